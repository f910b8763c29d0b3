"""SAF: sharpness-aware training at the cost of plain training, by a memory of each example's own earlier logits.

    loss + coefficient * T^2 * mean_i KL(softmax(z_i[e - delay] / T) || softmax(z_i[e] / T))    in epochs e > start

z_i[e] are the logits that example i had in epoch e, recorded on the way without a further forward pass. Only a sharp
drop of the loss makes them move much within `delay` epochs, so the term keeps training out of sharp minima. Records
live in a ring of delay + 1 epochs in a file of 16-bit numbers. An example without a record (skipped by `drop_last`,
first met after a change of data) gets no term.

Sharpness-Aware Training for Free, arXiv 2205.14083. The authors' code keeps 32-bit logits in memory.
"""

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset
from transformers import Trainer
from transformers.trainer_utils import has_length

from ..compat import keep_column, read_items, replaced
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

INDEX = "hfext_index"
FILE = "saf_logits.safetensors"


@dataclass(frozen=True, kw_only=True)
class SAFConfig(TrajectoryConfig):
    """Options of [`SAFMixin`], besides those of [`TrajectoryConfig`].

    Args:
        delay: How many epochs old the logits are that an example is held to, >= 1.
    """

    delay: int = 3

    def __post_init__(self):
        super().__post_init__()
        check(self, "delay", isinstance(self.delay, int) and self.delay >= 1, "an integer >= 1")

    def is_recorded(self, epoch: int) -> bool:
        """Whether some later epoch will read what this one produces."""
        return self.is_active(epoch + self.delay)


def slot_of(epoch: int, delay: int) -> int:
    """The place of an epoch in the ring: what is read now, `delay` epochs back, is overwritten in the next epoch."""
    return epoch % (delay + 1)


