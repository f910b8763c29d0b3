"""SAM against closed forms."""

import pytest
import torch

from hfext.optim import SharpnessAware, sam_step
from hfext.optim.sam import sam_direction


def scalar_run(steps, rho=0.05, lr=0.1, x0=1.0):
    """f(x) = x^2 with SGD."""
    x = torch.nn.Parameter(torch.tensor(x0, dtype=torch.float64))
    optimizer = SharpnessAware(torch.optim.SGD([x], lr=lr), rho=rho)

    def closure():
        loss = x**2
        loss.backward()
        return loss

    for _ in range(steps):
        sam_step(optimizer, closure)
    return x.item()


def test_square_ends_in_the_two_cycle_of_its_closed_form():
    cycle = 0.1 * 0.05 / (1 - 0.1)  # lr * rho / (1 - lr), since the slope of x^2 is 2x
    assert scalar_run(500) == pytest.approx(-cycle, abs=1e-12)
    assert scalar_run(501) == pytest.approx(cycle, abs=1e-12)


def test_quadratic_gradient_is_taken_at_the_worst_point():
    torch.manual_seed(0)
    a = torch.randn(5, 5, dtype=torch.float64)
    a, x = a @ a.T, torch.nn.Parameter(torch.randn(5, dtype=torch.float64))
    start, seen = x.detach().clone(), []
    optimizer = SharpnessAware(torch.optim.SGD([x], lr=1.0), rho=0.3)

    def closure():
        seen.append(x.detach().clone())
        loss = 0.5 * x @ a @ x
        loss.backward()
        return loss

    sam_step(optimizer, closure)
    g = a @ start
    torch.testing.assert_close(seen[1], start + 0.3 * g / g.norm())
    torch.testing.assert_close(x.detach(), start - a @ (start + 0.3 * g / g.norm()))
    assert (seen[1] - start).norm().item() == pytest.approx(0.3)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_scaling_the_loss_leaves_the_perturbation(scale):
    x = torch.nn.Parameter(torch.tensor([3.0, -4.0], dtype=torch.float64))
    seen = []

    def closure():
        seen.append(x.detach().clone())
        loss = scale * (x**2).sum() / 2
        loss.backward()
        return loss

    sam_step(SharpnessAware(torch.optim.SGD([x], lr=0.0), rho=0.5, eps=0.0), closure)
    torch.testing.assert_close(seen[1] - seen[0], torch.tensor([0.3, -0.4], dtype=torch.float64))


def test_one_norm_over_all_groups():
    p, q = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = SharpnessAware(torch.optim.SGD([{"params": [p]}, {"params": [q], "lr": 0.5}], lr=0.1), rho=1.0)
    seen = []

    def closure():
        seen.append((p.item(), q.item()))
        loss = (3 * p + 4 * q).sum()
        loss.backward()
        return loss

    sam_step(optimizer, closure)
    assert seen[1] == pytest.approx((0.6, 0.8))


def test_no_slope_no_perturbation():
    assert scalar_run(3, x0=0.0) == 0.0


def test_norm_is_taken_in_float32_for_16_bit_gradients():
    grads = [torch.full((70_000,), 3.0, dtype=torch.float16), torch.full((10,), 2.0, dtype=torch.bfloat16)[:1]]
    assert sam_direction(grads[:1]).item() == pytest.approx((9 * 70_000) ** 0.5, rel=1e-4)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rho": -0.1}, "rho is -0.1 but must be >= 0"),
        ({"eps": -1.0}, "eps"),
        ({"every": 0}, "every"),
        ({"scope": "all"}, "scope"),
        ({"start": 5, "end": 2}, "end is 2"),
        ({"perturb": "up"}, "perturb"),
        ({"rho": float("nan")}, "rho"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        SharpnessAware(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1), **options)


def test_sparse_gradients_are_refused():
    table = torch.nn.Embedding(4, 2, sparse=True)
    optimizer = SharpnessAware(torch.optim.SGD(table.parameters(), lr=0.1))

    def closure():
        loss = table(torch.tensor([1])).sum()
        loss.backward()
        return loss

    with pytest.raises(NotImplementedError, match="sparse=False"):
        sam_step(optimizer, closure)
