"""Efficient EigenScore: Chebyshev moments against determinants, the authors' number against its definition."""

import math

import numpy as np
import pytest
import torch

from hfext.metrics.efficient_eigenscore import (
    chebyshev_moments,
    compute,
    efficient_eigenscore,
    largest_eigenvalue,
    log_coefficients,
    reference_coefficients,
)
from hfext.metrics.eigenscore import eigenscore


def spread(k, d, condition, seed=0):
    """[k, d] whose Sigma + 1e-3 I has eigenvalues spread evenly in log from 1e-3 to 1e-3 * condition."""
    draw = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(k, k, generator=draw, dtype=torch.float64)).Q
    right = torch.randn(d, k, generator=draw, dtype=torch.float64)
    right = torch.linalg.qr(right - right.mean(0)).Q
    values = 1e-3 * torch.logspace(0, math.log10(condition), k, dtype=torch.float64) - 1e-3
    return left @ torch.diag((values * (d - 1)).sqrt()) @ right.T


def by_determinant(z):
    k, d = z.shape
    centred = z - z.mean(1, keepdim=True)
    sigma = centred @ centred.T / (d - 1) + 1e-3 * torch.eye(k, dtype=z.dtype)
    return torch.linalg.slogdet(sigma).logabsdet.item() / k / math.log(10)


def test_the_coefficients_are_those_of_a_quadrature():
    low, high, nodes = 1e-3, 2.0, 20_000
    theta = (np.arange(nodes) + 0.5) * np.pi / nodes
    values = np.log((high - low) / 2 * np.cos(theta) + (high + low) / 2)
    expected = [2 / nodes * (values * np.cos(m * theta)).sum() for m in range(31)]
    expected[0] /= 2
    np.testing.assert_allclose(log_coefficients(low, high, 30).numpy(), expected, atol=1e-10)


def test_moments_are_traces_of_chebyshev_polynomials():
    values = torch.linspace(-1, 1, 7, dtype=torch.float64)
    q = torch.linalg.qr(torch.randn(7, 7, dtype=torch.float64)).Q
    x = q @ torch.diag(values) @ q.T
    for moments in (1, 2, 7, 10):
        found = chebyshev_moments(lambda v: v @ x, torch.eye(7, dtype=torch.float64), moments)
        expected = [torch.cos(m * torch.arccos(values)).sum() for m in range(moments + 1)]
        torch.testing.assert_close(found, torch.stack(expected))
    assert largest_eigenvalue(lambda v: v @ x + v, torch.randn(2, 7, dtype=torch.float64), 200).item() == (
        pytest.approx(2, abs=1e-6)
    )


@pytest.mark.parametrize(
    "k, condition, moments", [(10, 10, 40), (10, 300, 40), (10, 1e3, 60), (50, 1e3, 40), (200, 1e3, 40)]
)
def test_an_exact_trace_gives_the_determinant_at_moderate_condition(k, condition, moments):
    z = spread(k, 256, condition)
    found = efficient_eigenscore(z, moments=moments, deflate=0, exact_trace=True).item()
    assert found == pytest.approx(by_determinant(z), abs=1e-3)


def test_the_error_falls_with_the_moments_as_the_bound_says():
    z = spread(30, 64, 1e4)
    root = 100.0
    q = (root - 1) / (root + 1)
    for moments in (10, 40, 160, 640):
        error = abs(efficient_eigenscore(z, moments=moments, deflate=0, exact_trace=True).item() - by_determinant(z))
        # What is cut off is at most the sum of 2 q^m / m; the interval is 5 % wider than the spectrum.
        assert error * math.log(10) <= 1.2 * 2 * q**moments / moments / (1 - q)
    assert error < 1e-5


def test_random_probes_are_unbiased_and_their_error_falls_with_their_number():
    z = spread(60, 128, 1e3)
    exact = efficient_eigenscore(z, exact_trace=True).item()

    def draws(number, runs):
        return np.array(
            [
                efficient_eigenscore(z, num_probes=number, generator=torch.Generator().manual_seed(s)).item()
                for s in range(runs)
            ]
        )

    few, many = draws(4, 60), draws(64, 60)
    assert abs(few.mean() - exact) < 3 * few.std() / 60**0.5
    assert 2.5 < few.std() / many.std() < 6.5  # 4 = sqrt(64 / 4)


