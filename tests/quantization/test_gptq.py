"""GPTQ: its recursion against sequential elimination, and what it becomes for simple Hessians."""

import pytest
import torch

from hfext.quantization._affine import Grid, dequantize, ends, grid, round_to_nearest
from hfext.quantization._column_rounding import eliminate, round_columns, round_groups, sweep_columns
from hfext.quantization.gptq import GPTQConfig, gptq


def correlated(columns, samples=None, seed=0, dtype=torch.float64):
    """H of inputs that a random matrix has mixed."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    x = torch.randn(samples or 8 * columns, columns, generator=generator, dtype=torch.float64) @ mixing
    return (x.T @ x / len(x)).to(dtype)


def row_loss(quantized, weight, hessian):
    difference = quantized.dequantize() - weight
    return torch.einsum("ri,ij,rj->r", difference, hessian, difference)


def eliminated_one_by_one(weight, made, bits, hessian, order):
    """OBQ with a given order: round one weight, move all free ones by their inverse Hessian, drop the column."""
    free, weight = list(order), weight.clone()
    width = weight.shape[1] // made.scales.shape[1]
    codes = torch.zeros(weight.shape, dtype=torch.uint8)
    while free:
        j, inverse = free[0], torch.linalg.inv(hessian[free][:, free])
        step, zero = made.scales[:, j // width], made.zeros[:, j // width]
        codes[:, j] = torch.floor((weight[:, j] - zero) / step + 0.5).clamp(0, 2**bits - 1).to(torch.uint8)
        error = weight[:, j] - (step * codes[:, j] + zero)
        weight[:, free] -= error[:, None] / inverse[0, 0] * inverse[0]
        free.pop(0)
    return codes


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("bits, groups", [(2, 1), (3, 2), (4, 4)])
def test_codes_are_those_of_sequential_elimination(act_order, bits, groups):
    for seed in range(5):
        torch.manual_seed(seed)
        hessian, weight = correlated(8, seed=seed), torch.randn(16, 8, dtype=torch.float64)
        made = grid(*ends(weight, 8 // groups), bits)
        elimination = eliminate(hessian, act_order, damp=0.01)
        damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(8, dtype=torch.float64)
        expected = eliminated_one_by_one(weight, made, bits, damped, elimination.order.tolist())
        assert torch.equal(round_columns(weight, *made, bits, elimination), expected)
        by_size = torch.argsort(hessian.diagonal(), descending=True)
        assert torch.equal(elimination.order, by_size if act_order else torch.arange(8))


def test_loss_is_the_sum_over_columns_that_the_factor_promises():
    hessian, weight = correlated(12), torch.randn(4, 12, dtype=torch.float64)
    order, feedback = eliminate(hessian, damp=0.0)
    unit = feedback.T + torch.eye(12, dtype=torch.float64)
    middle = torch.linalg.solve(unit, torch.linalg.solve(unit, hessian[order][:, order]).T)
    torch.testing.assert_close(middle, torch.diag(middle.diagonal()), rtol=0, atol=1e-9 * float(middle.max()))
    assert (middle.diagonal() > 0).all()
    result = gptq(weight, hessian, 2, 4, damp=0.0)
    pushed = (weight - result.dequantize())[:, order] @ unit
    torch.testing.assert_close((pushed.square() @ middle.diagonal()), row_loss(result, weight, hessian))


@pytest.mark.parametrize("options", [{}, {"act_order": False}, {"act_order": False, "static_groups": False}])
@pytest.mark.parametrize("clip_search", [False, True])
def test_independent_inputs_of_one_size_give_rounding_to_nearest(options, clip_search):
    weight = torch.randn(32, 64)
    nearest = round_to_nearest(weight, 3, 16, "int", clip_search=clip_search)
    result = gptq(weight, 0.7 * torch.eye(64), 3, 16, clip_search=clip_search, **options)
    for a, b in zip(result, nearest, strict=True):
        assert torch.equal(a, b)


def test_block_size_changes_nothing():
    hessian, weight = correlated(96), torch.randn(24, 96, dtype=torch.float64)
    made = grid(*ends(weight, 16), 2)
    elimination, plain = eliminate(hessian), eliminate(hessian, act_order=False)
    codes = [round_columns(weight, *made, 2, elimination, block) for block in (1, 7, 32, 96, 128)]
    assert all(torch.equal(codes[0], other) for other in codes[1:])
    swept = [sweep_columns(weight, codes[0], *made, 2, hessian, 2, block) for block in (1, 7, 32, 96)]
    assert all(torch.equal(swept[0], other) for other in swept[1:])
    dynamic = [round_groups(weight, 24, 2, plain, lambda w: grid(*ends(w, 24), 2), block) for block in (1, 7, 24, 32)]
    assert all(torch.equal(dynamic[0].codes, other.codes) for other in dynamic[1:])


def test_grids_made_on_the_way_come_from_the_moved_weights():
    hessian, weight = correlated(24), torch.randn(5, 24, dtype=torch.float64)
    result = gptq(weight, hessian, 2, 8, act_order=False, static_groups=False)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(24, dtype=torch.float64)
    for first in (0, 8, 16):
        error = (weight - result.dequantize())[:, :first]
        # The free weights that make the best of the errors so far.
        moved = weight[:, first:] + torch.linalg.solve(damped[first:, first:], damped[first:, :first] @ error.T).T
        expected = round_to_nearest(moved[:, :8].contiguous(), 2, 8, "int")
        torch.testing.assert_close(result.scales[:, first // 8], expected.scales[:, 0])
        torch.testing.assert_close(result.zeros[:, first // 8], expected.zeros[:, 0])
    static = gptq(weight, hessian, 2, 24, act_order=False)
    whole = gptq(weight, hessian, 2, -1, act_order=False, static_groups=False)
    assert torch.equal(static.codes, whole.codes)


def test_loss_is_below_that_of_rounding_to_nearest_in_nearly_all_rows():
    better = []
    for seed in range(10):
        hessian, weight = correlated(64, seed=seed, dtype=torch.float32), torch.randn(64, 64)
        for zero_point in ("int", "float"):
            result = gptq(weight, hessian, 3, 16, zero_point=zero_point)
            nearest = round_to_nearest(weight, 3, 16, zero_point)
            assert torch.equal(result.scales, nearest.scales)
            better.append(row_loss(result, weight, hessian) <= row_loss(nearest, weight, hessian))
    assert torch.stack(better).float().mean() > 0.95


def test_sweeps_never_raise_the_loss_of_a_row_and_end_where_no_code_helps():
    hessian, weight = correlated(16), torch.randn(32, 16, dtype=torch.float64)
    made = grid(*ends(weight, 8), 2)
    codes = round_columns(weight, *made, 2, eliminate(hessian))
    losses = []
    for _ in range(30):
        difference = dequantize(codes, *made) - weight
        losses.append(torch.einsum("ri,ij,rj->r", difference, hessian, difference))
        codes = sweep_columns(weight, codes, *made, 2, hessian)
    assert all((later <= earlier + 1e-12).all() for earlier, later in zip(losses, losses[1:], strict=False))
    assert losses[-1].sum() < losses[0].sum()
    for column in range(16):
        for code in range(4):
            other = codes.clone()
            other[:, column] = code
            difference = dequantize(other, *made) - weight
            assert (torch.einsum("ri,ij,rj->r", difference, hessian, difference) >= losses[-1] - 1e-12).all()


def test_rows_are_independent_and_follow_their_order():
    hessian, weight = correlated(32), torch.randn(20, 32, dtype=torch.float64)
    order = torch.randperm(20)
    result, permuted = gptq(weight, hessian, 2, 8), gptq(weight[order], hessian, 2, 8)
    assert torch.equal(permuted.codes, result.codes[order])


def test_size_of_the_hessian_changes_nothing():
    hessian, weight = correlated(32), torch.randn(20, 32, dtype=torch.float64)
    assert torch.equal(gptq(weight, hessian, 2, 8).codes, gptq(weight, 2.0**-40 * hessian, 2, 8).codes)


def test_inputs_that_never_speak_are_rounded_to_nearest():
    hessian, weight = correlated(32), torch.randn(20, 32, dtype=torch.float64)
    silent = torch.tensor([3, 4, 17])
    hessian[silent] = 0
    hessian[:, silent] = 0
    result, nearest = gptq(weight, hessian, 3, 8), round_to_nearest(weight, 3, 8, "int")
    assert torch.equal(result.codes[:, silent], nearest.codes[:, silent])
    all_silent = gptq(weight, torch.zeros_like(hessian), 3, 8)
    assert torch.equal(all_silent.codes, nearest.codes)


def test_more_damping_is_tried_before_it_gives_up():
    hessian = correlated(6)
    low = torch.linalg.eigvalsh(hessian)[0]
    shifted = hessian - (low + 0.5 * hessian.diagonal().mean()) * torch.eye(6, dtype=torch.float64)
    assert torch.linalg.cholesky_ex(shifted)[1] > 0
    assert eliminate(shifted).feedback.isfinite().all()
    with pytest.raises(RuntimeError, match="no Cholesky factor"):
        eliminate(-1e6 * hessian)
    with pytest.raises(RuntimeError, match="not finite"):
        eliminate(torch.full((4, 4), torch.nan))


def test_weights_on_the_grid_stay():
    made = Grid(torch.rand(8, 4) + 0.1, torch.randn(8, 4))
    codes = torch.randint(0, 4, (8, 32), dtype=torch.uint8)
    weight = dequantize(codes, *made)
    assert torch.equal(round_columns(weight, *made, 2, eliminate(correlated(32, dtype=torch.float32))), codes)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"damp": -0.1}, "damp"),
        ({"static_groups": False}, "act_order"),
        ({"zero_point": "half"}, "zero_point"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        GPTQConfig(bits=2, **options)
    if "static_groups" in options:
        with pytest.raises(ValueError, match=message):
            gptq(torch.randn(2, 8), torch.eye(8), 2, 4, **options)
