"""NGDiff: both gradients at unit length, one down and one up, and a learning rate from the retain loss.

    g_R, g_F   gradients of the mean token loss of retain and forget rows, over the whole update
    g = g_R / (||g_R|| + eps) - g_F / (||g_F|| + eps),    ||g||^2 = 2 - 2 cos(g_R, g_F)

Norms are those of all trained parameters together, in float64 across tensors. g does not change when either loss is
multiplied by a number, to first order the retain loss never rises and the forget loss never falls. Every `lr_interval`
updates the learning rate is the minimum of a parabola through three values of the retain loss (see `_auto_lr.py`).

Unlearning as multi-task optimization: a normalized gradient difference approach with an adaptive learning rate,
arXiv 2410.22086. The learning rate is that of "Gradient Descent with Generalized Newton's Method", arXiv 2407.02772.
Clipping by `max_grad_norm`, whose default of 1 would shorten g wherever cos < 1/2, is off unless it is asked for.
"""

from dataclasses import dataclass

from torch import Tensor

from ..optim._wrapper import total_norm
from ..registry import Method, Result
from ._auto_lr import AutoLRConfig
from ._objective import TwoGradientObjective, check


@dataclass(frozen=True, kw_only=True)
class NGDiffConfig(AutoLRConfig):
    """Options of [`NGDiff`], beside those of [`AutoLRConfig`].

    Args:
        eps: Added to both norms, > 0.
        scope: `global`, or `tensor` for norms of each tensor by itself, which is not the paper's method.
        forget_loss_cap: Forget loss, in nats a token, beyond which the forget gradient is left out; the loss has no
            upper bound. Not in the paper; `None` is off.
    """

    eps: float = 1e-12
    scope: str = "global"
    forget_loss_cap: float | None = None

    def __post_init__(self):
        super().__post_init__()
        check(self, "eps", self.eps > 0, "> 0")
        check(self, "scope", self.scope in ("global", "tensor"), "'global' or 'tensor'")
        check(self, "forget_loss_cap", self.forget_loss_cap is None or self.forget_loss_cap > 0, "None or > 0")


def inner(a: list[Tensor], b: list[Tensor]) -> Tensor:
    """Sum of the products of all entries, in float64 across tensors; scalar."""
    return sum(
        ((x.float() * y.float()).sum().double() for x, y in zip(a, b, strict=True)), start=a[0].new_zeros(()).double()
    )


def normalized_difference(retain: list[Tensor], forget: list[Tensor], eps: float = 1e-12) -> dict[str, Tensor]:
    """Write g into `retain`; returns `retain_norm`, `forget_norm` and `cosine`."""
    n_r, n_f = total_norm(retain), total_norm(forget)
    cosine = inner(retain, forget) / (n_r * n_f).clamp(min=1e-300)
    for r, f in zip(retain, forget, strict=True):
        r.div_((n_r + eps).to(r)).sub_(f / (n_f + eps).to(f))
    return {"retain_norm": n_r, "forget_norm": n_f, "cosine": cosine}


class NGDiff(TwoGradientObjective):
    """Normalised gradient difference: `UnlearningConfig(objective="ngdiff")`."""

    Config = NGDiffConfig

    def combine(self, retain, forget, losses):
        c = self.config
        if c.forget_loss_cap is not None and losses["forget"] > c.forget_loss_cap:
            for f in forget:
                f.zero_()
        if c.scope == "global":
            return normalized_difference(retain, forget, c.eps)
        found = {"retain_norm": total_norm(retain), "forget_norm": total_norm(forget)}
        for r, f in zip(retain, forget, strict=True):
            normalized_difference([r], [f], c.eps)
        return found


METHOD = Method(
    name="ngdiff",
    family="unlearning",
    title="Unlearning as multi-task optimization: a normalized gradient difference approach with an adaptive "
    "learning rate",
    authors="Bu et al.",
    arxiv="2410.22086",
    year=2024,
    status="faithful",
    target="hfext.unlearning.ngdiff:NGDiff",
    config=NGDiffConfig,
    usage='UnlearningTrainer(model, UnlearningConfig("out", objective="ngdiff"), f, r)',
    summary="Descends on retain rows and ascends on forget rows with gradients of equal length and its own step size.",
    claim="At matched forgetting NGDiff keeps more utility than gradient difference.",
    headline=Result(
        metric="model utility",
        setting="Llama2-7B, TOFU, at comparable forgetting (abstract)",
        value="about 40 % above the best rival",
    ),
    recipe="unlearning/ngdiff-llama-tofu.yaml",
    notes="Two forward and backward passes an update, as gradient difference; one more buffer of the size of the "
    "gradient. Three forward passes on the retain rows every `lr_interval` updates.",
)
