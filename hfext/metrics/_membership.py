"""Was a text trained on? Scores of rows, and how well a score tells members from others.

A higher score means less of a member, for all scores. They take one 1-D tensor of log-probabilities for each row, as
in `TokenScores.log_p`, and return float64 [rows].

    loss = -mean log p,   zlib = loss / len(zlib.compress(text)),   reference = loss - loss of another model
"""

import zlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

Ragged = Sequence[Tensor | Sequence[float] | np.ndarray]


def tokens_of(rows: Ragged, name: str = "log_probs") -> list[Tensor]:
    """Each row in float64; `ValueError` for no rows, an empty row, or NaN."""
    found = [torch.as_tensor(row).detach().to("cpu", torch.float64) for row in rows]
    if not found:
        raise ValueError(f"{name} has no rows.")
    for i, row in enumerate(found):
        if row.ndim != 1 or not len(row):
            raise ValueError(f"{name}[{i}] has the shape {list(row.shape)} but must be [tokens >= 1].")
        if row.isnan().any():
            raise ValueError(f"{name}[{i}] holds NaN.")
    return found


def extreme_mean(values: Tensor, k: float, largest: bool) -> Tensor:
    """Mean of the max(1, int(k n)) largest or smallest of n values."""
    return values.topk(max(1, int(k * len(values))), largest=largest).values.mean()


def loss(log_probs: Ragged) -> Tensor:
    """Mean negative log-likelihood of each row."""
    return torch.stack([-row.mean() for row in tokens_of(log_probs)])


def zlib_score(log_probs: Ragged, texts: Sequence[str]) -> Tensor:
    """The loss over the bytes that zlib needs for the text."""
    losses = loss(log_probs)
    if len(texts) != len(losses):
        raise ValueError(f"{len(texts)} texts for {len(losses)} rows of log_probs.")
    return losses / torch.tensor([len(zlib.compress(text.encode())) for text in texts], dtype=torch.float64)


def reference_score(log_probs: Ragged, reference: Ragged) -> Tensor:
    """The loss minus that of a model that did not see the members."""
    losses, others = loss(log_probs), loss(reference)
    if len(losses) != len(others):
        raise ValueError(f"{len(others)} rows of the reference for {len(losses)} rows of log_probs.")
    return losses - others


def _both(members: Tensor | Sequence[float], others: Tensor | Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    found = []
    for name, scores in (("members", members), ("others", others)):
        x = np.asarray(torch.as_tensor(scores).detach().cpu(), dtype=np.float64).reshape(-1)
        if not len(x) or np.isnan(x).any():
            raise ValueError(f"{name} has {len(x)} scores but must have >= 1, none of them NaN.")
        found.append(x)
    return found[0], found[1]


def auc(members: Tensor | Sequence[float], others: Tensor | Sequence[float]) -> float:
    """P(score of another > score of a member), ties count half: 1 separates them, 0.5 is chance (Mann-Whitney)."""
    a, b = _both(members, others)
    a = np.sort(a)
    below, at_most = np.searchsorted(a, b, "left"), np.searchsorted(a, b, "right")
    return float((below + at_most).sum() / (2 * len(a) * len(b)))


def tpr_at_fpr(members: Tensor | Sequence[float], others: Tensor | Sequence[float], fpr: float = 0.05) -> float:
    """Largest share of members below a threshold that has at most the share `fpr` of the others below it."""
    if not 0 <= fpr <= 1:
        raise ValueError(f"fpr is {fpr} but must be in [0, 1].")
    a, b = _both(members, others)
    # At most `allowed` of the others may lie at or below the threshold: it lies just below the next one.
    allowed = int(np.floor(fpr * len(b) + 1e-9))
    if allowed >= len(b):
        return 1.0
    return float((a < np.sort(b)[allowed]).mean())


def separation(scores: Tensor, members: Sequence[int] | None, fpr: float = 0.05) -> dict[str, float]:
    """`auc` and `tpr_at_fpr` of scores [rows], from 1 or 0 for each row; nothing without them."""
    if members is None:
        return {}
    is_member = torch.as_tensor(members).cpu()
    if is_member.shape != scores.shape or not ((is_member == 0) | (is_member == 1)).all():
        raise ValueError(f"members has the shape {list(is_member.shape)} but must hold {len(scores)} values 0 or 1.")
    found, others = scores[is_member == 1], scores[is_member == 0]
    return {"auc": auc(found, others), "tpr_at_fpr": tpr_at_fpr(found, others, fpr)}
