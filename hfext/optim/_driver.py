"""The two passes of a sharpness-aware update inside `transformers.Trainer`.

The second pass runs at the end of the last micro-batch's `training_step`. That is the one right place: gradients of
the whole update are there, and clipping, unscaling and the optimizer's step are still to come, so they act on the
second gradient alone. A closure given to `optimizer.step` and a callback both come too late.

`install()` patches `Trainer` once. Without a two-pass optimizer every patched method calls the original and no more.
"""

import contextlib
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import DistributedType
from transformers import Trainer

from ..compat import (
    counters_kept,
    patch_method,
    replaced,
    two_pass_optimizer,
    without_data_parallel,
    zeroth_order_optimizer,
)
from . import _zeroth_driver
from ._passes import Passes, plain, rng_state, running_statistics_kept, set_rng_state

_UNSUPPORTED = {
    DistributedType.DEEPSPEED: "DeepSpeed partitions gradients during the backward pass",
    DistributedType.FSDP: "the perturbation needs whole parameters and gradients on each process",
    DistributedType.MEGATRON_LM: "Megatron-LM owns the training step",
    DistributedType.XLA: "it was never tested on XLA",
}


@dataclass
class MicroBatch:
    """One `training_step` call, with all that is needed to repeat it."""

    inputs: Any
    num_items: Any
    accumulation: int
    rng: dict[str, Any]
    prepared: Any = None

    def copy_of_inputs(self) -> Any:
        """`compute_loss` pops and adds keys, so every evaluation gets its own container."""
        return type(self.prepared)({**self.prepared}) if isinstance(self.prepared, Mapping) else self.prepared


@dataclass
class Update:
    """The update in progress."""

    batches: list[MicroBatch] = field(default_factory=list)
    loss: torch.Tensor | float = 0.0
    active: bool = True
    step: int = -1
    todo: list[dict] = field(default_factory=list)  # parallel SAMPa: batches still to be evaluated


class TrainerPasses(Passes):
    def __init__(self, trainer, original, model, optimizer, batches, held=None):
        self.trainer, self.original, self.model, self.optimizer = trainer, original, model, optimizer
        self.batches, self.held = batches, held or {}
        scaler = trainer.accelerator.scaler
        self.scaled = scaler is not None and scaler.is_enabled()
        self.grad_scale = scaler.get_scale() if self.scaled else 1.0

    def __call__(self, batches=None, objective=None, sync=True):
        trainer, model = self.trainer, self.model
        batches = self.batches if batches is None else batches
        same_rng = self.optimizer.config.same_rng
        clear_gradients(model, self.optimizer)
        for p, grad in self.held.items():
            p.grad = grad
        after, total = rng_state(), 0.0
        with running_statistics_kept(model), counters_kept(trainer):
            for batch in batches:
                if same_rng:
                    set_rng_state(batch.rng)
                last = batch is batches[-1]
                total = total + evaluate(trainer, self.original, model, batch, objective, sync=sync and last)
                if self.optimizer.config.count_flos and isinstance(batch.inputs, Mapping):
                    trainer.current_flos += float(trainer.floating_point_ops(batch.inputs))
        if same_rng:
            set_rng_state(after)
        return total

    def keep(self, batch):
        return plain({name: getattr(batch, name) for name in ("prepared", "num_items", "accumulation", "rng")})

    def revive(self, kept):
        to_device = self.trainer._prepare_input
        prepared, num_items = to_device(kept["prepared"]), to_device(kept["num_items"])
        return MicroBatch(prepared, num_items, kept["accumulation"], kept["rng"], prepared)


def clear_gradients(model, optimizer) -> None:
    """Both: the optimizer may train parameters that are not the model's, and the model may have others."""
    model.zero_grad(set_to_none=True)
    optimizer.zero_grad(set_to_none=True)


def evaluate(trainer, original, model, batch: MicroBatch, objective=None, sync: bool = True) -> torch.Tensor:
    """Forward and backward of one micro-batch through the Trainer's own `training_step`; gradients accumulate."""
    with contextlib.ExitStack() as stack:
        if not sync:
            stack.enter_context(trainer.accelerator.no_sync(model))
        if objective is not None:
            stack.enter_context(replaced(trainer, "compute_loss", _substitute(trainer, objective)))
        stack.enter_context(replaced(trainer, "current_gradient_accumulation_steps", batch.accumulation))
        if batch.prepared is None:
            stack.enter_context(replaced(trainer, "_prepare_inputs", _recorder(trainer._prepare_inputs, batch)))
        else:
            stack.enter_context(replaced(trainer, "_prepare_inputs", lambda inputs: batch.copy_of_inputs()))
        return original(trainer, model, batch.inputs, batch.num_items)


