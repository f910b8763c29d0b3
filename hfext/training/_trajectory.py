"""What SAF and MESA share: a KL term that holds the outputs of a batch near the outputs of earlier weights.

    loss + coefficient * T^2 * mean_i KL(softmax(z_i_old / T) || softmax(z_i / T)),    no gradient through z_old

All in float32. The mean runs over the rows (tokens) with a label, normalised as the Trainer normalises its loss.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import kl_div, pad
from transformers import Trainer, TrainerCallback
from transformers.utils import logging

from ..compat import CheckpointMixin, loss_shifts_labels
from ..optim._objective import mean_over_update

logger = logging.get_logger(__name__)

CHUNK = 1024  # rows whose float32 probabilities exist at one time


@dataclass(frozen=True, kw_only=True)
class TrajectoryConfig:
    """Options of SAF and MESA.

    Args:
        coefficient: Weight of the KL term, the paper's lambda, >= 0. At 0 training is plain.
        temperature: T, > 0.
        start: The term is on in epochs after this one (epochs count from 0), >= -1. At -1 it is on from the beginning.
        end: Epoch from which it is off again; `None` keeps it on.
    """

    coefficient: float = 0.3
    temperature: float = 5.0
    start: int = 5
    end: int | None = None

    def __post_init__(self):
        check(self, "coefficient", self.coefficient >= 0 and math.isfinite(self.coefficient), "finite and >= 0")
        check(self, "temperature", self.temperature > 0 and math.isfinite(self.temperature), "finite and > 0")
        check(self, "start", isinstance(self.start, int) and self.start >= -1, "an integer >= -1")
        ok = self.end is None or (isinstance(self.end, int) and self.end > self.start)
        check(self, "end", ok, f"None or an integer > start ({self.start})")

    def is_active(self, epoch: int) -> bool:
        return self.coefficient > 0 and self.start < epoch and (self.end is None or epoch < self.end)


def check(config: Any, field: str, ok: bool, allowed: str) -> None:
    if not ok:
        raise ValueError(f"{type(config).__name__}: {field} is {getattr(config, field)!r} but must be {allowed}.")


def trajectory_kl(logits: Tensor, old: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(old / T) || softmax(logits / T)) of each row, float32: [rows, classes] twice -> [rows]."""
    new = torch.log_softmax(logits.float() / temperature, dim=-1)
    old = torch.log_softmax(old.float() / temperature, dim=-1)
    return temperature**2 * kl_div(new, old, reduction="none", log_target=True).sum(-1)


class _RowKL(torch.autograd.Function):
    """`trajectory_kl` with its gradient T (softmax(z / T) - softmax(old / T)), made chunk by chunk on the way."""

    @staticmethod
    def forward(ctx, logits, old, temperature, chunk):
        rows, gradients = [], []
        for z, z_old in zip(logits.split(chunk), old.split(chunk), strict=True):
            new = torch.log_softmax(z.float() / temperature, dim=-1)
            past = torch.log_softmax(z_old.float() / temperature, dim=-1)
            rows.append(temperature**2 * kl_div(new, past, reduction="none", log_target=True).sum(-1))
            gradients.append((temperature * (new.exp_() - past.exp_())).to(logits.dtype))
        ctx.save_for_backward(torch.cat(gradients) if len(gradients) > 1 else gradients[0])
        return torch.cat(rows) if len(rows) > 1 else rows[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_rows):
        (gradient,) = ctx.saved_tensors
        return gradient * grad_rows[:, None].to(gradient.dtype), None, None, None


def chunked_kl(logits: Tensor, old: Tensor, temperature: float, chunk: int = CHUNK) -> Tensor:
    """`trajectory_kl`, of which at most `chunk` rows are in float32 at one time."""
    return _RowKL.apply(logits, old, temperature, chunk)


def current_epoch(trainer: Trainer) -> int:
    """The epoch that the batch in work belongs to, from 0."""
    return int(trainer.state.epoch or 0)


