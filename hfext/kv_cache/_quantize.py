"""Scalar quantisers of the KV caches, as pure functions.

Affine (RotateKV), for a group of consecutive channels of one token with clip ratio c:

    s = c (max - min) / (2^b - 1),   z = round(-c min / s),   q = clamp(round(x / s) + z, 0, 2^b - 1),   x' = s (q - z)

Min-max (KIVI), for a group of consecutive channels of one token or of consecutive tokens of one channel:

    s = (max - m) / (2^b - 1),   m = min,   q = clamp(round((x - m) / s), 0, 2^b - 1),   x' = q s + m

Codebook (TurboQuant): q is the index of the nearest level of the Lloyd-Max codebook of N(0, 1).

Scales and offsets are returned in the types in which they are stored, and the codes are computed from these numbers:
fp16 scales (and minima) and int16 zeros below 8 bits, where they cost 32 / group_size bits per element, fp32 scales
(and minima) and int32 zeros from 8 bits on, where an fp16 minimum could be off by more than a step. Scales are rounded
up, so that the code range covers the whole group and the error of a value inside the clip range is at most s / 2.
Rounding to codes is half-to-even. Nothing here looks for NaN or infinity: a NaN spoils its own group.

Papers: "RotateKV: Accurate and Robust 2-Bit KV Cache Quantization for LLMs via Outlier-Aware Adaptive Rotations"
(arXiv 2501.16383), "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache" (arXiv 2402.02750), "TurboQuant:
Online Vector Quantization with Near-optimal Distortion Rate" (arXiv 2504.19874).
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

from .._packing import check_bits

_FP16_MAX = 65504.0
_FP16_TINY = 2.0**-24


def quantize_affine(x: Tensor, bits: int, group_size: int, clip: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """
    RotateKV's quantiser along the last dimension.

    A scale is never smaller than the largest magnitude in the group / 32000 (/ 2^20 from 8 bits on): then the zero
    point fits its type, and a constant group comes back with a relative error of at most 2e-5 (5e-7). Both ends of the
    range are multiplied by `clip`, so for a group far from 0 the clipped range can lie beside all its values (40 for a
    constant 50 at clip 0.8); such a group is not clipped.

    Args:
        x (`torch.Tensor`): [..., n], floating; computed in fp32.
        bits (`int`): 1, 2, 3, 4, 8 or 16.
        group_size (`int`): g, a divisor of n.
        clip (`float`, *optional*, defaults to 1.0): c in (0, 1].

    Returns:
        codes uint8 [..., n] (int32 for 16 bits), scale [..., n / g] in fp16 (fp32 from 8 bits on) and zero
        [..., n / g] in int16 (int32 from 8 bits on).
    """
    check_bits(bits)
    if not 0 < clip <= 1:
        raise ValueError(f"`clip` must be in (0, 1], got {clip!r}.")
    groups = _grouped(x, group_size, -1)
    # Much faster than aminmax on a CPU, which goes through single numbers.
    low, high = groups.amin(-1), groups.amax(-1)
    if clip < 1:
        inner_low, inner_high = clip * low, clip * high
        beside = (inner_high < low) | (inner_low > high)
        low, high = torch.where(beside, low, inner_low), torch.where(beside, high, inner_high)
    levels = 2**bits - 1
    least = torch.maximum(low.abs(), high.abs()).div_(32000.0 if bits < 8 else 2.0**20)
    scale = _stored_scale(torch.maximum((high - low).div_(levels), least), bits)
    step = scale.float()
    zero = (low / -step).round_()
    codes = (groups / step[..., None]).round_().add_(zero[..., None]).clamp_(0, levels)
    return _as_codes(codes, bits).view(x.shape), scale, zero.to(torch.int16 if bits < 8 else torch.int32)


def dequantize_affine(
    codes: Tensor, scale: Tensor, zero: Tensor, group_size: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """scale (code - zero) [..., n] from what `quantize_affine` returned; fp32 inside."""
    values = _grouped(codes, group_size, -1, copy=True)
    return values.sub_(zero[..., None]).mul_(scale[..., None]).view(codes.shape).to(dtype)


def quantize_minmax(x: Tensor, bits: int, group_size: int, dim: int = -1) -> tuple[Tensor, Tensor, Tensor]:
    """
    KIVI's quantiser: the offset is the group's minimum as a float, rounded to fp16 below 8 bits.

    Args:
        x (`torch.Tensor`): [..., T, n], floating; computed in fp32.
        bits (`int`): 1, 2, 3, 4, 8 or 16.
        group_size (`int`): g, a divisor of n (`dim=-1`) or of T (`dim=-2`).
        dim (`int`, *optional*, defaults to -1): -1 groups channels of one token, -2 tokens of one channel.

    Returns:
        codes uint8 [..., T, n] (int32 for 16 bits); scale and minimum [..., T, n / g] (`dim=-1`) or [..., T / g, n]
        (`dim=-2`), in fp16 (fp32 from 8 bits on). The error is at most s / 2, or the fp16 rounding of the minimum,
        2^-11 |minimum|, where that is larger.
    """
    check_bits(bits)
    groups = _grouped(x, group_size, dim)
    low, high = groups.amin(dim), groups.amax(dim)
    minimum = low.clamp(-_FP16_MAX, _FP16_MAX).half() if bits < 8 else low
    offset = minimum.float()
    levels = 2**bits - 1
    scale = _stored_scale((high - offset).div_(levels), bits)
    codes = (groups - offset.unsqueeze(dim)).div_(scale.float().unsqueeze(dim)).round_().clamp_(0, levels)
    return _as_codes(codes, bits).reshape(x.shape), scale, minimum


def dequantize_minmax(
    codes: Tensor, scale: Tensor, minimum: Tensor, group_size: int, dim: int = -1, dtype: torch.dtype = torch.float32
) -> Tensor:
    """code * scale + minimum [..., T, n] from what `quantize_minmax` returned; fp32 inside."""
    values = _grouped(codes, group_size, dim, copy=True)
    return values.mul_(scale.unsqueeze(dim)).add_(minimum.unsqueeze(dim)).view(codes.shape).to(dtype)


def lloyd_max_codebook(bits: int, device: torch.device | str = "cpu") -> Tensor:
    """
    The 2^bits levels, ascending, with the least mean squared error on N(0, 1): fp32 [2^bits], `bits` in 1..8.

    Each level is the mean of its cell, whose ends are the midpoints to its neighbours; solved by Newton's method in
    fp64. A fresh tensor each time.
    """
    if bits not in range(1, 9):
        raise ValueError(f"`bits` of a codebook must be in 1..8, got {bits!r}.")
    # A default device of the caller's, such as "meta" while a model is loaded, must not take part.
    with torch.device("cpu"):
        levels = _lloyd_max(bits)
    return torch.tensor(levels, dtype=torch.float32, device=device)


def quantize_codebook(x: Tensor, codebook: Tensor) -> Tensor:
    """uint8 [...]: for each value of `x` the index of the nearest level of `codebook` (ascending, at most 256)."""
    midpoints = (codebook[1:] + codebook[:-1]) / 2
    return torch.bucketize(x.to(codebook.dtype).contiguous(), midpoints, out_int32=True).to(torch.uint8)


def dequantize_codebook(codes: Tensor, codebook: Tensor) -> Tensor:
    """codebook[code] [...] in the type of `codebook`."""
    return codebook.index_select(0, codes.to(torch.int32).flatten()).view(codes.shape)


def random_signs(n: int, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """fp32 [n] of +1 and -1 that depend on `seed` alone; drawn on the CPU from a generator of their own."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return (
        torch.randint(2, (n,), generator=generator, device="cpu")
        .mul_(2)
        .sub_(1)
        .to(device=device, dtype=torch.float32)
    )


