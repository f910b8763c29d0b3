"""IGNITE: training under a bound on the surrogate's sensitivity, the gradient norm of its mean prediction h.

    min L(w) subject to rho * ||grad h(w)|| <= epsilon
    w' = w + r * grad h / ||grad h||
    step with grad L + lam * (rho / r) * (grad h(w') - grad h(w));  lam <- lam + lam_lr * (rho * ||grad h|| - epsilon)

The difference is a Hessian-vector product: the gradient of lam * rho * ||grad h|| as r -> 0. With `learn_lam=False`
the multiplier is fixed (IGNITE2). Three backward passes an update.

Incorporating Surrogate Gradient Norm to Improve Offline Optimization Techniques, arXiv 2503.04242. The authors' code
lets lam become negative, which rewards sharpness; here it is clamped at 0 unless `clamp=False`.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..registry import Method, Result
from ._ascent import AscentConfig, AscentOptimizer, check
from ._objective import mean_over_update, predictions
from ._wrapper import total_norm


@dataclass(frozen=True, kw_only=True)
class IGNITEConfig(AscentConfig):
    """Options of [`IGNITE`], besides those of [`AscentConfig`].

    Args:
        rho: Weight of the sensitivity in its bound, >= 0.
        epsilon: The bound, >= 0.
        lam: First value of the multiplier, >= 0.
        lam_lr: Its learning rate, >= 0.
        learn_lam: Adapt the multiplier (IGNITE) or keep it (IGNITE2).
        clamp: Keep the multiplier >= 0.
        r: Length of the finite difference, > 0.
        target: h is the mean `output`, or the training `loss` (then lam * rho / r = 1 is SAM with radius r).
        output: For classifiers: the `label`'s logit or the `max` logit.
    """

    epsilon: float = 0.1
    lam: float = 1e-3
    lam_lr: float = 1e-3
    learn_lam: bool = True
    clamp: bool = True
    r: float = 0.05
    target: Literal["output", "loss"] = "output"
    output: Literal["label", "max"] = "label"

    def __post_init__(self):
        super().__post_init__()
        for field in ("epsilon", "lam", "lam_lr"):
            check(self, field, getattr(self, field) >= 0, ">= 0")
        check(self, "r", self.r > 0 and math.isfinite(self.r), "> 0")
        check(self, "target", self.target in ("output", "loss"), "one of output, loss")
        check(self, "output", self.output in ("label", "max"), "one of label, max")
        check(self, "scope", self.scope == "update", "'update': the multiplier belongs to the whole update")


def penalised_gradient(g_loss: list[Tensor], g_h: list[Tensor], g_moved: list[Tensor], weight: float) -> None:
    """g_loss += weight * (g_moved - g_h), in place."""
    torch._foreach_sub_(g_moved, g_h)
    torch._foreach_add_(g_loss, g_moved, alpha=weight)


class IGNITE(AscentOptimizer):
    """Offline-optimisation surrogates with bounded sensitivity.

    Args:
        base_optimizer (`torch.optim.Optimizer`): Makes the step.
        **options: Fields of [`IGNITEConfig`].
    """

    Config = IGNITEConfig
    sync_first = True  # both parts of the gradient are averages over processes

    def __init__(self, base_optimizer, model=None, **options):
        super().__init__(base_optimizer, model, **options)
        self.lam = float(self.config.lam)

    def h(self, trainer, model, inputs, outputs, num_items) -> Tensor:
        """Mean prediction over the update."""
        (part,) = predictions(trainer, model, inputs, outputs, "IGNITE")
        if part.kind == "regression":
            values, mask = part.logits, torch.ones_like(part.logits, dtype=torch.bool)
        elif part.kind == "multilabel":
            values, mask = part.logits, part.labels >= 0
        else:
            mask = part.labels >= 0
            label = part.logits.gather(-1, part.labels.clamp(min=0)[:, None]).squeeze(-1)
            values = label if self.config.output == "label" else part.logits.amax(-1)
        return mean_over_update(trainer, values, mask, num_items)

    def finish(self, passes) -> None:
        c = self.config
        objective = self.h if c.target == "output" else None
        params, g_loss = self.take_gradients()
        if objective is None:
            g_h = g_loss
        else:
            passes(objective=objective)
            g_h = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in params]
        norm = float(total_norm(g_h))
        if math.isfinite(norm) and norm > 0:
            with self.moved(params):
                with torch.no_grad():
                    torch._foreach_add_(params, g_h, alpha=c.r / norm)
                passes(objective=objective)
            moved = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
            g_h = [g.clone() for g in g_h] if objective is None else g_h
            penalised_gradient(g_loss, g_h, moved, self.lam * self.rho / c.r)
        for p, g in zip(params, g_loss, strict=True):
            p.grad = g
        norm /= passes.grad_scale
        self.metrics |= {"ignite/grad_norm_h": norm, "ignite/lam": self.lam}
        if c.learn_lam and math.isfinite(norm):
            self.lam += c.lam_lr * (self.rho * norm - c.epsilon)
            self.lam = max(self.lam, 0.0) if c.clamp else self.lam
        self.check_descent(passes)

    def extra_state(self):
        return {"lam": self.lam}

    def load_extra_state(self, extra):
        lam = extra.get("lam", float(self.config.lam))
        if not isinstance(lam, float) or not math.isfinite(lam):
            raise ValueError(f"Corrupt optimizer state: hfext.lam is {lam!r}, not a finite number.")
        self.lam = lam


METHOD = Method(
    name="ignite",
    family="optim",
    title="Incorporating Surrogate Gradient Norm to Improve Offline Optimization Techniques",
    authors="Dao et al.",
    arxiv="2503.04242",
    year=2025,
    repo="cuong-dm/IGNITE",
    status="variant",
    difference="The multiplier is clamped at 0; `clamp=false` reproduces the authors' code, where it can go negative.",
    target="hfext.optim.ignite:IGNITE",
    config=IGNITEConfig,
    usage='TrainingArguments(optim="ignite", optim_args="rho=0.05,epsilon=0.1")',
    summary="Bounds the gradient norm of a surrogate's mean prediction by a penalty with an adaptive multiplier.",
    claim="Surrogates trained with IGNITE lead offline optimisation to better designs than those trained without.",
    headline=Result(
        metric="improvement of the found design", setting="offline black-box optimisation", value="up to 9.6 %"
    ),
    recipe="optim/ignite-mlp-offline.yaml",
)
