"""The grid that all integer methods share: w = s q + z, q in 0 .. 2^b - 1, one float s and one float z for each group
of g consecutive input columns of one output row.

Integer zero points are the special case z = -s zp. Everything is computed in the type of the weight, which the methods
give in fp32 or fp64.

Clip search: for i = 0 .. 79 both ends of a group's range are multiplied by 1 - i / 100, and the range with the least
sum |w' - w|^2.4 is kept: the search of GPTQ's authors ("GPTQ: Accurate Post-Training Quantization for Generative
Pre-trained Transformers", arXiv 2210.17323).
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Grid(NamedTuple):
    """Steps and offsets, both [rows, groups] (or any leading dimensions)."""

    scales: Tensor
    zeros: Tensor


class Quantized(NamedTuple):
    """A weight [rows, columns] as codes uint8 [rows, columns] on a grid [rows, groups]."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor

    def dequantize(self) -> Tensor:
        """s q + z [rows, columns] in the type of the scales."""
        return dequantize(self.codes, self.scales, self.zeros)


def grouped(weight: Tensor, groups: int) -> Tensor:
    """[..., columns] as [..., groups, columns / groups]; a view."""
    return weight.unflatten(-1, (groups, weight.shape[-1] // groups))


def dequantize(codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """s q + z [..., columns] in the type of the scales."""
    values = grouped(codes, scales.shape[-1]).to(scales.dtype)
    return (values * scales[..., None] + zeros[..., None]).flatten(-2)


def nearest(weight: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    """uint8 [..., columns]: the code whose value is nearest; exact halves go up. Steps may be negative or zero."""
    step = away_from_zero(scales)
    codes = ((grouped(weight, scales.shape[-1]) - zeros[..., None]) / step[..., None] + 0.5).floor_()
    return codes.clamp_(0, 2**bits - 1).to(torch.uint8).flatten(-2)


def away_from_zero(x: Tensor, least: float = 1e-15) -> Tensor:
    """`x` with magnitudes below `least` raised to it, signs kept."""
    return torch.where(x.abs() < least, torch.copysign(torch.full_like(x, least), x), x)


def ends(weight: Tensor, group_size: int, with_zero: bool = True) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of each group [rows, groups]; `with_zero` widens the range to hold 0, and makes it
    -1 .. 1 where a group holds nothing else."""
    groups = grouped(weight, weight.shape[-1] // columns_of(weight, group_size))
    low, high = groups.amin(-1), groups.amax(-1)
    if not with_zero:
        return low, high
    low, high = low.clamp(max=0), high.clamp(min=0)
    empty = (low == 0) & (high == 0)
    return torch.where(empty, -torch.ones_like(low), low), torch.where(empty, torch.ones_like(high), high)


def columns_of(weight: Tensor, group_size: int) -> int:
    """Columns of a group; `group_size=-1` is a whole row."""
    return weight.shape[-1] if group_size == -1 else group_size


def grid(low: Tensor, high: Tensor, bits: int, zero_point: str = "float", symmetric: bool = False) -> Grid:
    """The grid from `low` to `high`.

    Args:
        low, high (`torch.Tensor`): Ends of the ranges [rows, groups].
        bits (`int`): Bits of a code.
        zero_point (`str`): "float", so that code 0 is `low`; or "int", z = -s round(-low / s), which moves the grid by
            up to half a step so that one code is exactly 0.
        symmetric (`bool`): The range is -m .. m with m the larger magnitude (0 .. m where no value is negative), and
            the zero point is 2^(b-1).
    """
    levels = 2**bits - 1
    if symmetric:
        most = torch.maximum(low.abs(), high)
        low, high = torch.where(low < 0, -most, low), most
        scales = (high - low) / levels
        return Grid(scales, -scales * 2 ** (bits - 1))
    scales = (high - low) / levels
    if zero_point == "int":
        return Grid(scales, -scales * (-low / away_from_zero(scales)).round())
    return Grid(scales, low.clone())


def round_to_nearest(
    weight: Tensor,
    bits: int,
    group_size: int,
    zero_point: str = "float",
    symmetric: bool = False,
    clip_search: bool = False,
) -> Quantized:
    """Min-max rounding of a weight [rows, columns], the start of most methods and the last resort of some."""
    # A float offset needs no code at 0, so its range is the group's own.
    low, high = ends(weight, group_size, with_zero=zero_point == "int" or symmetric)
    if zero_point == "float" and not symmetric:
        flat = low == high
        high = torch.where(flat, low + away_from_zero(low.abs(), 1e-8), high)
    made = grid(low, high, bits, zero_point, symmetric)
    if clip_search:
        made = clipped(weight, low, high, bits, zero_point, symmetric)
    return Quantized(nearest(weight, *made, bits), *made)


def clipped(
    weight: Tensor,
    low: Tensor,
    high: Tensor,
    bits: int,
    zero_point: str = "float",
    symmetric: bool = False,
    norm: float = 2.4,
    shrink: float = 0.8,
    steps: int = 100,
) -> Grid:
    """The grid among shrunken ranges with the least sum |w' - w|^norm in each group."""
    best = grid(low, high, bits, zero_point, symmetric)
    least = torch.full_like(low, torch.inf)
    for i in range(int(shrink * steps)):
        share = 1 - i / steps
        tried = grid(share * low, share * high, bits, zero_point, symmetric)
        error = dequantize(nearest(weight, *tried, bits), *tried).sub_(weight).abs_().pow_(norm)
        error = grouped(error, low.shape[-1]).sum(-1)
        better = error < least
        least = torch.where(better, error, least)
        best = Grid(*(torch.where(better, new, old) for new, old in zip(tried, best, strict=True)))
    return best
