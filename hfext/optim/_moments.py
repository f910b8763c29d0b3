"""What `frugal`, `soap` and `adamr` share: Adam's moments, kept in float32 and loaded as they were saved.

bfloat16 has 8 bits: a second moment that should change by a factor 1 - beta2 = 0.001 would not change at all. So the
moments, and all that is computed from them, are float32 for weights in 16 bits (float64 for float64). Weights in 16
bits are rounded once, after decay and update.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any, get_type_hints

import torch
from torch import Tensor
from transformers import TrainingArguments
from transformers.utils import logging

from .._fields import coerce
from ..compat import decayed_parameters
from ._one_pass import OnePass

logger = logging.get_logger(__name__)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def adam_moments(exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, betas: tuple[float, float]) -> None:
    """m <- beta1 m + (1 - beta1) g and v <- beta2 v + (1 - beta2) g^2, in place."""
    exp_avg.lerp_(grad, 1 - betas[0])
    exp_avg_sq.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])


def adam_direction(exp_avg: Tensor, exp_avg_sq: Tensor, step: int, betas: tuple[float, float], eps: float) -> Tensor:
    """m_hat / (sqrt(v_hat) + eps), a new tensor: eps stands outside the corrected root, as in torch's AdamW."""
    denominator = exp_avg_sq.sqrt().div_(math.sqrt(1 - betas[1] ** step)).add_(eps)
    return torch.div(exp_avg, denominator, out=denominator).div_(1 - betas[0] ** step)


def move(p: Tensor, change: Tensor, decay: float = 0.0) -> None:
    """p <- (1 - decay) p + change, in the dtype of `change`, rounded once."""
    if p.dtype == change.dtype:
        p.mul_(1 - decay).add_(change)
    else:
        p.copy_(p.to(change.dtype).mul_(1 - decay).add_(change))


def check_types(config: Any) -> None:
    """`ValueError` that names the field where a value is not of the type that the dataclass declares."""
    for field, kind in get_type_hints(type(config)).items():
        coerce(f"{type(config).__name__}: {field}", kind, getattr(config, field))


def non_negative(value: Any, below: float = math.inf) -> bool:
    """Whether it is a number (or a tensor of one) in [0, below)."""
    return isinstance(value, int | float | Tensor) and not isinstance(value, bool) and bool(0 <= value < below)


def checked_betas(name: str, betas: Any) -> tuple[float, float]:
    """The pair, or a `ValueError`."""
    if not (isinstance(betas, Sequence) and len(betas) == 2 and all(non_negative(b, 1) for b in betas)):
        raise ValueError(f"{name}: betas is {betas!r} but must be two numbers in [0, 1).")
    return tuple(betas)


def finite(grads: list[Tensor]) -> bool:
    """Whether every entry is finite; one synchronisation with the device."""
    filled = [g for g in grads if g.numel()]
    if not filled:
        return True
    largest = torch._foreach_norm(filled, math.inf)
    return bool(torch.stack([n.isfinite().to(largest[0].device) for n in largest]).all())


def refuse_sharded(args: TrainingArguments, name: str, reason: str) -> None:
    """`NotImplementedError` when the Trainer would split parameters or gradients over processes."""
    for used, what in ((args.deepspeed is not None, "DeepSpeed"), (bool(args.fsdp), "FSDP")):
        if used:
            raise NotImplementedError(
                f"optim={name!r} does not run with {what}: {reason} Use DistributedDataParallel or one process."
            )


def trainer_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The Trainer's two groups, decayed and not decayed, without an empty one."""
    decayed = decayed_parameters(model)
    named = [(name in decayed, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for use, p in named if use == kind], "weight_decay": weight_decay if kind else 0.0}
        for kind in (True, False)
    ]
    return [group for group in groups if group["params"]]


class MomentOptimizer(OnePass):
    """Abstract: a method implements `update` and states in `state_options` which options give its state its shape.

    A gradient that is not finite reaches neither weights nor state: the whole update is left out, with a warning.
    """

    state_options: tuple[str, ...] = ()

    def __init__(
        self, params: Any, config: Any, *, lr: float, betas: Sequence[float], eps: float, weight_decay: float
    ):
        name = type(self).__name__
        for what, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not non_negative(value):
                raise ValueError(f"{name}: {what} is {value!r} but must be a number >= 0.")
        defaults = {"lr": lr, "betas": checked_betas(name, betas), "eps": eps, "weight_decay": weight_decay}
        self.config, self.updates = config, 0
        super().__init__(params, defaults)

    def update(self) -> None:
        """Change weights and state by the gradients, which are finite."""
        raise NotImplementedError

    def with_grad(self) -> Iterator[tuple[dict[str, Any], int, Tensor]]:
        """(group, number of the parameter among all of them, parameter) of every parameter that has a gradient."""
        number = 0
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    yield group, number, p
                number += 1

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        """One update; `closure`, which evaluates loss and gradients, is optional as in torch."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grads = [p.grad for _, _, p in self.with_grad()]
        if any(g.is_sparse for g in grads):
            raise NotImplementedError(
                f"{type(self).__name__}: sparse gradients; build the embedding with sparse=False."
            )
        if not finite(grads):
            logger.warning("Update skipped: the gradient is not finite. Weights and optimizer state are unchanged.")
        elif grads:
            self.update()
            self.updates += 1
        return loss

    def extra_state(self) -> dict[str, Any]:
        """What is not the state of one parameter: numbers, strings, lists and tensors only."""
        return {}

    def load_extra_state(self, extra: dict[str, Any]) -> None:
        """Take back `extra_state`, before anything else is loaded; raises `ValueError` when it does not fit."""

    def state_dict(self) -> dict[str, Any]:
        options = {name: asdict(self.config)[name] for name in self.state_options}
        own = {"method": type(self).__name__, "updates": self.updates, "options": options, **self.extra_state()}
        return {**super().state_dict(), "hfext_one_pass": own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        name, own = type(self).__name__, state_dict.get("hfext_one_pass")
        if own is None or own["method"] != name:
            saved = "another optimizer" if own is None else own["method"]
            raise ValueError(f"{name}: this optimizer state was saved by {saved}. Start without it, or use that one.")
        for option, value in own["options"].items():
            if asdict(self.config)[option] != value:
                raise ValueError(
                    f"{name}: the state was saved with {option}={value!r} but {option} is "
                    f"{asdict(self.config)[option]!r} now. Resume with the option of the checkpoint."
                )
        self.load_extra_state(own)
        super().load_state_dict(state_dict)
        # torch has cast every tensor of the state, indices too, to the dtype of its parameter.
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(ids, params, strict=True):
            for key, value in state_dict["state"].get(i, {}).items():
                if isinstance(value, Tensor):
                    self.state[p][key] = value.to(p.device)
        self.updates = own["updates"]

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "config": self.config, "updates": self.updates}
