"""Prune, then unlearn: the smallest weights are set to zero and stay there through any training that follows.

    the fraction `sparsity` of all entries of the pruned weights with the least magnitude, over all of them together,
    is zero; their gradients are zero before each step, and they are set to zero again after it, whatever momentum and
    weight decay did

Model Sparsity Can Simplify Machine Unlearning, arXiv 2304.04934: one-shot magnitude pruning at 95 %. The paper rewinds
to an early epoch and trains again under the mask before it unlearns: use the callback in that training too.
"""

import re

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from .._fields import in_range
from ..registry import Method


def smallest(weights: list[Tensor], sparsity: float) -> list[Tensor]:
    """Masks, true where an entry stays; exactly int(sparsity * entries) are false, of equal magnitudes the first."""
    magnitudes = torch.cat([w.detach().abs().flatten().float() for w in weights])
    mask = torch.ones_like(magnitudes, dtype=torch.bool)
    mask[magnitudes.argsort(stable=True)[: int(sparsity * len(magnitudes))]] = False
    return [m.view_as(w) for m, w in zip(mask.split([w.numel() for w in weights]), weights, strict=True)]


class PrunedWeights(TrainerCallback):
    """Keeps zeros where they are in any Trainer: `Trainer(..., callbacks=[pruned])`.

    Attributes:
        masks (`dict[str, Tensor]`): By parameter name, true where an entry stays.
    """

    def __init__(self, model: nn.Module, masks: dict[str, Tensor]):
        self.masks = masks
        own = dict(model.named_parameters())
        self.pairs = [(own[name], mask) for name, mask in masks.items()]
        self.apply()

    @torch.no_grad()
    def apply(self) -> None:
        """Set the pruned weights to zero."""
        for p, mask in self.pairs:
            p.mul_(mask.to(p))

    def on_train_begin(self, args, state, control, **kwargs):
        self.apply()  # also after a checkpoint was loaded

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        for p, mask in self.pairs:
            if p.grad is not None:
                p.grad.mul_(mask.to(p.grad))

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.apply()


def prune_then_unlearn(
    model: nn.Module, sparsity: float = 0.95, include: str | None = None, exclude: str = r"embed|lm_head|norm"
) -> PrunedWeights:
    """Prune a model in place and return the callback that keeps it pruned.

    Args:
        model (`nn.Module`): Changed in place.
        sparsity (`float`, *optional*, defaults to 0.95): Share of the entries that become zero, in [0, 1).
        include (`str`, *optional*): Regular expression of the parameters to prune; by default all with two dimensions
            or more.
        exclude (`str`, *optional*): Regular expression of parameters to leave alone.

    Returns:
        [`PrunedWeights`]

    Raises:
        ValueError: `sparsity` out of range, or no parameter left to prune.
    """
    in_range("sparsity", sparsity, 0, 1)
    if sparsity == 1:
        raise ValueError("sparsity is 1 but must be in [0, 1): nothing would be left.")
    chosen = {
        name: p
        for name, p in model.named_parameters()
        if p.is_floating_point()
        and (re.search(include, name) if include else p.dim() > 1)
        and not (exclude and re.search(exclude, name))
    }
    if not chosen:
        raise ValueError(f"include={include!r} and exclude={exclude!r} leave no parameter to prune.")
    masks = smallest(list(chosen.values()), sparsity)
    return PrunedWeights(model, dict(zip(chosen, masks, strict=True)))


METHOD = Method(
    name="prune_then_unlearn",
    family="unlearning",
    title="Model Sparsity Can Simplify Machine Unlearning",
    authors="Jia et al.",
    arxiv="2304.04934",
    year=2023,
    repo="OPTML-Group/Unlearn-Sparse",
    status="variant",
    difference="One-shot pruning and a mask that any Trainer keeps; rewinding and retraining are the user's own runs.",
    target="hfext.unlearning.prune_then_unlearn:prune_then_unlearn",
    usage="UnlearningTrainer(model, args, f, r, callbacks=[prune_then_unlearn(model, sparsity=0.95)])",
    summary="Prunes a model and keeps it pruned through the unlearning that follows.",
    notes="Embeddings, norms and the head are left alone by default, which the paper's image models do not have.",
)
