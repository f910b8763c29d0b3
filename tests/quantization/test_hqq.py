import pytest
import torch

from hfext.quantization import HQQConfig
from hfext.quantization._affine import round_to_nearest
from hfext.quantization.hqq import hqq, shrink


def weight(rows=6, columns=64, seed=0, heavy=True):
    made = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return made**3 if heavy else made


def by_hand(weight, bits, group, iterations, p, beta, kappa, rounded):
    """The report's loop in its own notation: inverse steps, zeros in units of codes, groups as rows."""
    groups = weight.reshape(-1, group)
    low, high = groups.min(1, keepdim=True).values, groups.max(1, keepdim=True).values
    inverse = (2**bits - 1) / (high - low)
    zero = -low * inverse
    zero = zero.round() if rounded else zero
    kept, least = zero, float("inf")
    for _ in range(iterations + 1):
        codes = torch.clamp(torch.round(groups * inverse + zero), 0, 2**bits - 1)
        back = (codes - zero) / inverse
        error = (groups - back).abs().mean().item()
        if error >= least:
            break
        kept, least = zero, error
        x = groups - back
        shrunk = torch.where(x == 0, 0, x.sign() * torch.relu(x.abs() - x.abs() ** (p - 1) / beta))
        zero = (codes - (groups - shrunk) * inverse).mean(1, keepdim=True)
        beta *= kappa
    codes = torch.clamp(torch.round(groups * inverse + kept), 0, 2**bits - 1)
    return ((codes - kept) / inverse).reshape(weight.shape)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("rounded", [False, True])
def test_equals_the_loop_in_the_notation_of_the_report(bits, rounded):
    x = weight(seed=bits)
    got = hqq(x, bits, 16, 20, 0.7, 10.0, 1.01, rounded).dequantize()
    torch.testing.assert_close(got, by_hand(x, bits, 16, 20, 0.7, 10.0, 1.01, rounded), atol=1e-10, rtol=0)


def test_without_steps_it_is_rounding_to_nearest():
    x = weight()
    torch.testing.assert_close(
        hqq(x, 3, 16, iterations=0).dequantize(), round_to_nearest(x, 3, 16).dequantize(), atol=1e-12, rtol=0
    )


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_mean_error_is_never_above_that_of_rounding_to_nearest(bits):
    for seed in range(20):
        x = weight(seed=seed)
        ours = (hqq(x, bits, 16).dequantize() - x).abs().mean()
        assert ours <= (round_to_nearest(x, bits, 16).dequantize() - x).abs().mean() * (1 + 1e-9)


def test_shrinking_everything_removes_the_mean_error_and_shrinking_nothing_changes_nothing():
    x = weight(heavy=False)
    groups = x.view(-1, 16)
    first = round_to_nearest(x, 2, 16)
    moved = hqq(x, 2, 16, iterations=1, beta=1e-9)
    # With these offsets and the codes of the start, each group's mean error is zero.
    assert not torch.allclose(moved.zeros, first.zeros, atol=1e-6)
    back = first.codes.view(-1, 16) * moved.scales.view(-1, 1) + moved.zeros.view(-1, 1)
    torch.testing.assert_close(back.mean(1), groups.mean(1), atol=1e-12, rtol=0)
    torch.testing.assert_close(hqq(x, 2, 16, beta=1e15).zeros, hqq(x, 2, 16, iterations=0).zeros, atol=1e-12, rtol=0)


def test_shrink_at_zero_and_in_closed_form():
    x = torch.tensor([0.0, 0.5, -0.5, 2.0], dtype=torch.float64)
    want = torch.tensor([0.0, 0.5 - 0.5**-0.3 / 10, -0.5 + 0.5**-0.3 / 10, 2 - 2**-0.3 / 10], dtype=torch.float64)
    torch.testing.assert_close(shrink(x, 10.0, 0.7), want)
    assert (shrink(x, 1e-9, 0.7) == 0).all()


def test_equal_weights_are_exact():
    x = torch.full((2, 32), 0.3)
    for bits in (2, 4):
        assert torch.equal(hqq(x, bits, 16, round_zero=bits == 4).dequantize(), x)


def test_bad_options_are_named():
    for options in ({"lp_norm": 0.0}, {"lp_norm": 1.5}, {"iterations": -1}, {"beta": 0.0}, {"kappa": 0.5}):
        field = next(iter(options))
        with pytest.raises(ValueError, match=f"{field} is .* but must be in"):
            HQQConfig(**options)