class Indexed(Dataset):
    """A dataset whose items know their position."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self._with_index(self.dataset[i], i)

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        items = read_items(self.dataset, indices)
        return [self._with_index(item, i) for item, i in zip(items, indices, strict=True)]

    def _with_index(self, item: Any, i: int) -> dict[str, Any]:
        if not isinstance(item, Mapping):
            raise TypeError(f"SAF needs items that are dicts; item {i} of the dataset is a {type(item).__name__}.")
        return {**item, INDEX: int(i)}


class IndexedCollator:
    """Any collator, with the positions of its items kept past it."""

    def __init__(self, collator: Any):
        self.collator = collator

    def __call__(self, items: list[dict[str, Any]]) -> Any:
        # The items are dicts that `Indexed` made for this batch, so they may be changed.
        index = torch.tensor([item.pop(INDEX) for item in items])
        batch = self.collator(items)
        batch[INDEX] = index
        return batch


class LogitHistory:
    """Ring of the last epochs' logits, float16 [slots, examples, classes], in a file that all processes map.

    `written` [slots, examples] holds 1 + the epoch of each record, 0 for none. Rows are stored less their maximum,
    which softmax does not see and which keeps them inside the range of float16.
    """

    def __init__(self, folder: str | Path, examples: int, classes: int, delay: int, accelerator: Any = None):
        self.delay, shape = delay, (delay + 1, examples, classes)
        parts = {str(Path(folder) / ".saf_logits"): shape, str(Path(folder) / ".saf_written"): shape[:2]}
        sizes = {name: torch.Size(size).numel() for name, size in parts.items()}
        if accelerator is None or accelerator.is_main_process:
            for name, width in zip(sizes, (2, 4), strict=True):
                with open(name, "wb") as file:
                    file.truncate(max(1, sizes[name]) * width)
        if accelerator is not None:
            accelerator.wait_for_everyone()
        tensors = [
            torch.from_file(name, shared=True, size=sizes[name], dtype=dtype).view(parts[name])
            for name, dtype in zip(parts, (torch.float16, torch.int32), strict=True)
        ]
        self.logits, self.written = tensors
        if accelerator is not None:
            accelerator.wait_for_everyone()
        if accelerator is None or accelerator.is_main_process:
            # The mapping outlives the name, so no run leaves a file behind. Windows refuses, and the file stays.
            with contextlib.suppress(OSError):
                for name in parts:
                    os.unlink(name)

    def record(self, epoch: int, index: Tensor, logits: Tensor) -> None:
        """Keep `logits` [batch, classes]. The first record of an example in an epoch stands: a second evaluation of
        the batch, at moved weights, changes nothing."""
        slot = slot_of(epoch, self.delay)
        new = self.written[slot][index] != epoch + 1
        if not new.any():
            return
        rows = logits.detach().float()
        rows = (rows - rows.amax(-1, keepdim=True)).clamp_(min=torch.finfo(torch.float16).min).half().cpu()
        if not new.all():
            index, rows = index[new], rows[new]
        self.logits[slot].index_copy_(0, index, rows)
        self.written[slot].index_fill_(0, index, epoch + 1)

    def recall(self, epoch: int, index: Tensor) -> tuple[Tensor, Tensor]:
        """The records of `epoch`: logits [batch, classes] up to a constant per row, and which rows have one. An epoch
        before the first has none."""
        slot = slot_of(epoch, self.delay)
        known = (self.written[slot][index] == epoch + 1) & (epoch >= 0)
        return self.logits[slot][index].float(), known

    def save(self, path: str | Path) -> None:
        slots, examples, classes = self.logits.shape
        shape = {"examples": examples, "classes": classes, "delay": slots - 1}
        save_file({"logits": self.logits, "written": self.written}, path, metadata={"shape": json.dumps(shape)})


class SAFMixin(TrajectoryMixin):
    """For any Trainer of a sequence classifier: `class T(SAFMixin, Trainer)`, then `T(..., saf=SAFConfig())`.

    Args:
        saf (`SAFConfig`, *optional*): Options.
    """

    def __init__(self, *args, saf: SAFConfig | None = None, **kwargs):
        self.saf = SAFConfig() if saf is None else saf
        if not isinstance(self.saf, SAFConfig):
            raise TypeError(f"saf is a {type(saf).__name__} but must be a SAFConfig.")
        super().__init__(*args, **kwargs)
        if self.train_dataset is not None:
            self._check_dataset()
        local = int(os.environ.get("LOCAL_WORLD_SIZE", self.args.world_size))
        if self.args.world_size != local:
            raise NotImplementedError(
                f"SAF shares one file between processes and so runs on one machine; {local} of {self.args.world_size} "
                "processes are on this one. MESATrainer has no such limit."
            )
        self.history: LogitHistory | None = None

    def get_train_dataloader(self):
        if self.train_dataset is None:
            return super().get_train_dataloader()
        self._check_dataset()
        keep_column(self, INDEX)
        with (
            replaced(self, "train_dataset", Indexed(self.train_dataset)),
            replaced(self, "data_collator", IndexedCollator(self.data_collator)),
        ):
            return super().get_train_dataloader()

    def _check_dataset(self) -> None:
        if isinstance(self.train_dataset, IterableDataset) or not has_length(self.train_dataset):
            raise ValueError(
                f"SAF looks examples up by their position, but train_dataset ({type(self.train_dataset).__name__}) is "
                "a stream or has no length. Use a map-style dataset, or MESATrainer."
            )

    def begin(self) -> None:
        self.history = None
        self.warn_if_never_on(self.saf)
        super().begin()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None, **kwargs):
        index = inputs.pop(INDEX, None)
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch, **kwargs)
        if index is None:
            raise ValueError(
                f"The batch has no {INDEX!r}. {type(self).__name__} overrides `get_train_dataloader` without calling "
                "super(), or a collator after it drops what it does not know."
            )
        labels = {name: inputs[name] for name in ("labels", "shift_labels") if name in inputs}
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch, **kwargs)
        epoch, index = current_epoch(self), index.cpu()
        if self.saf.is_recorded(epoch) or self.saf.is_active(epoch):
            logits = logits_of(self, outputs, "SAF")
            if logits.shape[:-1] != index.shape:
                raise NotImplementedError(
                    f"SAF keeps the logits of each example, which fits sequence classification; here logits are "
                    f"{list(logits.shape)} for {len(index)} examples. MESATrainer takes logits of any shape."
                )
            labelled = rows_with_label(self, labels, logits, "SAF")
            if self.history is None:
                self.history = self._make_history(logits.shape[-1])
            if self.saf.is_recorded(epoch):
                self.history.record(epoch, index, logits)
            if self.saf.is_active(epoch):
                old, known = (x.to(logits.device) for x in self.history.recall(epoch - self.saf.delay, index))
                loss = add_trajectory_loss(
                    self, self.saf, loss, logits, old, labelled, num_items_in_batch, known=known
                )
        return (loss, outputs) if return_outputs else loss

    def _make_history(self, classes: int) -> LogitHistory:
        return LogitHistory(self.args.output_dir, len(self.train_dataset), classes, self.saf.delay, self.accelerator)

    def save_more(self, folder: str) -> None:
        if self.history is not None:
            # Nobody writes into the shared file while it is read: a row without its stamp would be resumed as it is.
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self.history.save(Path(folder) / FILE)
            self.accelerator.wait_for_everyone()
        super().save_more(folder)

    def load_more(self, folder: str) -> None:
        path = Path(folder) / FILE
        self.history = None
        if path.is_file():
            with safe_open(path, "pt") as file:
                shape = json.loads((file.metadata() or {}).get("shape", "{}"))
                self._check_shape(path, shape)
                self.history = self._make_history(shape["classes"])
                if self.accelerator.is_main_process:
                    self.history.logits.copy_(file.get_tensor("logits"))
                    self.history.written.copy_(file.get_tensor("written"))
            self.accelerator.wait_for_everyone()
        elif any(self.saf.is_recorded(epoch) for epoch in range(current_epoch(self))):
            raise ValueError(f"{folder} has no {FILE}: it was not saved by SAFTrainer with these options.")
        super().load_more(folder)

    def _check_shape(self, path: Path, shape: dict[str, int]) -> None:
        here = {"examples": len(self.train_dataset), "delay": self.saf.delay}
        for name, value in here.items():
            if shape.get(name) != value:
                raise ValueError(
                    f"{path} was saved with {shape.get(name)} {name} but there are {value} now: the records "
                    "would belong to other examples. Resume with the same data and options, or start afresh."
                )


class SAFTrainer(SAFMixin, Trainer):
    """`Trainer` with SAF: `SAFTrainer(model, args, train_dataset=data, saf=SAFConfig(coefficient=0.3))`."""


METHOD = Method(
    name="saf",
    family="training",
    title="Sharpness-Aware Training for Free",
    authors="Du et al.",
    arxiv="2205.14083",
    year=2022,
    repo="AngusDujw/SAF",
    status="faithful",
    target="hfext.training.saf:SAFMixin",
    config=SAFConfig,
    usage="hfext.training.SAFTrainer(model, args, train_dataset=data, saf=SAFConfig(coefficient=0.3))",
    summary="Holds each example's outputs near its own outputs of some epochs ago, at the cost of plain training.",
    claim="SAF is at least as accurate as its base optimizer, at the base optimizer's speed.",
    headline=Result(
        metric="top-1 accuracy, %",
        setting="ImageNet-1k, ResNet-50, 90 epochs (as recalled from the paper)",
        value="77.8",
        baseline="76.0 (SAM 76.9)",
    ),
    recipe="training/saf-mlp-digits.yaml",
    notes="Sequence classification, one machine. Defaults are those of the authors' README and launch script "
    "(coefficient 0.3); their argument parser says 0.16.",
)