def _recorder(prepare, batch: MicroBatch):
    def prepare_and_keep(inputs):
        batch.prepared = prepare(inputs)
        return batch.copy_of_inputs()

    return prepare_and_keep


def _substitute(trainer, objective):
    """`compute_loss` whose value is the training loss and whose gradient is that of `objective`."""
    original = trainer.compute_loss

    def compute_loss(model, inputs, return_outputs=False, num_items_in_batch=None, **kwargs):
        batch = {**inputs} if isinstance(inputs, Mapping) else inputs
        if not vars(trainer).get("_hfext_own_forward"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                loss, outputs = _with_outputs(original, model, inputs, num_items_in_batch, kwargs)
            value = objective(trainer, model, batch, outputs, num_items_in_batch)
            # TRL's SFTTrainer recomputes the logits without a graph, for metrics alone.
            trainer._hfext_own_forward = not value.requires_grad
        if trainer._hfext_own_forward:
            before = rng_state()
            with torch.no_grad():
                loss = original(model, {**batch}, num_items_in_batch=num_items_in_batch, **kwargs)
            set_rng_state(before)
            outputs = model(**{key: x for key, x in batch.items() if key not in ("labels", "shift_labels")})
            value = objective(trainer, model, batch, outputs, num_items_in_batch)
        loss = value + (loss - value).detach()
        return (loss, outputs) if return_outputs else loss

    return compute_loss


def _with_outputs(compute_loss, model, inputs, num_items, kwargs):
    try:
        result = compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items, **kwargs)
    except TypeError as error:
        if "return_outputs" not in str(error):
            raise
        result = None
    if not isinstance(result, tuple):
        raise TypeError(
            "The optimizer needs the model's outputs, but the Trainer's `compute_loss` does not return "
            "(loss, outputs) for return_outputs=True. Let it, or use optim='sam'."
        )
    return result


def training_step(original, trainer, model, inputs, num_items_in_batch=None) -> torch.Tensor:
    """`Trainer.training_step` with a second pass after the last micro-batch of an update."""
    if vars(trainer).get("_hfext_inside"):
        return original(trainer, model, inputs, num_items_in_batch)
    zeroth = zeroth_order_optimizer(trainer)
    if zeroth is not None:
        with replaced(trainer, "_hfext_inside", True):
            loss = _zeroth_driver.drive(original, trainer, zeroth, model, inputs, num_items_in_batch)
        _meter(trainer, zeroth)
        return loss
    optimizer = two_pass_optimizer(trainer)
    if optimizer is None:
        return original(trainer, model, inputs, num_items_in_batch)
    try:
        with replaced(trainer, "_hfext_inside", True):
            return _drive(original, trainer, optimizer, model, inputs, num_items_in_batch)
    except BaseException:
        _forget(trainer)
        raise


def _drive(original, trainer, optimizer, model, inputs, num_items):
    if optimizer.own_driver is not None:
        return optimizer.own_driver(original, trainer, optimizer, model, inputs, num_items)
    update = vars(trainer).get("_hfext_update")
    if update is None or update.step != trainer.state.global_step:
        _forget(trainer)
        kind = trainer.accelerator.distributed_type
        if kind in _UNSUPPORTED:
            raise NotImplementedError(
                f"{type(optimizer).__name__} does not run with {kind.value}: {_UNSUPPORTED[kind]}. "
                "Use DistributedDataParallel or one process."
            )
        update = trainer._hfext_update = Update(step=trainer.state.global_step)
        update.active = optimizer.begin(trainer.state.max_steps or None, trainer.state.global_step)
    last = trainer.accelerator.gradient_state.sync_gradients
    batch = MicroBatch(inputs, num_items, trainer.current_gradient_accumulation_steps, rng_state())
    update.batches.append(batch)
    micro = optimizer.config.scope == "micro" and update.active
    held = None
    if micro:
        grads = {p: p.grad for p in model.parameters() if p.grad is not None}
        held = {p: g.clone() if g._is_view() else g for p, g in grads.items()}
        clear_gradients(model, optimizer)

    objective = optimizer.first_objective if update.active else None
    sync = last and (optimizer.sync_first or not update.active)
    loss = evaluate(trainer, original, model, batch, objective, sync=sync)
    update.loss = update.loss + loss
    if micro or last:
        batches = [batch] if micro else update.batches
        optimizer.complete(TrainerPasses(trainer, original, model, optimizer, batches, held))
    if last:
        if update.active:
            _note(trainer, optimizer, update)
        del trainer._hfext_update
    return loss


def _forget(trainer) -> None:
    """Drop an update that will not end: weights restored, buffers freed."""
    vars(trainer).pop("_hfext_update", None)
    two_pass_optimizer(trainer).abort()


