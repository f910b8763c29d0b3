"""`sam_step`: the two passes in a raw training loop, with or without accelerate."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import send_to_device

from ._passes import Passes, plain, rng_state, running_statistics_kept, set_rng_state
from ._wrapper import TwoPassOptimizer


class _ClosurePasses(Passes):
    def __init__(self, optimizer, closures, batch, model, scaler):
        self.optimizer, self.closures, self.model = optimizer, closures, model
        self.rng = rng_state()
        self.batches = [(batch, self.rng)]
        self.scaled = scaler is not None and scaler.is_enabled()
        self.grad_scale = scaler.get_scale() if self.scaled else 1.0

    def first(self, sync: bool) -> torch.Tensor:
        return self._call("surrogate" if self.optimizer.first_objective else "loss", self.batches[0][0], sync)

    def _call(self, kind: str, batch: Any, sync: bool) -> torch.Tensor:
        closure = self.closures.get(kind)
        if closure is None:
            raise ValueError(
                f"{type(self.optimizer).__name__} needs sam_step(..., surrogate=closure): a closure that runs forward "
                "and the backward pass of the method's own objective and returns the training loss."
            )
        no_sync = contextlib.nullcontext() if sync or not hasattr(self.model, "no_sync") else self.model.no_sync()
        with no_sync, torch.enable_grad():
            return torch.as_tensor(closure() if batch is None else closure(batch)).detach()

    def __call__(self, batches=None, objective=None, sync=True):
        self.optimizer.zero_grad()
        after, total = rng_state(), 0.0
        with running_statistics_kept(self.model):
            for batch, rng in self.batches if batches is None else batches:
                if self.optimizer.config.same_rng:
                    set_rng_state(rng)
                total = total + self._call("surrogate" if objective else "loss", batch, sync)
        if self.optimizer.config.same_rng:
            set_rng_state(after)
        return total

    def keep(self, batch):
        if batch[0] is None:
            raise ValueError("SAMPa evaluates each batch twice: call sam_step(optimizer, closure, batch).")
        return {"batch": plain(batch[0]), "rng": batch[1]}

    def revive(self, kept):
        device = next(p.device for group in self.optimizer.param_groups for p in group["params"])
        return send_to_device(kept["batch"], device), kept["rng"]


def sam_step(
    optimizer: torch.optim.Optimizer,
    closure: Callable[..., torch.Tensor],
    batch: Any = None,
    *,
    surrogate: Callable[..., torch.Tensor] | None = None,
    model: torch.nn.Module | None = None,
    scaler: "torch.amp.GradScaler | None" = None,
    max_updates: int | None = None,
    before_step: Callable[[], Any] | None = None,
) -> torch.Tensor:
    """One whole update: first pass, second pass, optimizer step, gradients cleared.

    Args:
        optimizer: A two-pass optimizer, or accelerate's wrapper around one.
        closure: Runs forward and backward of the whole update (with `accelerator.backward` or `scaler.scale(loss)`
            where these are used) and returns the loss. It must not clear gradients.
        batch: Passed to `closure` when given. SAMPa needs it, since it evaluates each batch twice, an update apart.
        surrogate: For BiSAM and IGNITE: like `closure`, with the backward pass of their own objective.
        model: Give it when it has BatchNorm layers, or is wrapped for data parallelism.
        scaler: A `torch.amp.GradScaler`; it makes the step.
        max_updates: Length of training, for options given as fractions.
        before_step: Called between the second pass and the step, for example to clip the gradient.

    Returns:
        What the first evaluation returned: the loss at the weights before the update (SAMPa: a step ahead of them).
    """
    two_pass, owner = optimizer, scaler
    while not isinstance(two_pass, TwoPassOptimizer):
        owner = owner or getattr(two_pass, "scaler", None)
        two_pass = vars(two_pass).get("optimizer")
        if two_pass is None:
            raise TypeError(
                f"sam_step needs a two-pass optimizer such as SharpnessAware, got {type(optimizer).__name__}."
            )
    if two_pass.config.scope == "micro":
        raise ValueError("scope='micro' is for the Trainer. In a raw loop, call sam_step for each micro-batch.")
    passes = _ClosurePasses(two_pass, {"loss": closure, "surrogate": surrogate}, batch, model, owner)
    try:
        active = two_pass.begin(max_updates)
        two_pass.zero_grad()
        loss = passes.first(two_pass.sync_first) if active else passes._call("loss", batch, sync=True)
        two_pass.complete(passes)
    except BaseException:
        two_pass.abort()
        raise
    if before_step is not None:
        before_step()
    if scaler is not None:
        scaler.step(optimizer)
        scaler.update()
    else:
        optimizer.step()
    two_pass.zero_grad()
    return loss
