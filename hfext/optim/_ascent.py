"""`AscentOptimizer`: what the sharpness-aware family shares. A method gives only the direction of its perturbation.

e = rho * d / (n + eps)     with d, n = direction(params, grads of the ascent objective)
gradient for the step = grad L(w + e), taken with w restored
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.utils import logging

from ._wrapper import TwoPassOptimizer, total_norm

logger = logging.get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class AscentConfig:
    """Options of every sharpness-aware optimizer.

    Args:
        rho: Radius of the perturbation, >= 0. At 0 the second pass is not run: the update is the base optimizer's.
        eps: Added to the norm, >= 0.
        scope: `update` perturbs once with the gradient of the whole update; `micro` perturbs for each micro-batch.
        sync: With data parallelism: average the ascent gradient over processes (True), or let every process perturb
            with its own (False, as in the paper).
        same_rng: Replay dropout and other noise in the second pass as in the first.
        every: Take the second pass in updates 0, every, 2*every, ...
        start: First update with a second pass: a number, or as a float in (0, 1] a fraction of training.
        end: Update from which there is no second pass any more: a number, or a fraction likewise.
        perturb: `nearest`, or `stochastic` rounding of w + e for weights in 16 bits.
        rho_schedule: `constant`; `linear` to 0 over training; `proportional_to_lr`.
        count_flos: Add the second pass to `state.total_flos`.
    """

    rho: float = 0.05
    eps: float = 1e-12
    scope: Literal["update", "micro"] = "update"
    sync: bool = False
    same_rng: bool = True
    every: int = 1
    start: int | float = 0
    end: int | float | None = None
    perturb: Literal["nearest", "stochastic"] = "nearest"
    rho_schedule: Literal["constant", "linear", "proportional_to_lr"] = "constant"
    count_flos: bool = True

    def __post_init__(self):
        check(self, "rho", self.rho >= 0, ">= 0")
        check(self, "eps", self.eps >= 0, ">= 0")
        check(self, "every", self.every >= 1, ">= 1")
        check(self, "start", self.start >= 0, ">= 0")
        check(self, "end", self.end is None or self.end >= self.start, f">= start ({self.start})")
        for field, choices in {
            "scope": ("update", "micro"),
            "perturb": ("nearest", "stochastic"),
            "rho_schedule": ("constant", "linear", "proportional_to_lr"),
        }.items():
            check(self, field, getattr(self, field) in choices, f"one of {', '.join(choices)}")
        if self.scope == "micro" and self.sync:
            raise ValueError(
                f"{type(self).__name__}: sync=True averages an ascent gradient over ranks, but scope='micro' takes "
                "one each micro-batch. Use scope='update', or sync=False."
            )


def check(config: Any, field: str, ok: bool, allowed: str) -> None:
    """`ValueError` naming field, value and range unless `ok`; a number must also be finite."""
    value = getattr(config, field)
    if not ok or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(f"{type(config).__name__}: {field} is {value!r} but must be {allowed}.")


def as_update(position: int | float, max_updates: int | None, field: str) -> float:
    """A position in training as an update number; a float of at most 1 is a fraction of `max_updates`."""
    if isinstance(position, int) or position == 0 or position > 1:
        return position
    if max_updates is None:
        raise ValueError(f"{field} is the fraction {position!r}, but the number of updates is not known here.")
    return position * max_updates


def round_stochastically(x: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """`x` (float32, any shape) to bfloat16, up or down with probability by distance: the mean is `x`."""
    if dtype == torch.float16:
        raise NotImplementedError("perturb='stochastic' rounds to bfloat16. Load the model in bfloat16 or float32.")
    if dtype != torch.bfloat16:
        return x.to(dtype)
    noise = torch.randint(0, 1 << 16, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    return ((x.view(torch.int32) + noise) & -65536).view(torch.float32).to(dtype)


class AscentOptimizer(TwoPassOptimizer):
    """Abstract: one perturbation, one replay. A method implements `direction`."""

    Config = AscentConfig

    def direction(self, params: list[Tensor], grads: list[Tensor]) -> Tensor:
        """Turn `grads` in place into the unscaled perturbation d and return its norm n (a scalar)."""
        raise NotImplementedError

    def selected(self) -> tuple[list[Tensor], list[Tensor]]:
        """The parameters to perturb and their gradients; the others stay where they are."""
        return self.with_grad()

    def is_active(self, max_updates: int | None) -> bool:
        c, t = self.config, self.position
        self._progress = t / max_updates if max_updates else None
        if c.rho == 0 or t % c.every or t < as_update(c.start, max_updates, "start"):
            return False
        return c.end is None or t < as_update(c.end, max_updates, "end")

    @property
    def rho(self) -> float:
        """Radius of this update, after the schedule."""
        match self.config.rho_schedule:
            case "linear":
                if self._progress is None:
                    raise ValueError("rho_schedule='linear' needs the number of updates, which is not known here.")
                return self.config.rho * max(0.0, 1 - self._progress)
            case "proportional_to_lr":
                group = self.param_groups[0]
                first = float(group.get("initial_lr", group["lr"]))
                return self.config.rho * float(group["lr"]) / first if first else 0.0
        return self.config.rho

    def finish(self, passes) -> None:
        params, grads = self.selected()
        with self.moved(params):
            with torch.no_grad():
                norm = float(self.direction(params, grads))
                if math.isfinite(norm):
                    self._move(params, grads, self.rho / (norm + self.config.eps) if norm > 0 else 0.0)
            # A gradient that is not finite perturbs nothing. The replay still runs, so that processes stay in step.
            self.metrics["sam/grad_norm_ascent"] = norm
            del grads
            self.metrics["sam/loss_perturbed"] = passes()
        self.check_descent(passes)

    def check_descent(self, passes) -> None:
        """Mark the update to be skipped when its gradient is not finite; under a loss scaler that is its business."""
        if not passes.scaled:
            self._skip = not bool(torch.isfinite(total_norm(self.with_grad()[1])))

    def _move(self, params: list[Tensor], grads: list[Tensor], scale: float) -> None:
        """params += scale * grads, measured for 16-bit weights, where rounding can eat the perturbation."""
        before = self._backup[1]
        low = [i for i, p in enumerate(params) if p.dtype in (torch.bfloat16, torch.float16)]
        if low and self.config.perturb == "stochastic":
            generators = {}
            for p, g in zip(params, grads, strict=True):
                generator = generators.setdefault(p.device, torch.Generator(p.device).manual_seed(self.updates))
                moved = p.to(torch.promote_types(p.dtype, torch.float32)) + scale * g
                p.copy_(round_stochastically(moved, p.dtype, generator))
        else:
            torch._foreach_add_(params, grads, alpha=scale)
        if not low:
            self.metrics["sam/perturb_norm"] = scale * float(total_norm(grads))
        elif self.updates % 100 == 0:
            self.metrics["sam/perturb_norm"] = float(total_norm(torch._foreach_sub(params, before)))
            pairs = [((params[i] - before[i]).double(), grads[i].double()) for i in low]
            sizes = [float(total_norm([pair[k] for pair in pairs])) for k in (0, 1)]
            size = sizes[0] * sizes[1]
            cosine = sum(float((a * g).sum()) for a, g in pairs) / size if size else 0.0
            self.metrics["sam/perturb_cosine"] = cosine
            if cosine < 0.9 and sizes[1]:
                logger.warning_once(
                    f"Rounding to {params[low[0]].dtype} leaves a perturbation of cosine {cosine:.2f} to the intended "
                    "one. Train float32 weights with bf16=True, or set optim_args='perturb=stochastic'."
                )
