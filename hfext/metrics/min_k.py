"""Min-K %: a text that was trained on has few tokens that surprise the model.

    score = -(1/m) sum of the m lowest log p(x_t | x_<t),   m = max(1, int(k n)) of n tokens;   k = 1 is the loss

Higher means less of a member. In float64.

Detecting Pretraining Data from Large Language Models, arXiv 2310.16789.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._fields import in_range
from ..registry import Method, Result
from ._form import Form
from ._membership import Ragged, extreme_mean, separation, tokens_of


def min_k(log_probs: Ragged, k: float = 0.2) -> Tensor:
    """The score of each row.

    Args:
        log_probs (list of 1-D tensors or lists): Log-probability of each scored token; `score_rows(...).log_p`.
        k (`float`, *optional*, defaults to 0.2): Share of the tokens, in (0, 1]; 0.4 in MUSE.

    Returns:
        `torch.Tensor` of shape `[rows]`, float64. A row of few tokens gives its one lowest.
    """
    in_range("k", k, 0, 1, low_open=True)
    return torch.stack([-extreme_mean(row, k, largest=False) for row in tokens_of(log_probs)])


def compute(
    predictions: Ragged, members: Sequence[int] | None = None, k: float = 0.2, fpr: float = 0.05
) -> dict[str, Any]:
    """`{"min_k": mean, "scores": one a row}`, and `auc` and `tpr_at_fpr` when `members` says 1 or 0 for each row."""
    scores = min_k(predictions, k)
    return {"min_k": scores.mean().item(), "scores": scores.tolist(), **separation(scores, members, fpr)}


FORMS = {
    "min_k": Form(compute, {"predictions": ["float64"]}, "predictions: log-probabilities of the tokens of each row.")
}

METHOD = Method(
    name="min_k",
    family="metrics",
    title="Detecting Pretraining Data from Large Language Models",
    authors="Shi et al.",
    arxiv="2310.16789",
    year=2023,
    repo="swj0419/detect-pretrain-code",
    status="faithful",
    target="hfext.metrics.min_k:min_k",
    usage="hfext.metrics.min_k.min_k(hfext.metrics.score_rows(model, rows).log_p, k=0.2)",
    summary="Membership score: the mean negative log-probability of a text's least likely tokens.",
    claim="The least likely tokens of a text separate members from others better than its whole loss.",
    headline=Result(
        metric="AUC",
        setting="WikiMIA, mean of five models and two lengths; 7.4 % above the best rival in the abstract",
        value="0.72",
        baseline="0.67 (loss)",
    ),
    recipe="metrics/min_k-llama-shakespeare.yaml",
    notes="Higher scores mean less of a member. The figures of the headline were not re-read in the paper's text.",
)
