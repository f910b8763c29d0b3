"""Rounding column by column: the columns that follow make up for the error of each.

The loss of a layer is tr((W' - W) H (W' - W)^T) with H = X^T X / N of its inputs. Columns are taken by falling H_jj;
the recursion is in `_column_rounding.py`. The grid of a group comes from the weights before anything is rounded
(static groups), or from the moved weights when the group is reached, which rules out the order by H_jj.

GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers, arXiv 2210.17323. Unlike in the
authors' code, weights of an input that is always 0 are rounded to nearest and not set to 0: the loss does not see
them, and other data may.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from .._fields import in_range
from ..registry import Method, Result
from ._affine import Grid, Quantized, columns_of, round_to_nearest
from ._column_rounding import eliminate, round_columns, round_groups
from ._config import CalibratedConfig


@dataclass(kw_only=True, repr=False)
class GPTQConfig(CalibratedConfig):
    """Options of GPTQ, beside those of `CalibratedConfig`.

    Args:
        act_order (`bool`, *optional*, defaults to `True`): Take the columns by falling size of their inputs.
        static_groups (`bool`, *optional*, defaults to `True`): Make all grids before the first column is rounded;
            otherwise when a group is reached, which needs `act_order=False`.
        damp (`float`, *optional*, defaults to 0.01): This share of the mean diagonal of H is added to it; more where
            the factorisation fails. >= 0.
        zero_point (`str`, *optional*, defaults to "int"): "int" makes 0 exact, as in the paper; "float" lets the
            offset be any number, which is better at 2 bits.
        symmetric (`bool`, *optional*, defaults to `False`): The range is -m .. m and the zero point its middle.
        clip_search (`bool`, *optional*, defaults to `False`): Shrink ranges where that lowers sum |w' - w|^2.4.

    Raises:
        ValueError: A value out of its range, or `act_order` with `static_groups=False`.
    """

    method: ClassVar[str] = "gptq"
    act_order: bool = True
    static_groups: bool = True
    damp: float = 0.01
    zero_point: Literal["float", "int"] = "int"
    symmetric: bool = False
    clip_search: bool = False

    def __post_init__(self):
        super().__post_init__()
        in_range("damp", self.damp, 0.0, 1e6)
        _check_order(self.act_order, self.static_groups)

    def quantize_layer(self, weight: Tensor, hessian: Tensor, bits: int, group_size: int) -> Quantized:
        return gptq(
            weight,
            hessian,
            bits,
            group_size,
            act_order=self.act_order,
            static_groups=self.static_groups,
            damp=self.damp,
            zero_point=self.zero_point,
            symmetric=self.symmetric,
            clip_search=self.clip_search,
        )


def gptq(
    weight: Tensor,
    hessian: Tensor,
    bits: int,
    group_size: int,
    act_order: bool = True,
    static_groups: bool = True,
    damp: float = 0.01,
    zero_point: str = "int",
    symmetric: bool = False,
    clip_search: bool = False,
) -> Quantized:
    """Codes and grid of a weight [rows, columns], given H [columns, columns]; the options are those of
    [`GPTQConfig`]. `RuntimeError` when H has no Cholesky factor at any damping."""
    _check_order(act_order, static_groups)

    def nearest_on(part: Tensor, width: int) -> Quantized:
        return round_to_nearest(part, bits, width, zero_point, symmetric, clip_search)

    width = columns_of(weight, group_size)
    elimination = eliminate(hessian, act_order, damp)
    if static_groups:
        _, scales, zeros = nearest_on(weight, width)
        return Quantized(round_columns(weight, scales, zeros, bits, elimination), scales, zeros)
    return round_groups(weight, width, bits, elimination, lambda moved: Grid(*nearest_on(moved, width)[1:]))


def _check_order(act_order: bool, static_groups: bool) -> None:
    if act_order and not static_groups:
        raise ValueError(
            "act_order is True but must be False with static_groups=False: groups are consecutive columns in the "
            "stored format, and a grid made on the way needs all of its columns at once."
        )


METHOD = Method(
    name="gptq",
    family="quantization",
    title="GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
    authors="Frantar et al.",
    arxiv="2210.17323",
    year=2022,
    repo="IST-DASLab/gptq",
    status="faithful",
    target="hfext.quantization.gptq:GPTQConfig",
    config=GPTQConfig,
    usage="from_pretrained(path, quantization_config=GPTQConfig(bits=3, dataset=texts))",
    summary="Rounds column by column and moves the columns that follow to make up for the error.",
    claim="At 3 and 4 bits a layer's output, and with it perplexity, suffers far less than from rounding to nearest.",
    headline=Result(
        metric="perplexity",
        setting="WikiText-2, LLaMA-2-7B, 2 bits in groups of 64",
        value="20.85, as decoupleQ's authors report it",
    ),
    notes="Without clip search and at 2 bits it is poor; it is the baseline of decoupleq.",
)
