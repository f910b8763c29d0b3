"""SAMPa: SAM without the wait. The perturbation uses a gradient taken elsewhere, so both gradients run side by side.

    x~ = x_t + rho * g_y / (||g_y|| + eps);   y_{t+1} = x_t - (the base optimizer's step on g_y)
    g_x = grad L(x~; B_{t-1}) and g_n = grad L(y_{t+1}; B_t), independent of each other
    x_{t+1} = base step at x_t with (1 - lam) g_x + lam g_n;   g_y <- g_n

Each batch is used twice, one update apart. The first update has no g_y and is the base optimizer's. In one process
the two gradients follow each other; with `parallel=true` pairs of processes take one each. No gradient is taken at
x_t itself: the logged loss is that at y_t.

SAMPa: Sharpness-aware Minimization Parallelized, arXiv 2410.10683. Unlike in the authors' code, lam = 0 works,
weights are restored by copy, the learning rate is this step's, and any number of process pairs may run.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers.utils import logging

from ..registry import Method, Result
from ._ascent import AscentConfig, AscentOptimizer, check
from ._parallel import check_world, drive
from ._passes import is_plain, nbytes
from ._wrapper import total_norm

logger = logging.get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class SAMPaConfig(AscentConfig):
    """Options of [`SAMPa`], besides `rho`, `eps`, `same_rng` and `count_flos` of [`AscentConfig`].

    Args:
        rho: Radius, >= 0.
        lam: Weight of the gradient at y, in [0, 1]; `lambda` in `optim_args`. 0 is SAMPa-0, 1 is optimistic descent.
        lookahead: y is the `base` optimizer's own step (SGD, Adam and AdamW; others fall back), or `plain` x - lr g_y.
        parallel: Pairs of processes take one gradient each. Needs an even number of processes.
        save_prev_batch: Keep the previous update's batches (up to 64 MB) in checkpoints, for exact resume.
    """

    rho: float = 0.1
    lam: float = 0.2
    lookahead: Literal["base", "plain"] = "base"
    parallel: bool = False
    save_prev_batch: bool = True

    def __post_init__(self):
        super().__post_init__()
        check(self, "lam", 0 <= self.lam <= 1, "in [0, 1]")
        check(self, "lookahead", self.lookahead in ("base", "plain"), "one of base, plain")
        for field, value in {"scope": "update", "every": 1, "start": 0, "end": None, "perturb": "nearest"}.items():
            check(
                self,
                field,
                getattr(self, field) == value,
                f"{value!r}: SAMPa carries a gradient from update to update",
            )


def sgd_step(p: Tensor, g: Tensor, state: dict, group: dict) -> Tensor:
    """What `torch.optim.SGD` would subtract from `p` for gradient `g`, its state untouched."""
    g = g.add(p, alpha=group["weight_decay"]) if group["weight_decay"] else g
    if group["momentum"]:
        held = state.get("momentum_buffer")
        buffer = g if held is None else held.mul(group["momentum"]).add(g, alpha=1 - group["dampening"])
        g = g.add(buffer, alpha=group["momentum"]) if group["nesterov"] else buffer
    return g * float(group["lr"])


def adam_step(p: Tensor, g: Tensor, state: dict, group: dict) -> Tensor:
    """What `torch.optim.Adam` or `AdamW` would subtract from `p` for gradient `g`, its state untouched."""
    lr, decay, (beta1, beta2) = float(group["lr"]), group["weight_decay"], group["betas"]
    decoupled = group["decoupled_weight_decay"]
    if decay and not decoupled:
        g = g.add(p, alpha=decay)
    t = float(state.get("step", 0)) + 1
    m = state["exp_avg"].lerp(g, 1 - beta1) if "exp_avg" in state else g * (1 - beta1)
    v = state["exp_avg_sq"] * beta2 if "exp_avg_sq" in state else torch.zeros_like(g)
    v = v.addcmul(g, g, value=1 - beta2)
    step = lr / (1 - beta1**t) * m / (v.sqrt() / math.sqrt(1 - beta2**t) + group["eps"])
    return step.add(p, alpha=lr * decay) if decay and decoupled else step


class SAMPa(AscentOptimizer):
    """Parallelised SAM.

    Args:
        base_optimizer (`torch.optim.Optimizer`): Makes the step.
        **options: Fields of [`SAMPaConfig`].
    """

    Config = SAMPaConfig
    sync_first = True

    def __init__(self, base_optimizer, model=None, **options):
        super().__init__(base_optimizer, model, **options)
        self._stale: list[Tensor | None] | None = None  # g_y, one entry for each parameter
        self.previous: list[dict] = []  # the batches on which it was taken
        self.pairs = None

    def is_active(self, max_updates) -> bool:
        self._progress = self.position / max_updates if max_updates else None
        return True

    def parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def stale_pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        """Parameters with their g_y."""
        pairs = [(p, g) for p, g in zip(self.parameters(), self._stale, strict=True) if g is not None]
        return [p for p, _ in pairs], [g for _, g in pairs]

    @property
    def own_driver(self):
        if not self.config.parallel:
            return None
        check_world()
        return drive

    @property
    def is_first(self) -> bool:
        """True while there is no g_y yet: this update is the base optimizer's."""
        return self._stale is None

    def begin(self, max_updates=None, position=None) -> bool:
        super().begin(max_updates, position)
        if not self.is_first and not self.config.parallel:
            self.move_ahead()
        return True

    @torch.no_grad()
    def move_ahead(self) -> None:
        """x -> y, by the step that the base optimizer would make on g_y."""
        self.backup(self.stale_pairs()[0])
        rule = None
        if self.config.lookahead == "base":
            kinds = {torch.optim.SGD: sgd_step, torch.optim.Adam: adam_step, torch.optim.AdamW: adam_step}
            rule = kinds.get(type(self.base))
            if rule is None or self.defaults.get("amsgrad") or self.defaults.get("maximize"):
                rule = None
                logger.warning_once(f"SAMPa: lookahead='plain' is used with {type(self.base).__name__}.")
        stale = iter(self._stale)
        for group in self.param_groups:
            for p in group["params"]:
                g = next(stale)
                if g is not None:
                    p.sub_(rule(p, g, self.state.get(p, {}), group) if rule else g * float(group["lr"]))

    @torch.no_grad()
    def move_up(self) -> None:
        """x -> x~, along g_y."""
        params, stale = self.stale_pairs()
        self.backup(params)
        norm = float(total_norm(stale))
        torch._foreach_add_(params, stale, alpha=self.rho / (norm + self.config.eps) if norm > 0 else 0.0)

    def finish(self, passes) -> None:
        self.restore()
        params, g_n = self.take_gradients()
        g_x = None
        if not self.is_first and self.config.lam < 1:
            self.move_up()
            self.metrics["sampa/loss_previous"] = passes([passes.revive(kept) for kept in self.previous])
            self.restore()
            g_x = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
        self.settle(params, g_x, g_n, passes)

    def settle(self, params: list[Tensor], g_x: list[Tensor] | None, g_n: list[Tensor], passes) -> None:
        """Leave the mixed gradient for the step and keep what the next update needs. Without g_x: g_n alone."""
        lam, scale = self.config.lam, passes.grad_scale
        # What the step gets is clipped in place, so it never shares memory with what is kept.
        mixed = [g.clone() for g in g_n] if g_x is None else torch._foreach_lerp(g_x, g_n, lam)
        for p, g in zip(params, mixed, strict=True):
            p.grad = g
        found = {id(p): g if scale == 1 else g / scale for p, g in zip(params, g_n, strict=True)}
        # Start again rather than carry a broken gradient into the next update.
        finite = math.isfinite(float(total_norm(g_n)))
        self._stale = [found.get(id(p)) for p in self.parameters()] if finite else None
        self.previous = [passes.keep(batch) for batch in passes.batches]
        self.check_descent(passes)
        self._ready = True

    def extra_state(self):
        if self._stale is None:
            return {}
        state = {"stale": [torch.empty(0) if g is None else g for g in self._stale]}
        if self.config.save_prev_batch and is_plain(self.previous):
            if nbytes(self.previous) <= 64 << 20:
                state["previous"] = self.previous
            else:
                logger.warning_once("SAMPa: the last batches take more than 64 MB and are not saved.")
        return state

    def load_extra_state(self, extra):
        stale = extra.get("stale")
        if stale is None:
            self._stale, self.previous = None, []
            return
        params = self.parameters()
        if len(stale) != len(params) or any(
            g.numel() and g.shape != p.shape for p, g in zip(params, stale, strict=True)
        ):
            raise ValueError("Corrupt optimizer state: hfext.stale does not fit the parameters.")
        if "previous" not in extra:
            logger.warning("SAMPa: the checkpoint has no previous batch; the first update is the base optimizer's.")
            self._stale, self.previous = None, []
            return
        self._stale = [g.to(p.device) if g.numel() else None for p, g in zip(params, stale, strict=True)]
        self.previous = extra["previous"]

    def rank_state(self):
        return {key: value for key, value in self.extra_state().items() if key == "previous"}

    def load_rank_state(self, state):
        if state is None:
            logger.warning(
                "SAMPa: resumed with another number of processes; the first update is the base optimizer's."
            )
            self._stale, self.previous = None, []
        else:
            self.previous = state["previous"]


METHOD = Method(
    name="sampa",
    family="optim",
    title="SAMPa: Sharpness-aware Minimization Parallelized",
    authors="Xie et al.",
    arxiv="2410.10683",
    year=2024,
    repo="LIONS-EPFL/SAMPa",
    status="faithful",
    target="hfext.optim.sampa:SAMPa",
    config=SAMPaConfig,
    usage='TrainingArguments(optim="sampa", optim_args="rho=0.1,lambda=0.2")',
    summary="SAM whose two gradients do not depend on each other, so that pairs of processes compute them at once.",
    claim="With two processes an update takes up to half of the time of SAM's.",
    headline=Result(
        metric="sequential gradients an update",
        setting="two processes, communication neglected",
        value="1",
        baseline="2 (SAM)",
    ),
    recipe="optim/sampa-speed.yaml",
)
