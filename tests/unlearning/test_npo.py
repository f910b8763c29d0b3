"""NPO: its rows against golden numbers and limits, its gradient against plain torch."""

import math

import pytest
import torch
from torch.nn.functional import logsigmoid
from unlearning_cases import divergence, first_gradient, gradient_of, llama, nll_sums, part

from hfext.unlearning.npo import NPO, npo_rows


def test_golden_values():
    s = torch.tensor([3.0], dtype=torch.float64, requires_grad=True)
    loss = npo_rows(s, torch.tensor([1.0], dtype=torch.float64), 0.1)
    assert loss.item() == pytest.approx(20 * math.log1p(math.exp(-0.2)), abs=1e-12)
    assert torch.autograd.grad(loss, s)[0].item() == pytest.approx(-2 / (1 + math.exp(0.2)), abs=1e-12)
    at_reference = npo_rows(s, s.detach(), 0.1)
    assert at_reference.item() == pytest.approx(2 * math.log(2) / 0.1)
    assert torch.autograd.grad(at_reference, s)[0].item() == -1


def test_a_small_beta_is_gradient_ascent_and_a_forgotten_row_is_left_alone():
    s = torch.tensor([0.3, 40.0], dtype=torch.float64, requires_grad=True)
    (g,) = torch.autograd.grad(npo_rows(s, torch.zeros(2, dtype=torch.float64), 1e-6).sum(), s)
    assert (g + 1).abs().max() < 3e-5
    far = torch.tensor([1e4], requires_grad=True)
    loss = npo_rows(far, torch.zeros(1), 0.5)
    assert torch.isfinite(loss) and abs(torch.autograd.grad(loss, far)[0]) < 1e-6
    assert torch.isfinite(npo_rows(-far, torch.zeros(1), 0.5))


@pytest.mark.parametrize("retain", ["nll", "kl", "none"])
def test_the_gradient_is_that_of_the_formula(retain, tmp_path):
    model, reference = llama(), llama(seed=4).double()
    options = {"beta": 0.3, "gamma": 0.7, "alpha": 1.3, "retain": retain}
    found, pairs = first_gradient("npo", tmp_path, model, options, ref_model=reference)
    s, _ = nll_sums(model, part(pairs, "forget"))
    s_ref, _ = nll_sums(reference, part(pairs, "forget"))
    loss = 0.7 * (-2 / 0.3 * logsigmoid(0.3 * (s - s_ref.detach()))).mean()
    if retain == "nll":
        r, n = nll_sums(model, part(pairs, "retain"))
        loss = loss + 1.3 * r.sum() / n.sum()
    if retain == "kl":
        loss = loss + 1.3 * divergence(model, reference, part(pairs, "retain"))
    torch.testing.assert_close(found, gradient_of(loss, model), rtol=0, atol=1e-9)


def test_what_is_needed_follows_the_options():
    assert NPO(retain="none").needs == ("forget",) and NPO().reference == {"forget": "nll"}
    assert NPO(retain="kl").reference == {"forget": "nll", "retain": "outputs"}
    with pytest.raises(ValueError, match="retain is 'l2'"):
        NPO(retain="l2")
