"""ASAM: its formula, its invariance, and the setting in which it is SAM."""

import pytest
import torch
from torch import nn

from hfext.optim import ASAM, SharpnessAware, sam_step
from hfext.optim.asam import asam_direction


def perturbation(make, build, loss_of):
    """w + e - w of every parameter, and the loss there."""
    net = build()
    optimizer, seen = make(net), []

    def closure():
        seen.append([p.detach().clone() for p in net.parameters()])
        loss = loss_of(net)
        loss.backward()
        seen.append(loss.item())
        return loss

    sam_step(optimizer, closure)
    return [b - a for a, b in zip(seen[0], seen[2], strict=True)], seen[3]


def relu_net(scale=1.0):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8, bias=False), nn.ReLU(), nn.Linear(8, 1, bias=False)).double()
    with torch.no_grad():
        net[0].weight *= scale
        net[2].weight /= scale
    return net


def loss_of(net):
    return (net(torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4)) - 1).pow(2).mean()


def test_rescaling_a_relu_network_changes_nothing_for_asam_and_much_for_sam():
    def after(cls, scale, **options):
        return perturbation(
            lambda net: cls(torch.optim.SGD(net.parameters(), lr=0.0), **options), lambda: relu_net(scale), loss_of
        )

    (e, loss), (e_scaled, loss_scaled) = after(ASAM, 1.0, eta=0.0), after(ASAM, 5.0, eta=0.0)
    assert loss == pytest.approx(loss_scaled, rel=1e-12)
    torch.testing.assert_close(e_scaled[0], 5 * e[0])
    torch.testing.assert_close(e_scaled[1], e[1] / 5)
    assert after(SharpnessAware, 1.0, rho=0.5)[1] != pytest.approx(after(SharpnessAware, 5.0, rho=0.5)[1], rel=1e-2)


def test_formula_against_dense_matrices():
    torch.manual_seed(0)
    w = [torch.randn(3, 2, dtype=torch.float64), torch.randn(4, dtype=torch.float64)]
    g = [torch.randn_like(x) for x in w]
    t = torch.diag(torch.cat([w[0].abs().flatten() + 0.01, torch.ones(4, dtype=torch.float64)]))
    flat = torch.cat([x.flatten() for x in g])
    expected, norm = t @ t @ flat, (t @ flat).norm()
    n = asam_direction(w, g, [True, False], eta=0.01)
    torch.testing.assert_close(torch.cat([x.flatten() for x in g]), expected)
    assert n.item() == pytest.approx(norm.item(), rel=1e-12)


def test_weights_of_one_size_give_sam_with_a_scaled_radius():
    def build():
        net = relu_net()
        with torch.no_grad():
            for p in net.parameters():
                p.copy_(p.sign() * 0.3)
        return net

    asam = perturbation(lambda net: ASAM(torch.optim.SGD(net.parameters(), lr=0.0), rho=0.5, eta=0.1), build, loss_of)
    sam = perturbation(lambda net: SharpnessAware(torch.optim.SGD(net.parameters(), lr=0.0), rho=0.2), build, loss_of)
    for a, b in zip(asam[0], sam[0], strict=True):
        torch.testing.assert_close(a, b)


def test_infinity_norm_moves_every_weight_by_its_size():
    net = relu_net()
    before = [p.detach().clone() for p in net.parameters()]
    e, _ = perturbation(
        lambda n: ASAM(torch.optim.SGD(n.parameters(), lr=0.0), rho=0.5, eta=0.01, p="inf"), relu_net, loss_of
    )
    for moved, w in zip(e, before, strict=True):
        moved_at = moved != 0  # a dead unit has no sign
        torch.testing.assert_close(moved[moved_at].abs(), 0.5 * (w.abs() + 0.01)[moved_at])


def test_layerwise_uses_one_number_for_a_tensor():
    w, g = [torch.tensor([[3.0, 4.0]])], [torch.tensor([[1.0, 2.0]])]
    n = asam_direction(w, g, [True], eta=1.0, mode="layerwise")
    assert g[0].tolist() == [[36.0, 72.0]] and n.item() == pytest.approx(6 * 5**0.5)


def test_biases_scale_only_when_asked():
    net = nn.Linear(2, 2)
    asam = ASAM(torch.optim.SGD(net.parameters(), lr=0.1), model=net)
    assert asam.weights_among(list(net.parameters())) == [True, False]
    norm = nn.LayerNorm(4)
    assert ASAM(torch.optim.SGD(norm.parameters(), lr=0.1), model=norm).weights_among(list(norm.parameters())) == [
        True,
        False,
    ]


@pytest.mark.parametrize(
    "options, message", [({"eta": -1.0}, "eta"), ({"mode": "rowwise"}, "mode"), ({"p": 3}, "p is 3")]
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        ASAM(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1), **options)


def test_zero_weights_and_no_eta_leave_the_weights():
    x = nn.Parameter(torch.zeros(2, 2))

    def closure():
        loss = (x - 1).pow(2).sum()
        loss.backward()
        return loss

    sam_step(ASAM(torch.optim.SGD([x], lr=0.1), eta=0.0), closure)
    assert torch.isfinite(x).all()
