"""Rounding a weight column by column so that later columns make up for the errors of earlier ones.

For the loss tr((W' - W) H (W' - W)^T) write H = (I + M) D (I + M)^T with M strictly upper triangular and D diagonal.
With the errors e_i = w_i - w'_i of the columns so far, the next column is rounded as

    w'_j = Q(w_j + sum_{i<j} e_i M_ij)        which leaves the loss  sum_j D_jj |w'_j - (w_j + sum_{i<j} e_i M_ij)|^2

This is GPTQ ("GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", arXiv 2210.17323) in
the form of LDLQ ("QuIP: 2-Bit Quantization of Large Language Models With Guarantees", arXiv 2307.13304), which gives
the same codes. It needs the factor of H instead of that of its inverse, and reads the finished columns instead of
writing all later ones. Before group g is reached its weights have moved to W_g + E M_:g (I + M_gg)^-1: from these a
grid can be made on the way.

The factor is computed in float64, the recursion in the type of the weight on transposed memory, so that a column of
all rows is contiguous. All rows are independent.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ._affine import Grid, Quantized, away_from_zero


class Elimination(NamedTuple):
    """The order of the columns [n], and M^T in this order (strictly lower triangular [n, n])."""

    order: Tensor
    feedback: Tensor


def eliminate(hessian: Tensor, act_order: bool = True, damp: float = 0.01) -> Elimination:
    """Factor a Hessian [n, n] (symmetric, positive semi-definite) in the type of the Hessian.

    Args:
        hessian (`torch.Tensor`): H [n, n].
        act_order (`bool`): Take the columns by falling diagonal of H, else from left to right.
        damp (`float`): This share of the mean diagonal is added to the diagonal; ten times as much, up to four times
            more, while the factorisation fails. `RuntimeError` when it never succeeds.
    """
    return weighted_elimination(hessian, act_order, damp)[0]


def weighted_elimination(hessian: Tensor, act_order: bool = True, damp: float = 0.01) -> tuple[Elimination, Tensor]:
    """`eliminate`, with the diagonal of D [n] in the original order of the columns, float64."""
    diagonal = hessian.diagonal().double()
    order = torch.argsort(diagonal, descending=True, stable=True) if act_order else torch.arange(len(hessian))
    order = order.to(hessian.device)
    # H = A A^T with A upper triangular is a Cholesky factorisation from the last row to the first.
    backwards = order.flip(0)
    damped = hessian[backwards][:, backwards].double()
    mean = diagonal.mean()
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    added = 0.0
    for share in (damp, *((damp or 0.001) * 10.0**k for k in range(1, 5))):
        damped.diagonal().add_((share - added) * mean)
        added = share
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed and factor.isfinite().all():
            # A = flip(factor), and row j of M^T is column j of A over A_jj.
            lower = factor.flip(0, 1).T
            root = lower.diagonal()
            feedback = lower / root[:, None]
            feedback.diagonal().zero_()
            weights = torch.empty_like(root).index_copy_(0, order, root.square())
            return Elimination(order, feedback.to(hessian.dtype).contiguous()), weights
    raise RuntimeError(
        f"The Hessian [{len(hessian)}, {len(hessian)}] has no Cholesky factor, even with {added:g} of its mean "
        f"diagonal ({mean.item():.3g}) added: it is not positive semi-definite or not finite."
    )


def round_columns(
    weight: Tensor, scales: Tensor, zeros: Tensor, bits: int, elimination: Elimination, block: int = 32
) -> Tensor:
    """Codes uint8 [rows, columns] on a fixed grid.

    Args:
        weight (`torch.Tensor`): [rows, columns].
        scales, zeros (`torch.Tensor`): The grid [rows, groups]; groups follow the original order of the columns.
        bits (`int`): Bits of a code.
        elimination (`Elimination`): From `eliminate`.
        block (`int`): Columns that share one matrix product; the speed depends on it and the codes do not.
    """
    order, feedback = elimination.order, elimination.feedback.to(weight.dtype)
    width = weight.shape[1] // scales.shape[1]
    # Codes are those of w - z, so that a column needs no offset.
    weights = (weight - zeros.repeat_interleave(width, 1)).T[order]
    steps, slopes = _by_column(scales, (order // width).tolist())
    errors, codes = torch.zeros_like(weights), torch.empty_like(weights)
    for start in range(0, len(order), block):
        stop = start + block
        moved = torch.addmm(weights[start:stop], feedback[start:stop, :start], errors[:start])
        _round_block(moved, weights, errors, codes, feedback, start, steps[start:stop], slopes[start:stop], bits)
    result = torch.empty_like(codes, dtype=torch.uint8)
    result[order] = codes.to(torch.uint8)
    return result.T.contiguous()


def sweep_columns(
    weight: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bits: int,
    hessian: Tensor,
    sweeps: int = 1,
    block: int = 32,
) -> Tensor:
    """Better codes uint8 [rows, columns] by coordinate descent: each column in turn takes the code that is best given
    those of all others, w'_j = Q(w_j + sum_{i != j} e_i H_ij / H_jj), so that the loss of no row rises.

    Args:
        weight (`torch.Tensor`): [rows, columns].
        codes, scales, zeros (`torch.Tensor`): Where to start, uint8 [rows, columns], and the grid [rows, groups].
        bits (`int`): Bits of a code.
        hessian (`torch.Tensor`): H [columns, columns].
        sweeps (`int`): Passes over all columns.
        block (`int`): Columns that share one matrix product.
    """
    width = weight.shape[1] // scales.shape[1]
    diagonal = hessian.diagonal()[:, None]
    feedback = torch.where(diagonal > 0, hessian / diagonal, 0).to(weight.dtype)
    feedback.diagonal().zero_()
    weights = (weight - zeros.repeat_interleave(width, 1)).T.contiguous()
    steps, slopes = _by_column(scales, [j // width for j in range(len(weights))])
    values = codes.T.to(weight.dtype, memory_format=torch.contiguous_format)
    errors = torch.addcmul(weights, values, scales.T.repeat_interleave(width, 0), value=-1)
    for start in (start for _ in range(sweeps) for start in range(0, len(weights), block)):
        stop = start + block
        moved = torch.addmm(weights[start:stop], feedback[start:stop], errors)
        moved.addmm_(feedback[start:stop, start:stop], errors[start:stop], alpha=-1)
        _round_block(moved, weights, errors, values, feedback, start, steps[start:stop], slopes[start:stop], bits)
    return values.T.to(torch.uint8, memory_format=torch.contiguous_format)


def round_groups(
    weight: Tensor,
    group_size: int,
    bits: int,
    elimination: Elimination,
    make_grid: Callable[[Tensor], Grid],
    block: int = 32,
) -> Quantized:
    """Round from left to right with grids made on the way.

    Args:
        weight (`torch.Tensor`): [rows, columns].
        group_size (`int`): Columns of a group.
        bits (`int`): Bits of a code.
        elimination (`Elimination`): From `eliminate` with `act_order=False`.
        make_grid (`Callable`): Takes the moved weights of a group [rows, group_size] and returns its grid [rows, 1].
        block (`int`): Columns that share one matrix product.
    """
    feedback = elimination.feedback.to(weight.dtype)
    weights = weight.T.clone(memory_format=torch.contiguous_format)
    errors, codes = torch.zeros_like(weights), torch.empty_like(weights)
    made = []
    for first in range(0, len(weights), group_size):
        last = first + group_size
        pushed = torch.linalg.solve_triangular(
            feedback[first:last, first:last],
            feedback[first:last, :first] @ errors[:first],
            upper=False,
            unitriangular=True,
        )
        scales, zeros = make_grid((weights[first:last] + pushed).T.contiguous())
        made.append((scales, zeros))
        weights[first:last] -= zeros.T
        steps, slopes = _by_column(scales, [0] * group_size)
        for start in range(first, last, block):
            stop = min(start + block, last)
            moved = torch.addmm(weights[start:stop], feedback[start:stop, :start], errors[:start])
            here = slice(start - first, stop - first)
            _round_block(moved, weights, errors, codes, feedback, start, steps[here], slopes[here], bits)
    scales, zeros = (torch.cat(parts, dim=1) for parts in zip(*made, strict=True))
    return Quantized(codes.T.to(torch.uint8, memory_format=torch.contiguous_format), scales, zeros)


def _by_column(scales: Tensor, groups: list[int]) -> tuple[list[Tensor], list[Tensor]]:
    """For each column, whose group is given, the step to divide by [rows] and the scale with its sign changed."""
    steps, slopes = away_from_zero(scales).T.contiguous().unbind(), (-scales).T.contiguous().unbind()
    return [steps[k] for k in groups], [slopes[k] for k in groups]


def _round_block(
    moved: Tensor,
    weights: Tensor,
    errors: Tensor,
    codes: Tensor,
    feedback: Tensor,
    start: int,
    steps: list[Tensor],
    slopes: list[Tensor],
    bits: int,
) -> None:
    """Round the columns `start` .. of the transposed `weights`, which columns of other blocks have pushed to `moved`;
    fills `errors` and `codes`. A column costs six small kernels, and no time for views and scalars."""
    top, half = 2**bits - 1, torch.full_like(moved[0], 0.5)
    rows = slice(start, start + len(moved))
    # Errors that are still to come are zeros, or meet zeros of M.
    known = errors[rows].T
    columns = (moved, weights[rows], errors[rows], codes[rows], feedback[rows, rows])
    for target, weight, error, code, share, step, slope in zip(
        *(x.unbind() for x in columns), steps, slopes, strict=True
    ):
        target.addmv_(known, share)
        torch.div(target, step, out=code).add_(half).floor_().clamp_(0, top)
        torch.addcmul(weight, code, slope, out=error)
