"""A learning rate from three values of the retain loss along the optimizer's own step.

    D = theta - theta'             what the optimizer would do now, tried and taken back
    L(s) = L_R(theta - s D),  s in {-1, 0, 1};   the parabola through them has its minimum at

    s* = (L(-1) - L(1)) / (2 (L(1) + L(-1) - 2 L(0)))       taken where it curves upwards and s* > 0

The new rate is s* times the rate of this step, at most `lr_clip_factor` times more or less than before, smoothed; a
schedule of the Trainer multiplies it. s* has no unit: groups of parameters with different rates keep their ratio.
Losses are sums of float32 tokens in float64, over the retain rows of the update, in eval mode, of all processes.

Gradient Descent with Generalized Newton's Method, arXiv 2407.02772.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from ..compat import plain_optimizer, set_base_rates
from ..optim._passes import rng_state, set_rng_state
from ._objective import check
from ._terms import Scored


@dataclass(frozen=True, kw_only=True)
class AutoLRConfig:
    """Options of the automatic learning rate.

    Args:
        auto_lr: Whether there is one; `learning_rate` is then the first.
        lr_interval: Updates between two looks, >= 1.
        lr_clip_factor: Most that the rate grows or shrinks at once, > 1; `None` for no limit.
        lr_smoothing: Share of the old rate in the new one, in [0, 1).
        lr_min, lr_max: Bounds; `None` for none.
    """

    auto_lr: bool = True
    lr_interval: int = 10
    lr_clip_factor: float | None = 2.0
    lr_smoothing: float = 0.0
    lr_min: float | None = None
    lr_max: float | None = None

    def __post_init__(self):
        check(self, "lr_interval", isinstance(self.lr_interval, int) and self.lr_interval >= 1, "an integer >= 1")
        check(self, "lr_clip_factor", self.lr_clip_factor is None or self.lr_clip_factor > 1, "None or > 1")
        check(self, "lr_smoothing", 0 <= self.lr_smoothing < 1, "in [0, 1)")
        check(self, "lr_min", self.lr_min is None or self.lr_min > 0, "None or > 0")
        check(self, "lr_max", self.lr_max is None or self.lr_max >= (self.lr_min or 0), "None or >= lr_min")


def minimum(before: float, here: float, after: float) -> float | None:
    """s* from L(-1), L(0) and L(1); None where the parabola has no minimum in the direction of the step."""
    curvature, fall = after + before - 2 * here, before - after
    # A NaN fails both comparisons.
    return fall / (2 * curvature) if curvature > 0 and fall > 0 else None


def next_rate(rate: float, scale: float, s: float, config: AutoLRConfig) -> float:
    """The rate that follows `rate`, of which a schedule lets `scale` be used, after s* was seen."""
    found = s * scale * rate
    if config.lr_clip_factor is not None:
        found = min(max(found, rate / config.lr_clip_factor), rate * config.lr_clip_factor)
    found = config.lr_smoothing * rate + (1 - config.lr_smoothing) * found
    return min(max(found, config.lr_min or 0.0), config.lr_max or float("inf"))


@torch.no_grad()
def look(optimizer: torch.optim.Optimizer, loss: Callable[[], float]) -> tuple[float, float, float] | None:
    """L(-1), L(0), L(1) along the step that the optimizer would make with the gradients it has; parameters, the
    optimizer's state and the generators are afterwards what they were, bit for bit. None for a step of length 0."""
    params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    weights = [p.detach().clone() for p in params]
    state = {
        p: {key: _copy(value) for key, value in optimizer.state[p].items()} for p in params if p in optimizer.state
    }
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    groups = [{key: _copy(value) for key, value in group.items()} for group in groups]
    rng = rng_state()
    try:
        here = loss()
        optimizer.step()
        if all(torch.equal(p, old) for p, old in zip(params, weights, strict=True)):
            return None
        after = loss()
        for p, old in zip(params, weights, strict=True):
            p.copy_(2 * old - p)
        return loss(), here, after
    finally:
        for p, old in zip(params, weights, strict=True):
            p.copy_(old)
            _restore(optimizer.state, p, state.get(p))
        for group, old in zip(optimizer.param_groups, groups, strict=True):
            group.update(old)
        set_rng_state(rng)


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _restore(state: dict, p: Tensor, old: dict | None) -> None:
    if old is None:
        state.pop(p, None)
        return
    for key in list(state[p]):
        if key not in old:
            del state[p][key]
        elif isinstance(old[key], Tensor) and isinstance(state[p][key], Tensor):
            state[p][key].copy_(old[key])  # the same tensor: others may hold it
        else:
            state[p][key] = old[key]


class AutoLR(TrainerCallback):
    """Sets the learning rate of an `UnlearningTrainer` before the optimizer's step."""

    def __init__(self, trainer: Any, config: AutoLRConfig):
        self.trainer, self.config = trainer, config

    def on_train_begin(self, args, state, control, lr_scheduler=None, **kwargs):
        if not isinstance(lr_scheduler, torch.optim.lr_scheduler.LambdaLR):
            raise ValueError(
                f"auto_lr is True, but lr_scheduler_type={args.lr_scheduler_type!r} sets the rate by itself. Use "
                "'constant' or another schedule that multiplies it, or objective_args={'auto_lr': False}."
            )

    def on_pre_optimizer_step(self, args, state, control, lr_scheduler=None, **kwargs):
        if state.global_step == 0 or state.global_step % self.config.lr_interval:
            return
        trainer = self.trainer
        seen = look(plain_optimizer(trainer), self.retain_loss)
        s = None if seen is None else minimum(*seen)
        rate, now = lr_scheduler.base_lrs[0], lr_scheduler.get_last_lr()[0]
        found = rate if s is None else next_rate(rate, now / rate, s, self.config)
        if found != rate:
            set_base_rates(lr_scheduler, [b * found / rate for b in lr_scheduler.base_lrs])
        trainer.note({"auto_lr": torch.tensor(found)})

    def retain_loss(self) -> float:
        """The mean token loss of the update's retain rows, of all processes."""
        trainer, total = self.trainer, torch.zeros((), dtype=torch.float64, device=self.trainer.args.device)
        model = trainer.accelerator.unwrap_model(trainer.model)
        modes = {module: module.training for module in model.modules()}
        model.eval()
        try:
            for batch in trainer.window:
                part = {key: value.to(total.device) for key, value in batch["retain"].items()}
                with trainer.compute_loss_context_manager():
                    logits = model(part["input_ids"], attention_mask=part["attention_mask"], use_cache=False).logits
                total += Scored.shifted(logits, part["labels"]).token_nll.double().sum()
        finally:
            for module, training in modes.items():
                module.training = training
        return float(trainer.accelerator.reduce(total, reduction="sum") / trainer.window_counts["retain tokens"])
