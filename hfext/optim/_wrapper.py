"""`TwoPassOptimizer`: a wrapper that gives any optimizer a second gradient evaluation in each update.

The life of one update, driven by `hfext.optim._driver` inside the Trainer and by `sam_step` in a raw loop:

    begin()             the method may move the weights (SAMPa) or sit this update out (`every`, `start`, `end`)
    <first pass>        forward and backward of all micro-batches; gradients accumulate in `.grad`
    finish(passes)      reads `.grad`, moves the weights, calls `passes()` to evaluate again, moves them back
    step()              the base optimizer's own step, with the gradient that `finish` left

`param_groups`, `state` and `defaults` are the base optimizer's own objects, so schedulers, gradient clipping and
accelerate see one truth. Nothing of a perturbation is ever kept in `state`: the weight backup lives only inside
`finish`.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from ..compat import full_tensor, optimizer_hook_tables, set_optimizer_mode

logger = logging.get_logger(__name__)


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """2-norm of all entries of `tensors` together: float32 in each tensor, float64 across them; scalar."""
    if not tensors:
        return torch.zeros((), dtype=torch.float64)
    norms = []
    for kind in (torch.float32, torch.float64):
        same = [x for x in tensors if (x.dtype == torch.float64) == (kind == torch.float64)]
        norms += torch._foreach_norm(same, 2, dtype=kind) if same else []
    return torch.linalg.vector_norm(torch.stack([full_tensor(n).double().to(norms[0].device) for n in norms]))


class TwoPassOptimizer(torch.optim.Optimizer):
    """Abstract wrapper of `base_optimizer`; a method implements `finish` and, if it must, `begin`.

    Args:
        base_optimizer (`torch.optim.Optimizer`): Makes the step. Its groups, state and defaults are shared.
        model (`torch.nn.Module`, *optional*): For methods that treat parameters by name or by kind of module.
        **options: Fields of the method's `Config`.
    """

    hfext_two_pass = True
    Config: type
    first_objective: Callable | None = None  # replaces the loss in the first pass

    own_driver: Callable | None = None  # replaces the two passes of `_driver` in the Trainer

    @property
    def sync_first(self) -> bool:
        """With data parallelism: whether the first pass averages its gradient over processes."""
        return self.config.sync

    def __init__(self, base_optimizer: torch.optim.Optimizer, model: torch.nn.Module | None = None, **options: Any):
        # The constructor of torch.optim.Optimizer is not run: it would make groups and state of its own.
        if not isinstance(base_optimizer, torch.optim.Optimizer):
            raise TypeError(f"base_optimizer must be a torch.optim.Optimizer, got {type(base_optimizer).__name__}.")
        if isinstance(base_optimizer, TwoPassOptimizer):
            raise TypeError(f"{type(base_optimizer).__name__} is itself a two-pass optimizer and cannot be a base.")
        self.base = base_optimizer
        self.model = model
        self.config = self.Config(**options)
        self.updates = self.position = 0
        self.metrics: dict[str, Tensor | float] = {}
        self._backup: tuple[list[Tensor], list[Tensor]] | None = None
        self._active = True
        self._ready = False
        self._skip = False
        self.__dict__.update(optimizer_hook_tables(base_optimizer))

    param_groups = property(lambda self: self.base.param_groups, lambda self, v: setattr(self.base, "param_groups", v))
    state = property(lambda self: self.base.state, lambda self, v: setattr(self.base, "state", v))
    defaults = property(lambda self: self.base.defaults, lambda self, v: setattr(self.base, "defaults", v))

    @classmethod
    def trainer_kwargs(cls, context, base: str, config) -> dict[str, Any]:
        """What a method adds to the arguments of the Trainer's optimizer, for example parameter groups of its own."""
        return {}

    # ---- the update -------------------------------------------------------------------------------------------

    def begin(self, max_updates: int | None = None, position: int | None = None) -> bool:
        """Called before the first pass; True when this update takes a second one.

        `position` is the number of this update in a training of `max_updates`; by default, the updates made so far.
        """
        self._ready = self._skip = False
        self.position = self.updates if position is None else position
        self._active = self.is_active(max_updates)
        return self._active

    def is_active(self, max_updates: int | None) -> bool:
        return True

    def finish(self, passes) -> None:
        """Called after the first pass, with its gradients in `.grad`; leaves the gradient for `step` there."""
        raise NotImplementedError

    def complete(self, passes) -> None:
        """`finish` with its safety: weights are back and `step` is allowed, or an exception and nothing is moved."""
        try:
            if self._active:
                self.finish(passes)
            self._ready = True
        finally:
            self.restore()

    def abort(self) -> None:
        """Forget an update that did not end, weights restored."""
        self.restore()
        self._ready = False

    def step(self, closure=None):
        """The base optimizer's step on the gradient of the last pass."""
        if closure is not None:
            raise RuntimeError(
                f"{type(self).__name__}.step takes no closure: a closure runs after gradient clipping and unscaling. "
                "Call hfext.optim.sam_step(optimizer, closure) instead."
            )
        if not self._ready:
            raise RuntimeError(
                f"{type(self).__name__}.step was called without its second pass. Either a Trainer subclass overrides "
                "`training_step` without calling super().training_step (call it, or add hfext.optim."
                "SharpnessAwareMixin), or the optimizer is used outside the Trainer: then call "
                "hfext.optim.sam_step(optimizer, closure)."
            )
        self._ready = False
        if self._skip:
            logger.warning("Update skipped: the gradient is not finite. Weights and optimizer state are unchanged.")
            return None
        result = self.base.step()
        self.updates += 1
        return result

    # ---- moving the weights -----------------------------------------------------------------------------------

    def with_grad(self) -> tuple[list[Tensor], list[Tensor]]:
        """The parameters that have a gradient, each once, and their gradients."""
        params, seen = [], set()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and id(p) not in seen:
                    if p.grad.is_sparse:
                        raise NotImplementedError(f"{type(self).__name__}: sparse gradients; build with sparse=False.")
                    seen.add(id(p))
                    params.append(p)
        if not params:
            raise RuntimeError(f"{type(self).__name__}: no parameter of the optimizer received a gradient.")
        return params, [p.grad for p in params]

    def take_gradients(self) -> tuple[list[Tensor], list[Tensor]]:
        """`with_grad`, for gradients that must outlive another pass: those that are views of a communication bucket
        are copied, since the next backward pass overwrites it."""
        params, grads = self.with_grad()
        return params, [g.clone() if g._is_view() else g for g in grads]

    def weights_among(self, params: list[Tensor]) -> list[bool]:
        """Which of `params` are called `weight`, norm gains among them; without a model: which are no vectors."""
        names = {} if self.model is None else {id(p): name for name, p in self.model.named_parameters()}
        return ["weight" in names[id(p)] if id(p) in names else p.dim() > 1 for p in params]

    def backup(self, params: list[Tensor]) -> None:
        """Keep a copy of `params`; `restore` brings it back by copy, so that no rounding is left behind."""
        if self._backup is not None:
            raise RuntimeError("The weights are already moved.")
        self._backup = params, [p.detach().clone() for p in params]

    def restore(self) -> None:
        if self._backup is not None:
            with torch.no_grad():
                torch._foreach_copy_(*self._backup)
            self._backup = None

    @property
    def is_perturbed(self) -> bool:
        """True while the weights are not those of the trained model."""
        return self._backup is not None

    @contextlib.contextmanager
    def moved(self, params: list[Tensor]) -> Iterator[None]:
        """Weights may be changed inside; they are as before afterwards, whatever happens."""
        self.backup(params)
        try:
            yield
        finally:
            self.restore()

    @contextlib.contextmanager
    def unmoved(self) -> Iterator[None]:
        """The trained weights inside, the moved ones again afterwards."""
        params, trained = self._backup
        moved = [p.detach().clone() for p in params]
        self.restore()
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(params, moved)
            self._backup = params, trained

    # ---- what every optimizer has -----------------------------------------------------------------------------

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict) -> None:
        self.base.add_param_group(param_group)

    def train(self) -> None:
        set_optimizer_mode(self.base, train=True)

    def eval(self) -> None:
        set_optimizer_mode(self.base, train=False)

    def extra_state(self) -> dict[str, Any]:
        """What the method itself must save; tensors, numbers, strings, lists and dicts only."""
        return {}

    def load_extra_state(self, extra: dict[str, Any]) -> None:
        """Take back `extra_state`. Called before anything else is loaded; raises `ValueError` on bad content."""

    def rank_state(self) -> dict[str, Any]:
        """What differs between processes and must be saved by each."""
        return {}

    def load_rank_state(self, state: dict[str, Any] | None) -> None:
        """Take back `rank_state`; None when the checkpoint was made by another number of processes."""

    def state_dict(self) -> dict[str, Any]:
        if self.is_perturbed:
            raise RuntimeError("state_dict was called in the middle of a two-pass update.")
        own = {"method": type(self).__name__, "updates": self.updates, **self.extra_state()}
        return {**self.base.state_dict(), "hfext": own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Accepts its own checkpoints and those of the bare base optimizer."""
        state_dict = dict(state_dict)
        own = state_dict.pop("hfext", {"updates": 0})
        if not isinstance(own.get("updates"), int) or own["updates"] < 0:
            raise ValueError(f"Corrupt optimizer state: hfext.updates is {own.get('updates')!r}, not an integer >= 0.")
        if own.get("method", type(self).__name__) == type(self).__name__:
            self.load_extra_state(own)
        else:
            logger.warning(f"Optimizer state was saved by {own['method']}; only the base optimizer's part is used.")
        self.base.load_state_dict(state_dict)
        self.updates = own["updates"]

    def __getstate__(self):
        return self.__dict__

    def __setstate__(self, state):
        self.__dict__.update(state)
        self.__dict__.update(optimizer_hook_tables(self.base))

    def __repr__(self):
        options = ", ".join(f"{k}={v!r}" for k, v in asdict(self.config).items())
        return f"{type(self).__name__}({options})\n  base: {self.base!r}"
