"""Half-quadratic quantisation: offsets that leave few large errors, from the weight alone.

With q = clamp(round(w / s - c), 0, 2^b - 1) and w' = s (q + c) on the min-max step s, the offset c minimises
sum |w - w'|_p^p with p < 1, which cares little for outliers, by half-quadratic splitting with errors e:

    e <- shrink(w - w', beta),   shrink(x, beta) = sign(x) max(|x| - |x|^(p-1) / beta, 0)
    c <- mean over the group of (w - e) / s - q,   beta <- kappa beta

until mean |w - w'| of the whole weight no longer falls; the best offsets are kept. Then z = s c in w' = s q + z.

"Half-Quadratic Quantization of Large Machine Learning Models" (Badri and Shaji, 2023), a report on the web. The
released code keeps beta as it is by default and returns the offsets of the step after the best one.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._fields import in_range
from ..registry import Method
from ._affine import Quantized, columns_of, ends, grouped, nearest
from ._config import WeightConfig


@dataclass(kw_only=True, repr=False)
class HQQConfig(WeightConfig):
    """Options of HQQ, beside those of `WeightConfig`.

    Args:
        iterations (`int`, *optional*, defaults to 20): Most steps; 0 is rounding to nearest.
        lp_norm (`float`, *optional*, defaults to 0.7): p, in (0, 1].
        beta (`float`, *optional*, defaults to 10.0): Weight of the splitting at the start.
        kappa (`float`, *optional*, defaults to 1.01): Its growth with each step.
        round_zero (`bool`, *optional*): Start from an offset that is a multiple of the step; by default with 4 bits.
    """

    method: ClassVar[str] = "hqq"
    iterations: int = 20
    lp_norm: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01
    round_zero: bool | None = None

    def check(self) -> None:
        in_range("iterations", self.iterations, 0, 10000)
        in_range("lp_norm", self.lp_norm, 0, 1, low_open=True)
        in_range("beta", self.beta, 0, 1e9, low_open=True)
        in_range("kappa", self.kappa, 1, 100)

    def quantize_weight(self, weight: Tensor, bits: int, group_size: int) -> Quantized:
        rounded = bits == 4 if self.round_zero is None else self.round_zero
        return hqq(weight, bits, group_size, self.iterations, self.lp_norm, self.beta, self.kappa, rounded)


def shrink(x: Tensor, beta: float, p: float) -> Tensor:
    """sign(x) max(|x| - |x|^(p-1) / beta, 0); 0 at 0."""
    size = x.abs()
    return x.sign() * (size - size.pow(p - 1) / beta).clamp_(min=0)


def hqq(
    weight: Tensor,
    bits: int,
    group_size: int,
    iterations: int = 20,
    lp_norm: float = 0.7,
    beta: float = 10.0,
    kappa: float = 1.01,
    round_zero: bool = False,
) -> Quantized:
    """Codes and grid of a weight [rows, columns]; the arguments are those of [`HQQConfig`]."""
    top = 2**bits - 1
    low, high = ends(weight, group_size, with_zero=False)
    flat = high == low
    # A group of equal weights gets the step 1, and its offset does the work.
    scales = torch.where(flat, torch.ones_like(low), (high - low) / top)
    centre = low / scales
    if round_zero:
        centre = torch.where(flat, centre, centre.round())
    groups = grouped(weight, weight.shape[-1] // columns_of(weight, group_size)) / scales[..., None]
    best, least = centre, torch.inf
    for _ in range(iterations + 1):
        codes = (groups - centre[..., None]).round_().clamp_(0, top)
        error = (groups - codes - centre[..., None]) * scales[..., None]
        size = float(error.abs().mean())
        if size >= least:
            break
        best, least = centre, size
        kept = shrink(error, beta, lp_norm).div_(scales[..., None])
        centre = (groups - kept - codes).mean(-1)
        beta *= kappa
    zeros = scales * best
    return Quantized(nearest(weight, scales, zeros, bits), scales, zeros)


METHOD = Method(
    name="hqq",
    family="quantization",
    title="Half-Quadratic Quantization of Large Machine Learning Models",
    arxiv=None,
    year=2023,
    authors="Badri and Shaji",
    repo="mobiusml/hqq",
    status="variant",
    difference="The splitting weight grows as in the report and the best offsets are kept, where the released code's "
    "default keeps the weight and returns the offsets after the best ones; small steps are not raised to 5e-5.",
    target="hfext.quantization.hqq:HQQConfig",
    usage="from_pretrained(path, quantization_config=HQQConfig(bits=4))",
    summary="Finds the offset of each group that leaves few large errors; needs no data and takes seconds.",
    config=HQQConfig,
    notes="Published on the web without an arXiv id.",
)
