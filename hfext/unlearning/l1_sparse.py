"""l1-sparse: fine-tuning on the retain rows with a penalty that fades, which lets go of what the forget rows need.

    loss = mean nll of retain tokens + gamma_t ||theta||_1
    gamma_t = gamma (1 - t / (E - E0)) in epoch t < E - E0, else 0;  E epochs, E0 of them without penalty (if E0 = E,
    the penalty stays gamma)

The norm is a sum over all trained weights, so that gamma depends on the size of the model. Model Sparsity Can Simplify
Machine Unlearning, arXiv 2304.04934; gamma and schedule are those for image classifiers.
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from ..registry import Method
from ._objective import Objective, check, finite
from ._terms import UPDATE, Term, keeping


@dataclass(frozen=True, kw_only=True)
class L1SparseConfig:
    """Options of [`L1Sparse`].

    Args:
        gamma: Weight of the norm at the start, >= 0.
        no_l1_epochs: E0, epochs at the end without penalty, >= 0.
        exclude: Names of parameters that match this regular expression are not penalised, such as
            "embed|norm|lm_head"; the paper penalises all.
    """

    gamma: float = 5e-4
    no_l1_epochs: int = 0
    exclude: str | None = None

    def __post_init__(self):
        finite(self, "gamma", "no_l1_epochs")
        if self.exclude is not None:
            try:
                re.compile(self.exclude)
            except re.error as error:
                check(self, "exclude", False, f"a regular expression ({error})")


def weight_at(epoch: int, epochs: float, gamma: float, no_l1_epochs: int) -> float:
    """gamma_t."""
    span = epochs - no_l1_epochs
    if span == 0:
        return gamma
    return gamma * (1 - epoch / span) if epoch < span else 0.0


def l1_norm(tensors: list[Tensor]) -> Tensor:
    """Sum of the magnitudes of all entries, in float32; its gradient is the sign."""
    return torch.stack([x.float().abs().sum() for x in tensors]).sum()


class L1Sparse(Objective):
    """Sparsity-aware fine-tuning on what is kept: `UnlearningConfig(objective="l1_sparse")`."""

    Config = L1SparseConfig
    needs = ("retain",)

    def prepare(self, model, data):
        skip = self.config.exclude
        self.penalised = [
            p for name, p in model.named_parameters() if p.requires_grad and not (skip and re.search(skip, name))
        ]
        if not self.penalised:
            raise ValueError(f"L1SparseConfig: exclude is {skip!r}, which leaves no parameter to penalise.")

    def terms(self, now, reference):
        found = keeping(now, reference, "nll", 1.0)
        gamma = weight_at(int(self.epoch), self.epochs, self.config.gamma, self.config.no_l1_epochs)
        return {**found, "l1": Term(l1_norm(self.penalised), UPDATE, gamma)} if gamma else found


METHOD = Method(
    name="l1_sparse",
    family="unlearning",
    title="Model Sparsity Can Simplify Machine Unlearning",
    authors="Jia et al.",
    arxiv="2304.04934",
    year=2023,
    repo="OPTML-Group/Unlearn-Sparse",
    status="faithful",
    target="hfext.unlearning.l1_sparse:L1Sparse",
    config=L1SparseConfig,
    usage='UnlearningTrainer(model, UnlearningConfig("out", objective="l1_sparse"), retain_dataset=rows)',
    summary="Fine-tunes on the retain rows with an l1 penalty that fades out.",
    notes="Sees no forget row. Compared in recipes/unlearning/ngdiff-llama-tofu.yaml.",
)
