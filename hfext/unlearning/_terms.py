"""What a model says about the scored tokens of a batch, and the terms of which a loss is the sum.

A term is a sum over items with the name of what it is divided by: "forget tokens", "retain rows", .... The Trainer
divides by the count of the whole update, over micro-batches and processes, so that the split of a batch changes
nothing; the mean of means of the usual loop differs from it by a quarter on ragged rows.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

UPDATE = "updates"  # divides what is counted once an update, such as a penalty on weights
RowLoss = Callable[[Tensor, Tensor], Tensor]


def negative_log_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    """-log p(label) [tokens] in float32 or wider, from logits [tokens, vocab]."""
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, reduction="none")


@dataclass
class Scored:
    """Logits [rows, T, vocab] and the labels that they predict [rows, T], -100 where nothing is scored.

    `of_tokens` stands for the negative log-likelihood and is replaced where another loss of a token is wanted.
    """

    logits: Tensor
    labels: Tensor
    of_tokens: RowLoss = field(default=negative_log_likelihood, repr=False)

    @classmethod
    def shifted(cls, logits: Tensor, labels: Tensor, of_tokens: RowLoss = negative_log_likelihood) -> "Scored":
        """From a causal model's logits and the labels of its input ids, both [rows, T, ...]."""
        return cls(logits[:, :-1], labels[:, 1:].to(logits.device), of_tokens)

    @cached_property
    def mask(self) -> Tensor:
        """Which positions are scored [rows, T]."""
        return self.labels != -100

    @cached_property
    def lengths(self) -> Tensor:
        """Scored tokens of each row [rows], at least 1."""
        return self.mask.sum(1).clamp(min=1)

    @cached_property
    def token_nll(self) -> Tensor:
        """-log p of each label [rows, T], 0 where nothing is scored."""
        # Only the scored positions are copied and widened: they are a small part of [rows, T, vocab].
        of_scored = self.of_tokens(self.logits[self.mask], self.labels[self.mask])
        zeros = of_scored.new_zeros(self.labels.shape)
        return zeros.masked_scatter(self.mask, of_scored)

    @cached_property
    def nll(self) -> Tensor:
        """-log p of each whole answer [rows]."""
        return self.token_nll.sum(1)

    @cached_property
    def mean_nll(self) -> Tensor:
        """-log p of each answer over its length [rows]."""
        return self.nll / self.lengths

    @cached_property
    def log_probs(self) -> Tensor:
        """log p of the whole vocabulary at the scored positions [scored, vocab], float32 or wider."""
        kept = self.logits[self.mask]
        return F.log_softmax(kept.to(torch.promote_types(kept.dtype, torch.float32)), dim=-1)


@dataclass
class Term:
    """A part of a loss: `weight * total / (count of per)`."""

    total: Tensor
    per: str
    weight: float = 1.0


def tokens(part: str, values: Tensor, weight: float = 1.0) -> Term:
    """Mean over the scored tokens of a part; `values` [...] are 0 elsewhere."""
    return Term(values.sum(), f"{part} tokens", weight)


def rows(part: str, values: Tensor, weight: float = 1.0) -> Term:
    """Mean over the rows of a part; `values` [rows]."""
    return Term(values.sum(), f"{part} rows", weight)


def kl_rows(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) [...] from log-probabilities [..., vocab]."""
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


Keep = Literal["nll", "kl", "none"]


def keeping(now: dict[str, Scored], reference: dict[str, Any], kind: Keep, weight: float) -> dict[str, Term]:
    """What holds a model on the retain rows: their likelihood, or KL(reference || model) at their scored tokens."""
    if kind == "none" or weight == 0:
        return {}
    retain = now["retain"]
    if kind == "kl":
        return {"retain": tokens("retain", kl_rows(reference["retain"].log_probs, retain.log_probs), weight)}
    return {"retain": tokens("retain", retain.token_nll, weight)}


def counts_of(part: str, labels: Tensor) -> dict[str, Tensor]:
    """Scored tokens, and rows, of a part with labels [rows, T] as a causal model is given them."""
    return {f"{part} tokens": (labels[:, 1:] != -100).sum(), f"{part} rows": torch.tensor(len(labels))}
