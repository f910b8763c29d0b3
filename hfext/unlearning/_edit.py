"""`Edit`: what every change of a trained model returns. It tells what changed, undoes it bit for bit, and stores it.

Of a tensor only the change is kept, on the CPU, such that it leads both ways:

    single entries    their positions, and old XOR new of their bits
    low rank          the factors in float64; new = round(old + L R), old = round(new - L R), and the old value of each
                      entry that this does not bring back (old XOR new where these are many)
    anything else     old XOR new of all bits

`LR` is a sum of outer products, so that every machine rounds it alike. Digests of the tensor before and after (of the
entries alone where single entries were changed) tell which of the two a model holds: what neither fits is refused.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ._lora_export import write_lora

FORMAT = "hfext.edit.1"
KEYS = {
    "entries": [{"index", "difference"}],
    "low_rank": [{"left", "right", "index", "old"}, {"left", "right", "difference"}],
    "dense": [{"difference"}],
}
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Entries:
    """The entries at the flat positions `index` [n] become `values` [n]."""

    index: Tensor
    values: Tensor


@dataclass(frozen=True)
class LowRank:
    """`left` [rows, r] @ `right` [r, columns] is added to a matrix, in the layout in which the model stores it."""

    left: Tensor
    right: Tensor


@dataclass(frozen=True)
class Dense:
    """The tensor becomes `values`, of its shape."""

    values: Tensor


Change = Entries | LowRank | Dense


@dataclass(frozen=True)
class Kept:
    """One changed tensor: its name, the kind of change, the digests before and after, and what leads from one to the
    other."""

    name: str
    kind: str
    before: str
    after: str
    tensors: dict[str, Tensor] = field(repr=False)


def low_rank_sum(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in float64, one outer product after the other."""
    total = left.new_zeros(left.shape[0], right.shape[1], dtype=torch.float64)
    for column, row in zip(left.double().unbind(1), right.double().unbind(0), strict=True):
        total += torch.outer(column, row)
    return total


