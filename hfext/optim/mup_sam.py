"""muP^2: SAM that perturbs every layer at any width, so that (lr, rho) found on a narrow model hold on a wide one.

With one global norm, the last layer of a wide network takes the whole radius. A weight W = a V with width ratios r_in,
r_out should move by a spectral norm ~ sqrt(r_out / r_in), which for the stored V and its gradient g means

    m = r_out / (r_in a^2);   n = sqrt(sum_k m_k ||g_k||^2);   e_l = rho * m_l g_l / n

the steepest ascent in the ball sum_l ||e_l||^2 / m_l <= rho^2. At the base width this is SAM, bit for bit. The model
needs base shapes: `hfext.optim.mup.apply(model, base_config)`.

muP^2: Effective Sharpness Aware Minimization Requires Layerwise Perturbation Scaling, arXiv 2411.00075. The
factors are derived from the paper's condition on the spectral norm. The norm of the scaled gradients ||(m_k g_k)_k||
(`denominator="literal"`, with rho * sqrt(r)) has the same order but lets the input layer set it.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..compat import decayed_parameters
from ..registry import Method, Result
from ._ascent import AscentConfig, AscentOptimizer, check
from ._wrapper import total_norm
from .mup import InfShape, infshapes, param_groups, perturbation_factor


@dataclass(frozen=True, kw_only=True)
class MuPSAMConfig(AscentConfig):
    """Options of [`MuPSAM`], besides those of [`AscentConfig`].

    Args:
        rho: Radius at the base width, >= 0.
        denominator: `dual`: every layer has its share of the norm; `literal`: the norm of the scaled gradients.
        perturbation: `layerwise`; or `global`, plain SAM on the weights W, to compare with.
    """

    denominator: Literal["dual", "literal"] = "dual"
    perturbation: Literal["layerwise", "global"] = "layerwise"

    def __post_init__(self):
        super().__post_init__()
        check(self, "denominator", self.denominator in ("dual", "literal"), "one of dual, literal")
        check(self, "perturbation", self.perturbation in ("layerwise", "global"), "one of layerwise, global")


def layer_factors(
    shapes: list[InfShape], perturbation: str = "layerwise", denominator: str = "dual"
) -> tuple[list[float], list[float]]:
    """(u, v) per parameter, for d_l = u_l g_l and n = ||(v_l g_l)_l|| in stored gradients; all 1 at the base width."""
    m, a = [perturbation_factor(s) for s in shapes], [s.multiplier for s in shapes]
    if perturbation == "global":
        return [x**-2 for x in a], [1 / x for x in a]
    if denominator == "literal":
        width = max(max(s.fan_in, s.fan_out) for s in shapes)
        return [width**0.5 * x for x in m], [x * y for x, y in zip(m, a, strict=True)]
    return m, [x**0.5 for x in m]


def mup_direction(grads: list[Tensor], numerators: list[float], denominators: list[float]) -> Tensor:
    """Turn `grads` in place into u_l g_l; returns ||(v_l g_l)_l||, a scalar."""
    torch._foreach_mul_(grads, denominators)
    norm = total_norm(grads)
    torch._foreach_mul_(grads, [u / v for u, v in zip(numerators, denominators, strict=True)])
    return norm


class MuPSAM(AscentOptimizer):
    """muP^2. Raises `ValueError` at construction when a parameter has no base shape.

    Args:
        base_optimizer (`torch.optim.Optimizer`): Makes the step, with the groups of `mup.param_groups`; the Trainer
            makes these itself.
        model (`torch.nn.Module`, *optional*): Needed after a copy of the model, to find base shapes by name.
        **options: Fields of [`MuPSAMConfig`].
    """

    Config = MuPSAMConfig

    def __init__(self, base_optimizer: torch.optim.Optimizer, model: torch.nn.Module | None = None, **options: Any):
        super().__init__(base_optimizer, model, **options)
        infshapes((p for group in self.param_groups for p in group["params"]), model)

    @classmethod
    def trainer_kwargs(cls, context, base: str, config) -> dict[str, Any]:
        args, model = context.args, context.model
        if model is None:
            return {}
        if base.startswith(("galore", "apollo")):
            raise NotImplementedError(
                f"optim='mup_sam' makes parameter groups of its own, and so does base={base!r}. Use base=adamw."
            )
        decayed = decayed_parameters(model)
        return {
            "params": param_groups(
                model,
                "sgd" if "sgd" in base else "adam",
                lr=args.learning_rate,
                weight_decay=args.weight_decay,
                no_decay={name for name, _ in model.named_parameters()} - decayed,
            )
        }

    def direction(self, params: list[Tensor], grads: list[Tensor]) -> Tensor:
        c = self.config
        return mup_direction(grads, *layer_factors(infshapes(params, self.model), c.perturbation, c.denominator))


METHOD = Method(
    name="mup_sam",
    family="optim",
    title="μP²: Effective Sharpness Aware Minimization Requires Layerwise Perturbation Scaling",
    authors="Haas et al.",
    arxiv="2411.00075",
    year=2024,
    status="variant",
    difference="The authors' code was not found: the layer factors are derived from the paper's condition that the "
    "perturbation of a weight has spectral norm ~ sqrt(fan_out / fan_in), and checked by their slopes over width. "
    "Every layer counts alike in the norm; denominator=literal takes the norm of the scaled gradients.",
    target="hfext.optim.mup_sam:MuPSAM",
    config=MuPSAMConfig,
    usage='mup.apply(model, base_config); TrainingArguments(optim="mup_sam", optim_args="rho=0.05")',
    summary="SAM with a perturbation scaled layer by layer, so that every layer is perturbed at any width.",
    claim="Layerwise scaling perturbs every layer at any width; plain SAM only the last layer of a wide net.",
    headline=Result(
        metric="transfer of the joint optimum of (lr, rho) across width",
        setting="MLP, ResNet and ViT, as the abstract states it",
        value="transfers",
        baseline="muP with global perturbation: rho does not transfer",
    ),
    after_load="hfext.optim.mup.apply(model, rescale=False)",
    recipe="optim/mup_sam-perturbation-scaling.yaml",
    opt_out=(("PEFT", "muP scales the parameters of the model it was applied to, not those of an adapter"),),
)
