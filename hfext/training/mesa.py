"""MESA: SAF without the memory of every example. The earlier outputs are those of an average of past weights.

    v <- decay * v + (1 - decay) * w                      after each step of the optimizer, from v = w at the start
    loss + coefficient * T^2 * mean_i KL(softmax(f_v(x_i) / T) || softmax(f_w(x_i) / T))    in epochs e > start

One more forward pass, without gradient. The averaged model is evaluated in eval mode (no dropout, its own averaged
BatchNorm statistics), as in the authors' code; the paper does not say. Parameters that are frozen when training starts
are shared with the model, not copied. The average of 16-bit weights is kept in float32: at decay 0.9998 a 16-bit one
would never move.

Sharpness-Aware Training for Free, arXiv 2205.14083.
"""

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import has_length

from ..registry import Method, Result
from ._trajectory import (
    TrajectoryConfig,
    TrajectoryMixin,
    add_trajectory_loss,
    check,
    current_epoch,
    logits_of,
    rows_with_label,
)

FILE = "mesa_average.safetensors"


@dataclass(frozen=True, kw_only=True)
class MESAConfig(TrajectoryConfig):
    """Options of [`MESAMixin`], besides those of [`TrajectoryConfig`].

    Args:
        decay: Of the average, in [0, 1]. 0 is the model one step ago, 1 the model at the start. The default averages
            over 5000 steps, which is about four epochs of the paper's ImageNet training; scale it with your epochs.
    """

    coefficient: float = 0.8
    decay: float = 0.9998

    def __post_init__(self):
        super().__post_init__()
        check(self, "decay", 0 <= self.decay <= 1, "in [0, 1]")


def average_(average: list[Tensor], current: list[Tensor], decay: float) -> None:
    """average <- decay * average + (1 - decay) * current, in place; equal entries stay equal bit for bit."""
    torch._foreach_lerp_(average, [w.detach().to(v.dtype) for v, w in zip(average, current, strict=True)], 1 - decay)


class AveragedModel:
    """A copy of `model` in eval mode whose trained weights and floating-point buffers follow it as an average."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay, self.source = decay, model
        frozen = {id(p): p for p in model.parameters() if not p.requires_grad}
        self.module = copy.deepcopy(model, memo=frozen).eval().requires_grad_(False)
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        names += [name for name, _ in model.named_buffers()]
        here, there = ({**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (self.module, model))
        self.counts = [(here[n], there[n]) for n in names if not there[n].is_floating_point()]
        names = [n for n in names if there[n].is_floating_point()]
        self.weights = {n: here[n] for n in names}
        self.current = [there[n] for n in names]
        self.average = {n: w if w.dtype.itemsize > 2 else w.float() for n, w in self.weights.items()}

    @torch.no_grad()
    def update(self) -> None:
        average_(list(self.average.values()), self.current, self.decay)
        for mine, its in self.counts:
            mine.copy_(its)
        self._publish()

    def _publish(self) -> None:
        for name, average in self.average.items():
            if average is not self.weights[name]:
                self.weights[name].copy_(average)

    def save(self, path: str | Path) -> None:
        save_file({name: v.detach().contiguous() for name, v in self.average.items()}, path)

    @torch.no_grad()
    def load(self, path: str | Path) -> None:
        saved = load_file(path)
        differ = saved.keys() ^ self.average.keys() or {
            n for n, v in self.average.items() if (saved[n].shape, saved[n].dtype) != (v.shape, v.dtype)
        }
        if differ:
            raise ValueError(f"{path} belongs to another model: {len(differ)} tensors differ, as {min(differ)!r}.")
        for name, v in self.average.items():
            v.copy_(saved[name])
        for mine, its in self.counts:
            mine.copy_(its)
        self._publish()


def without_labels(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The batch, without labels where `forward` can do without them: a loss of its own would only cost time."""
    arguments = inspect.signature(model.forward).parameters
    label = arguments.get("labels")
    needed = label is not None and label.default is inspect.Parameter.empty
    # An encoder-decoder makes its decoder's input from the labels.
    needed |= "decoder_input_ids" in arguments and "decoder_input_ids" not in inputs
    return {k: v for k, v in inputs.items() if needed or k not in ("labels", "shift_labels", "num_items_in_batch")}


