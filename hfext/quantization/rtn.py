"""Rounding to nearest: the baseline of weight quantisation, from the weight alone.

For each group of g inputs of an output, with lo and hi the ends of its weights:

    s = (hi - lo) / (2^b - 1),   z = lo,   q = clamp(round((w - z) / s), 0, 2^b - 1),   w' = s q + z

An integer zero point moves z to a multiple of s, with lo <= 0 <= hi, so that 0 is exact; a symmetric grid centres it.
With clip search the range is shrunk where that lowers sum |w' - w|^2.4 (see `_affine.py`).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from ..registry import Method
from ._affine import Quantized, round_to_nearest
from ._config import WeightConfig


@dataclass(kw_only=True, repr=False)
class RTNConfig(WeightConfig):
    """Options of rounding to nearest, beside those of `WeightConfig`.

    Args:
        zero_point (`str`, *optional*, defaults to "int"): "int" makes 0 exact, as other libraries and their kernels
            expect; "float" lets the offset be any number, which fits the weights better and a model worse: on
            SmolLM2-135M at 3 bits the perplexity is 221 instead of 77.
        symmetric (`bool`, *optional*, defaults to `False`): The range is -m .. m and the zero point its middle.
        clip_search (`bool`, *optional*, defaults to `False`): Shrink ranges where that lowers the error.
    """

    method: ClassVar[str] = "rtn"
    zero_point: Literal["float", "int"] = "int"
    symmetric: bool = False
    clip_search: bool = False

    def quantize_weight(self, weight: Tensor, bits: int, group_size: int) -> Quantized:
        return round_to_nearest(weight, bits, group_size, self.zero_point, self.symmetric, self.clip_search)


METHOD = Method(
    name="rtn",
    family="quantization",
    title="Rounding to nearest",
    arxiv=None,
    year=2021,
    status="faithful",
    target="hfext.quantization.rtn:RTNConfig",
    usage="from_pretrained(path, quantization_config=RTNConfig(bits=4))",
    summary="Rounds each weight to the nearest of 2^b levels between the ends of its group; needs no data.",
    config=RTNConfig,
    notes="The common baseline; it has no paper of its own. The clip search is that of GPTQ's authors.",
)
