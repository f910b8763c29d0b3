"""What an edit keeps of one tensor, how that leads from the state before to the state after, and back."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

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


def plan(name: str, old: Tensor, change: Change) -> tuple[Kept, Tensor]:
    """What is to be kept, and what is to be written."""
    if isinstance(change, LowRank):
        left, right = change.left.detach().double(), change.right.detach().double()
        if old.ndim != 2 or (left.shape[0], right.shape[1]) != old.shape or left.shape[1] != right.shape[0]:
            raise ValueError(f"{name}: {list(left.shape)} x {list(right.shape)} does not fit {list(old.shape)}.")
        delta = low_rank_sum(left.to(old.device), right.to(old.device))
        new = (old.double() + delta).to(old.dtype)
        lost = ((new.double() - delta).to(old.dtype).view(BITS[old.element_size()]) != bits_of(old)).reshape(-1)
        index = lost.nonzero()[:, 0]
        tensors = {"left": left, "right": right}
        # A position and a value are three times the size of the bits of an entry.
        if 4 * index.numel() > old.numel():
            tensors |= {"difference": bits_of(old) ^ bits_of(new)}
        else:
            tensors |= {"index": index, "old": old.reshape(-1)[index]}
        kind, before = "low_rank", old
    elif isinstance(change, Entries):
        if change.index.is_floating_point() or change.index.dtype == torch.bool:
            raise ValueError(f"{name}: the positions are {change.index.dtype} but must be integers.")
        index = change.index.to(old.device).long()
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < old.numel():
            raise ValueError(f"{name}: positions must be in [0, {old.numel()}).")
        if index.unique().numel() != index.numel() or change.values.shape != index.shape:
            raise ValueError(f"{name}: {index.numel()} positions for {change.values.numel()} values, or some twice.")
        before, new = old.reshape(-1)[index], change.values.to(old)
        kind, tensors = "entries", {"index": index, "difference": bits_of(before) ^ bits_of(new)}
    else:
        if change.values.shape != old.shape:
            raise ValueError(f"{name}: {list(change.values.shape)} does not fit {list(old.shape)}.")
        before, new = old, change.values.detach().to(old)
        kind, tensors = "dense", {"difference": bits_of(before) ^ bits_of(new)}
    if not new.isfinite().all():
        raise ValueError(f"{name} would hold NaN or infinity.")
    tensors = {key: t.detach().cpu().clone() for key, t in tensors.items()}
    return Kept(name, kind, digest(before), digest(new), tensors), new


def bits_of(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(BITS[tensor.element_size()])


def part_of(tensor: Tensor, kept: Kept) -> Tensor:
    """What the digests are of."""
    tensor = tensor.detach()
    return tensor.reshape(-1)[kept.tensors["index"].to(tensor.device)] if kept.kind == "entries" else tensor


def write(tensor: Tensor, kept: Kept, new: Tensor) -> None:
    if kept.kind != "entries":
        tensor.copy_(new)
    elif tensor.is_contiguous():
        tensor.view(-1)[kept.tensors["index"].to(tensor.device)] = new
    else:
        flat = tensor.reshape(-1)
        flat[kept.tensors["index"].to(tensor.device)] = new
        tensor.copy_(flat.view(tensor.shape))


def moved(part: Tensor, kept: Kept, back: bool) -> Tensor:
    """`part` (see [`part_of`]) in the state before, where it is in the state after, or the other way round."""
    data = {key: t.to(part.device) for key, t in kept.tensors.items()}
    if "difference" in data and (back or kept.kind != "low_rank"):
        return (bits_of(part) ^ data["difference"]).view(part.dtype)
    delta = low_rank_sum(data["left"], data["right"])
    new = (part.double() - delta if back else part.double() + delta).to(part.dtype)
    if back:
        new = new.reshape(-1)
        new[data["index"]] = data["old"]
    return new.view(part.shape)


def leads_there(tensor: Tensor, kept: Kept, back: bool, and_back: bool = False) -> bool:
    """Whether what is kept leads from the one state to the other, by the digests. Nothing is written."""
    old, new = (kept.after, kept.before) if back else (kept.before, kept.after)
    there = moved(part_of(tensor, kept), kept, back)
    return digest(there) == new and (not and_back or digest(moved(there, kept, not back)) == old)


def shape_problem(tensor: Tensor, kept: Kept) -> str:
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


def read(row: Mapping[str, Any], i: int, data: Mapping[str, Tensor]) -> Kept:
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
