"""`Edit`: what every change of a trained model returns. It tells what changed, undoes it bit for bit, and stores it.

Of a tensor only the change is kept, on the CPU, such that it leads both ways:

    single entries    their positions, and old XOR new of their bits
    low rank          the factors in float64; new = round(old + L R), old = round(new - L R), and the old value of each
                      entry that this does not bring back (old XOR new where these are many)
    anything else     old XOR new of all bits

`LR` is a sum of outer products, so that every machine rounds it alike. Digests of the tensor before and after (of the
entries alone where single entries were changed) tell which of the two a model holds: what neither fits is refused, and
so is what does not lead from the one to the other, before anything is written.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ._edit_changes import (
    BITS,
    Change,
    Dense,
    Entries,
    Kept,
    LowRank,
    digest,
    leads_there,
    low_rank_sum,
    moved,
    part_of,
    plan,
    read,
    shape_problem,
    write,
)
from ._lora_export import write_lora

__all__ = ["Dense", "Edit", "Entries", "Kept", "LowRank", "digest", "low_rank_sum", "refuse_quantized"]

FORMAT = "hfext.edit.1"


def refuse_quantized(model: nn.Module) -> None:
    """`NotImplementedError` that names the first module whose weights are not plain floating-point parameters."""
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        coded = [n for n, p in own.items() if not p.is_floating_point() or p.element_size() == 1]
        if isinstance(module, nn.Linear | Conv1D) and "weight" not in own:
            coded = ["weight"]
        if coded:
            raise NotImplementedError(
                f"{name or type(module).__name__}.{coded[0]} is no plain floating-point parameter (quantised?): load "
                "the model without quantisation, or dequantise it (`model.dequantize()`), and edit that."
            )


class Edit:
    """A change that was made to `model`. Made by [`Edit.make`] and by every post-hoc edit of the library.

    As a context manager it undoes itself at the exit: `with ssd(model, rows, data=all_rows): ...`.

    Attributes:
        model: The changed model, in place.
        report: `parameters` holds a row for each changed tensor: name, the names tied to it, the kind of change, how
            many entries changed and which share. Methods add keys of their own.
        applied: Whether the change is in the model now.
    """

    def __init__(self, model: nn.Module, kept: list[Kept], report: dict[str, Any], applied: bool = True):
        self.model, self.kept, self.report, self.applied = model, kept, report, applied

    def __repr__(self) -> str:
        return f"Edit({len(self.kept)} tensors, {'applied' if self.applied else 'undone'})"

    @classmethod
    def make(
        cls,
        model: nn.Module,
        changes: Mapping[str, Change] | Iterable[tuple[str, Change]],
        report: Mapping[str, Any] | None = None,
    ) -> "Edit":
        """Write `changes`, by names of parameters or buffers. If one fails, the earlier ones are taken back.

        An iterable is read as it goes, so that a generator needs to hold one new tensor at a time.
        """
        tensors, tied = _tensors(model)
        edit = cls(model, [], {**(report or {}), "parameters": []})
        try:
            for name, change in changes.items() if isinstance(changes, Mapping) else changes:
                tensor = _writable(name, tensors)
                names = tied[_place(tensor)]
                first = names[0]
                if any(kept.name == first for kept in edit.kept):
                    raise ValueError(f"{name} is changed twice: it is the same tensor as {first}.")
                kept, new = plan(first, tensor.detach(), change)
                changed = int((new != part_of(tensor, kept)).sum())
                with torch.no_grad():
                    write(tensor, kept, new)
                edit.kept.append(kept)
                row = {"name": first, "kind": kept.kind, "entries": tensor.numel(), "changed": changed}
                row |= {"share": changed / max(tensor.numel(), 1)}
                row |= {"rank": kept.tensors["left"].shape[1]} if kept.kind == "low_rank" else {}
                row |= {"tied": names[1:]} if len(names) > 1 else {}
                edit.report["parameters"].append(row)
        except BaseException:
            for kept in edit.kept:
                _move(tensors[kept.name], kept, back=True)
            raise
        return edit

    def undo(self) -> None:
        """Bring every changed tensor back, bit for bit.

        Raises:
            RuntimeError: It was undone already, or something else wrote to what the edit wrote (training, a later
                edit, a cast): later changes must be undone first. Nothing is touched then. For changes of single
                entries only these entries count.
        """
        if not self.applied:
            raise RuntimeError("This edit was undone already: the model is as it was before.")
        self._switch(back=True)

    def redo(self) -> None:
        """Make an undone change again, bit for bit; `RuntimeError` as in [`Edit.undo`]."""
        if self.applied:
            raise RuntimeError("This edit is in the model already: undo it first.")
        self._switch(back=False)

    def __enter__(self) -> "Edit":
        return self

    def __exit__(self, *_: object) -> None:
        if self.applied:
            self.undo()

    def _switch(self, back: bool) -> None:
        tensors, _ = _tensors(self.model)
        for kept in self.kept:
            tensor = tensors.get(kept.name)
            expected = kept.after if back else kept.before
            if tensor is None or shape_problem(tensor, kept) or digest(part_of(tensor, kept)) != expected:
                raise RuntimeError(
                    f"{kept.name} was changed by something else since this edit was {'made' if back else 'undone'}: "
                    "undo the later change first, or load the model again. Nothing was touched."
                )
            if not leads_there(tensor, kept, back):
                raise RuntimeError(
                    f"What is kept of {kept.name} was altered: it leads elsewhere. Nothing was touched."
                )
        for kept in self.kept:
            _move(tensors[kept.name], kept, back)
        self.applied = not back

    def save(self, path: str | Path) -> None:
        """Write the edit as one safetensors file, from which [`Edit.load`] makes or undoes it in another process."""
        tensors, _ = _tensors(self.model)
        rows = []
        for kept in self.kept:
            row = {"name": kept.name, "kind": kept.kind, "before": kept.before, "after": kept.after}
            tensor = tensors[kept.name]
            rows.append({**row, "shape": list(tensor.shape), "dtype": str(tensor.dtype)})
        header = {"format": FORMAT, "tensors": rows, "report": self.report}
        data = {f"{i}.{key}": t.contiguous() for i, kept in enumerate(self.kept) for key, t in kept.tensors.items()}
        save_file(data, path, metadata={"hfext_edit": json.dumps(header)})

    @classmethod
    def load(cls, path: str | Path, model: nn.Module) -> "Edit":
        """The stored edit on `model`, which holds the state before (the edit is made) or after it (it can be undone).

        Raises:
            ValueError: The file is no whole edit or was altered, or the model is neither; it is then as it was.
        """
        try:
            with safe_open(str(path), "pt") as file:
                header = json.loads((file.metadata() or {})["hfext_edit"])
                data = {key: file.get_tensor(key) for key in file.keys()}
            if header["format"] != FORMAT:
                raise ValueError(f"its format is {header['format']!r} and not {FORMAT!r}")
            kept = [read(row, i, data) for i, row in enumerate(header["tensors"])]
            forms = [(row["shape"], row["dtype"]) for row in header["tensors"]]
            report = dict(header["report"])
        except (SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path} holds no whole edit: {error}.") from error
        tensors, tied = _tensors(model)
        states, seen = set(), set()
        for part, (shape, dtype) in zip(kept, forms, strict=True):
            tensor = _writable(part.name, tensors)
            if _place(tensor) in seen:
                raise ValueError(f"{path} changes one tensor twice: {' = '.join(tied[_place(tensor)])}.")
            seen.add(_place(tensor))
            problem = shape_problem(tensor, part)
            if list(tensor.shape) != shape or str(tensor.dtype) != dtype or problem:
                raise ValueError(
                    f"{path}: {part.name} is {dtype} {shape} in the file and {tensor.dtype} "
                    f"{list(tensor.shape)} in the model{problem and f': {problem}'}."
                )
            found = digest(part_of(tensor, part))
            # A change to what was there before fits both.
            if not found == part.before == part.after:
                states.add({part.after: "after", part.before: "before"}.get(found, part.name))
        if not states <= {"before"} and not states <= {"after"}:
            raise ValueError(
                f"{path}: the model holds neither the weights before this edit nor those after it "
                f"(seen: {', '.join(sorted(states))}). Nothing was touched."
            )
        edit = cls(model, kept, report, applied=states == {"after"})
        for part in kept:
            if not leads_there(tensors[part.name].detach(), part, back=edit.applied, and_back=True):
                raise ValueError(
                    f"{path} was altered: what it has of {part.name} does not lead from the weights before to those "
                    "after the edit, and back. Nothing was touched."
                )
        if not edit.applied:
            for part in kept:
                _move(tensors[part.name], part, back=False)
            edit.applied = True
        return edit

    def to_lora(self, folder: str | Path | None = None) -> tuple[Any, dict[str, Tensor]]:
        """The change as a LoRA adapter of the model before the edit; also written into `folder` if given.

        Returns:
            `LoraConfig` (r is the rank and so is alpha: the scaling is 1) and its weights.

        Raises:
            ValueError: Some change is not of low rank, or not of a linear layer's weight.
        """
        return write_lora(self.model, self.kept, folder)


def _place(tensor: Tensor) -> tuple:
    """The same for two tensors that are one: tied parameters, or two objects that share their storage."""
    where = 0 if tensor.is_meta else tensor.untyped_storage().data_ptr()
    if not where:
        return (id(tensor),)
    return tensor.device, where, tensor.storage_offset(), tensor.dtype, tensor.shape, tensor.stride()


def _tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[tuple, list[str]]]:
    """All parameters and buffers by all their names, and the names of each, first the one that is used."""
    named = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    names: dict[tuple, list[str]] = {}
    for name, tensor in named.items():
        names.setdefault(_place(tensor), []).append(name)
    return named, names


def _writable(name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    if name not in tensors:
        raise ValueError(f"The model has no parameter {name!r} (is it quantised, or another model?).")
    tensor = tensors[name]
    if not tensor.is_floating_point() or tensor.element_size() not in BITS:
        raise NotImplementedError(f"{name} is {tensor.dtype}: dequantise the model, only plain floats are edited.")
    if tensor.is_meta:
        raise NotImplementedError(f"{name} is not in memory (offloaded): load the model on a device, and edit that.")
    return tensor


@torch.no_grad()
def _move(tensor: Tensor, kept: Kept, back: bool) -> None:
    """From the state after to the state before, or the other way round."""
    write(tensor, kept, moved(part_of(tensor, kept), kept, back))