def logits_of(trainer: Trainer, outputs: Any, method: str) -> Tensor:
    """The model's logits, or an error that says why there is nothing to compare."""
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else None
    if not isinstance(logits, Tensor):
        found = sorted(outputs) if isinstance(outputs, Mapping) else type(outputs).__name__
        raise ValueError(
            f"{method} compares logits, but {type(trainer.model).__name__} returned {found}, no tensor `logits`. "
            "Use a loss that keeps the logits (no fused linear cross-entropy) and a model that returns a dict."
        )
    if logits.shape[-1] < 2:
        raise NotImplementedError(f"{method}: a model with one output is a regression, where softmax is constant.")
    return logits


def rows_with_label(trainer: Trainer, inputs: Mapping[str, Any], logits: Tensor, method: str) -> Tensor:
    """Which positions of `logits` [..., classes] the loss counts: bool [...]."""
    shifted, labels = inputs.get("shift_labels"), inputs.get("labels")
    if labels is not None and labels.is_floating_point():
        raise NotImplementedError(f"{method}: float labels (regression, multi-label) have no softmax to compare.")
    shape = logits.shape[:-1]
    if shifted is not None and shifted.shape == shape:
        return shifted != -100
    if labels is None or labels.shape != shape:
        return torch.ones(shape, dtype=torch.bool, device=logits.device)
    mask = labels != -100
    return pad(mask[:, 1:], (0, 1), value=False) if loss_shifts_labels(trainer) else mask


def add_trajectory_loss(
    trainer: Trainer,
    config: TrajectoryConfig,
    loss: Tensor,
    logits: Tensor,
    old: Tensor,
    labelled: Tensor,
    num_items: Any,
    known: Tensor | None = None,
) -> Tensor:
    """`loss` with the KL term; `labelled`, `known`: bool [...], the rows that count and those that have an `old`."""
    shape = (-1, logits.shape[-1])
    rows = chunked_kl(logits.reshape(shape), old.reshape(shape), config.temperature).view(labelled.shape)
    if known is not None:
        rows = torch.where(known, rows, 0.0)
    term = config.coefficient * mean_over_update(trainer, rows, labelled, num_items)
    note(trainer, term.detach())
    return loss + term.to(loss.dtype)


def note(trainer: Trainer, term: Tensor) -> None:
    """Add the term to what the next `log` will average."""
    total, count = vars(trainer).get("_hfext_trajectory", (0.0, 0))
    trainer._hfext_trajectory = total + term, count + 1


class TrajectoryMixin(CheckpointMixin):
    """Abstract: tells the mixin when training begins and when a step was made, and logs the KL term.

    `begin` makes the state of a fresh run. On resume `load_more` has made it before, and `begin` is not called.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            raise NotImplementedError(
                f"{type(self).__name__} does not run with DataParallel: start one process per device (torchrun)."
            )
        self.add_callback(_Events(self))

    def begin(self) -> None:
        """Start from nothing; ends with `super().begin()`."""

    def stepped(self) -> None:
        """After each step of the optimizer; ends with `super().stepped()`."""

    def load_more(self, folder: str) -> None:
        self._hfext_resumed = True
        super().load_more(folder)

    def log(self, logs, *args, **kwargs):
        if "loss" in logs:
            total, count = vars(self).pop("_hfext_trajectory", (0.0, 0))
            logs |= {"trajectory_loss": float(total) / count} if count else {}
        return super().log(logs, *args, **kwargs)

    def warn_if_never_on(self, config: TrajectoryConfig) -> None:
        """A start after the last epoch is plain training; say so."""
        epochs = self.state.num_train_epochs
        if config.coefficient > 0 and epochs <= config.start + 1:
            logger.warning(
                f"{type(config).__name__}: start={config.start} but training has {epochs} epochs, so the KL term is "
                "never on. Set a smaller `start`; -1 is on from the beginning."
            )


class _Events(TrainerCallback):
    def __init__(self, trainer: TrajectoryMixin):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if not vars(self.trainer).pop("_hfext_resumed", False):
            self.trainer.begin()

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.stepped()
