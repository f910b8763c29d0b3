"""The attention kernels as operations of torch: forward, backward and decode, each with a fake, and autograd."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from . import _reference
from ._launch import config, interpreted, launch
from ._ops import add_op_namespace_prefix
from .topk import quantiles

Maybe = Optional[Tensor]


def _padded(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


def _setting(op: str, q: Tensor, DV: int, N: int, r: int, gate: bool, halves: bool, dropout: bool) -> dict:
    """Tile sizes, warps and stages, and what every kernel is told about its types."""
    D, M = q.shape[3], q.shape[2]
    kind = "float32" if q.dtype == torch.float32 else "16 bit"
    found = config(op, q, dtype=kind, D=max(_padded(D), _padded(DV)), M=M, N=N, dropout=str(dropout).lower())
    sizes = {"D": D, "R": r, "DV": DV, "BD1": _padded(r), "BDV": _padded(DV), "BD2": _padded(D - r) if gate else 16}
    halves = halves and gate
    low = interpreted() and q.dtype in (torch.bfloat16, torch.float16)
    split = {"GATE": gate, "HALVES": halves, "ALIGN": align(D, r, halves)}
    return {**sizes, **split, "UPCAST": low, "PRECISION": "ieee", **found}


def align(D: int, r: int, halves: bool) -> int:
    """The power of two, at most 16, at whose multiples runs of neighbouring columns begin in both parts."""
    for size in (16, 8, 4, 2):
        if not any(x % size for x in ((r // 2, D // 2) if halves else (r,))):
            return size
    return 1


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


def _scales(scale: float, D: int, r: int, gate: bool) -> tuple[float, float]:
    return _reference.scales(scale, D, r) if gate else (scale, 0.0)


@torch.library.custom_op(add_op_namespace_prefix("attention_forward"), mutates_args=())
def forward(
    q: Tensor, k: Tensor, v: Tensor, lo: Maybe, hi: Maybe, keys: Maybe, mask: Maybe, seed: Maybe, topk: int, r: int,
    gate: bool, halves: bool, unbiased: bool, scale: float, dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """o [B, M, H, DV] in q's dtype; lse and theta [B, H, M] fp32 in units of log 2; masks come as uint8."""
    from ._kernels import spark_forward

    B, H, M, D = q.shape
    HK, N, DV = k.shape[1], k.shape[2], v.shape[3]
    o = q.new_empty(B, M, H, DV)
    lse, theta = (q.new_empty(B, H, M, dtype=torch.float32) for _ in range(2))
    if o.numel() == 0:
        return o, lse, theta
    setting = _setting("forward", q, DV, N, r, gate, halves, dropout_p > 0)
    launch(
        spark_forward, (-(-M // setting["BM"]), B * H),
        q, k, v, o, lse, theta, quantiles(topk, N, q.device), _or(lo, q), _or(hi, q), _or(keys, q), _or(mask, q),
        _or(seed, q), *q.stride(), *k.stride(), *v.stride(), _row_stride(lo), _row_stride(keys), *_strides4(mask),
        H, H // HK, M, N, *_scales(scale, D, r, gate), dropout_p, UNBIASED=unbiased, INTERVAL=lo is not None,
        MASK=mask is not None, KEYS=keys is not None, DROPOUT=dropout_p > 0, **setting,
    )  # fmt: skip
    return o, lse, theta


@forward.register_fake
def _(q, k, v, lo, hi, keys, mask, seed, topk, r, gate, halves, unbiased, scale, dropout_p):
    B, H, M, _ = q.shape
    rows = (q.new_empty(B, H, M, dtype=torch.float32) for _ in range(2))
    return (q.new_empty(B, M, H, v.shape[3]), *rows)


@torch.library.custom_op(add_op_namespace_prefix("attention_backward"), mutates_args=())
def backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, theta: Tensor, lo: Maybe, hi: Maybe,
    keys: Maybe, mask: Maybe, seed: Maybe, r: int, gate: bool, halves: bool, scale: float, dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv in their inputs' dtypes and [B, H, M, D] layouts."""
    from . import _backward

    B, H, M, D = q.shape
    HK, N, DV = k.shape[1], k.shape[2], v.shape[3]
    dq = q.new_empty(B, M, H, D).transpose(1, 2)
    dk = k.new_empty(B, N, HK, D).transpose(1, 2)
    dv = v.new_empty(B, N, HK, DV).transpose(1, 2)
    if min(dq.numel(), dk.numel()) == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    delta = torch.empty_like(lse)
    launch(
        _backward.spark_delta, (-(-M // 64), B * H), o, do, delta, *do.stride(), H, M, DV=DV, BDV=_padded(DV), BM=64
    )
    pointers = [_or(x, q) for x in (keys, mask, seed)]
    strides = [*q.stride(), *k.stride(), *v.stride(), *do.stride()]
    masks = [_row_stride(keys), *_strides4(mask)]
    sizes = [M, N, *_scales(scale, D, r, gate), dropout_p]
    flags = {
        "INTERVAL": lo is not None, "MASK": mask is not None, "KEYS": keys is not None, "DROPOUT": dropout_p > 0
    }  # fmt: skip

    setting = _setting("query_gradient", q, DV, N, r, gate, halves, dropout_p > 0)
    launch(
        _backward.spark_query_gradient, (-(-M // setting["BM"]), B * H),
        q, k, v, do, lse, theta, delta, dq, _or(lo, q), _or(hi, q), *pointers, *strides, *dq.stride()[:3],
        _row_stride(lo), *masks, H, H // HK, *sizes, **flags, **setting,
    )  # fmt: skip

    setting = _setting("key_gradient", q, DV, N, r, gate, halves, dropout_p > 0)
    first, last = (q, q) if lo is None else query_ranges(lo, hi, N, setting["BN"])
    for wanted in pieces(setting.pop("APART", 0), setting["BD1"], gate):
        launch(
            _backward.spark_key_gradient, (-(-N // setting["BN"]), B * HK),
            q, k, v, do, lse, theta, delta, dk, dv, _or(lo, q), _or(hi, q), first, last, *pointers, *strides,
            *dk.stride()[:3], *dv.stride()[:3], _row_stride(lo), _row_stride(None if lo is None else first), *masks,
            HK, H // HK, *sizes, **flags, **wanted, **setting,
        )  # fmt: skip
    return dq, dk, dv


@backward.register_fake
def _(do, q, k, v, o, lse, theta, lo, hi, keys, mask, seed, r, gate, halves, scale, dropout_p):
    return tuple(x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2) for x in (q, k, v))


def pieces(apart: int, BD1: int, gate: bool) -> list[dict]:
    """What each launch of the gradient of keys and values makes: everything; keys and values apart (1); or the two
    parts of the keys apart as well, or two halves of the columns where there is one part (2)."""
    whole = {"C0": 0, "CW": BD1, "DK2": gate}
    values = {"C0": 0, "CW": 0, "DK2": False, "DVALUE": True}
    if apart == 0:
        return [{**whole, "DVALUE": True}]
    if apart == 1:
        return [{**whole, "DVALUE": False}, values]
    if gate:
        return [{**whole, "DK2": False, "DVALUE": False}, {**values, "DK2": True, "DVALUE": False}, values]
    return [{**whole, "C0": c, "CW": BD1 // 2, "DVALUE": False} for c in (0, BD1 // 2)] + [values]


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
    q, k, v, lo, hi, keys, mask, seed, _, r, gate, halves, _, scale, dropout_p = inputs
    ctx.save_for_backward(q, k, v, *output, lo, hi, keys, mask, seed)
    ctx.mark_non_differentiable(*output[1:])
    ctx.numbers = (r, gate, halves, scale, dropout_p)
    ctx.set_materialize_grads(False)


def _backward(ctx, do, *_):
    if do is None:
        return (None,) * 15
    return (*backward(do, *ctx.saved_tensors, *ctx.numbers), *(None,) * 12)


forward.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op(add_op_namespace_prefix("attention_decode"), mutates_args=())
def decode(
    q: Tensor, k: Tensor, v: Tensor, lo: Maybe, hi: Maybe, keys: Maybe, mask: Maybe, topk: int, r: int, gate: bool,
    halves: bool, unbiased: bool, scale: float, parts: int,
) -> Tensor:  # fmt: skip
    """As `forward` without a gradient, for few queries: keys in `parts` parts, 0 for as many as the device wants."""
    from . import _decode

    B, H, M, D = q.shape
    HK, N, DV = k.shape[1], k.shape[2], v.shape[3]
    o = q.new_empty(B, M, H, DV)
    if o.numel() == 0 or N == 0:
        return o.zero_()
    setting = _setting("decode", q, DV, N, r, gate, halves, False)
    chunk = chunk_of(q, B * HK, N, setting["BN"], parts)
    parts = -(-N // chunk)
    stats = q.new_empty(5, parts, B, H, M, dtype=torch.float32)
    part_o = q.new_empty(parts, B, H, M, DV, dtype=torch.float32)
    part_lse = q.new_empty(parts, B, H, M, dtype=torch.float32)
    masks = [_or(lo, q), _or(hi, q), _or(keys, q), _or(mask, q)]
    strides = [_row_stride(lo), _row_stride(keys), *_strides4(mask), B, H, H // HK, M, N, chunk]
    flags = {"INTERVAL": lo is not None, "MASK": mask is not None, "KEYS": keys is not None}
    flags["BR"] = _padded(H // HK * M)
    scale1, scale2 = _scales(scale, D, r, gate)
    first = {name: value for name, value in setting.items() if name not in ("DV", "BD2", "BDV", "GATE")}
    launch(
        _decode.spark_moments, (parts, B * HK), q, k, stats, *masks, *q.stride(), *k.stride(), *strides, scale1,
        **flags, **first,
    )  # fmt: skip
    launch(
        _decode.spark_decode, (parts, B * HK), q, k, v, part_o, part_lse, stats, quantiles(topk, N, q.device), *masks,
        *q.stride(), *k.stride(), *v.stride(), *strides, scale1, scale2, UNBIASED=unbiased, **flags, **setting,
    )  # fmt: skip
    launch(
        _decode.spark_combine, (B * H * M,), part_o, part_lse, o, B, H, M, parts, DV=DV, BDV=_padded(DV),
        BP=1 << (parts - 1).bit_length(),
    )  # fmt: skip
    return o


@decode.register_fake
def _(q, k, v, lo, hi, keys, mask, topk, r, gate, halves, unbiased, scale, parts):
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


def chunk_of(q: Tensor, programs: int, N: int, BN: int, parts: int = 0) -> int:
    """Keys of one part, from shapes alone: as many parts as give each multiprocessor two programs, of 256 keys at
    least."""
    if not parts:
        processors = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 8
        parts = max(1, min(-(-2 * processors // programs), N // 256))
    return max(BN, -(-N // (parts * BN)) * BN)
