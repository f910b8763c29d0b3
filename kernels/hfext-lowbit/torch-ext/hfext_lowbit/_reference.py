"""The same in plain torch: any device, any floating type, differentiable in the input."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def packed_width(n: int, bits: int) -> int:
    """Bytes of `n` codes."""
    return -(-n // 8) * 3 if bits == 3 else -(-n * bits // 8)


def _fields(packed: Tensor, bits: int) -> Tensor:
    if bits == 8:
        return packed
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(-1) >> shifts) & (2**bits - 1)).flatten(-2)


def unpack(qweight: Tensor, bits: int, in_features: int) -> Tensor:
    """uint8 [out, in] of packed codes."""
    if bits == 3:
        high = qweight.shape[-1] // 3 * 2
        codes = _fields(qweight[..., :high], 2) + 4 * _fields(qweight[..., high:], 1)
    else:
        codes = _fields(qweight, bits)
    return codes[..., :in_features]


def dequantize(
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bits: int,
    group_size: int,
    in_features: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """w = s q + z [out, in], computed in fp32 (fp64 for that type) and rounded to `dtype`, fp32 by default."""
    dtype = dtype or torch.float32
    inner = torch.float64 if dtype == torch.float64 else torch.float32
    s, z = (t.to(inner).repeat_interleave(group_size, -1)[..., :in_features] for t in (scales, zeros))
    return (unpack(qweight, bits, in_features).to(inner) * s + z).to(dtype)


def linear(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bits: int,
    group_size: int,
    bias: Tensor | None = None,
) -> Tensor:
    """x W^T + bias with W in the type of x."""
    weight = dequantize(qweight, scales, zeros, bits, group_size, x.shape[-1], x.dtype)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


def linear_grad(
    dy: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor, bits: int, group_size: int, in_features: int
) -> Tensor:
    """dL/dx = dL/dy W."""
    return dy @ dequantize(qweight, scales, zeros, bits, group_size, in_features, dy.dtype)
