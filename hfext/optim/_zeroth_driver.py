"""One update of a zeroth-order optimizer inside `transformers.Trainer`: the losses of its micro-batches, twice.

The losses are those of the Trainer's own `training_step`, with its scaling over micro-batches and processes, in eval
mode, without a graph and without a backward pass. All micro-batches of an update wait for its last one, so that both
sides see all of them with one walk of the weights.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import Trainer

from ..compat import counters_kept, patch_method, replaced, without_data_parallel, zeroth_order_optimizer
from ._passes import rng_state, set_rng_state

CLASSES: dict[str, type] = {}  # by name of `TrainingArguments.optim`; filled where the optimizers are registered


def drive(original: Callable, trainer, optimizer, model: nn.Module, inputs: Any, num_items: Any) -> Tensor:
    """`training_step`: remembers a micro-batch, and at the last one of the update returns the loss of all."""
    step = trainer.state.global_step
    update, batches = vars(trainer).get("_hfext_zeroth", (None, []))
    if update != step:
        batches = []
    model.train()  # as `training_step` does: some trainers prepare other inputs for an evaluation
    prepared = trainer._prepare_inputs(inputs)
    batches = [*batches, (prepared, None if optimizer.own_batches else num_items, rng_state())]
    trainer._hfext_zeroth = (step, batches)
    if not trainer.accelerator.gradient_state.sync_gradients:
        return torch.zeros((), device=trainer.args.device)
    del trainer._hfext_zeroth
    after = rng_state()
    with _evaluating(trainer, model, optimizer.own_batches):
        loss = optimizer.probe([functools.partial(_value, original, trainer, model, batch) for batch in batches])
    set_rng_state(after)
    return torch.tensor(loss, dtype=torch.float32, device=trainer.args.device)


def _value(original, trainer, model, batch, count: bool) -> Tensor:
    """The loss of one micro-batch; `count` says whether a Trainer's own metrics may count it."""
    prepared, num_items, rng = batch
    inputs = type(prepared)({**prepared}) if isinstance(prepared, Mapping) else prepared
    set_rng_state(rng)
    with torch.no_grad(), contextlib.nullcontext() if count else counters_kept(trainer):
        return original(trainer, model, inputs, num_items)


@contextlib.contextmanager
def _evaluating(trainer, model: nn.Module, own_batches: bool) -> Iterator[None]:
    """`training_step` makes no backward pass, leaves the model in eval mode, and takes inputs that are prepared.

    The model's own flag, by which losses and trainers know that they train, stays: its parts are in eval mode.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    model.training = True
    with contextlib.ExitStack() as stack:
        stack.enter_context(replaced(model, "train", lambda mode=True: model))
        stack.enter_context(replaced(trainer.accelerator, "backward", lambda loss, **kwargs: None))
        stack.enter_context(replaced(trainer, "_prepare_inputs", lambda inputs: inputs))
        if own_batches:
            stack.enter_context(replaced(trainer, "current_gradient_accumulation_steps", 1))
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


@torch.no_grad()
def share_first_weights(model: nn.Module) -> None:
    """What DistributedDataParallel does at its start: every process begins with the weights of the first."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        for tensor in [*model.parameters(), *model.buffers()]:
            held = tensor.detach().to("cuda" if dist.get_backend() == "nccl" else "cpu").contiguous()
            dist.broadcast(held, 0)
            tensor.copy_(held)


def _kind(trainer) -> type | None:
    """The class of a Trainer's zeroth-order optimizer, whether it was made already or not."""
    made = zeroth_order_optimizer(trainer)
    if made is not None:
        return type(made)
    return CLASSES.get(trainer.args.optim) if vars(trainer).get("optimizer") is None else None


def _move(original):
    def move(self, model, device):
        if "hfext_offload" in vars(model):
            return None
        kind = _kind(self)
        if kind is None or kind.place is None:
            return original(self, model, device)
        return kind.place(model, device)

    return move


def _prepare(original):
    def prepare(self, *args, **kwargs):
        kind = _kind(self)
        if kind is None:
            return original(self, *args, **kwargs)
        # No gradients: no buckets for them either. The weights of all processes stay equal by making the same moves.
        with without_data_parallel(self, place=kind.place is None):
            prepared = original(self, *args, **kwargs)
        share_first_weights(self.model)
        return prepared

    return prepare


def install() -> None:
    """Patch `Trainer`; idempotent."""
    patch_method(Trainer, "_prepare_for_training", _prepare)
    patch_method(Trainer, "_move_model_to_device", _move)
