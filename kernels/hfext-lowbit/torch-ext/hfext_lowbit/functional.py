"""y = x W^T + bias for weights of 8, 4, 3 or 2 bits on an affine grid, w = s q + z, and its gradient in x.

Up to `GEMV_TOKENS` tokens meet codes in fp32 without tensor cores; then codes become weights of the type of x for
tensor-core dots with fp32 accumulation. Few tokens split the inputs among programs, and a second kernel adds the parts
in a fixed order, so results are the same bits each time. Groups that do not start at a byte take the second path.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from . import _reference
from ._launch import config, interpreted, launch, runs_kernel
from ._ops import add_op_namespace_prefix

GEMV_TOKENS = 4
TYPES = (torch.float16, torch.bfloat16, torch.float32)


def quantized_linear(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bits: int,
    group_size: int,
    bias: Tensor | None = None,
) -> Tensor:
    """
    x W^T + bias with frozen packed weights.

    Args:
        x: [..., in], of any strides.
        qweight: uint8 [out, bytes of `in` codes]; with 3 bits the plane of low pairs, then that of high bits.
        scales, zeros: [out, ceil(in / group_size)] in a floating type.
        bits: 2, 3, 4 or 8.
        group_size: Consecutive inputs that share a scale and an offset; -1 for all. The last group may be shorter.
        bias: [out], may be trained.

    Returns:
        [..., out] in the type of x.

    Raises:
        ValueError: Shapes that do not fit, unknown bits, tensors on several devices.
        TypeError: Types that cannot be taken.
        NotImplementedError: `scales` or `zeros` are to be trained: the weights are frozen.
    """
    group_size = _checked(x, qweight, scales, zeros, bits, group_size, bias)
    return _linear(x, qweight, scales, zeros, bias, bits, group_size)


def dequantize(
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bits: int,
    group_size: int,
    in_features: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The weight [out, in] that packed codes stand for."""
    probe = scales.new_empty(0, in_features, dtype=dtype)
    group_size = _checked(probe, qweight, scales, zeros, bits, group_size, None)
    return _reference.dequantize(qweight, scales, zeros, bits, group_size, in_features, dtype)


def _checked(x, qweight, scales, zeros, bits, group_size, bias) -> int:
    if bits not in (2, 3, 4, 8):
        raise ValueError(f"bits is {bits!r} but must be one of 2, 3, 4, 8.")
    if not x.is_floating_point():
        raise TypeError(f"x is {x.dtype} but must be of a floating type.")
    if qweight.dtype != torch.uint8:
        raise TypeError(f"qweight is {qweight.dtype} but must be torch.uint8.")
    if not (scales.is_floating_point() and zeros.is_floating_point()):
        raise TypeError(f"scales and zeros are {scales.dtype} and {zeros.dtype} but must be of a floating type.")
    n = x.shape[-1] if x.dim() else 0
    if n < 1:
        raise ValueError(f"x has shape {tuple(x.shape)} but must be [..., in] with at least one input.")
    group_size = n if group_size == -1 else group_size
    if group_size < 1:
        raise ValueError(f"group_size is {group_size} but must be -1 or >= 1.")
    width, groups = _reference.packed_width(n, bits), -(-n // group_size)
    if qweight.dim() != 2 or qweight.shape[1] != width:
        raise ValueError(
            f"qweight has shape {tuple(qweight.shape)} but must be [out, {width}] for {n} inputs of {bits} bits."
        )
    wanted = (qweight.shape[0], groups)
    if tuple(scales.shape) != wanted or tuple(zeros.shape) != wanted:
        raise ValueError(
            f"scales and zeros have shapes {tuple(scales.shape)} and {tuple(zeros.shape)} but must be {wanted} for "
            f"{n} inputs in groups of {group_size}."
        )
    if bias is not None and tuple(bias.shape) != wanted[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)} but must be {wanted[:1]}.")
    if any(t is not None and t.device != x.device for t in (qweight, scales, zeros, bias)):
        raise ValueError(f"All tensors must be on the device of x, {x.device}.")
    if torch.is_grad_enabled() and (scales.requires_grad or zeros.requires_grad):
        raise NotImplementedError(
            "The weights are frozen: scales and zeros get no gradient here. Call requires_grad_(False) on them, or "
            "train them through dequantize(...), which is differentiable."
        )
    return group_size


