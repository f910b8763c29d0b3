"""ASAM: SAM with a ball that scales with the weights, so that re-scaling a network does not change its sharpness.

    T = diag(|w| + eta) for weights, 1 for other parameters;  e = rho * T^2 g / (||T g|| + eps)

`mode="layerwise"` takes ||w_p|| + eta as one number per tensor; `p="inf"` gives e = rho * T sign(g).

ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning of Deep Neural Networks, arXiv 2102.11600.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..registry import Method, Result
from ._ascent import AscentConfig, AscentOptimizer, check
from ._wrapper import total_norm


@dataclass(frozen=True, kw_only=True)
class ASAMConfig(AscentConfig):
    """Options of [`ASAM`], besides those of [`AscentConfig`].

    Args:
        rho: Radius in the scaled norm, >= 0.
        eta: Added to |w|, >= 0.
        mode: `elementwise` or `layerwise` scaling.
        p: Norm of the ball, 2 or `inf`.
        normalize_bias: Scale biases too, not only what is called `weight`.
    """

    rho: float = 0.5
    eps: float = 1e-16
    eta: float = 0.01
    mode: Literal["elementwise", "layerwise"] = "elementwise"
    p: Literal[2, "inf"] = 2
    normalize_bias: bool = False

    def __post_init__(self):
        super().__post_init__()
        check(self, "eta", self.eta >= 0, ">= 0")
        check(self, "mode", self.mode in ("elementwise", "layerwise"), "one of elementwise, layerwise")
        check(self, "p", self.p in (2, "inf"), "one of 2, inf")


def asam_direction(
    params: list[Tensor],
    grads: list[Tensor],
    scaled: list[bool],
    eta: float,
    mode: str = "elementwise",
    p: int | str = 2,
) -> Tensor:
    """Turn `grads` in place into T^2 g (p=2) or T sign(g) (inf); returns ||T g|| or 1. `scaled`: where T is not 1."""
    size = [None] * len(params)
    for i, (w, use) in enumerate(zip(params, scaled, strict=True)):
        if use:
            size[i] = (
                w.detach().abs().add_(eta) if mode == "elementwise" else torch.linalg.vector_norm(w.detach()) + eta
            )
    if p == "inf":
        for g, t in zip(grads, size, strict=True):
            g.sign_() if t is None else g.sign_().mul_(t)
        return torch.ones((), dtype=torch.float64)
    for g, t in zip(grads, size, strict=True):
        if t is not None:
            g.mul_(t)
    norm = total_norm(grads)
    for g, t in zip(grads, size, strict=True):
        if t is not None:
            g.mul_(t)
    return norm


class ASAM(AscentOptimizer):
    """Adaptive SAM.

    Args:
        base_optimizer (`torch.optim.Optimizer`): Makes the step.
        **options: Fields of [`ASAMConfig`].
    """

    Config = ASAMConfig

    def direction(self, params: list[Tensor], grads: list[Tensor]) -> Tensor:
        c = self.config
        scaled = [True] * len(params) if c.normalize_bias else self.weights_among(params)
        return asam_direction(params, grads, scaled, c.eta, c.mode, c.p)


METHOD = Method(
    name="asam",
    family="optim",
    title="ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning of Deep Neural Networks",
    authors="Kwon et al.",
    arxiv="2102.11600",
    year=2021,
    repo="SamsungLabs/ASAM",
    status="faithful",
    target="hfext.optim.asam:ASAM",
    config=ASAMConfig,
    usage='TrainingArguments(optim="asam", optim_args="rho=0.5,eta=0.01")',
    summary="SAM whose ball scales with the weights, so that re-scaling the layers of a network changes nothing.",
    claim="ASAM generalises better than its base optimizer and at least as well as SAM.",
    headline=Result(
        metric="test accuracy, %",
        setting="CIFAR-10 and CIFAR-100, ResNets and WRNs",
        value="above SAM's in the paper's tables (figures not re-checked)",
    ),
    recipe="optim/asam-mlp-digits.yaml",
)
