"""Parts of a gradient for `frugal`: which tensors or coordinates, how to go down into the part and up again.

A part of one matrix is `kind` with a tensor `basis`: `all` (no basis), `columns`, `rows`, `entries` (int32 indices,
ascending), `right` (G -> G P) or `left` (G -> P' G) with orthonormal columns P in float32. What is drawn depends on
(seed, tensor, refresh) alone, on the CPU generator: every process and every device draws the same.
"""

import hashlib
import math

import torch
from torch import Tensor

ORDERS = ("random", "ascending", "descending", "mirror")


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator of its own for `key`."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def active_blocks(count: int, density: float, order: str, refresh: int, seed: int) -> set[int]:
    """The round(density * count) tensors (at least one, unless density is 0) that have state after this refresh.

    Tensors are walked through in `order`, in windows; a pass's last window is filled up from the start of the pass, so
    that each pass meets every tensor.
    """
    size = min(count, max(round(density * count), density > 0))
    if size == 0:
        return set()
    turn, window = divmod(refresh, math.ceil(count / size))
    if order == "random":
        walk = torch.randperm(count, generator=generator(seed, "blocks", turn)).tolist()
    else:
        backwards = order == "descending" or (order == "mirror" and turn % 2 == 1)
        walk = list(range(count))[:: -1 if backwards else 1]
    return {walk[i % count] for i in range(window * size, (window + 1) * size)}


def kind_of(projection: str, shape: tuple[int, int], basis: str = "svd") -> str:
    """What `projection` does to a matrix. GaLore works on its smaller side."""
    if projection != "galore":
        return {"columns": "columns", "rows": "rows", "randk": "entries"}[projection]
    if basis == "permutation":
        return "columns" if shape[0] >= shape[1] else "rows"
    return "right" if shape[0] >= shape[1] else "left"


def size_of(kind: str, shape: tuple[int, int], density: float) -> int:
    """How many columns, rows, entries or directions are kept: at least one, unless density is 0."""
    side = {"columns": shape[1], "right": shape[1], "rows": shape[0], "left": shape[0]}.get(kind, shape[0] * shape[1])
    # 0.29 * 100 is 28.999999999999996.
    wanted = round(density * side) if kind in ("left", "right") else int(density * side + 1e-9)
    return min(side, max(wanted, density > 0))


def draw(kind: str, grad: Tensor, size: int, basis: str, g: torch.Generator) -> Tensor:
    """The basis of a new part. `grad`: [rows, columns], in float32 or float64; the SVD is of this one gradient."""
    rows, columns = grad.shape
    side = {"columns": columns, "right": columns, "rows": rows, "left": rows}.get(kind, rows * columns)
    if kind in ("columns", "rows", "entries"):
        chosen = torch.randperm(side, generator=g)[:size].sort().values
        return chosen.to(grad.device, torch.int32 if side < 2**31 else torch.int64)
    if basis == "svd":
        u, _, vh = torch.linalg.svd(grad, full_matrices=False)
        return (vh[:size].mT if kind == "right" else u[:, :size]).contiguous()
    drawn = torch.randn(side, size, generator=g, dtype=torch.float64)
    return torch.linalg.qr(drawn).Q.to(grad.device, grad.dtype).contiguous()


def down(x: Tensor, kind: str, basis: Tensor | None) -> Tensor:
    """The part of `x` [rows, columns]."""
    match kind:
        case "all":
            return x
        case "columns":
            return x.index_select(1, basis)
        case "rows":
            return x.index_select(0, basis)
        case "entries":
            return x.flatten().index_select(0, basis)
        case "right":
            return x @ basis
        case "left":
            return basis.mT @ x
    raise ValueError(f"kind is {kind!r} but must be one of all, columns, rows, entries, right, left.")


def up(part: Tensor, kind: str, basis: Tensor | None, shape: tuple[int, int]) -> Tensor:
    """A part as a tensor of `shape`, zero outside."""
    match kind:
        case "all":
            return part
        case "columns":
            return part.new_zeros(shape).index_copy_(1, basis.long(), part)
        case "rows":
            return part.new_zeros(shape).index_copy_(0, basis.long(), part)
        case "entries":
            return part.new_zeros(shape[0] * shape[1]).index_copy_(0, basis.long(), part).view(shape)
        case "right":
            return part @ basis.mT
        case "left":
            return basis @ part
    raise ValueError(f"kind is {kind!r} but must be one of all, columns, rows, entries, right, left.")


def complement(x: Tensor, part: Tensor, kind: str, basis: Tensor | None) -> Tensor:
    """x - up(part), exactly zero inside the part.

    Beside a matrix, what is left of a gradient that lies in its range is rounding, of which a sign would make whole
    steps. So entries below 8 roundings of the row or column that was projected become zero.
    """
    if kind not in ("left", "right"):
        return x - up(part, kind, basis, x.shape)
    if basis.shape[0] == basis.shape[1]:
        return torch.zeros_like(x)
    rest = x - up(part, kind, basis, x.shape)
    rounding = 8 * torch.finfo(x.dtype).eps * torch.linalg.vector_norm(x, dim=int(kind == "right"), keepdim=True)
    return rest.masked_fill_(rest.abs() <= rounding, 0.0)
