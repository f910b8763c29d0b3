"""The kernels as operations of torch: forward, backward and decode, each with a fake; autograd over the first two."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from ._launch import config, interpreted, launch
from ._ops import add_op_namespace_prefix

Maybe = Optional[Tensor]


def _padded(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


def _setting(op: str, q: Tensor, D: int, DV: int, M: int, N: int, features: bool) -> dict:
    """Tile sizes, warps and stages, and what every kernel is told about its types."""
    kind = "float32" if q.dtype == torch.float32 else "16 bit"
    found = config(op, q, dtype=kind, features=str(features).lower(), D=max(_padded(D), _padded(DV)), M=M, N=N)
    sizes = {"D": D, "DV": DV, "BD": _padded(D), "BDV": _padded(DV)}
    low = interpreted() and q.dtype in (torch.bfloat16, torch.float16)
    setting = {**sizes, "UPCAST": low, "PRECISION": "ieee", **found}
    if op in ("forward", "query_gradient"):
        setting.setdefault("SPLIT", True)
    return setting


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


def _flags(softcap: float, lo: Maybe, keys: Maybe, mask: Maybe, slopes: Maybe) -> dict:
    return {
        "INTERVAL": lo is not None,
        "SOFTCAP": softcap > 0,
        "MASK": mask is not None,
        "KEYS": keys is not None,
        "ALIBI": slopes is not None,
    }


def _has_features(softcap: float, *tensors: Maybe) -> bool:
    return softcap > 0 or any(tensor is not None for tensor in tensors)


@torch.library.custom_op(add_op_namespace_prefix("forward"), mutates_args=())
def forward(
    q: Tensor, k: Tensor, v: Tensor, lo: Maybe, hi: Maybe, keys: Maybe, mask: Maybe, bias: Maybe, sink: Maybe,
    slopes: Maybe, seed: Maybe, scale: float, softcap: float, off: int, dropout_p: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """o [B, M, H, DV] in q's dtype and lse [B, H, M] fp32; masks come as uint8."""
    from ._kernels import attention_forward

    B, H, M, D = q.shape
    HK, N, DV = k.shape[1], k.shape[2], v.shape[3]
    o = q.new_empty(B, M, H, DV)
    lse = q.new_empty(B, H, M, dtype=torch.float32)
    if o.numel() == 0:
        return o, lse
    setting = _setting("forward", q, D, DV, M, N, _has_features(softcap, mask, bias, slopes) or dropout_p > 0)
    launch(
        attention_forward, (-(-M // setting["BM"]), B * H),
        q, k, v, o, lse, _or(lo, q), _or(hi, q), _or(keys, q), _or(mask, q), _or(bias, q), _or(sink, q),
        _or(slopes, q), _or(seed, q), *q.stride(), *k.stride(), *v.stride(), _row_stride(lo), _row_stride(keys),
        *_strides4(mask), *_strides4(bias), H, H // HK, M, N, off, scale, softcap, dropout_p,
        **_flags(softcap, lo, keys, mask, slopes), BIAS=bias is not None, SINK=sink is not None,
        DROPOUT=dropout_p > 0, **setting,
    )  # fmt: skip
    return o, lse


@forward.register_fake
def _(q, k, v, lo, hi, keys, mask, bias, sink, slopes, seed, scale, softcap, off, dropout_p):
    B, H, M, _ = q.shape
    return q.new_empty(B, M, H, v.shape[3]), q.new_empty(B, H, M, dtype=torch.float32)


@torch.library.custom_op(add_op_namespace_prefix("backward"), mutates_args=())
def backward(
    do: Tensor, dlse: Maybe, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, lo: Maybe, hi: Maybe,
    keys: Maybe, mask: Maybe, bias: Maybe, sink: Maybe, slopes: Maybe, seed: Maybe, scale: float, softcap: float,
    off: int, dropout_p: float, with_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv in their inputs' dtypes and [B, H, M, D] layouts; dbias, dsink in fp32, empty where not asked."""
    from . import _backward

    B, H, M, D = q.shape
    HK, N, DV = k.shape[1], k.shape[2], v.shape[3]
    dq = q.new_empty(B, M, H, D).transpose(1, 2)
    dk = k.new_empty(B, N, HK, D).transpose(1, 2)
    dv = v.new_empty(B, N, HK, DV).transpose(1, 2)
    dbias = q.new_empty(bias.shape if with_bias else (0,), dtype=torch.float32)
    if min(dq.numel(), dk.numel()) == 0:
        dsink = q.new_zeros(H if sink is not None else 0, dtype=torch.float32)
        return dq.zero_(), dk.zero_(), dv.zero_(), dbias.zero_(), dsink
    delta = torch.empty_like(lse)
    launch(
        _backward.attention_delta, (-(-M // 64), B * H),
        o, do, _or(dlse, q), delta, do.stride(0), do.stride(1), do.stride(2), do.stride(3), H, M,
        DV=DV, BDV=_padded(DV), BM=64, LSE=dlse is not None, UPCAST=True,
    )  # fmt: skip
    dsink = q.new_empty(0, dtype=torch.float32)
    if sink is not None:
        dsink = -((sink.float()[None, :, None] - lse).exp() * delta).double().sum((0, 2)).float()

    pointers = [_or(x, q) for x in (keys, mask, bias, slopes, seed)]
    strides = [*q.stride(), *k.stride(), *v.stride(), do.stride(0), do.stride(1), do.stride(2), do.stride(3)]
    masks = [_row_stride(keys), *_strides4(mask), *_strides4(bias)]
    sizes = [M, N, off, scale, softcap, dropout_p]
    flags = {**_flags(softcap, lo, keys, mask, slopes), "DROPOUT": dropout_p > 0}
    features = _has_features(softcap, mask, bias, slopes) or dropout_p > 0

    setting = _setting("query_gradient", q, D, DV, M, N, features)
    launch(
        _backward.attention_query_gradient, (-(-M // setting["BM"]), B * H),
        q, k, v, do, lse, delta, dq, _or(lo, q), _or(hi, q), *pointers, *strides, *dq.stride()[:3],
        _row_stride(lo), *masks, H, H // HK, *sizes, **flags, BIAS=bias is not None, **setting,
    )  # fmt: skip

    setting = _setting("key_gradient", q, D, DV, M, N, features)
    first, last = (q, q) if lo is None else query_ranges(lo, hi, N, setting["BN"])
    for made in ({"WITH_K": False}, {"WITH_V": False}) if setting.pop("APART", False) else ({},):
        launch(
            _backward.attention_key_gradient, (-(-N // setting["BN"]), B * HK),
            q, k, v, do, lse, delta, dk, dv, _or(lo, q), _or(hi, q), first, last, *pointers, *strides,
            *dk.stride()[:3], *dv.stride()[:3], _row_stride(lo), _row_stride(None if lo is None else first), *masks,
            HK, H // HK, *sizes, **flags, BIAS=bias is not None, **{"WITH_K": True, "WITH_V": True, **made}, **setting,
        )  # fmt: skip

    if with_bias:
        setting = _setting("bias_gradient", q, D, DV, M, N, True)
        BB, HB = bias.shape[:2]
        launch(
            _backward.attention_bias_gradient, (-(-M // setting["BM"]) * -(-N // setting["BN"]), BB * HB),
            q, k, v, do, lse, delta, dbias, _or(lo, q), _or(hi, q), *pointers, *strides,
            _row_stride(lo), *masks, B, H, BB, HB, H // HK, *sizes, **flags, **setting,
        )  # fmt: skip
    return dq, dk, dv, dbias, dsink


@backward.register_fake
def _(
    do, dlse, q, k, v, o, lse, lo, hi, keys, mask, bias, sink, slopes, seed, scale, softcap, off, dropout_p, with_bias
):
    B, H, M, D = q.shape
    HK, N, DV = k.shape[1], k.shape[2], v.shape[3]
    return (
        q.new_empty(B, M, H, D).transpose(1, 2),
        k.new_empty(B, N, HK, D).transpose(1, 2),
        v.new_empty(B, N, HK, DV).transpose(1, 2),
        q.new_empty(bias.shape if with_bias else (0,), dtype=torch.float32),
        q.new_empty(H if sink is not None else 0, dtype=torch.float32),
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
    q, k, v, lo, hi, keys, mask, bias, sink, slopes, seed, *numbers = inputs
    o, lse = output
    ctx.save_for_backward(q, k, v, o, lse, lo, hi, keys, mask, bias, sink, slopes, seed)
    ctx.numbers = numbers
    ctx.set_materialize_grads(False)


def _backward(ctx, do, dlse):
    q, k, v, o, lse, lo, hi, keys, mask, bias, sink, slopes, seed = ctx.saved_tensors
    if do is None:
        do = torch.zeros_like(o)
    with_bias = bias is not None and ctx.needs_input_grad[7]
    dlse = None if dlse is None else dlse.contiguous()
    dq, dk, dv, dbias, dsink = backward(
        do, dlse, q, k, v, o, lse, lo, hi, keys, mask, bias, sink, slopes, seed, *ctx.numbers, with_bias
    )
    dbias = dbias.to(bias.dtype) if with_bias else None
    dsink = None if sink is None else dsink.to(sink.dtype)
    return dq, dk, dv, None, None, None, None, dbias, dsink, None, None, None, None, None, None


forward.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op(add_op_namespace_prefix("decode"), mutates_args=())
def decode(
    q: Tensor, k: Tensor, v: Tensor, lo: Maybe, hi: Maybe, keys: Maybe, mask: Maybe, bias: Maybe, sink: Maybe,
    slopes: Maybe, scale: float, softcap: float, off: int, parts: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `forward` without a gradient, for few queries: keys in `parts` parts, 0 for as many as the device wants."""
    from ._decode import attention_decode

    B, H, M, D = q.shape
    HK, N, DV = k.shape[1], k.shape[2], v.shape[3]
    setting = _setting("decode", q, D, DV, M, N, _has_features(softcap, mask, bias, slopes))
    chunk = chunk_of(q, B * HK, N, setting["BN"], parts)
    parts = max(1, -(-N // chunk))
    part_o = q.new_empty(parts, B, H, M, DV, dtype=torch.float32)
    part_lse = q.new_empty(parts, B, H, M, dtype=torch.float32)
    launch(
        attention_decode, (parts, B * HK),
        q, k, v, part_o, part_lse, _or(lo, q), _or(hi, q), _or(keys, q), _or(mask, q), _or(bias, q), _or(slopes, q),
        *q.stride(), *k.stride(), *v.stride(), _row_stride(lo), _row_stride(keys), *_strides4(mask),
        *_strides4(bias), B, H, H // HK, M, N, chunk, off, scale, softcap,
        BR=_padded(H // HK * M), **_flags(softcap, lo, keys, mask, slopes), BIAS=bias is not None, **setting,
    )  # fmt: skip
    return combine(part_o, part_lse, sink, q.dtype)


@decode.register_fake
def _(q, k, v, lo, hi, keys, mask, bias, sink, slopes, scale, softcap, off, parts):
    B, H, M, _ = q.shape
    return q.new_empty(B, M, H, v.shape[3]), q.new_empty(B, H, M, dtype=torch.float32)


def chunk_of(q: Tensor, programs: int, N: int, BN: int, parts: int = 0) -> int:
    """Keys of one part, from shapes alone: as many parts as give each multiprocessor two programs, of 256 keys at
    least."""
    if not parts:
        processors = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 8
        parts = max(1, min(-(-2 * processors // programs), N // 256))
    return max(BN, -(-N // (parts * BN)) * BN)


def combine(part_o: Tensor, part_lse: Tensor, sink: Maybe, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """o [B, M, H, DV] and lse [B, H, M] from normalised parts [parts, B, H, M, DV] and their lse in units of log 2."""
    from ._decode import attention_combine

    parts, B, H, M, DV = part_o.shape
    o = part_o.new_empty(B, M, H, DV, dtype=dtype)
    lse = part_o.new_empty(B, H, M)
    if o.numel():
        launch(
            attention_combine, (B * H * M,), part_o, part_lse, _or(sink, part_o), o, lse, B, H, M, parts,
            DV=DV, BDV=_padded(DV), BP=1 << (parts - 1).bit_length(), SINK=sink is not None,
        )  # fmt: skip
    return o, lse