def digest(tensor: Tensor) -> str:
    bits = tensor.detach().contiguous().view(BITS[tensor.element_size()]).cpu()
    return hashlib.blake2b(bits.numpy(), digest_size=16).hexdigest()


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
                first = tied[id(tensor)][0]
                if any(kept.name == first for kept in edit.kept):
                    raise ValueError(f"{name} is changed twice: it is the same tensor as {first}.")
                kept, new = _plan(first, tensor.detach(), change)
                changed = int((new != _part(tensor, kept)).sum())
                with torch.no_grad():
                    _write(tensor, kept, new)
                edit.kept.append(kept)
                row = {"name": first, "kind": kept.kind, "entries": tensor.numel(), "changed": changed}
                row |= {"share": changed / max(tensor.numel(), 1)}
                row |= {"rank": kept.tensors["left"].shape[1]} if kept.kind == "low_rank" else {}
                row |= {"tied": tied[id(tensor)][1:]} if len(tied[id(tensor)]) > 1 else {}
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
            if tensor is None or _shape_problem(tensor, kept) or digest(_part(tensor, kept)) != expected:
                raise RuntimeError(
                    f"{kept.name} was changed by something else since this edit was {'made' if back else 'undone'}: "
                    "undo the later change first, or load the model again. Nothing was touched."
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
            ValueError: The file is no whole edit, or the model is neither; the model is then as it was.
        """
        try:
            with safe_open(str(path), "pt") as file:
                header = json.loads((file.metadata() or {})["hfext_edit"])
                data = {key: file.get_tensor(key) for key in file.keys()}
            if header["format"] != FORMAT:
                raise ValueError(f"its format is {header['format']!r} and not {FORMAT!r}")
            kept = [_read(row, i, data) for i, row in enumerate(header["tensors"])]
            report = dict(header["report"])
        except (SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path} holds no whole edit: {error}.") from error
        tensors, _ = _tensors(model)
        states = set()
        for part, row in zip(kept, header["tensors"], strict=True):
            tensor = _writable(part.name, tensors)
            problem = _shape_problem(tensor, part)
            if list(tensor.shape) != row["shape"] or str(tensor.dtype) != row["dtype"] or problem:
                raise ValueError(
                    f"{path}: {part.name} is {row['dtype']} {row['shape']} in the file and {tensor.dtype} "
                    f"{list(tensor.shape)} in the model{problem and f': {problem}'}."
                )
            found = digest(_part(tensor, part))
            states.add({part.after: "after", part.before: "before"}.get(found, part.name))
        if not states <= {"before"} and not states <= {"after"}:
            raise ValueError(
                f"{path}: the model holds neither the weights before this edit nor those after it "
                f"(seen: {', '.join(sorted(states))}). Nothing was touched."
            )
        edit = cls(model, kept, report, applied=states == {"after"})
        if not edit.applied:
            edit.redo()
        return edit

    def to_lora(self, folder: str | Path | None = None) -> tuple[Any, dict[str, Tensor]]:
        """The change as a LoRA adapter of the model before the edit; also written into `folder` if given.

        Returns:
            `LoraConfig` (r is the rank and so is alpha: the scaling is 1) and its weights.

        Raises:
            ValueError: Some change is not of low rank, or not of a linear layer's weight.
        """
        return write_lora(self.model, self.kept, folder)


def _tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[int, list[str]]]:
    """All parameters and buffers by all their names, and the names of each, first the one that is used."""
    named = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    names: dict[int, list[str]] = {}
    for name, tensor in named.items():
        names.setdefault(id(tensor), []).append(name)
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


def _part(tensor: Tensor, kept: Kept) -> Tensor:
    """What the digests are of."""
    tensor = tensor.detach()
    return tensor.reshape(-1)[kept.tensors["index"].to(tensor.device)] if kept.kind == "entries" else tensor


def _write(tensor: Tensor, kept: Kept, new: Tensor) -> None:
    if kept.kind != "entries":
        tensor.copy_(new)
    elif tensor.is_contiguous():
        tensor.view(-1)[kept.tensors["index"].to(tensor.device)] = new
    else:
        flat = tensor.reshape(-1)
        flat[kept.tensors["index"].to(tensor.device)] = new
        tensor.copy_(flat.view(tensor.shape))


def _plan(name: str, old: Tensor, change: Change) -> tuple[Kept, Tensor]:
    """What is to be kept, and what is to be written."""
    if isinstance(change, LowRank):
        left, right = change.left.detach().double(), change.right.detach().double()
        if old.ndim != 2 or (left.shape[0], right.shape[1]) != old.shape or left.shape[1] != right.shape[0]:
            raise ValueError(f"{name}: {list(left.shape)} x {list(right.shape)} does not fit {list(old.shape)}.")
        delta = low_rank_sum(left.to(old.device), right.to(old.device))
        new = (old.double() + delta).to(old.dtype)
        lost = ((new.double() - delta).to(old.dtype).view(BITS[old.element_size()]) != _bits(old)).reshape(-1)
        index = lost.nonzero()[:, 0]
        tensors = {"left": left, "right": right}
        # A position and a value are three times the size of the bits of an entry.
        if 4 * index.numel() > old.numel():
            tensors |= {"difference": _bits(old) ^ _bits(new)}
        else:
            tensors |= {"index": index, "old": old.reshape(-1)[index]}
        kind, before = "low_rank", old
    elif isinstance(change, Entries):
        index = change.index.to(old.device)
        if index.unique().numel() != index.numel() or change.values.shape != index.shape:
            raise ValueError(f"{name}: {index.numel()} positions for {change.values.numel()} values, or some twice.")
        before, new = old.reshape(-1)[index], change.values.to(old)
        kind, tensors = "entries", {"index": index, "difference": _bits(before) ^ _bits(new)}
    else:
        if change.values.shape != old.shape:
            raise ValueError(f"{name}: {list(change.values.shape)} does not fit {list(old.shape)}.")
        before, new = old, change.values.detach().to(old)
        kind, tensors = "dense", {"difference": _bits(before) ^ _bits(new)}
    if not new.isfinite().all():
        raise ValueError(f"{name} would hold NaN or infinity.")
    tensors = {key: t.detach().cpu().clone() for key, t in tensors.items()}
    return Kept(name, kind, digest(before), digest(new), tensors), new


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(BITS[tensor.element_size()])


@torch.no_grad()
def _move(tensor: Tensor, kept: Kept, back: bool) -> None:
    """From the state after to the state before, or the other way round."""
    data = {key: t.to(tensor.device) for key, t in kept.tensors.items()}
    if "difference" in data:
        _write(tensor, kept, (_bits(_part(tensor, kept)) ^ data["difference"]).view(tensor.dtype))
        return
    delta = low_rank_sum(data["left"], data["right"])
    moved = (tensor.double() - delta if back else tensor.double() + delta).to(tensor.dtype).reshape(-1)
    if back:
        moved[data["index"]] = data["old"]
    tensor.copy_(moved.view(tensor.shape))


def _shape_problem(tensor: Tensor, kept: Kept) -> str:
    """Why the kept change cannot belong to the tensor, or nothing."""
    data, bits = kept.tensors, BITS.get(tensor.element_size())
    if (
        "difference" in data
        and data["difference"].dtype != bits
        or "old" in data
        and data["old"].dtype != tensor.dtype
    ):
        return "another type"
    if "index" in data:
        index = data["index"]
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < tensor.numel():
            return "positions outside it"
        if index.unique().numel() != index.numel():
            return "positions twice"
    if "difference" in data and kept.kind != "entries" and data["difference"].shape != tensor.shape:
        return "another shape"
    if kept.kind == "low_rank" and (data["left"].shape[0], data["right"].shape[1]) != tuple(tensor.shape):
        return "factors of another shape"
    return ""


def _read(row: Mapping[str, Any], i: int, data: Mapping[str, Tensor]) -> Kept:
    tensors = {key.partition(".")[2]: tensor for key, tensor in data.items() if key.startswith(f"{i}.")}
    if set(tensors) not in KEYS[row["kind"]]:
        raise ValueError(f"{row['name']}: {row['kind']} with {', '.join(sorted(tensors)) or 'nothing'}")
    if "index" in tensors:
        shapes = {tuple(tensors[key].shape) for key in ("index", "old", "difference") if key in tensors}
        if len(shapes) > 1 or tensors["index"].ndim != 1:
            raise ValueError(f"{row['name']}: positions and values are not equally many")
    if "index" in tensors and tensors["index"].dtype != torch.int64:
        raise ValueError(f"{row['name']}: index is {tensors['index'].dtype}")
    if "left" in tensors and (
        tensors["left"].ndim != 2
        or tensors["right"].ndim != 2
        or tensors["left"].shape[1] != tensors["right"].shape[0]
        or {tensors["left"].dtype, tensors["right"].dtype} != {torch.float64}
    ):
        raise ValueError(f"{row['name']}: the factors do not fit each other")
    return Kept(str(row["name"]), row["kind"], str(row["before"]), str(row["after"]), tensors)
