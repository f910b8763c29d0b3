"""`statistical_topk` and its operations."""

from __future__ import annotations

from functools import lru_cache
from typing import Optional, Tuple  # noqa: UP035 (operations are declared by these annotations, on Python 3.9 too)

import torch
from torch import Tensor

from . import _reference
from ._launch import config, launch, runs_kernel
from ._ops import add_op_namespace_prefix

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Maybe = Optional[Tensor]


def statistical_topk(
    x: Tensor, k: float, unbiased: bool = True, mode: str = "soft", visible: Tensor | None = None
) -> Tensor:
    """
    About the k largest values of each row of the last axis, found from mean and standard deviation without sorting.

    theta = mean + std Q(1 - k / c), over the c visible values of a row, Q the normal quantile; moments in fp32, of
    differences from a value of the row, so that a common offset costs none of their digits. "soft" gives
    max(x - theta, 0), with std at least 1e-6 and gradients through mean and std; "hard" gives x where x >= theta and
    -inf elsewhere, whose threshold has a gradient of 0 almost everywhere. Rows with c <= k keep all, unshifted. Where
    the threshold lies above the largest value "soft" gives zeros and "hard" keeps the largest, each of equal ones.

    Args:
        x (`Tensor` [..., d]): fp32, bf16 or fp16; fp64 in plain torch.
        k (`float`): How many, >= 1.
        unbiased (`bool`, *optional*, defaults to `True`): Divide by c - 1; `False` divides by c, as Gemma 3n does.
        mode (`str`, *optional*, defaults to `"soft"`): Or `"hard"`.
        visible (`Tensor` bool, *optional*): Broadcasts to `x`; hidden values give 0, or -inf with `"hard"`.
    """
    check_k("k", k)
    if mode not in ("soft", "hard"):
        raise ValueError(f"mode is {mode!r} but must be 'soft' or 'hard'.")
    if x.dtype not in (*DTYPES, torch.float64):
        raise TypeError(f"x is {x.dtype} but must be float32, bfloat16 or float16.")
    if x.ndim == 0:
        raise ValueError("x has no axis: it must be [..., d].")
    if visible is not None:
        if visible.dtype != torch.bool:
            raise TypeError(f"visible is {visible.dtype} but must be bool.")
        try:
            visible = visible.expand_as(x)
        except RuntimeError:
            shapes = f"{tuple(visible.shape)} but must broadcast to that of x, {tuple(x.shape)}"
            raise ValueError(f"visible has shape {shapes}.") from None
    if not runs_kernel(x) or x.dtype == torch.float64 or x.numel() == 0:
        return _reference.statistical_topk(x, k, unbiased, mode == "soft", visible)
    rows = x.reshape(-1, x.shape[-1])
    mask = None if visible is None else visible.reshape(rows.shape).view(torch.uint8)
    return forward(rows, mask, float(k), unbiased, mode == "soft")[0].view(x.shape)


def check_k(name: str, k: float, whole: bool = False) -> None:
    """Raise unless k is a number, or an integer, >= 1."""
    if isinstance(k, bool) or not isinstance(k, int if whole else (int, float)):
        raise TypeError(f"{name} is {k!r} but must be {'an integer' if whole else 'a number'} >= 1.")
    if not k >= 1:
        raise ValueError(f"{name} is {k} but must be >= 1.")


@lru_cache(maxsize=64)
def _table(k: float, size: int, device: torch.device) -> Tensor:
    counts = torch.arange(size + 1)
    return _reference.quantile(k, counts).float().to(device)


def quantiles(k: float, count: int, device: torch.device) -> Tensor:
    """Q(1 - k / c) for c = 0 .. at least count, fp32; -inf where all are kept."""
    return _table(float(k), max(64, 1 << (count - 1).bit_length()), device)


@torch.library.custom_op(add_op_namespace_prefix("topk_forward"), mutates_args=())
def forward(x: Tensor, mask: Maybe, k: float, unbiased: bool, soft: bool) -> Tuple[Tensor, Tensor]:  # noqa: UP006
    """y as x [rows, width], contiguous, and fp32 [5, rows] of statistics; mask is uint8."""
    from ._topk_kernels import topk_forward

    rows, width = x.shape
    y = x.new_empty(rows, width)
    stats = x.new_empty(5, rows, dtype=torch.float32)
    if y.numel() == 0:
        return y, stats.zero_()
    shown = x if mask is None else mask
    launch(
        topk_forward, (rows,), x, y, shown, quantiles(k, width, x.device), stats, rows, width, *x.stride(),
        *shown.stride(), SOFT=soft, UNBIASED=unbiased, MASK=mask is not None, **config("topk", x, width=width),
    )  # fmt: skip
    return y, stats


@forward.register_fake
def _(x, mask, k, unbiased, soft):
    return x.new_empty(x.shape), x.new_empty(5, x.shape[0], dtype=torch.float32)


@torch.library.custom_op(add_op_namespace_prefix("topk_backward"), mutates_args=())
def backward(grad: Tensor, x: Tensor, mask: Maybe, stats: Tensor, unbiased: bool, soft: bool) -> Tensor:
    """dx as x, contiguous."""
    from ._topk_kernels import topk_backward

    rows, width = x.shape
    dx = x.new_empty(rows, width)
    if dx.numel() == 0:
        return dx
    shown = x if mask is None else mask
    count = stats if mask is None else mask.sum(1, dtype=torch.int32).float()
    launch(
        topk_backward, (rows,), x, grad, dx, shown, stats, count, rows, width, *x.stride(), *grad.stride(),
        *shown.stride(), SOFT=soft, UNBIASED=unbiased, MASK=mask is not None, **config("topk", x, width=width),
    )  # fmt: skip
    return dx


@backward.register_fake
def _(grad, x, mask, stats, unbiased, soft):
    return x.new_empty(x.shape)


def _setup(ctx, inputs, output):
    x, mask, _, ctx.unbiased, ctx.soft = inputs
    ctx.save_for_backward(x, mask, output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _):
    x, mask, stats = ctx.saved_tensors
    if grad is None:
        return None, None, None, None, None
    return backward(grad, x, mask, stats, ctx.unbiased, ctx.soft), None, None, None, None


forward.register_autograd(_backward, setup_context=_setup)
