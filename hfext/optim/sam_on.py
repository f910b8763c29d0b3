"""SAM-ON: SAM that perturbs the normalisation layers only, under 0.1 % of the weights of most networks.

    e = rho * g_N / (||g_N|| + eps) on the parameters N of normalisation layers, 0 elsewhere

With `mode="elementwise"` or `"layerwise"` the ball is ASAM's. Every parameter still gets its second gradient.

Normalization Layers Are All That Sharpness-Aware Minimization Needs, arXiv 2306.04226.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..registry import Method, Result
from ._ascent import AscentConfig, AscentOptimizer, check
from .asam import asam_direction
from .sam import sam_direction

logger = logging.get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class SAMONConfig(AscentConfig):
    """Options of [`SAMON`], besides those of [`AscentConfig`].

    Args:
        rho: Radius, >= 0.
        only: `norm` perturbs normalisation layers, `no_norm` all the rest, `all` everything (which is SAM).
        mode: `plain` ball, or ASAM's `elementwise` or `layerwise` one.
        eta: Added to |w| in ASAM's ball, >= 0.
        freeze_others: Leave out the weight gradients of the other parameters in the first pass, which saves time.
            Not with torch.compile or several processes.
    """

    rho: float = 0.5
    only: Literal["norm", "no_norm", "all"] = "norm"
    mode: Literal["plain", "elementwise", "layerwise"] = "plain"
    eta: float = 0.0
    freeze_others: bool = False

    def __post_init__(self):
        super().__post_init__()
        check(self, "only", self.only in ("norm", "no_norm", "all"), "one of norm, no_norm, all")
        check(self, "mode", self.mode in ("plain", "elementwise", "layerwise"), "one of plain, elementwise, layerwise")
        check(self, "eta", self.eta >= 0, ">= 0")
        if self.freeze_others and self.scope == "micro":
            raise ValueError("SAMONConfig: freeze_others needs scope='update'.")


def norm_parameters(model: nn.Module) -> list[str]:
    """Names of the parameters of normalisation layers: by kind of module, or by name where none is of the kind."""
    kinds = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase, nn.LocalResponseNorm)
    names = [
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if isinstance(module, kinds) or any(kind in type(module).__name__ for kind in ("RMSNorm", "LayerNorm"))
        for name, _ in module.named_parameters(recurse=False)
    ]
    return names or [n for n, _ in model.named_parameters() if any(k in n.lower() for k in ("norm", ".bn", "ln_"))]


class SAMON(AscentOptimizer):
    """SAM on normalisation layers.

    Args:
        base_optimizer (`torch.optim.Optimizer`): Makes the step.
        model (`torch.nn.Module`): Tells which parameters belong to normalisation layers.
        **options: Fields of [`SAMONConfig`].
    """

    Config = SAMONConfig

    def __init__(self, base_optimizer, model=None, **options):
        super().__init__(base_optimizer, model, **options)
        if model is None:
            raise ValueError("SAMON needs model=: the normalisation layers are found by kind of module.")
        self._frozen: list[Tensor] = []
        chosen = self._chosen()
        trained = [p for group in self.param_groups for p in group["params"] if id(p) in chosen]
        if not trained:
            raise ValueError(
                f"SAMON: none of the trained parameters matches only={self.config.only!r}. With frozen or absent "
                "normalisation layers use optim='sam', or train the norms (peft: modules_to_save)."
            )
        logger.info(f"SAM-ON perturbs {len(trained)} tensors, {sum(p.numel() for p in trained):,} parameters.")

    def _chosen(self) -> set[int]:
        norms = set(norm_parameters(self.model))
        keep = {"norm": lambda n: n in norms, "no_norm": lambda n: n not in norms, "all": lambda n: True}
        return {id(p) for name, p in self.model.named_parameters() if keep[self.config.only](name)}

    def begin(self, max_updates=None, position=None) -> bool:
        active = super().begin(max_updates, position)
        if active and self.config.freeze_others:
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                raise ValueError("SAMON: freeze_others does not work with several processes; leave it out.")
            chosen = self._chosen()
            every = [p for group in self.param_groups for p in group["params"]]
            self._frozen = [p for p in every if p.requires_grad and id(p) not in chosen]
            for p in self._frozen:
                p.requires_grad_(False)
        return active

    def _thaw(self) -> None:
        for p in self._frozen:
            p.requires_grad_(True)
        self._frozen = []

    def abort(self) -> None:
        self._thaw()
        super().abort()

    def selected(self) -> tuple[list[Tensor], list[Tensor]]:
        self._thaw()
        chosen = self._chosen()
        pairs = [(p, g) for p, g in zip(*self.with_grad(), strict=True) if id(p) in chosen]
        if not pairs:
            raise RuntimeError("SAMON: no normalisation layer received a gradient. Use optim='sam'.")
        return [p for p, _ in pairs], [g for _, g in pairs]

    def direction(self, params: list[Tensor], grads: list[Tensor]) -> Tensor:
        c = self.config
        if c.mode == "plain":
            return sam_direction(grads)
        return asam_direction(params, grads, [True] * len(params), c.eta, c.mode)


METHOD = Method(
    name="sam_on",
    family="optim",
    title="Normalization Layers Are All That Sharpness-Aware Minimization Needs",
    authors="Mueller et al.",
    arxiv="2306.04226",
    year=2023,
    repo="mueller-mp/SAM-ON",
    status="faithful",
    target="hfext.optim.sam_on:SAMON",
    config=SAMONConfig,
    usage='TrainingArguments(optim="sam_on", optim_args="rho=0.5,base=sgd")',
    summary="SAM that perturbs the normalisation layers only.",
    claim="Perturbing the normalisation parameters alone generalises at least as well as perturbing all of them.",
    headline=Result(
        metric="perturbed parameters", setting="CIFAR, ResNets and ViTs; accuracy at least SAM's", value="< 0.1 %"
    ),
    recipe="optim/sam_on-mlp-digits.yaml",
)