def _note(trainer, optimizer, update: Update) -> None:
    if "sam/loss_perturbed" in optimizer.metrics and optimizer.config.scope == "update":
        optimizer.metrics["sam/sharpness"] = optimizer.metrics["sam/loss_perturbed"] - update.loss
    _meter(trainer, optimizer)


def _meter(trainer, optimizer) -> None:
    """Add this update's measurements to those that the next `log` will average."""
    metrics, optimizer.metrics = optimizer.metrics, {}
    meter = vars(trainer).setdefault("_hfext_meter", {})
    for name, value in metrics.items():
        total, count = meter.get(name, (0.0, 0))
        meter[name] = total + value, count + 1


def _log(original):
    def log(self, logs, *args, **kwargs):
        meter = vars(self).pop("_hfext_meter", None) if "loss" in logs else None
        for name, (total, count) in (meter or {}).items():
            logs[name] = float(total) / count
        return original(self, logs, *args, **kwargs)

    return log


def _at_trained_weights(original):
    """Evaluation and saving see the trained weights, or an error."""

    def method(self, *args, **kwargs):
        zeroth = zeroth_order_optimizer(self)
        if zeroth is not None:
            if zeroth.is_perturbed:
                raise RuntimeError(f"{original.__name__} was called inside an update, at perturbed weights.")
            zeroth.flush()
        if "hfext_offload" in vars(self.model):
            with without_data_parallel(self, place=False):
                return original(self, *args, **kwargs)
        optimizer = two_pass_optimizer(self)
        if optimizer is not None and optimizer.is_perturbed:
            if vars(self).get("_hfext_inside"):
                raise RuntimeError(f"{original.__name__} was called inside a two-pass update, at perturbed weights.")
            with optimizer.unmoved():  # between two micro-batches of SAMPa
                return original(self, *args, **kwargs)
        return original(self, *args, **kwargs)

    return method


def _load_best(original):
    def load_best(self):
        if two_pass_optimizer(self) is not None:
            _forget(self)
        return original(self)

    return load_best


def _train(original):
    def train(self, *args, **kwargs):
        try:
            return original(self, *args, **kwargs)
        finally:
            if two_pass_optimizer(self) is not None:
                _forget(self)
            zeroth = zeroth_order_optimizer(self)
            if zeroth is not None:
                vars(self).pop("_hfext_zeroth", None)
                zeroth.flush()

    return train


def _save(original):
    def save(self, output_dir):
        original(self, output_dir)
        optimizer = two_pass_optimizer(self)
        # optimizer.pt is written by one process; what differs between processes goes beside it, as the Trainer does
        # with the state of the generators.
        if optimizer is not None and self.args.world_size > 1 and optimizer.rank_state():
            os.makedirs(output_dir, exist_ok=True)
            torch.save(optimizer.rank_state(), _rank_file(output_dir, self.args.process_index))

    return save


def _load(original):
    def load(self, checkpoint):
        original(self, checkpoint)
        optimizer, world = two_pass_optimizer(self), self.args.world_size
        if optimizer is None or checkpoint is None or not optimizer.rank_state():
            return
        if world == 1 and not os.path.isfile(_rank_file(checkpoint, 0)):
            return  # saved by one process: its state came with optimizer.pt
        # Every process must decide alike, or they would wait for each other in the next update.
        same_world = world > 1 and all(os.path.isfile(_rank_file(checkpoint, i)) for i in range(world))
        if same_world and not os.path.isfile(_rank_file(checkpoint, world)):
            own = torch.load(_rank_file(checkpoint, self.args.process_index), weights_only=True, map_location="cpu")
            optimizer.load_rank_state(own)
        else:
            optimizer.load_rank_state(None)

    return load


def _rank_file(folder, rank: int) -> str:
    return os.path.join(folder, f"hfext_state_{rank}.pt")


def _step(original):
    def step(self, model, inputs, num_items_in_batch=None):
        return training_step(original, self, model, inputs, num_items_in_batch)

    return step


class SharpnessAwareMixin:
    """For Trainer subclasses whose `training_step` does not call `super()`: `class T(SharpnessAwareMixin, Custom)`."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        custom = super().training_step
        return training_step(lambda trainer, *args: custom(*args), self, model, inputs, num_items_in_batch)


def install() -> None:
    """Patch `Trainer`; idempotent."""
    patch_method(Trainer, "training_step", _step)
    patch_method(Trainer, "log", _log)
    patch_method(Trainer, "train", _train)
    _zeroth_driver.install()
    patch_method(Trainer, "_load_best_model", _load_best)
    patch_method(Trainer, "_save_optimizer_and_scheduler", _save)
    patch_method(Trainer, "_load_optimizer_and_scheduler", _load)
    for name in ("evaluate", "predict", "save_model"):
        patch_method(Trainer, name, _at_trained_weights)
