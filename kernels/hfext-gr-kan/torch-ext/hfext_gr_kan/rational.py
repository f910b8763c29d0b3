"""`rational`: checks, the two custom operations, and their launches."""

from __future__ import annotations

from typing import Tuple  # noqa: UP035 (operations are declared by these annotations, on Python 3.9 too)

import torch
from torch import Tensor

from . import _reference
from ._launch import config, launch, runs_kernel
from ._ops import add_op_namespace_prefix

DENOMINATORS = ("abs_terms", "abs_sum")
MAX_NUMERATOR, MAX_DENOMINATOR = 8, 6
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def rational(x: Tensor, numerator: Tensor, denominator: Tensor, form: str = "abs_terms") -> Tensor:
    """P(x) / Q(x), elementwise, with coefficients for each group of channels.

    Computed in float32 (float64 for float64) whatever the dtype of `x`, which the result has. The gradients of the
    coefficients are deterministic. Only `x` is kept for the backward pass. At b_j = 0 ("abs_terms") or where
    sum_j b_j x^j = 0 ("abs_sum") the derivative of |.| is taken as +1, so that a denominator of zeros learns; that of
    |x| at 0 is 0. Gradients cannot be differentiated again.

    Args:
        x: [..., channels], float32, float16, bfloat16 or float64.
        numerator: a, [groups, m + 1] or [1, m + 1], 1 <= m <= 8.
        denominator: b, [groups, n] or [1, n], 0 <= n <= 6. The larger first size of the two is the number of groups,
            which must divide the channels; channel c is in group c // (channels / groups).
        form: "abs_terms", Q = 1 + sum_j |b_j| |x|^j, or "abs_sum", Q = 1 + |sum_j b_j x^j|, with j from 1.
    """
    if form not in DENOMINATORS:
        raise ValueError(f"form is {form!r} but must be one of {', '.join(DENOMINATORS)}.")
    if x.dtype not in DTYPES:
        raise TypeError(f"x is {x.dtype} but must be float32, float16, bfloat16 or float64.")
    if x.dim() < 2:
        raise ValueError(f"x has {x.dim()} dimensions but must have at least 2: [..., channels].")
    for name, c, least, most in (
        ("numerator", numerator, 2, MAX_NUMERATOR + 1),
        ("denominator", denominator, 0, MAX_DENOMINATOR),
    ):
        if c.dim() != 2 or not least <= c.shape[1] <= most:
            raise ValueError(
                f"{name} has shape {tuple(c.shape)} but must be [groups, {least} to {most} coefficients]."
            )
        if c.device != x.device:
            raise ValueError(f"{name} is on {c.device} but x is on {x.device}.")
    groups = max(len(numerator), len(denominator))
    if {len(numerator), len(denominator)} - {1, groups}:
        raise ValueError(
            f"numerator has {len(numerator)} groups and denominator {len(denominator)}: they must be equal, or 1."
        )
    if x.shape[-1] % groups or not x.shape[-1]:
        raise ValueError(f"x has {x.shape[-1]} channels, which {groups} groups do not divide.")
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    a = numerator.to(dtype).expand(groups, -1)
    b = denominator.to(dtype).expand(groups, -1)
    return _forward(x, a, b, form)


@torch.library.custom_op(add_op_namespace_prefix("forward"), mutates_args=())
def _forward(x: Tensor, numerator: Tensor, denominator: Tensor, form: str) -> Tensor:
    numerator, denominator = numerator.contiguous(), denominator.contiguous()
    if not runs_kernel(x) or not x.numel():
        return _reference.forward(x, numerator, denominator, form)
    import triton

    from ._kernels import rational_forward_kernel

    flat = x.reshape(-1, x.shape[-1])
    rows, groups, width = len(flat), len(numerator), x.shape[-1] // len(numerator)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block_r, block_c, cfg = _tile("forward", x, rows, width)
    grid = (triton.cdiv(rows, block_r) * groups * triton.cdiv(width, block_c),)
    launch(
        rational_forward_kernel,
        grid,
        flat,
        numerator,
        denominator,
        y,
        rows,
        groups,
        width,
        *flat.stride(),
        **_constants(x, numerator, denominator, form),
        BLOCK_R=block_r,
        BLOCK_C=block_c,
        num_warps=cfg["num_warps"],
    )
    return y


