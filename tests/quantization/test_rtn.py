import math

import pytest
import torch

from hfext.quantization import RTNConfig
from hfext.quantization._affine import dequantize, ends, grid, nearest, round_to_nearest


def weight(rows=8, columns=64, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def one_group(values, bits, integer):
    """The textbook rule for one group of plain numbers."""
    low, high = min(values), max(values)
    if integer:
        low, high = min(low, 0.0), max(high, 0.0)
        if low == high:
            low, high = -1.0, 1.0
    step = (high - low) / (2**bits - 1)
    if step == 0:
        return [low] * len(values)
    offset = -step * round(-low / step) if integer else low
    codes = [min(max(math.floor((v - offset) / step + 0.5), 0), 2**bits - 1) for v in values]
    return [step * q + offset for q in codes]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("zero_point", ["float", "int"])
def test_equals_the_rule_group_by_group(bits, zero_point):
    x = weight(seed=bits)
    got = round_to_nearest(x, bits, 16, zero_point).dequantize()
    for r in range(8):
        for g in range(4):
            part = x[r, 16 * g : 16 * g + 16]
            want = one_group(part.tolist(), bits, zero_point == "int")
            # Exact halves aside, which do not occur among random numbers.
            torch.testing.assert_close(got[r, 16 * g : 16 * g + 16], torch.tensor(want, dtype=x.dtype))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("options", [{}, {"zero_point": "int"}, {"symmetric": True}])
def test_the_error_is_bounded_by_the_step(bits, options):
    x = weight()
    made = round_to_nearest(x, bits, 16, **options)
    most = 0.5 if not options else 1.0
    error = (made.dequantize() - x).abs().view(8, 4, 16).amax(-1)
    assert (error <= most * made.scales * (1 + 1e-9)).all()


@pytest.mark.parametrize("options", [{}, {"zero_point": "int"}, {"symmetric": True}])
def test_a_weight_on_the_grid_is_a_fixed_point(options):
    x = round_to_nearest(weight(), 3, 16, **options).dequantize()
    again = round_to_nearest(x, 3, 16, **options)
    # A grid whose ends no value reaches is wider than needed, so only full ones come back.
    full = (again.codes.view(8, 4, 16).amax(-1) == 7) & (again.codes.view(8, 4, 16).amin(-1) == 0)
    if not options:
        assert full.all()
        torch.testing.assert_close(again.dequantize(), x)


def test_zero_is_exact_with_an_integer_zero_point():
    x = weight()
    x[:, ::7] = 0
    for options in ({"zero_point": "int"}, {"symmetric": True}):
        got = round_to_nearest(x, 4, 16, **options).dequantize()
        assert (got[:, ::7].abs() < 1e-12).all()


def test_rows_do_not_know_each_other():
    x = weight()
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(round_to_nearest(x, 3, 16).dequantize()[order], round_to_nearest(x[order], 3, 16).dequantize())


@pytest.mark.parametrize("options", [{}, {"zero_point": "int"}])
def test_clip_search_is_the_best_of_its_ranges(options):
    x = weight() ** 3
    got = round_to_nearest(x, 2, 16, clip_search=True, **options)
    cost = (got.dequantize() - x).abs().pow(2.4).view(8, 4, 16).sum(-1)
    low, high = ends(x, 16, with_zero=bool(options))
    for i in range(80):
        p = 1 - i / 100
        made = grid(p * low, p * high, 2, **options)
        other = (dequantize(nearest(x, *made, 2), *made) - x).abs().pow(2.4).view(8, 4, 16).sum(-1)
        assert (cost <= other * (1 + 1e-9)).all()


def test_equal_weights_and_zeros_are_exact():
    for value in (0.0, 0.37, -5.0, 1e-4):
        x = torch.full((2, 32), value)
        assert torch.equal(round_to_nearest(x, 2, 16).dequantize(), x)
    assert torch.equal(round_to_nearest(torch.zeros(2, 32), 2, 16, "int").dequantize(), torch.zeros(2, 32))


def test_options_reach_the_method():
    x = weight().float()
    config = RTNConfig(bits=2, group_size=16, symmetric=True, clip_search=True)
    want = round_to_nearest(x, 2, 16, "float", True, True)
    assert all(torch.equal(a, b) for a, b in zip(config.quantize_weight(x, 2, 16), want, strict=True))
    with pytest.raises(ValueError, match="zero_point is 'half' but must be one of 'float', 'int'"):
        RTNConfig(zero_point="half")


def test_exact_halves_go_up():
    values = torch.tensor([[0.0, 0.5, 1.5, 2.5, 3.0, 1.0, 2.0, 3.0]])
    codes = nearest(values, torch.ones(1, 1), torch.zeros(1, 1), 2)
    assert codes.tolist() == [[0, 1, 2, 3, 3, 1, 2, 3]]
