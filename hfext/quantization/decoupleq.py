"""Codes and grids found in turns: two bits become usable.

For each row w of a layer and H = X^T X / N of its inputs, integers q and one s and z for each of G groups are sought:

    min  e = (s q + z - w) H (s q + z - w)^T        q in 0 .. 2^b - 1;  s, z any numbers

(1) With q fixed, e is a quadratic function of theta = [s; z], of all groups at once. With A [n, 2G] whose column k
holds q on group k, and column G + k ones on group k: (A^T H A) theta = A^T H w. (2) With s and z fixed, q is rounded
column by column (`_column_rounding.py`), or through a relaxation by projected gradient steps (`round_train`). A new
result is taken only in the rows whose e it lowers. H is damped once, and this H is the one in all of these. The start
is a grid from the ends of the weights with the best shrinkage; its codes give the first s and z by (1).

After the layers of a block, its codes are fixed, and s, z and the weights of its norms are tuned on

    mean |block(x) - label|^2        label: what the block gave for x before it was quantised

decoupleQ: Towards 2-bit Post-Training Uniform Quantization via decoupling Parameters into Integer and Floating Points,
arXiv 2404.12759. Not in the paper: `clip="group"`, `sweeps`. Systems (1) that are singular get a ridge just above
rounding errors instead of 1 % of their diagonal, which pulls s to 0; for G = 1 too, where the authors' code has a
bound that depends on the units of w.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from .._fields import in_range
from ..registry import Method, Result
from ._affine import Grid, Quantized, away_from_zero, clipped, dequantize, ends, grid, grouped, nearest
from ._block_tuning import tune_block
from ._calibration import Block
from ._column_rounding import eliminate, round_columns, sweep_columns
from ._config import CalibratedConfig

ENOUGH_ROWS = 1e-4  # a turn that changes fewer rows is the last


@dataclass(kw_only=True, repr=False)
class DecoupleQConfig(CalibratedConfig):
    """Options of decoupleQ, beside those of `CalibratedConfig`.

    Args:
        max_iter_num (`int`, *optional*, defaults to 4): Turns of the layer stage. 0 is rounding to nearest on a float
            grid, 1 is GPTQ on the same grid.
        round_fn (`str`, *optional*, defaults to "gptq"): How codes are found for a grid: "gptq", or "train", which is
            some hundred times slower.
        clip (`str`, *optional*, defaults to "row"): Choice of the first grid. "row": one shrinkage for a row by e, as
            in the paper, found from coarse to fine; "row_full" tries all 160; "group": one for each group by the sum
            of (w' - w)^2, of 20, which is faster and mostly better.
        sweeps (`int`, *optional*, defaults to 0): Passes of coordinate descent over the codes after each rounding.
        act_order (`bool`, *optional*, defaults to `True`): Round columns by falling size of their inputs.
        symmetric (`bool`, *optional*, defaults to `False`): Offsets follow from the scales, with `group_size=-1` only.
        iters_before_round, inner_iters (`int`, *optional*, defaults to 200 and 5): Of `round_fn="train"`: gradient
            steps before the first column is rounded, and after each.
        block_epochs (`int`, *optional*, defaults to 4): Passes over the data in the block stage; 0 leaves it out.
        block_lr, block_weight_decay (`float`, *optional*, defaults to 1e-5 and 1e-6): Adam's. The paper's steps are of
            one row each: set `batch_size=1` for them.
        train_norm (`bool`, *optional*, defaults to `True`): Tune norms with the grids.
        train_bias (`bool`, *optional*, defaults to `False`): Tune biases of the quantised layers too.

    Raises:
        ValueError: A value out of its range, or `symmetric` with groups.
    """

    method: ClassVar[str] = "decoupleq"
    bits: int | dict[str, int] = 2
    max_iter_num: int = 4
    round_fn: Literal["gptq", "train"] = "gptq"
    clip: Literal["row", "row_full", "group"] = "row"
    sweeps: int = 0
    act_order: bool = True
    symmetric: bool = False
    iters_before_round: int = 200
    inner_iters: int = 5
    block_epochs: int = 4
    block_lr: float = 1e-5
    block_weight_decay: float = 1e-6
    train_norm: bool = True
    train_bias: bool = False

    def __post_init__(self):
        super().__post_init__()
        for name in ("max_iter_num", "sweeps", "iters_before_round", "inner_iters", "block_epochs"):
            in_range(name, getattr(self, name), 0, 100_000)
        in_range("block_lr", self.block_lr, 0.0, 1.0, low_open=True)
        in_range("block_weight_decay", self.block_weight_decay, 0.0, 1.0)
        if self.symmetric and self.group_size != -1:
            raise ValueError(
                f"symmetric is True but must be False with groups: group_size is {self.group_size}, not -1."
            )

    def quantize_layer(self, weight: Tensor, hessian: Tensor, bits: int, group_size: int) -> Quantized:
        return decoupleq(
            weight,
            hessian,
            bits,
            group_size,
            max_iter_num=self.max_iter_num,
            round_fn=self.round_fn,
            clip=self.clip,
            sweeps=self.sweeps,
            act_order=self.act_order,
            symmetric=self.symmetric,
            iters_before_round=self.iters_before_round,
            inner_iters=self.inner_iters,
        )

    def finish_block(self, block: Block) -> None:
        if self.block_epochs:
            chosen = (self.train_norm, self.train_bias)
            tune_block(block, self.block_epochs, self.block_lr, self.block_weight_decay, *chosen)


class Fit(NamedTuple):
    """The best so far: codes uint8 [rows, columns], grid [rows, groups], e [rows]."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    errors: Tensor


def decoupleq(
    weight: Tensor,
    hessian: Tensor,
    bits: int,
    group_size: int,
    max_iter_num: int = 4,
    round_fn: str = "gptq",
    clip: str = "row",
    sweeps: int = 0,
    act_order: bool = True,
    symmetric: bool = False,
    iters_before_round: int = 200,
    inner_iters: int = 5,
    damp: float = 0.01,
    watch: Callable[[str, Fit], Any] | None = None,
) -> Quantized:
    """The layer stage, for a weight [rows, columns] given H [columns, columns].

    The options are those of [`DecoupleQConfig`]; `damp` is the share of the mean diagonal of H that is added to it,
    once for all losses and once more for the rounding of columns. `watch(step, fit)` sees what each step leaves.
    """
    if symmetric and group_size != -1:
        raise ValueError(f"symmetric is True but must be False with groups: group_size is {group_size}, not -1.")
    mean = hessian.diagonal().mean()
    # The units of H change nothing.
    hessian = hessian.to(weight.dtype) / torch.where(mean > 0, mean, 1)
    hessian.diagonal().add_(damp if mean > 0 else 1.0)
    product = weight @ hessian
    low, high = ends(weight, group_size)
    groups = low.shape[1]
    elimination = eliminate(hessian, act_order, damp) if max_iter_num and round_fn == "gptq" else None

    def error(codes: Tensor, made: Grid) -> Tensor:
        return row_errors(weight, dequantize(codes, *made), hessian)

    def offer(step: str, codes: Tensor, made: Grid) -> float:
        """Take it where it is better; returns the share of such rows."""
        nonlocal best
        new = Fit(codes, *made, error(codes, made))
        better = new.errors < best.errors
        column = better[:, None]
        best = Fit(*(torch.where(column, a, b) for a, b in zip(new[:3], best[:3], strict=True)),
                   torch.where(better, new.errors, best.errors))  # fmt: skip
        if watch:
            watch(step, best)
        return float(better.float().mean())

    def rounded(made: Grid) -> Tensor:
        if elimination is None:
            codes = round_train(weight, *made, bits, hessian, iters_before_round, inner_iters)
        else:
            codes = round_columns(weight, *made, bits, elimination)
        return sweep_columns(weight, codes, *made, bits, hessian, sweeps) if sweeps else codes

    def solved(codes: Tensor) -> Grid:
        if symmetric:
            return solve_scale(codes, weight, hessian, bits, product)
        return solve_grid(codes, weight, hessian, groups, bits, product)

    made = grid(low, high, bits, symmetric=symmetric)
    codes = nearest(weight, *made, bits)
    best = Fit(codes, *made, error(codes, made))
    if watch:
        watch("nearest", best)
    if max_iter_num:
        offer("round 0", rounded(made), made)
    for k in range(1, max_iter_num):
        if k > 1:
            made = Grid(best.scales, best.zeros)
        else:
            made = first_grid(weight, low, high, hessian, bits, clip, symmetric)
            made = solved(nearest(weight, *made, bits))
        if offer(f"round {k}", rounded(made), made) < ENOUGH_ROWS:
            break
        if offer(f"solve {k}", best.codes, solved(best.codes)) < ENOUGH_ROWS:
            break
    return Quantized(*best[:3])


def row_errors(weight: Tensor, dequantized: Tensor, hessian: Tensor, panels: int = 6) -> Tensor:
    """(w' - w) H (w' - w)^T for each row [rows]; H is symmetric, so that half of the product suffices."""
    difference = dequantized - weight
    errors, columns = difference.new_zeros(len(weight)), weight.shape[1]
    width = -(-columns // panels)
    for start in range(0, columns, width):
        panel, later = slice(start, start + width), slice(start + width, columns)
        product = difference[:, panel] @ hessian[panel, panel]
        product.addmm_(difference[:, later], hessian[later, panel], alpha=2)
        errors += torch.linalg.vecdot(product, difference[:, panel])
    return errors


def solve_grid(
    codes: Tensor, weight: Tensor, hessian: Tensor, groups: int, bits: int, product: Tensor | None = None
) -> Grid:
    """The best s and z [rows, groups] for given codes, of all groups of a row at once, solved in float64.

    Args:
        codes (`torch.Tensor`): uint8 [rows, columns].
        weight (`torch.Tensor`): [rows, columns]; its type is that of the matrix products.
        hessian (`torch.Tensor`): H [columns, columns].
        groups (`int`): G.
        bits (`int`): Bits of a code.
        product (`torch.Tensor`, *optional*): W H, where it is known.
    """
    product = weight @ hessian if product is None else product
    # Codes around 0 make s and z nearly independent.
    middle = (2**bits - 1) / 2
    sums = grouped(hessian, groups).sum(-1)  # [columns, groups]
    parts = zip(codes.split(1024), product.split(1024), strict=True)
    theta = [_solve(part.to(weight.dtype).sub_(middle), right, hessian, sums, groups) for part, right in parts]
    scales, middles = torch.cat(theta).split(groups, dim=1)
    return Grid(scales.to(weight.dtype), (middles - middle * scales).to(weight.dtype))


def _solve(values: Tensor, product: Tensor, hessian: Tensor, sums: Tensor, groups: int) -> Tensor:
    """theta [rows, 2 groups] in float64 for centred codes [rows, columns]."""
    rows, columns = values.shape
    width = columns // groups
    system = torch.empty(rows, 2 * groups, 2 * groups, dtype=torch.float64, device=values.device)
    for k in range(groups):
        own = slice(k * width, (k + 1) * width)
        spread = values[:, own] @ hessian[own, own.start :]
        pairs = torch.linalg.vecdot(grouped(spread, groups - k), grouped(values[:, own.start :], groups - k))
        system[:, k, k:groups] = pairs
        system[:, k:groups, k] = pairs
        mixed = values[:, own] @ sums[own]
        system[:, k, groups:] = mixed
        system[:, groups:, k] = mixed
    system[:, groups:, groups:] = sums.unflatten(0, (groups, width)).sum(1)
    of_groups = grouped(product, groups)
    right = torch.cat([torch.linalg.vecdot(of_groups, grouped(values, groups)), of_groups.sum(-1)], dim=1).double()
    factor, failed = torch.linalg.cholesky_ex(system)
    diagonal = system.diagonal(dim1=1, dim2=2)
    # Codes that are all the same leave s and z of their group undetermined.
    small = max(1e-10, 10 * torch.finfo(values.dtype).eps)
    singular = (failed > 0) | (factor.diagonal(dim1=1, dim2=2).square() <= small * diagonal).any(1)
    if singular.any():
        diagonal[singular] += small * diagonal[singular].mean(1, keepdim=True)
        factor[singular] = torch.linalg.cholesky_ex(system[singular])[0]
    return torch.cholesky_solve(right[..., None], factor)[..., 0]


def solve_scale(codes: Tensor, weight: Tensor, hessian: Tensor, bits: int, product: Tensor | None = None) -> Grid:
    """The best s [rows, 1] where z = -2^(b-1) s: s = w H i / i H i with i = q - 2^(b-1), in float64."""
    product = weight @ hessian if product is None else product
    values = codes.to(weight.dtype).sub_(2 ** (bits - 1))
    size = torch.linalg.vecdot((values @ hessian).double(), values.double())
    scales = torch.linalg.vecdot(product.double(), values.double()) / away_from_zero(size)
    scales = scales[:, None].to(weight.dtype)
    return Grid(scales, -(2 ** (bits - 1)) * scales)


def first_grid(
    weight: Tensor, low: Tensor, high: Tensor, hessian: Tensor, bits: int, clip: str = "row", symmetric: bool = False
) -> Grid:
    """The grid between p low and p high with the best p = 1 - i / 200, i = 0 .. 159, for nearest codes. `clip` is the
    option of [`DecoupleQConfig`]; "group" takes every eighth p, and "row" looks around the best of every sixteenth."""
    if clip == "group":
        return clipped(weight, low, high, bits, symmetric=symmetric, norm=2.0, steps=25)
    last, rows = 159, len(weight)
    best, least = weight.new_zeros(rows, 1), weight.new_full((rows, 1), torch.inf)

    def attempt(index: Tensor) -> None:
        nonlocal best, least
        index = index.clamp(0, last)
        made = shrunk(index)
        errors = row_errors(weight, dequantize(nearest(weight, *made, bits), *made), hessian)[:, None]
        best, least = torch.where(errors < least, index, best), torch.minimum(errors, least)

    def shrunk(index: Tensor) -> Grid:
        share = 1 - index / 200
        return grid(share * low, share * high, bits, symmetric=symmetric)

    stride = 1 if clip == "row_full" else 16
    for i in range(0, last + 1, stride):
        attempt(torch.full_like(best, i))
    while stride > 1:
        stride //= 2
        around = best
        attempt(around - stride)
        attempt(around + stride)
    return shrunk(best)


def round_train(
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bits: int,
    hessian: Tensor,
    iters_before_round: int = 200,
    inner_iters: int = 5,
    lr: float = 1e-3,
) -> Tensor:
    """Codes uint8 [rows, columns] on a fixed grid by projected Adam steps on e: first of all weights inside the range
    of their grid; then one column after the other is rounded and the others go on. The gradient (w' - w) H takes H
    over its mean diagonal; columns go by falling diagonal."""
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    columns, width = weight.shape[1], weight.shape[1] // scales.shape[1]
    weight = weight[:, order]
    hessian = hessian[order][:, order] / hessian.diagonal().mean()
    scales, zeros = (x.repeat_interleave(width, 1)[:, order] for x in (scales, zeros))
    other_end = zeros + (2**bits - 1) * scales
    low, high = torch.minimum(zeros, other_end), torch.maximum(zeros, other_end)
    values, codes = weight.clone(), torch.empty_like(weight, dtype=torch.uint8)
    mean, square = torch.zeros_like(weight), torch.zeros_like(weight)
    count = 0

    def step(start: int, eps: float) -> None:
        nonlocal count
        count += 1
        free = slice(start, columns)
        gradient = (values - weight) @ hessian[:, free]
        mean[:, free].lerp_(gradient, 0.1)
        square[:, free].mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        size = (square[:, free] / (1 - 0.999**count)).sqrt_().add_(eps)
        values[:, free].addcdiv_(mean[:, free], size, value=-lr / (1 - 0.9**count))
        values[:, free].clamp_(low[:, free], high[:, free])

    for _ in range(iters_before_round):
        step(0, 1e-5)
    for j in range(columns):
        one = slice(j, j + 1)
        codes[:, one] = nearest(values[:, one], scales[:, one], zeros[:, one], bits)
        values[:, one] = dequantize(codes[:, one], scales[:, one], zeros[:, one])
        for _ in range(inner_iters if j + 1 < columns else 0):
            step(j + 1, 1e-4)
    result = torch.empty_like(codes)
    result[:, order] = codes
    return result


METHOD = Method(
    name="decoupleq",
    family="quantization",
    title="decoupleQ: Towards 2-bit Post-Training Uniform Quantization via decoupling Parameters into Integer and "
    "Floating Points",
    authors="Guo et al.",
    arxiv="2404.12759",
    year=2024,
    repo="bytedance/decoupleQ",
    status="faithful",
    target="hfext.quantization.decoupleq:DecoupleQConfig",
    config=DecoupleQConfig,
    usage="from_pretrained(path, quantization_config=DecoupleQConfig(bits=2, dataset=texts))",
    summary="Finds codes and grids in turns, then tunes the grids of a block with its codes fixed; for 2 bits.",
    claim="At 2 bits its perplexity is far below that of GPTQ, which needs 3 bits or more.",
    headline=Result(
        metric="perplexity",
        setting="WikiText-2, LLaMA-2-7B, 2 bits in groups of 64",
        value="8.41",
        baseline="20.85 (GPTQ), 9.62 (OmniQuant)",
    ),
    recipe="quantization/decoupleq-smollm2-wikitext2.yaml",
    notes='Shrinkage of rows is searched from coarse to fine; `clip="row_full"` is the authors\' full search. '
    '`clip="group"` and `sweeps` are ours: they lower the layer error by about a tenth.',
)
