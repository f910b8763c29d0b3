"""`spark_ffn`: a feed-forward layer of which each token uses a few units, and its operation for a few tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from . import _reference
from ._launch import config, launch, runs_kernel
from ._ops import add_op_namespace_prefix
from .topk import DTYPES, check_k, quantiles, statistical_topk

FEW_ROWS = 8
SPLITS = 8


def spark_ffn(x: Tensor, k1: Tensor, k2: Tensor, v: Tensor, k: int, unbiased: bool = True) -> Tensor:
    """
    v' (gelu(STopk(k1 x1, k)) * (k2 x2)), x1 the first r numbers of x and x2 the rest: gelu(0) = 0, so a unit below the
    threshold contributes nothing, exactly.

    Up to 8 tokens without a gradient take the sparse path, which reads k2 and v for active units alone; others the
    dense one. Both are the same function up to rounding.

    Args:
        x (`Tensor` [..., d_model]): fp32, bf16 or fp16; fp64 in plain torch.
        k1 (`Tensor` [d_ff, r]): The predictor.
        k2 (`Tensor` [d_ff, d_model - r]): What gates an active unit.
        v (`Tensor` [d_ff, d_out]): Values, by rows.
        k (`int`): About how many units a token uses, a whole number >= 1; from d_ff on all of them, unshifted.
        unbiased (`bool`, *optional*, defaults to `True`): See `statistical_topk`.
    """
    check_k("k", k, whole=True)
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        kind = torch.get_autocast_dtype(x.device.type)
        x, k1, k2, v = x.to(kind), k1.to(kind), k2.to(kind), v.to(kind)
    _check(x, k1, k2, v)
    r = k1.shape[1]
    rows = x.reshape(-1, x.shape[-1])
    learns = torch.is_grad_enabled() and any(t.requires_grad for t in (x, k1, k2, v))
    if not learns and 0 < len(rows) <= FEW_ROWS and k < len(k1) and not torch.compiler.is_compiling():
        return decode(rows, k1, k2, v, k, unbiased).view(*x.shape[:-1], v.shape[1])
    hidden = statistical_topk(F.linear(x[..., :r], k1), k, unbiased)
    return (F.gelu(hidden) * F.linear(x[..., r:], k2)) @ v


def _check(x: Tensor, k1: Tensor, k2: Tensor, v: Tensor) -> None:
    if x.dtype not in (*DTYPES, torch.float64) or {k1.dtype, k2.dtype, v.dtype} != {x.dtype}:
        raise TypeError(
            f"x, k1, k2 and v are {x.dtype}, {k1.dtype}, {k2.dtype} and {v.dtype} but must share one of float32, "
            "bfloat16 and float16."
        )
    if k1.ndim != 2 or k2.ndim != 2 or v.ndim != 2 or not len(k1) == len(k2) == len(v):
        raise ValueError(
            f"k1, k2 and v have shapes {tuple(k1.shape)}, {tuple(k2.shape)} and {tuple(v.shape)} but must be "
            "[d_ff, r], [d_ff, d_model - r] and [d_ff, d_out]."
        )
    d = x.shape[-1] if x.ndim else 0
    if not 1 <= k1.shape[1] < d or k1.shape[1] + k2.shape[1] != d:
        raise ValueError(
            f"k1 and k2 take {k1.shape[1]} and {k2.shape[1]} numbers, which must be >= 1 and together the {d} of x."
        )


@torch.library.custom_op(add_op_namespace_prefix("ffn_decode"), mutates_args=())
def decode(x: Tensor, k1: Tensor, k2: Tensor, v: Tensor, k: int, unbiased: bool) -> Tensor:
    """`spark_ffn` of a few rows x [rows, d_model], without a gradient; the count of active units stays on the GPU."""
    if not runs_kernel(x) or x.dtype == torch.float64:
        return _reference.spark_ffn_by_rows(x, k1, k2, v, k, unbiased)
    from . import _topk_kernels as kernels

    k1, k2, v, x = (t if t.stride(-1) == 1 else t.contiguous() for t in (k1, k2, v, x))
    (rows, d), (units, r), out = x.shape, k1.shape, v.shape[1]
    s = x.new_empty(rows, units, dtype=torch.float32)
    index = x.new_empty(rows, units, dtype=torch.int32)
    h = torch.empty_like(s)
    count = x.new_empty(rows, dtype=torch.int32)
    parts = x.new_empty(SPLITS, rows, out, dtype=torch.float32)
    setting = config("ffn_predict", x, d=r)
    tiles = -(-units // setting["BLOCK_F"])
    launch(kernels.ffn_predict, (tiles, rows), x, k1, s, x.stride(0), k1.stride(0), r, units, **setting)
    table = quantiles(k, units, x.device)
    launch(
        kernels.ffn_compact, (rows,), s, index, h, count, table, units, UNBIASED=unbiased,
        **config("ffn_compact", x, units=units),
    )  # fmt: skip
    setting = config("ffn_gate", x, d=d - r)
    tiles = -(-units // setting["BLOCK_A"])
    launch(
        kernels.ffn_gate, (tiles, rows), x[:, r:], k2, index, h, count, x.stride(0), k2.stride(0), d - r, units,
        **setting,
    )  # fmt: skip
    setting = config("ffn_output", x, d=out)
    tiles = -(-out // setting["BLOCK_D"])
    launch(
        kernels.ffn_output, (tiles, SPLITS, rows), v, index, h, count, parts, v.stride(0), out, units, rows, SPLITS,
        **setting,
    )  # fmt: skip
    return parts.sum(0).to(x.dtype)


@decode.register_fake
def _(x, k1, k2, v, k, unbiased):
    return x.new_empty(x.shape[0], v.shape[1])
