"""MaxRenyi-K %: where was the model unsure? A membership score that needs no target token.

    score = mean of the max(1, int(k n)) LARGEST Renyi entropies H_a of the next-token distributions of n positions
            k = 0: the largest one; k = 1: the mean.   MinRenyi: the smallest ones

As no token is looked at, it scores image positions of a vision-language model, which have no ids, as well as text, and
each segment of the sequence (image, instruction, description) by itself. The modified entropy has the label as its
target and is averaged over the tokens. Higher means less of a member. Formulas in `_token_scores`; in float64.

Membership Inference Attacks against Large Vision-Language Models, arXiv 2411.02902.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .._fields import in_range
from ..registry import Method, Result
from ._form import Form
from ._membership import Ragged, extreme_mean, separation, tokens_of
from ._token_scores import check_orders, log_softmax_pieces, renyi_entropy


def max_renyi(entropies: Ragged, k: float = 0.1) -> Tensor:
    """The score of each row.

    Args:
        entropies (list of 1-D tensors or lists): Of the positions of each row: `score_rows(..., renyi=[a]).renyi[a]`,
            or [`position_entropies`].
        k (`float`, *optional*, defaults to 0.1): Share of the positions, in [0, 1]; the paper has 0, 0.1 and 1.

    Returns:
        `torch.Tensor` of shape `[rows]`, float64.
    """
    in_range("k", k, 0, 1)
    return torch.stack([extreme_mean(row, k, largest=True) for row in tokens_of(entropies, "entropies")])


def min_renyi(entropies: Ragged, k: float = 0.1) -> Tensor:
    """As [`max_renyi`], of the smallest entropies."""
    in_range("k", k, 0, 1)
    return torch.stack([extreme_mean(row, k, largest=False) for row in tokens_of(entropies, "entropies")])


def modified_score(modified: Ragged) -> Tensor:
    """The mean modified entropy of each row, from `score_rows(..., modified=[a]).modified[a]`."""
    return torch.stack([row.mean() for row in tokens_of(modified, "modified")])


@torch.no_grad()
def position_entropies(
    logits: Tensor, segments: Mapping[str, slice | Sequence[int]], order: float = 1, clamp: float = 1e-10
) -> dict[str, Tensor]:
    """Segment to the entropies of its positions, from the logits [T, V] of one sequence; no ids are needed.

    Args:
        logits (`torch.Tensor` of shape `[T, V]`): Of a model whose sequence may hold image positions.
        segments (`{name: slice or list of positions}`): As in `{"image": slice(5, 581), "text": slice(581, -1)}`.
        order (`float`, *optional*, defaults to 1): a > 0, `math.inf` too; the paper has 0.5, 1, 2 and infinity.
        clamp (`float`, *optional*, defaults to 1e-10): Of the probabilities.
    """
    check_orders([order], [], clamp)
    if logits.ndim != 2:
        raise ValueError(f"logits have the shape {list(logits.shape)} but must be [T, V], of one sequence.")
    found = {}
    for name, where in segments.items():
        part = logits[where if isinstance(where, slice) else list(where)]
        if not len(part):
            raise ValueError(f"The segment {name!r} is empty in a sequence of {len(logits)} positions.")
        found[name] = torch.cat([renyi_entropy(log_p, order, clamp) for _, log_p in log_softmax_pieces(part)]).cpu()
    return found


def compute(
    predictions: Ragged,
    members: Sequence[int] | None = None,
    k: float = 0.1,
    smallest: bool = False,
    fpr: float = 0.05,
) -> dict[str, Any]:
    """`{"renyi": mean, "scores": one a row}`, and `auc` and `tpr_at_fpr` when `members` says 1 or 0 for each row."""
    scores = (min_renyi if smallest else max_renyi)(predictions, k)
    return {"renyi": scores.mean().item(), "scores": scores.tolist(), **separation(scores, members, fpr)}


FORMS = {
    "renyi": Form(compute, {"predictions": ["float64"]}, "predictions: Renyi entropies of the positions of each row.")
}

METHOD = Method(
    name="renyi",
    family="metrics",
    title="Membership Inference Attacks against Large Vision-Language Models",
    authors="Li et al.",
    arxiv="2411.02902",
    year=2024,
    repo="LIONS-EPFL/VL-MIA",
    status="faithful",
    target="hfext.metrics.renyi:max_renyi",
    usage="hfext.metrics.renyi.max_renyi(hfext.metrics.score_rows(model, rows, renyi=[0.5]).renyi[0.5], k=0.1)",
    summary="Membership score without target tokens: the mean of the largest next-token Renyi entropies.",
    claim="MaxRenyi-K %, which looks at no target token, separates members from others above chance.",
    headline=Result(
        metric="AUC",
        setting="VL-MIA, text and image segments of vision-language models",
        value="above the target-free baselines (figures not re-checked)",
        baseline="0.5 (chance)",
    ),
    recipe="metrics/renyi-llama-shakespeare.yaml",
    notes="k=0 is the largest entropy, k=1 the mean. With a target, `modified_score`. Higher means less of a member.",
)