class MESAMixin(TrajectoryMixin):
    """For any Trainer of a model with logits: `class T(MESAMixin, Trainer)`, then `T(..., mesa=MESAConfig())`.

    Args:
        mesa (`MESAConfig`, *optional*): Options.
    """

    def __init__(self, *args, mesa: MESAConfig | None = None, **kwargs):
        self.mesa = MESAConfig() if mesa is None else mesa
        if not isinstance(self.mesa, MESAConfig):
            raise TypeError(f"mesa is a {type(mesa).__name__} but must be a MESAConfig.")
        super().__init__(*args, **kwargs)
        if self.args.fsdp or self.args.deepspeed:
            raise NotImplementedError(
                "MESA copies the whole model, so it does not run with FSDP or DeepSpeed. Use DistributedDataParallel."
            )
        if self.train_dataset is not None and not has_length(self.train_dataset) and self.mesa.start >= 0:
            raise ValueError(
                f"MESAConfig: start is {self.mesa.start}, an epoch, but train_dataset is a stream, which has no "
                "epochs. Set start=-1."
            )
        self.averaged: AveragedModel | None = None

    def begin(self) -> None:
        self.averaged = AveragedModel(self.model, self.mesa.decay)
        self.warn_if_never_on(self.mesa)
        super().begin()

    def stepped(self) -> None:
        if not self.accelerator.optimizer_step_was_skipped:
            self.averaged.update()
        super().stepped()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None, **kwargs):
        if not model.training or not self.mesa.is_active(current_epoch(self)):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch, **kwargs)
        labels = {name: inputs[name] for name in ("labels", "shift_labels") if name in inputs}
        teacher = self.averaged.module
        with torch.no_grad():
            old = logits_of(self, teacher(**without_labels(teacher, inputs)), "MESA")
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch, **kwargs)
        logits = logits_of(self, outputs, "MESA")
        labelled = rows_with_label(self, labels, logits, "MESA")
        loss = add_trajectory_loss(self, self.mesa, loss, logits, old, labelled, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def save_more(self, folder: str) -> None:
        if self.args.should_save:
            self.averaged.save(Path(folder) / FILE)
        super().save_more(folder)

    def load_more(self, folder: str) -> None:
        path = Path(folder) / FILE
        if not path.is_file():
            raise ValueError(f"{folder} has no {FILE}: it was not saved by MESATrainer.")
        self.averaged = AveragedModel(self.model, self.mesa.decay)
        self.averaged.load(path)
        super().load_more(folder)


class MESATrainer(MESAMixin, Trainer):
    """`Trainer` with MESA: `MESATrainer(model, args, train_dataset=data, mesa=MESAConfig(decay=0.999))`."""


METHOD = Method(
    name="mesa",
    family="training",
    title="Sharpness-Aware Training for Free",
    authors="Du et al.",
    arxiv="2205.14083",
    year=2022,
    repo="AngusDujw/SAF",
    status="faithful",
    target="hfext.training.mesa:MESAMixin",
    config=MESAConfig,
    usage="hfext.training.MESATrainer(model, args, train_dataset=data, mesa=MESAConfig(decay=0.9998))",
    summary="Holds the outputs near those of an average of past weights, for one more forward pass.",
    claim="MESA is at least as accurate as its base optimizer and much faster than SAM.",
    headline=Result(
        metric="top-1 accuracy, %",
        setting="ImageNet-1k, ResNet-50, 90 epochs (as recalled from the paper)",
        value="77.5",
        baseline="76.0 (SAM 76.9)",
    ),
    recipe="training/mesa-mlp-digits.yaml",
    notes="Any model with logits. Defaults are those of the authors' README and launch script (coefficient 0.8, decay "
    "of timm's averaged model); their argument parser says 0.3.",
)
