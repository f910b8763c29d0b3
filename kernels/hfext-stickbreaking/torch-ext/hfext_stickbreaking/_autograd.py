"""The kernels as operations of torch: forward, backward and decode, each with a fake; autograd over the first two."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from ._launch import config, interpreted, launch
from ._ops import add_op_namespace_prefix

Maybe = Optional[Tensor]
EDGE_BYTES = 2**28  # most memory for the edges of tiles at one time, as far as one key head's fit


def _padded(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


def _setting(op: str, q: Tensor, D: int, DV: int, M: int, N: int) -> dict:
    """Tile sizes, warps and stages, and what every kernel is told about its types."""
    kind = "float32" if q.dtype == torch.float32 else "16 bit"
    found = config(op, q, dtype=kind, D=max(_padded(D), _padded(DV)), M=M, N=N)
    low = interpreted() and q.dtype in (torch.bfloat16, torch.float16)
    sizes = {"D": D, "DV": DV, "BD": _padded(D), "BDV": _padded(DV)}
    return {**sizes, "UPCAST": low, "PRECISION": "ieee", **found}


def _strides4(x: Maybe) -> tuple[int, int, int, int]:
    """Strides of a [B or 1, H or 1, M or 1, N or 1] tensor, 0 along what it is shared over."""
    if x is None:
        return 0, 0, 0, 0
    return tuple(0 if size == 1 else stride for size, stride in zip(x.shape, x.stride()))


def _row_stride(x: Maybe) -> int:
    return 0 if x is None or x.shape[0] == 1 else x.stride(0)


def _or(x: Maybe, q: Tensor) -> Tensor:
    """A pointer for an argument that is not used."""
    return q if x is None else x


@torch.library.custom_op(add_op_namespace_prefix("forward"), mutates_args=())
def forward(
    q: Tensor, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor, keys: Maybe, mask: Maybe, scale: float
) -> tuple[Tensor, Tensor]:
    """o [B, M, H, DV] in q's dtype and the remainder [B, H, M] fp32; masks come as uint8."""
    from ._kernels import stickbreaking_forward

    B, H, M, D = q.shape
    HK, N, DV = k.shape[1], k.shape[2], v.shape[3]
    o = q.new_empty(B, M, H, DV)
    rest = q.new_empty(B, H, M, dtype=torch.float32)
    if o.numel() == 0:
        return o, rest
    setting = _setting("forward", q, D, DV, M, N)
    launch(
        stickbreaking_forward, (-(-M // setting["BM"]), B * H),
        q, k, v, o, rest, lo, hi, _or(keys, q), _or(mask, q), *q.stride(), *k.stride(), *v.stride(), _row_stride(lo),
        _row_stride(keys), *_strides4(mask), H, H // HK, M, N, scale,
        KEYS=keys is not None, MASK=mask is not None, **setting,
    )  # fmt: skip
    return o, rest


@forward.register_fake
def _(q, k, v, lo, hi, keys, mask, scale):
    B, H, M, _ = q.shape
    return q.new_empty(B, M, H, v.shape[3]), q.new_empty(B, H, M, dtype=torch.float32)


@torch.library.custom_op(add_op_namespace_prefix("backward"), mutates_args=())
def backward(
    do: Tensor, drest: Maybe, q: Tensor, k: Tensor, v: Tensor, rest: Tensor, lo: Tensor, hi: Tensor, keys: Maybe,
    mask: Maybe, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv in their inputs' dtypes and [B, H, M, D] layouts.

    Between its kernels stand two fp32 numbers for each query and tile of keys, 8 M N / BN bytes a head. Heads are
    taken in groups so that these stay under EDGE_BYTES, or one key head at a time; nothing of them outlives the call.
    """
    from . import _kernels

    B, H, M, D = q.shape
    HK, N, DV = k.shape[1], k.shape[2], v.shape[3]
    G = H // HK
    dq = q.new_empty(B, M, H, D).transpose(1, 2)
    dk = k.new_empty(B, N, HK, D).transpose(1, 2)
    dv = v.new_empty(B, N, HK, DV).transpose(1, 2)
    if min(dq.numel(), dk.numel()) == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    names = ("edges", "query_gradient", "key_gradient")
    edges, query, key = (_setting(name, q, D, DV, M, N) for name in names)
    BK = edges["BK"] = query["BK"] = key["BN"]
    BN = edges["BN"] = query["BN"] = min(query["BN"], BK)  # what the edges are of; it divides BK
    edges = {name: value for name, value in edges.items() if name not in ("DV", "BDV")}
    apart = key.pop("APART", False)
    tiles = -(-N // BK) * (BK // BN)
    together = max(1, min(B * HK, EDGE_BYTES // (8 * G * tiles * M)))
    right, left = q.new_empty(2, together * G, tiles, M, dtype=torch.float32)
    first_query, last_query = query_ranges(lo, hi, N, BK)
    strides = [*q.stride(), *k.stride(), *v.stride(), *do.stride()]
    masks = [_row_stride(keys), *_strides4(mask)]
    shown = [_or(keys, q), _or(mask, q)]
    flags = {"KEYS": keys is not None, "MASK": mask is not None}
    for first in range(0, B * HK, together):
        count = min(together, B * HK - first)
        sizes = [H, G, first * G, tiles, M, N, scale]
        launch(
            _kernels.stickbreaking_edges, (-(-M // edges["BM"]), count * G),
            q, k, right, lo, hi, *shown, *q.stride(), *k.stride(), _row_stride(lo), *masks, *sizes, **flags, **edges,
        )  # fmt: skip
        launch(
            _kernels.stickbreaking_query_gradient, (-(-M // query["BM"]), count * G),
            q, k, v, do, rest, _or(drest, q), right, left, dq, lo, hi, *shown, *strides, *dq.stride()[:3],
            _row_stride(lo), *masks, *sizes, **flags, REST=drest is not None, **query,
        )  # fmt: skip
        for made in ({"WITH_K": False}, {"WITH_V": False}) if apart else ({},):
            launch(
                _kernels.stickbreaking_key_gradient, (-(-N // BK), count),
                q, k, v, do, right, left, dk, dv, lo, hi, first_query, last_query, *shown, *strides, *dk.stride()[:3],
                *dv.stride()[:3], _row_stride(lo), _row_stride(first_query), *masks, HK, G, first, tiles, M, N, scale,
                **flags, **{"WITH_K": True, "WITH_V": True, **made}, PARTS=BK // BN, **key,
            )  # fmt: skip
    return dq, dk, dv


@backward.register_fake
def _(do, drest, q, k, v, rest, lo, hi, keys, mask, scale):
    B, H, M, D = q.shape
    HK, N, DV = k.shape[1], k.shape[2], v.shape[3]
    return (
        q.new_empty(B, M, H, D).transpose(1, 2),
        k.new_empty(B, N, HK, D).transpose(1, 2),
        v.new_empty(B, N, HK, DV).transpose(1, 2),
    )


def query_ranges(lo: Tensor, hi: Tensor, N: int, BN: int) -> tuple[Tensor, Tensor]:
    """For each tile of keys the first query that may see it and the one behind the last, int32 [B or 1, tiles].

    Exact where intervals move forward with the queries, as in all usual patterns, and never too small.
    """
    tiles = torch.arange(0, N, BN, device=lo.device, dtype=lo.dtype)
    latest = hi.cummax(-1).values.contiguous()
    earliest = lo.flip(-1).cummin(-1).values.flip(-1).contiguous()
    wanted = tiles.expand(lo.shape[0], -1).contiguous()
    first = torch.searchsorted(latest, wanted, right=True)
    last = torch.searchsorted(earliest, (wanted + BN).clamp_(max=N), right=False)
    return first.int(), last.int()


def _setup(ctx, inputs, output):
    q, k, v, lo, hi, keys, mask, scale = inputs
    ctx.save_for_backward(q, k, v, output[1], lo, hi, keys, mask)
    ctx.scale = scale
    ctx.shape = output[0].shape
    ctx.set_materialize_grads(False)


def _backward(ctx, do, drest):
    q, k, v, rest, lo, hi, keys, mask = ctx.saved_tensors
    if do is None:
        do = q.new_zeros(ctx.shape)
    drest = None if drest is None else drest.contiguous()
    dq, dk, dv = backward(do, drest, q, k, v, rest, lo, hi, keys, mask, ctx.scale)
    return dq, dk, dv, None, None, None, None, None


forward.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op(add_op_namespace_prefix("decode"), mutates_args=())
def decode(
    q: Tensor, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor, keys: Maybe, mask: Maybe, scale: float, parts: int
) -> tuple[Tensor, Tensor]:
    """As `forward` without a gradient, for few queries: keys in `parts` parts, 0 for as many as the device wants."""
    from ._kernels import stickbreaking_combine, stickbreaking_decode

    B, H, M, D = q.shape
    HK, N, DV = k.shape[1], k.shape[2], v.shape[3]
    o = q.new_empty(B, M, H, DV)
    rest = q.new_empty(B, H, M, dtype=torch.float32)
    if o.numel() == 0:
        return o, rest
    setting = _setting("decode", q, D, DV, M, N)
    chunk = chunk_of(q, B * HK, N, setting["BN"], parts)
    parts = max(1, -(-N // chunk))
    part_o = q.new_empty(parts, B, H, M, DV, dtype=torch.float32)
    logs = q.new_empty(parts, B, H, M, dtype=torch.float32)
    launch(
        stickbreaking_decode, (parts, B * HK),
        q, k, v, part_o, logs, lo, hi, _or(keys, q), _or(mask, q), *q.stride(), *k.stride(), *v.stride(),
        _row_stride(lo), _row_stride(keys), *_strides4(mask), B, H, H // HK, M, N, chunk, scale,
        BR=_padded(H // HK * M), KEYS=keys is not None, MASK=mask is not None, **setting,
    )  # fmt: skip
    launch(
        stickbreaking_combine, (B * H * M,), part_o, logs, o, rest, B, H, M, parts, DV=DV, BDV=_padded(DV)
    )  # fmt: skip
    return o, rest


@decode.register_fake
def _(q, k, v, lo, hi, keys, mask, scale, parts):
    B, H, M, _ = q.shape
    return q.new_empty(B, M, H, v.shape[3]), q.new_empty(B, H, M, dtype=torch.float32)


def chunk_of(q: Tensor, programs: int, N: int, BN: int, parts: int = 0) -> int:
    """Keys of one part, from shapes alone: as many parts as give each multiprocessor two programs, of 256 keys at
    least."""
    if not parts:
        processors = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 8
        parts = max(1, min(-(-2 * processors // programs), N // 256))
    return max(BN, -(-N // (parts * BN)) * BN)