def _grouped(x: Tensor, group_size: int, dim: int, copy: bool = False) -> Tensor:
    """fp32 with dimension `dim` split into [groups, group_size]; contiguous."""
    if dim not in (-1, -2):
        raise ValueError(f"`dim` must be -1 (channels) or -2 (tokens), got {dim!r}.")
    if group_size < 1 or x.shape[dim] % group_size:
        raise ValueError(
            f"`group_size` must divide the size of dimension {dim} of the tensor, {x.shape[dim]}, got {group_size!r}."
        )
    values = x.to(torch.float32, copy=copy, memory_format=torch.contiguous_format).contiguous()
    # With a split second-last dimension the groups come last but one, so that `dim` still names the group's members.
    return values.unflatten(dim, (x.shape[dim] // group_size, group_size))


def _stored_scale(scale: Tensor, bits: int) -> Tensor:
    """Positive scales rounded up to the type they are stored in."""
    if bits >= 8:
        return scale.clamp_(min=torch.finfo(torch.float32).tiny)
    scale = scale.clamp_(_FP16_TINY, _FP16_MAX)
    stored = scale.half()
    # Positive floats are ordered as their bit patterns are, so one more is the next fp16.
    return (stored.view(torch.int16) + (stored < scale)).view(torch.float16)


def _as_codes(codes: Tensor, bits: int) -> Tensor:
    return codes.to(torch.uint8 if bits < 16 else torch.int32)


@lru_cache(maxsize=8)
def _lloyd_max(bits: int) -> tuple[float, ...]:
    count = 2**bits
    # The best levels for many bits have the density of N(0, 3).
    middle = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    levels = math.sqrt(3) * torch.special.ndtri(middle)
    for _ in range(50):
        edges = torch.cat(
            (levels.new_tensor([-math.inf]), (levels[1:] + levels[:-1]) / 2, levels.new_tensor([math.inf]))
        )
        density = (-(edges**2) / 2).exp() / math.sqrt(2 * math.pi)
        mass = torch.special.ndtr(edges).diff()
        mean = -density.diff() / mass
        by_left = (density[:-1] * (mean - edges[:-1])).nan_to_num(0.0) / mass / 2
        by_right = (density[1:] * (edges[1:] - mean)).nan_to_num(0.0) / mass / 2
        jacobian = torch.diag(1 - by_left - by_right) - torch.diag(by_left[1:], -1) - torch.diag(by_right[:-1], 1)
        change = torch.linalg.solve(jacobian, levels - mean)
        levels = levels - change
        if change.abs().max() < 1e-13:
            break
    return tuple(((levels - levels.flip(0)) / 2).tolist())