def _linear_on_device(x, qweight, scales, zeros, bias, bits, group_size) -> Tensor:
    from . import _kernels as k

    inputs, rows = x.shape[-1], qweight.shape[0]
    out = x.new_empty(*x.shape[:-1], rows)
    if out.numel() == 0:
        return out
    flat = x.reshape(-1, inputs)
    tokens = flat.shape[0]
    qweight = qweight if qweight.stride(1) == 1 else qweight.contiguous()
    scales, zeros = scales.contiguous(), zeros.contiguous()
    if scales.shape[1] == 1:
        group_size = -(-inputs // 8) * 8  # one group may reach beyond the last input
    sizes = (tokens, rows, inputs, _plane_width(qweight, bits))
    strides = (flat.stride(0), flat.stride(1), qweight.stride(0), scales.stride(0))
    has_bias = bias is not None
    bias = bias.contiguous() if has_bias else out
    aligned = group_size % (8 if bits == 3 else 8 // bits) == 0
    if tokens <= GEMV_TOKENS and aligned:
        c = config("gemv", x, bits=bits, tokens=tokens, rows=rows, inputs=inputs)
        codes = max(min(_power(group_size), c["CODES"]), 8 if bits == 3 else 8 // bits)
        in_tile = max(1, c["CODES"] // _power(group_size))
        groups = scales.shape[1]
        tiles = groups * -(-group_size // codes) if in_tile == 1 else -(-groups // in_tile)
        split = max(1, min(c["SPLIT"], tiles))
        held = _parts(out, split, tokens, rows)
        launch(
            k.gemv_kernel, (-(-rows // c["BLOCK_N"]), split), flat, qweight, scales, zeros, bias, held, *sizes,
            *strides, groups, GROUP=group_size, BITS=bits, TOKENS=_power(tokens), BLOCK_N=c["BLOCK_N"],
            GROUPS=in_tile, CODES=codes, SPLIT=split, STAGES=c["num_stages"], HAS_BIAS=has_bias,
            num_warps=c["num_warps"], num_stages=c["num_stages"],
        )  # fmt: skip
    else:
        c = config("gemm", x, dtype=_word(x), tokens=tokens, rows=rows, inputs=inputs)
        split = max(1, min(c["SPLIT"], -(-inputs // c["BLOCK_K"])))
        held = _parts(out, split, tokens, rows)
        grid = (-(-tokens // c["BLOCK_M"]) * -(-rows // c["BLOCK_N"]), split)
        launch(
            k.gemm_kernel, grid, flat, qweight, scales, zeros, bias, held, *sizes, *strides, GROUP=group_size,
            BITS=bits, BLOCK_M=c["BLOCK_M"], BLOCK_N=c["BLOCK_N"], BLOCK_K=c["BLOCK_K"], SPLIT=split,
            WHOLE=group_size % c["BLOCK_K"] == 0 or scales.shape[1] == 1, HAS_BIAS=has_bias, UPCAST=interpreted(),
            num_warps=c["num_warps"], num_stages=c["num_stages"],
        )  # fmt: skip
    if split > 1:
        block, total = 1024, tokens * rows
        launch(
            k.sum_kernel, (-(-total // block),), held, bias, out, rows, total, SPLIT=split, BLOCK=block,
            HAS_BIAS=has_bias,
        )  # fmt: skip
    return out


def _grad_on_device(dy, qweight, scales, zeros, bits, group_size, inputs) -> Tensor:
    from . import _kernels as k

    rows = qweight.shape[0]
    out = dy.new_empty(*dy.shape[:-1], inputs)
    if dy.numel() == 0:
        return out.zero_()
    flat = dy.reshape(-1, rows)
    tokens = flat.shape[0]
    qweight = qweight if qweight.stride(1) == 1 else qweight.contiguous()
    scales, zeros = scales.contiguous(), zeros.contiguous()
    c = config("grad", dy, dtype=_word(dy), tokens=tokens, rows=rows, inputs=inputs)
    grid = (-(-tokens // c["BLOCK_M"]) * -(-inputs // c["BLOCK_K"]),)
    launch(
        k.grad_kernel, grid, flat, qweight, scales, zeros, out, tokens, rows, inputs,
        _plane_width(qweight, bits), flat.stride(0), flat.stride(1), qweight.stride(0), scales.stride(0),
        GROUP=group_size, BITS=bits, BLOCK_M=c["BLOCK_M"], BLOCK_N=c["BLOCK_N"], BLOCK_K=c["BLOCK_K"],
        WHOLE=group_size % c["BLOCK_K"] == 0 or scales.shape[1] == 1, UPCAST=interpreted(),
        num_warps=c["num_warps"], num_stages=c["num_stages"],
    )  # fmt: skip
    return out


def _parts(out: Tensor, split: int, tokens: int, rows: int) -> Tensor:
    return out if split == 1 else out.new_empty(split, tokens, rows, dtype=torch.float32)


def _plane_width(qweight: Tensor, bits: int) -> int:
    """Bytes of a row, or with 3 bits of its plane of low pairs."""
    return qweight.shape[1] // 3 * 2 if bits == 3 else qweight.shape[1]


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _word(x: Tensor) -> str:
    return "float32" if x.dtype == torch.float32 else "half"


@torch.library.custom_op(add_op_namespace_prefix("linear"), mutates_args=())
def _linear(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bias: Optional[Tensor],  # noqa: UP045 (read at run time by Python 3.9)
    bits: int,
    group_size: int,
) -> Tensor:
    if runs_kernel(x) and x.dtype in TYPES:
        return _linear_on_device(x, qweight, scales, zeros, bias, bits, group_size)
    return _reference.linear(x, qweight, scales, zeros, bits, group_size, bias).contiguous()


@_linear.register_fake
def _(x, qweight, scales, zeros, bias, bits, group_size):
    return x.new_empty(*x.shape[:-1], qweight.shape[0])


@torch.library.custom_op(add_op_namespace_prefix("linear_grad"), mutates_args=())
def _linear_grad(
    dy: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor, bits: int, group_size: int, in_features: int
) -> Tensor:
    if runs_kernel(dy) and dy.dtype in TYPES:
        return _grad_on_device(dy, qweight, scales, zeros, bits, group_size, in_features)
    return _reference.linear_grad(dy, qweight, scales, zeros, bits, group_size, in_features)


@_linear_grad.register_fake
def _(dy, qweight, scales, zeros, bits, group_size, in_features):
    return dy.new_empty(*dy.shape[:-1], in_features)


def _save(ctx, inputs, output):
    x, qweight, scales, zeros, bias, ctx.bits, ctx.group_size = inputs
    ctx.inputs, ctx.bias_type = x.shape[-1], None if bias is None else bias.dtype
    ctx.save_for_backward(qweight, scales, zeros)


def _backward(ctx, dy):
    dx = dbias = None
    if ctx.needs_input_grad[0]:
        dx = _linear_grad(dy, *ctx.saved_tensors, ctx.bits, ctx.group_size, ctx.inputs)
    if ctx.bias_type is not None and ctx.needs_input_grad[4]:
        wide = torch.promote_types(dy.dtype, torch.float32)
        dbias = (dy if dy.dim() == 1 else dy.flatten(0, -2).sum(0, dtype=wide)).to(ctx.bias_type)
    return dx, None, None, None, dbias, None, None


def _save_grad(ctx, inputs, output):
    _, *saved, ctx.bits, ctx.group_size, _ = inputs
    ctx.save_for_backward(*saved)


def _double_backward(ctx, g):
    # dx is linear in dy, so the derivative is the forward product.
    return _linear(g, *ctx.saved_tensors, None, ctx.bits, ctx.group_size), None, None, None, None, None, None


torch.library.register_autograd(add_op_namespace_prefix("linear"), _backward, setup_context=_save)
torch.library.register_autograd(add_op_namespace_prefix("linear_grad"), _double_backward, setup_context=_save_grad)
