"""`Objective`: what an unlearning method is to the Trainer. One class is one method; its maths are pure functions.

An objective names the parts of data that it needs and, for each, what a frozen reference must say about it; `terms`
turns both into a loss. A `TwoGradientObjective` gets the gradients of two terms apart and makes one of them.
"""

import dataclasses
import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..registry import methods, suggest
from ._terms import RowLoss, Scored, Term, counts_of, negative_log_likelihood

Part = Literal["forget", "retain", "alternate", "decouple"]
PARTS: tuple[str, ...] = ("forget", "retain", "alternate", "decouple")
Batch = Mapping[str, Mapping[str, Tensor]]


def check(config: Any, field: str, ok: bool, allowed: str) -> None:
    """Raise unless a field of a config is in its range."""
    if not ok:
        raise ValueError(f"{type(config).__name__}: {field} is {getattr(config, field)!r} but must be {allowed}.")


def finite(config: Any, *fields: str) -> None:
    """Raise unless the fields are finite and not negative."""
    for field in fields:
        check(config, field, 0 <= getattr(config, field) < float("inf"), "finite and >= 0")


class Objective(ABC):
    """Abstract. `Objective(**options)` takes the fields of its `Config`.

    Attributes:
        needs: Parts of the data without which there is no loss.
        reference: For a part, what the reference is asked: "nll" (of whole rows) or "outputs" (what `forward` gives).
        epoch, epochs: Where the training stands; kept by the Trainer.
    """

    Config: ClassVar[type]
    needs: tuple[str, ...] = ("forget", "retain")
    reference: Mapping[str, str] = {}
    epoch: float = 0.0
    epochs: float = 1.0

    def __init__(self, **options: Any):
        fields = [f.name for f in dataclasses.fields(self.Config)]
        for name in options:
            if name not in fields:
                raise TypeError(f"{type(self).__name__} has no option {name!r}. {suggest(name, fields)}")
        self.config = self.Config(**options)

    @abstractmethod
    def terms(self, now: dict[str, Any], reference: dict[str, Any]) -> dict[str, Term]:
        """The parts of the loss by name, from what `forward` gave for the model and for the reference."""

    def forward(self, model: nn.Module, batch: Batch, of_tokens: RowLoss = negative_log_likelihood) -> dict[str, Any]:
        """What the model says about each part: one forward pass of all rows together."""
        return scored(model, batch, of_tokens)

    def with_row_loss(self, now: dict[str, Any], of_tokens: RowLoss) -> dict[str, Any]:
        """What `forward` gave, with another loss of a token."""
        return {part: Scored(one.logits, one.labels, of_tokens) for part, one in now.items()}

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Numbers of items of a micro-batch, by the names that terms are divided by."""
        return {name: n for part, given in batch.items() for name, n in counts_of(part, given["labels"]).items()}

    def prepare(self, model: nn.Module, data: Any) -> None:  # noqa: B027 (nothing to do for most)
        """When the Trainer is made: may look at the model, and at the rows of each part (`data.parts`)."""

    def begin(self, model: nn.Module) -> None:  # noqa: B027
        """When training begins, before the optimizer is made: may freeze parameters."""

    def release(self) -> None:  # noqa: B027
        """When training has ended, also by an exception: undoes `begin`."""

    def finish(self, trainer: Any) -> None:  # noqa: B027
        """After training, before the model is saved for the last time."""


class TwoGradientObjective(Objective):
    """Abstract: the gradients of the terms "retain" and "forget" are taken apart, each over the whole update."""

    @abstractmethod
    def combine(self, retain: list[Tensor], forget: list[Tensor], losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """Write the gradient of the update into `retain`; both hold one tensor for each trained parameter, and
        `losses` the mean losses of the update. Returns what is to be logged."""

    def terms(self, now, reference):
        return {part: Term(one.token_nll.sum(), f"{part} tokens") for part, one in now.items()}


def joined(batch: Batch) -> tuple[Tensor, Tensor, Callable[[Tensor], dict[str, Tensor]]]:
    """Ids and attention mask of all parts, padded to one length, which leaves every unpadded position as it is; and
    what splits [rows of all parts, ...] by part."""
    parts = {name: batch[name] for name in PARTS if name in batch}
    longest = max(part["input_ids"].shape[1] for part in parts.values())

    def whole(key: str) -> Tensor:
        return torch.cat([F.pad(part[key], (0, longest - part[key].shape[1])) for part in parts.values()])

    def split(x: Tensor) -> dict[str, Tensor]:
        return dict(zip(parts, x.split([len(part["input_ids"]) for part in parts.values()]), strict=True))

    return whole("input_ids"), whole("attention_mask"), split


def scored(model: nn.Module, batch: Batch, of_tokens: RowLoss = negative_log_likelihood) -> dict[str, Scored]:
    """One forward pass over all parts."""
    ids, attention, split = joined(batch)
    logits = split(model(input_ids=ids, attention_mask=attention, use_cache=False).logits)
    return {
        part: Scored.shifted(z[:, : batch[part]["labels"].shape[1]], batch[part]["labels"], of_tokens)
        for part, z in logits.items()
    }


def objective(name: str | Objective, options: Mapping[str, Any] | None = None) -> Objective:
    """An objective by its name and options, or itself."""
    if isinstance(name, Objective):
        if options:
            raise ValueError("objective_args has no meaning beside an Objective: give the options to its constructor.")
        return name
    return objective_class(name)(**(options or {}))


def objective_class(name: str) -> type[Objective]:
    """The class of a name; `ValueError` with the known names otherwise."""
    known = objectives()
    if name not in known:
        raise ValueError(f"objective is {name!r}, which is unknown. {suggest(str(name), known)}")
    return known[name]


def objectives() -> dict[str, type[Objective]]:
    """Every registered objective by name: the methods whose record names a class of this kind."""
    found = {}
    for method in methods("unlearning"):
        module, _, name = method.target.partition(":")
        target = getattr(importlib.import_module(module), name)
        if isinstance(target, type) and issubclass(target, Objective):
            found[method.name] = target
    return found
