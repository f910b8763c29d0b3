"""KLoM: are the margins of unlearned models distributed as those of models that never saw the data?

    margin(x) = log p_y - log sum_{v != y} p_v
    KLoM(x)   = KL(P_oracle || P_unlearned),   P: histograms of the margin at x over N models each

Margins are clipped to [-clip, clip]. The bins are the same for both and reach from the least to the largest margin
at x. Every bin has `smoothing` added before it is normalised, so that KLoM is about -log(smoothing) at most. 0 is
perfect; two halves of the oracles give the floor that so few models can reach. In float64.

Attribute-to-Delete: Machine Unlearning via Datamodel Matching, arXiv 2410.23232.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..registry import Method, Result
from ._form import Form


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """[...], float64, of logits [..., V] and labels [...]: log p_y - log(1 - p_y), without its cancellation."""
    logits = logits.detach().to(torch.float64)
    own = logits.gather(-1, labels[..., None])
    return own[..., 0] - logits.scatter(-1, labels[..., None], -torch.inf).logsumexp(-1)


def _margins(name: str, values: Any) -> np.ndarray:
    found = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values, dtype=np.float64)
    if found.ndim != 2 or 0 in found.shape or np.isnan(found).any():
        raise ValueError(
            f"{name} has the shape {list(found.shape)} but must be [models >= 1, points >= 1], without NaN."
        )
    return found


def klom(
    unlearned: Tensor | np.ndarray | Sequence[Sequence[float]],
    oracle: Tensor | np.ndarray | Sequence[Sequence[float]],
    bins: int = 20,
    clip: float = 100.0,
    smoothing: float = 1e-5,
) -> np.ndarray:
    """[points]: KL from the oracles' histogram of margins to the unlearned models'.

    Args:
        unlearned (`[models, points]`): Margins of models that were trained and unlearned independently.
        oracle (`[models, points]`): Margins of models retrained without the forget set; another number is allowed.
        bins (`int`, *optional*, defaults to 20): >= 1.
        clip (`float`, *optional*, defaults to 100): Largest absolute margin, > 0.
        smoothing (`float`, *optional*, defaults to 1e-5): Added to each bin's share, > 0.
    """
    for name, value, least in (("bins", bins, 1), ("clip", clip, 0), ("smoothing", smoothing, 0)):
        if not (value >= least if least else value > 0) or not math.isfinite(value):
            raise ValueError(f"{name} is {value} but must be {'>= 1' if least else '> 0'}.")
    ours, theirs = (np.clip(_margins(n, x), -clip, clip) for n, x in (("unlearned", unlearned), ("oracle", oracle)))
    if ours.shape[1] != theirs.shape[1]:
        raise ValueError(f"unlearned has {ours.shape[1]} points and oracle {theirs.shape[1]}: they must be the same.")
    low = np.minimum(ours.min(0), theirs.min(0))
    width = np.maximum(ours.max(0), theirs.max(0)) - low
    p, q = (_shares(x, low, width, bins, smoothing) for x in (theirs, ours))
    return (p * np.log(p / q)).sum(1)


def _shares(x: np.ndarray, low: np.ndarray, width: np.ndarray, bins: int, smoothing: float) -> np.ndarray:
    """[points, bins]."""
    place = np.minimum((bins * (x - low) / np.where(width > 0, width, 1)).astype(int), bins - 1)
    share = (place[:, :, None] == np.arange(bins)).mean(0) + smoothing
    return share / share.sum(1, keepdims=True)


def summary(
    unlearned: Any, oracle: Any, sets: Mapping[str, Sequence[int]] | None = None, **options: Any
) -> dict[str, Any]:
    """Mean, median and 95 % quantile of KLoM over each set of points, as `{"forget": indices, "retain": ...}`."""
    values = klom(unlearned, oracle, **options)
    found = {}
    for name, where in ({"all": range(len(values))} if sets is None else sets).items():
        part = values[np.asarray(list(where), dtype=int)]
        if not len(part):
            raise ValueError(f"The set {name!r} has no points.")
        found[name] = {
            "mean": float(part.mean()),
            "median": float(np.median(part)),
            "q95": float(np.quantile(part, 0.95)),
        }
    return found


def compute(
    predictions: Sequence[Sequence[float]], references: Sequence[Sequence[float]], **options: Any
) -> dict[str, Any]:
    """`{"klom": mean, "scores": one a point}`; a row holds the margins of all models at one point."""
    scores = klom(_points("predictions", predictions), _points("references", references), **options)
    return {"klom": float(scores.mean()), "scores": scores.tolist()}


def _points(name: str, rows: Sequence[Sequence[float]]) -> np.ndarray:
    if len({len(row) for row in rows}) != 1:
        raise ValueError(f"{name} must have the margins of the same models at every point.")
    return np.asarray(rows, dtype=np.float64).T


FORMS = {
    "klom": Form(
        compute,
        {"predictions": ["float64"], "references": ["float64"]},
        "predictions: margins of the unlearned models at each point; references: of the retrained ones.",
    )
}

METHOD = Method(
    name="klom",
    family="metrics",
    title="Attribute-to-Delete: Machine Unlearning via Datamodel Matching",
    authors="Georgiev et al.",
    arxiv="2410.23232",
    year=2024,
    status="abstract-only",
    difference="Bins, clipping and smoothing are ours; the direction KL(oracle || unlearned) is the paper's.",
    target="hfext.metrics.klom:klom",
    usage="hfext.metrics.klom.klom(unlearned_margins, oracle_margins)",
    summary="KL between the margins of many unlearned and many retrained models, point by point.",
    claim="Models retrained without the data have a KLoM near the floor, untouched ones far above it.",
    headline=Result(
        metric="KLoM", setting="CIFAR-10 and ImageNet subsets", value="near the retrained models' (datamodel matching)"
    ),
    notes="Needs some tens of models of each kind. For language models the margin is that of a token; average over a "
    "row's tokens, or give every token as a point. No recipe: it measures the objective `dmm`.",
)