@_forward.register_fake
def _(x, numerator, denominator, form):
    return x.new_empty(x.shape)


@torch.library.custom_op(add_op_namespace_prefix("backward"), mutates_args=())
def _backward(
    grad: Tensor, x: Tensor, numerator: Tensor, denominator: Tensor, form: str
) -> Tuple[Tensor, Tensor, Tensor]:  # noqa: UP006
    numerator, denominator = numerator.contiguous(), denominator.contiguous()
    if not runs_kernel(x) or not x.numel():
        return _reference.backward(grad, x, numerator, denominator, form)
    import triton

    from ._kernels import rational_backward_kernel, rational_reduce_kernel

    flat, grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, x.shape[-1])
    rows, groups, width = len(flat), len(numerator), x.shape[-1] // len(numerator)
    block_r, block_c, cfg = _tile("backward", x, rows, width)
    chunks = triton.cdiv(width, block_c)
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2
    tiles = min(triton.cdiv(rows, block_r), max(1, cfg["programs_per_processor"] * processors // (groups * chunks)))
    constants = _constants(x, numerator, denominator, form)
    m, n = constants["M"], constants["N"]
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    partial = torch.empty(tiles * chunks, groups, m + 1 + n, dtype=numerator.dtype, device=x.device)
    launch(
        rational_backward_kernel,
        (tiles * groups * chunks,),
        grad,
        flat,
        numerator,
        denominator,
        dx,
        partial,
        rows,
        groups,
        width,
        tiles,
        *grad.stride(),
        *flat.stride(),
        **constants,
        BLOCK_R=block_r,
        BLOCK_C=block_c,
        STAGES=cfg["stages"],
        num_warps=cfg["num_warps"],
    )
    da, db = torch.empty_like(numerator), torch.empty_like(denominator)
    launch(
        rational_reduce_kernel,
        (groups,),
        partial,
        denominator,
        da,
        db,
        tiles * chunks,
        groups,
        M=m,
        N=n,
        ABS_TERMS=form == "abs_terms",
        BLOCK=64,
        COEFFICIENTS=triton.next_power_of_2(m + 1 + n),
        num_warps=4,
    )
    return dx, da, db


@_backward.register_fake
def _(grad, x, numerator, denominator, form):
    return x.new_empty(x.shape), numerator.new_empty(numerator.shape), denominator.new_empty(denominator.shape)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3])
    ctx.form = inputs[3]


def _differentiate(ctx, grad):
    dx, da, db = _backward(grad, *ctx.saved_tensors, ctx.form)
    return dx, da, db, None


_forward.register_autograd(_differentiate, setup_context=_setup)


def _constants(x: Tensor, numerator: Tensor, denominator: Tensor, form: str) -> dict:
    import triton.language as tl

    return {
        "M": numerator.shape[1] - 1,
        "N": denominator.shape[1],
        "ABS_TERMS": form == "abs_terms",
        "COMPUTE": tl.float64 if x.dtype == torch.float64 else tl.float32,
    }


def _tile(op: str, x: Tensor, rows: int, width: int) -> tuple[int, int, dict]:
    """BLOCK_R, BLOCK_C and the other launch parameters. BLOCK_C wastes the fewest lanes, the widest of equals."""
    cfg = config(op, x, dtype=str(x.dtype).replace("torch.", ""), width=width)
    ceiling = 1 << max(0, width - 1).bit_length()
    sizes = [size for size in (512, 256, 128, 64, 32) if size <= ceiling] or [ceiling]
    block_c = min(sizes, key=lambda size: (-(-width // size) * size, -size))
    block_r = max(1, min(cfg["elements"] // block_c, 1 << max(0, rows - 1).bit_length()))
    return block_r, block_c, cfg