@pytest.mark.parametrize("k, d", [(10, 300), (40, 12), (1, 8)])
def test_it_agrees_with_eigenscore_in_both_forms(k, d):
    z = torch.randn(k, d, generator=torch.Generator().manual_seed(1)) * 0.1
    for options in ({}, {"alpha": 0.05, "base": math.e, "ddof": None}):
        found = efficient_eigenscore(z, **options, moments=200, exact_trace=True)
        torch.testing.assert_close(found, eigenscore(z, **options), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("deflate", [0, 1, 3, 9])
@pytest.mark.parametrize("k, d", [(12, 40), (40, 12)])
def test_taking_dimensions_out_changes_nothing_but_the_moments_needed(k, d, deflate):
    """One power iteration, so that what is taken out is far from eigenvectors."""
    z = torch.randn(k, d, dtype=torch.float64) * 0.3
    found = efficient_eigenscore(z, deflate=deflate, exact_trace=True, moments=600, power_iterations=1)
    torch.testing.assert_close(found, eigenscore(z), atol=1e-5, rtol=0)


def test_a_common_part_costs_few_moments_once_it_is_taken_out():
    z = 30 * torch.randn(1, 200, dtype=torch.float64) + torch.randn(100, 200, dtype=torch.float64)
    exact = eigenscore(z)
    without = efficient_eigenscore(z, deflate=0, moments=60, exact_trace=True) - exact
    taken = efficient_eigenscore(z, moments=60, exact_trace=True) - exact
    assert abs(without) > 0.1 and abs(taken) < 1e-3


def test_the_default_number_of_moments_meets_its_tolerance():
    for condition in (10, 1e3, 1e5):
        z = spread(40, 80, condition)
        found = efficient_eigenscore(z, exact_trace=True)
        torch.testing.assert_close(found, eigenscore(z), atol=0.01 / math.log(10), rtol=0)


def test_equal_and_empty_answers():
    row = torch.randn(64, dtype=torch.float64)
    same = row.repeat(10, 1)
    found = efficient_eigenscore(same, moments=600, exact_trace=True)
    torch.testing.assert_close(found, eigenscore(same), atol=1e-4, rtol=0)
    assert efficient_eigenscore(torch.ones(5, 8)).item() == pytest.approx(-3)


def test_it_depends_on_its_generator_alone():
    z, before = torch.randn(20, 30), torch.get_rng_state()
    one = efficient_eigenscore(z)
    torch.manual_seed(9)
    assert efficient_eigenscore(z) == one
    assert efficient_eigenscore(z, generator=torch.Generator().manual_seed(5)) != one
    torch.manual_seed(0)
    torch.randn(20, 30)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_coefficients_of_the_reference_are_its_integral():
    """By a substitution of its own: x = 1 - u^2 takes away one singular end, x = v^3 softens the other."""
    n = 400_000
    v = (np.arange(n) + 0.5) / n
    for m in (1, 2, 7, 20):
        upper = v * 0.5**0.5  # u in [0, sqrt(1/2)], x in [1/2, 1]
        x = 1 - upper**2
        high = np.mean(np.log(x) * np.cos(m * x) * 2 / np.sqrt(1 + x)) * 0.5**0.5
        width = 0.5 ** (1 / 3)
        x = (v * width) ** 3
        low = np.mean(np.log(x) * np.cos(m * x) / np.sqrt(1 - x**2) * 3 * (v * width) ** 2) * width
        assert reference_coefficients(20)[m - 1].item() == pytest.approx(2 / np.pi * (high + low), abs=1e-8)


def test_the_reference_number_is_its_definition():
    z = torch.randn(6, 50, dtype=torch.float64)
    x = (z - z.mean(1, keepdim=True)) / z.std(1, correction=0, keepdim=True)
    values = torch.linalg.svdvals(x).square()
    values = values / values[0]
    moments = torch.stack([torch.cos(m * torch.arccos(values.clamp(max=1))).mean() for m in range(1, 11)])
    found = efficient_eigenscore(z, method="reference", moments=10, exact_trace=True, power_iterations=500)
    torch.testing.assert_close(found, (reference_coefficients(10) * moments).sum(), atol=1e-6, rtol=1e-6)
    # Blind to the size of the embeddings, which EigenScore is not.
    options = {"method": "reference", "moments": 10}
    torch.testing.assert_close(efficient_eigenscore(5 * z, **options), efficient_eigenscore(z, **options))
    assert eigenscore(5 * z) > eigenscore(z) + 1


@pytest.mark.parametrize(
    "options, message",
    [
        ({"method": "lanczos"}, "method is 'lanczos' but must be one of kpm, reference"),
        ({"deflate": -1}, "deflate is -1 but must be an integer >= 0"),
        ({"moments": 0}, "moments is 0 but must be an integer >= 1"),
        ({"num_probes": 2.5}, "num_probes is 2.5"),
        ({"power_iterations": True}, "power_iterations is True"),
        ({"alpha": -1.0}, "alpha is -1.0"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        efficient_eigenscore(torch.randn(4, 8), **options)
    with pytest.raises(ValueError, match="one set a call"):
        efficient_eigenscore(torch.randn(2, 4, 8))
    with pytest.raises(ValueError, match="same value in all features"):
        efficient_eigenscore(torch.ones(4, 8), method="reference")


def test_compute_returns_plain_numbers():
    z = torch.randn(3, 10, 16)
    found = compute(z, moments=20)
    assert found["scores"] == [efficient_eigenscore(x, moments=20).item() for x in z]
    assert found["efficient_eigenscore"] == pytest.approx(sum(found["scores"]) / 3)
    assert compute(z[0])["scores"] == [efficient_eigenscore(z[0]).item()]
