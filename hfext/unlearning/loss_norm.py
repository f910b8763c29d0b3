"""Loss-normalised difference: each gradient over its own loss, g = g_R / L_R - g_F / L_F.

It is the gradient of log L_R - log L_F: multiplying either loss by a number changes nothing, but the lengths of the
two parts are not those of a unit. The ablation of "Unlearning as multi-task optimization: a normalized gradient
difference approach with an adaptive learning rate", arXiv 2410.22086. Losses are those of the whole update.
"""

from dataclasses import dataclass

from ..optim._wrapper import total_norm
from ..registry import Method
from ._auto_lr import AutoLRConfig
from ._objective import TwoGradientObjective, check
from .ngdiff import inner


@dataclass(frozen=True, kw_only=True)
class LossNormConfig(AutoLRConfig):
    """Options of [`LossNorm`], beside those of [`AutoLRConfig`].

    Args:
        auto_lr: Off, so that the ablation is of the direction alone.
        eps: Added to both losses, > 0.
    """

    auto_lr: bool = False
    eps: float = 1e-12

    def __post_init__(self):
        super().__post_init__()
        check(self, "eps", self.eps > 0, "> 0")


class LossNorm(TwoGradientObjective):
    """Gradients over losses: `UnlearningConfig(objective="loss_norm")`."""

    Config = LossNormConfig

    def combine(self, retain, forget, losses):
        n_r, n_f = total_norm(retain), total_norm(forget)
        cosine = inner(retain, forget) / (n_r * n_f).clamp(min=1e-300)
        for r, f in zip(retain, forget, strict=True):
            r.div_((losses["retain"] + self.config.eps).to(r)).sub_(f / (losses["forget"] + self.config.eps).to(f))
        return {"retain_norm": n_r, "forget_norm": n_f, "cosine": cosine}


METHOD = Method(
    name="loss_norm",
    family="unlearning",
    title="Loss-normalised gradient difference",
    authors="Bu et al.",
    arxiv="2410.22086",
    year=2024,
    status="faithful",
    target="hfext.unlearning.loss_norm:LossNorm",
    config=LossNormConfig,
    usage='UnlearningTrainer(model, UnlearningConfig("out", objective="loss_norm"), f, r)',
    summary="Divides each gradient by its own loss instead of its length: the ablation of NGDiff.",
    notes="Compared with NGDiff in recipes/unlearning/ngdiff-llama-tofu.yaml.",
)
