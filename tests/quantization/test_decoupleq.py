"""decoupleQ: its closed form, its errors step by step, small problems against the optimum, and the block stage."""

import copy
import itertools
import re

import pytest
import torch

from hfext.quantization._affine import Grid, Quantized, dequantize, ends, grid, nearest, round_to_nearest
from hfext.quantization._block_tuning import tune_block
from hfext.quantization._column_rounding import eliminate, round_columns
from hfext.quantization._quantizer import quantize, quantized_layers
from hfext.quantization.decoupleq import (
    DecoupleQConfig,
    decoupleq,
    first_grid,
    round_train,
    row_errors,
    solve_grid,
    solve_scale,
)
from hfext.quantization.gptq import gptq


def correlated(columns, samples=None, seed=0, dtype=torch.float64):
    """H of inputs that a random matrix has mixed."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    x = torch.randn(samples or 8 * columns, columns, generator=generator, dtype=torch.float64) @ mixing
    return (x.T @ x / len(x)).to(dtype)


def damped(hessian, share=0.01):
    return hessian + share * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype)


def loss(weight, dequantized, hessian):
    difference = dequantized - weight
    return torch.einsum("ri,ij,rj->r", difference, hessian, difference)


def best_grids(codes, weight, hessian, groups):
    """Least squares in the coordinates of a Cholesky factor, one row at a time: theta [rows, 2 groups] and errors."""
    rows, columns = codes.shape
    half = torch.linalg.cholesky(hessian).T
    member = torch.eye(groups, dtype=weight.dtype).repeat_interleave(columns // groups, 0)
    thetas, errors = [], []
    for row in range(rows):
        design = torch.cat([member * codes[row, :, None], member], dim=1)
        theta = torch.linalg.lstsq(half @ design, (half @ weight[row])[:, None], driver="gelsd").solution[:, 0]
        thetas.append(theta)
        errors.append((half @ (design @ theta - weight[row])).square().sum())
    return torch.stack(thetas), torch.stack(errors)


def test_row_errors_are_the_quadratic_form():
    for columns in (1, 5, 6, 7, 48):
        hessian, weight = correlated(columns), torch.randn(9, columns, dtype=torch.float64)
        other = torch.randn_like(weight)
        torch.testing.assert_close(row_errors(weight, other, hessian), loss(weight, other, hessian))


@pytest.mark.parametrize("bits, groups", [(2, 1), (2, 4), (3, 2), (4, 8)])
def test_grids_are_the_least_squares_solution(bits, groups):
    hessian, weight = correlated(64), torch.randn(12, 64, dtype=torch.float64)
    codes = torch.randint(0, 2**bits, (12, 64), dtype=torch.uint8)
    made = solve_grid(codes, weight, hessian, groups, bits)
    theta, errors = best_grids(codes, weight, hessian, groups)
    torch.testing.assert_close(torch.cat(made, dim=1), theta, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(row_errors(weight, dequantize(codes, *made), hessian), errors, rtol=1e-8, atol=0)
    many = solve_grid(codes.repeat(200, 1), weight.repeat(200, 1), hessian, groups, bits)
    torch.testing.assert_close(many.scales, made.scales.repeat(200, 1))


def test_gradient_vanishes_at_the_solution():
    hessian, weight = correlated(32), torch.randn(6, 32, dtype=torch.float64)
    codes = torch.randint(0, 4, (6, 32), dtype=torch.uint8)
    made = [x.requires_grad_() for x in solve_grid(codes, weight, hessian, 4, 2)]
    loss(weight, dequantize(codes, *made), hessian).sum().backward()
    assert all(x.grad.abs().max() < 1e-9 * hessian.diagonal().sum() for x in made)


def test_one_group_and_white_inputs_are_linear_regression():
    weight, codes = torch.randn(5, 40, dtype=torch.float64), torch.randint(0, 8, (5, 40), dtype=torch.uint8)
    made = solve_grid(codes, weight, 3.0 * torch.eye(40, dtype=torch.float64), 1, 3)
    x, q = weight - weight.mean(1, keepdim=True), codes.double() - codes.double().mean(1, keepdim=True)
    slope = (x * q).sum(1) / q.square().sum(1)
    torch.testing.assert_close(made.scales[:, 0], slope)
    torch.testing.assert_close(made.zeros[:, 0], weight.mean(1) - slope * codes.double().mean(1))


def test_equal_codes_in_a_group_still_give_the_least_error():
    hessian, weight = correlated(32), torch.randn(8, 32, dtype=torch.float64)
    codes = torch.randint(0, 4, (8, 32), dtype=torch.uint8)
    codes[0], codes[1, :8], codes[2, 8:16], codes[3, 24:] = 2, 0, 3, 1
    made = solve_grid(codes, weight, hessian, 4, 2)
    expected = best_grids(codes, weight, hessian, 4)[1]
    torch.testing.assert_close(row_errors(weight, dequantize(codes, *made), hessian), expected, rtol=1e-6, atol=0)
    single = solve_grid(codes, weight.float(), hessian.float(), 4, 2)
    errors = loss(weight, dequantize(codes, *single).double(), hessian)
    torch.testing.assert_close(errors, expected, rtol=1e-3, atol=0)
    assert made.scales.abs().min() > 0


def test_scale_alone_is_the_best_of_many():
    hessian, weight = correlated(24), torch.randn(6, 24, dtype=torch.float64)
    codes = torch.randint(0, 8, (6, 24), dtype=torch.uint8)
    made = solve_scale(codes, weight, hessian, 3)
    assert torch.equal(made.zeros, -4 * made.scales)
    least = row_errors(weight, dequantize(codes, *made), hessian)
    for share in (0.9, 0.999, 1.001, 1.1):
        tried = Grid(share * made.scales, share * made.zeros)
        assert (row_errors(weight, dequantize(codes, *tried), hessian) > least).all()


@pytest.mark.parametrize("options", [{}, {"clip": "group", "sweeps": 2}, {"act_order": False}, {"round_fn": "train"}])
@pytest.mark.parametrize("bits, group_size", [(2, 16), (3, -1)])
def test_error_of_no_row_ever_rises(options, bits, group_size):
    hessian, weight = correlated(64), torch.randn(40, 64, dtype=torch.float64)
    steps, fits = [], []
    extra = {"iters_before_round": 50, "inner_iters": 2} if "round_fn" in options else {}
    result = decoupleq(
        weight,
        hessian,
        bits,
        group_size,
        watch=lambda step, fit: (steps.append(step), fits.append(fit)),
        **options,
        **extra,
    )
    assert steps[:5] == ["nearest", "round 0", "round 1", "solve 1", "round 2"]
    # By the loss as it is written, and not by the errors that decided.
    errors = [loss(weight, dequantize(*fit[:3]), damped(hessian)) for fit in fits]
    mean = hessian.diagonal().mean()
    for fit, error in zip(fits, errors, strict=True):
        torch.testing.assert_close(fit.errors * mean, error)
    for earlier, later in zip(errors, errors[1:], strict=False):
        assert (later <= earlier * (1 + 1e-12)).all()
    assert (errors[-1] < errors[1]).float().mean() > 0.9
    torch.testing.assert_close(loss(weight, result.dequantize(), damped(hessian)), errors[-1])


def test_no_turn_is_rounding_to_nearest_and_one_is_gptq():
    hessian, weight = correlated(64), torch.randn(40, 64, dtype=torch.float64)
    made = grid(*ends(weight, 16), 2)
    none = decoupleq(weight, hessian, 2, 16, max_iter_num=0)
    assert torch.equal(none.codes, nearest(weight, *made, 2))
    one = decoupleq(weight, hessian, 2, 16, max_iter_num=1)
    # Every group here has weights of both signs, so that ranges with and without 0 are the same.
    expected = gptq(weight, damped(hessian), 2, 16, zero_point="float")
    torch.testing.assert_close(one.scales, expected.scales)
    better = loss(weight, expected.dequantize(), damped(hessian)) < loss(weight, none.dequantize(), damped(hessian))
    assert better.float().mean() > 0.8
    assert torch.equal(one.codes[better], expected.codes[better])
    assert torch.equal(one.codes[~better], none.codes[~better])


@pytest.mark.parametrize("round_fn", ["gptq", "train"])
def test_weights_on_a_grid_are_found_again(round_fn):
    made = Grid(torch.rand(8, 4) + 0.1, torch.randn(8, 4))
    codes = torch.randint(0, 4, (8, 32), dtype=torch.uint8)
    codes[:, ::8], codes[:, 1::8] = 0, 3  # both ends of a group occur
    weight, hessian = dequantize(codes, *made), correlated(32, dtype=torch.float32)
    if round_fn == "train":
        found = round_train(weight, *made, 2, damped(hessian), iters_before_round=20, inner_iters=1)
    else:
        found = round_columns(weight, *made, 2, eliminate(hessian))
    assert torch.equal(found, codes)
    both_signs = Grid(made.scales, -made.scales * 1.3)
    weight = dequantize(codes, *both_signs)
    result = decoupleq(weight, hessian, 2, 8, round_fn=round_fn, iters_before_round=20, inner_iters=1)
    assert torch.equal(result.codes, codes)
    torch.testing.assert_close(result.dequantize(), weight)


def test_units_of_hessian_and_weights_change_nothing():
    hessian, weight = correlated(64), torch.randn(20, 64, dtype=torch.float64)
    for clip, share in itertools.product(("row", "group"), (2.0**-30, 2.0**30)):
        result = decoupleq(weight, hessian, 2, 16, clip=clip)
        assert torch.equal(decoupleq(weight, share * hessian, 2, 16, clip=clip).codes, result.codes)
        scaled = decoupleq(share * weight, hessian, 2, 16, clip=clip)
        assert torch.equal(scaled.codes, result.codes)
        torch.testing.assert_close(scaled.dequantize(), share * result.dequantize(), rtol=1e-9, atol=0)


def test_rows_are_independent():
    hessian, weight = correlated(64), torch.randn(20, 64, dtype=torch.float64)
    order = torch.randperm(20)
    assert torch.equal(decoupleq(weight[order], hessian, 2, 16).codes, decoupleq(weight, hessian, 2, 16).codes[order])


def test_shrinkage_of_a_row_is_the_best_of_all_and_nearly_so_from_coarse_to_fine():
    hessian, weight = damped(correlated(64)), torch.randn(30, 64, dtype=torch.float64)
    low, high = ends(weight, 16)
    errors = []
    for i in range(160):
        made = grid((1 - i / 200) * low, (1 - i / 200) * high, 2)
        errors.append(loss(weight, dequantize(nearest(weight, *made, 2), *made), hessian))
    index = torch.stack(errors).argmin(0)[:, None]
    torch.testing.assert_close(
        first_grid(weight, low, high, hessian, 2, "row_full").scales, (1 - index / 200) * (high - low) / 3
    )
    made = first_grid(weight, low, high, hessian, 2, "row")
    coarse = loss(weight, dequantize(nearest(weight, *made, 2), *made), hessian)
    assert coarse.sum() < 1.03 * torch.stack(errors).amin(0).sum()


def test_symmetric_rows_keep_their_middle():
    hessian, weight = correlated(32), torch.randn(10, 32, dtype=torch.float64)
    for bits in (2, 4):
        result = decoupleq(weight, hessian, bits, -1, symmetric=True)
        torch.testing.assert_close(result.zeros, -(2 ** (bits - 1)) * result.scales)
        start = round_to_nearest(weight, bits, -1, symmetric=True)
        assert (loss(weight, result.dequantize(), hessian) < loss(weight, start.dequantize(), hessian)).all()


def smallest(columns, hessian, weight):
    """Errors of the best grids of all 4^n rows of codes, by the 2 x 2 systems written out; the least of them."""
    codes = torch.tensor(list(itertools.product(range(4), repeat=columns)), dtype=torch.float64)
    codes = codes[(codes != codes[:, :1]).any(1)]
    ones = torch.ones(columns, dtype=torch.float64)
    a, b, c = torch.einsum("ri,ij,rj->r", codes, hessian, codes), codes @ hessian @ ones, ones @ hessian @ ones
    d, e = codes @ hessian @ weight, ones @ hessian @ weight
    gain = (c * d * d - 2 * b * d * e + a * e * e) / (a * c - b * b)
    return (weight @ hessian @ weight - gain).min()


def small_problems(draws, columns=6):
    """(optimum, {name: error}) of random rows under the Hessian of 40 mixed samples."""
    for seed in range(draws):
        generator = torch.Generator().manual_seed(seed)
        mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
        x = torch.randn(40, columns, generator=generator, dtype=torch.float64) @ mixing
        weight = torch.randn(1, columns, generator=generator, dtype=torch.float64)
        hessian = x.T @ x / 40
        exact = damped(hessian)
        found = {
            "rtn": round_to_nearest(weight, 2, -1),
            "gptq": gptq(weight, exact, 2, -1, zero_point="float"),
            "decoupleq": decoupleq(weight, hessian, 2, -1),
            "group, swept": decoupleq(weight, hessian, 2, -1, clip="group", sweeps=4),
        }
        errors = {name: float(loss(weight, made.dequantize(), exact)) for name, made in found.items()}
        yield float(smallest(columns, exact, weight[0])), errors


def test_small_problems_end_near_the_optimum():
    ratios = {}
    for optimum, errors in small_problems(100):
        for name, error in errors.items():
            assert error >= optimum * (1 - 1e-9)
            ratios.setdefault(name, []).append(error / optimum)
    median = {name: float(torch.tensor(values).median()) for name, values in ratios.items()}
    assert median["decoupleq"] <= 1.35
    assert median["group, swept"] <= 1.35
    assert median["gptq"] > 2 and median["rtn"] > median["gptq"]


def test_relaxation_stays_inside_the_grid_and_beats_nearest():
    hessian, weight = damped(correlated(48)), torch.randn(16, 48, dtype=torch.float64)
    made = first_grid(weight, *ends(weight, 16), hessian, 2, "group")
    made = Grid(made.scales * torch.tensor([1.0, -1.0, 1.0]), made.zeros.clone())
    made.zeros[:, 1] -= 3 * made.scales[:, 1]  # the same levels from the other end
    codes = round_train(weight, *made, 2, hessian)
    assert codes.max() <= 3
    start = loss(weight, dequantize(nearest(weight, *made, 2), *made), hessian)
    assert loss(weight, dequantize(codes, *made), hessian).sum() < 0.8 * start.sum()


def ids(rows=6, tokens=40):
    return torch.randint(3, 128, (rows, tokens), generator=torch.Generator().manual_seed(7))


def make(**options):
    fixed = dict(
        bits=2,
        group_size=16,
        dataset=ids(),
        sequence_length=40,
        batch_size=2,
        block_lr=1e-3,
        clip="group",
        max_iter_num=2,
    )
    return DecoupleQConfig(**{**fixed, **options})


def tuned(model, monkeypatch, **options):
    """The model, quantised, with (loss before, loss after, loss returned) of each block."""
    seen = []

    def watched(block, *args):
        def mean():
            parts = zip(block.samples, block.labels, strict=True)
            return float(torch.stack([(block.run(s).float() - y.float()).square().mean() for s, y in parts]).mean())

        before = mean()
        returned = tune_block(block, *args)
        seen.append((before, mean(), returned))
        return returned

    monkeypatch.setattr("hfext.quantization.decoupleq.tune_block", watched)
    return quantize(model, make(**options)), seen


def test_block_stage_lowers_the_loss_and_leaves_the_codes(tiny_llama, monkeypatch):
    model, seen = tuned(tiny_llama(), monkeypatch)
    plain = quantize(tiny_llama(), make(block_epochs=0))
    assert len(seen) == 2
    for before, after, returned in seen:
        assert after < before and after == pytest.approx(returned, rel=1e-5)
    # What enters the first block is the same with and without its tuning.
    for name, layer in quantized_layers(model.model.layers[0]).items():
        other = quantized_layers(plain.model.layers[0])[name]
        assert torch.equal(layer.qweight, other.qweight)
        assert not torch.equal(layer.scales, other.scales)
        assert layer.scales.dtype == torch.float16 and not layer.scales.requires_grad and layer.scales.grad is None
    assert not torch.equal(model.model.layers[0].input_layernorm.weight, torch.ones(32))
    assert torch.equal(plain.model.layers[0].input_layernorm.weight, torch.ones(32))


def test_a_step_size_that_ruins_the_block_is_undone(tiny_llama, monkeypatch):
    model, seen = tuned(tiny_llama(), monkeypatch, block_lr=1.0, block_epochs=1)
    plain = quantize(tiny_llama(), make(block_epochs=0))
    assert all(after == before for before, after, _ in seen)
    for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("train_norm, train_bias", [(True, False), (False, True), (False, False)])
def test_only_what_is_asked_for_is_tuned(tiny_llama, monkeypatch, train_norm, train_bias):
    start = tiny_llama(attention_bias=True)
    for parameter in start.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.01 * torch.randn_like(parameter)
    model, _ = tuned(copy.deepcopy(start), monkeypatch, train_norm=train_norm, train_bias=train_bias)
    before, after = dict(start.named_parameters()), dict(model.named_parameters())
    changed = {name for name in before.keys() & after.keys() if not torch.equal(before[name], after[name])}
    norms = {name for name in before if re.search(r"layers.*layernorm", name)}
    biases = {name for name in before if name.endswith("bias")}
    assert changed == (norms if train_norm else set()) | (biases if train_bias else set())


def test_block_stage_works_in_fp32_for_a_bf16_model(tiny_llama, monkeypatch):
    model, seen = tuned(tiny_llama().bfloat16(), monkeypatch)
    assert all(after < before for before, after, _ in seen)
    kinds = {p.dtype for name, p in model.named_parameters() if not name.endswith((".scales", ".zeros"))}
    assert kinds == {torch.bfloat16}
    assert model(ids()).logits.isfinite().all()


def test_a_failure_after_tuning_puts_everything_back(tiny_llama, monkeypatch):
    model = tiny_llama()
    before = copy.deepcopy(model.state_dict())
    calls = []

    def failing(block, *args):
        calls.append(tune_block(block, *args))
        if len(calls) == 2:
            raise RuntimeError("stopped")

    monkeypatch.setattr("hfext.quantization.decoupleq.tune_block", failing)
    with pytest.raises(RuntimeError, match="stopped"):
        quantize(model, make())
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_layers_come_out_better_than_those_of_gptq():
    hessian, weight = correlated(64, dtype=torch.float32), torch.randn(64, 64)
    ours = decoupleq(weight, hessian, 2, 16)
    theirs = gptq(weight, hessian, 2, 16, zero_point="float")
    assert isinstance(ours, Quantized)
    exact = damped(hessian)
    assert loss(weight, ours.dequantize(), exact).sum() < 0.8 * loss(weight, theirs.dequantize(), exact).sum()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"symmetric": True}, "symmetric"),
        ({"max_iter_num": -1}, "max_iter_num"),
        ({"round_fn": "adam"}, "round_fn"),
        ({"clip": "all"}, "clip"),
        ({"block_lr": 0.0}, "block_lr"),
        ({"sweeps": -1}, "sweeps"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
    if "symmetric" in options:
        with pytest.raises(ValueError, match=message):
            decoupleq(torch.randn(2, 8), torch.eye(8), 2, 4, **options)
    assert make(symmetric=True, group_size=-1).symmetric
