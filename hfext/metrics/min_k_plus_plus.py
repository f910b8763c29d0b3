"""Min-K %++: each token's log-probability against the others that could have stood there.

    z_t   = (log p(x_t) - mu_t) / sigma_t,   mu_t = sum_v p_v log p_v,   sigma_t^2 = sum_v p_v (log p_v)^2 - mu_t^2
    score = -(1/m) sum of the m lowest z_t,   m = max(1, int(k n)) of n tokens

A trained text lies at the modes of the model's distribution, where z is large. sigma^2 is at least 1e-6, so that a
flat or a certain distribution divides by no 0. Higher means less of a member. In float64.

Min-K%++: Improved Baseline for Detecting Pre-Training Data from Large Language Models, arXiv 2404.02936.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._fields import in_range
from ..registry import Method, Result
from ._form import Form
from ._membership import Ragged, extreme_mean, separation, tokens_of
from ._token_scores import TokenScores


def standardised(log_p: Tensor, mean: Tensor, std: Tensor, floor: float = 1e-6) -> Tensor:
    """z [...] of log-probabilities with the moments of their positions; `floor` is the least variance."""
    return (log_p - mean) / std.square().clamp(min=floor).sqrt()


def min_k_plus_plus(scores: TokenScores, k: float = 0.2) -> Tensor:
    """The score of each row.

    Args:
        scores (`TokenScores`): Of `score_rows(model, rows)`; its `log_p`, `mean` and `std` are used.
        k (`float`, *optional*, defaults to 0.2): Share of the tokens, in (0, 1].

    Returns:
        `torch.Tensor` of shape `[rows]`, float64.
    """
    return _score(scores.log_p, scores.mean, scores.std, k)


def _score(log_p: Ragged, mean: Ragged, std: Ragged, k: float) -> Tensor:
    in_range("k", k, 0, 1, low_open=True)
    columns = tokens_of(log_p), tokens_of(mean, "mean"), tokens_of(std, "std")
    if len({tuple(map(len, column)) for column in columns}) != 1:
        raise ValueError("log_p, mean and std must have the same rows of the same lengths.")
    return torch.stack([-extreme_mean(standardised(*row), k, largest=False) for row in zip(*columns, strict=True)])


def compute(
    predictions: Ragged,
    mean: Ragged,
    std: Ragged,
    members: Sequence[int] | None = None,
    k: float = 0.2,
    fpr: float = 0.05,
) -> dict[str, Any]:
    """`{"min_k_plus_plus": mean, "scores": one a row}`, and `auc` and `tpr_at_fpr` with `members` (1 or 0 a row)."""
    scores = _score(predictions, mean, std, k)
    return {"min_k_plus_plus": scores.mean().item(), "scores": scores.tolist(), **separation(scores, members, fpr)}


FORMS = {
    "min_k_plus_plus": Form(
        compute,
        {"predictions": ["float64"], "mean": ["float64"], "std": ["float64"]},
        "predictions, mean, std: log-probability of each token, and mean and deviation over the vocabulary there.",
    )
}

METHOD = Method(
    name="min_k_plus_plus",
    family="metrics",
    title="Min-K%++: Improved Baseline for Detecting Pre-Training Data from Large Language Models",
    authors="Zhang et al.",
    arxiv="2404.02936",
    year=2024,
    repo="zjysteven/mink-plus-plus",
    status="faithful",
    target="hfext.metrics.min_k_plus_plus:min_k_plus_plus",
    usage="hfext.metrics.min_k_plus_plus.min_k_plus_plus(hfext.metrics.score_rows(model, rows), k=0.2)",
    summary="Membership score: Min-K % of log-probabilities standardised over the vocabulary.",
    claim="Standardised log-probabilities separate members from others better than Min-K %.",
    headline=Result(
        metric="AUROC",
        setting="WikiMIA, mean over models",
        value="6.2 to 10.5 points above the runner-up (abstract)",
    ),
    notes="Higher scores mean less of a member. Measured beside Min-K % by the recipe of `min_k`.",
)
