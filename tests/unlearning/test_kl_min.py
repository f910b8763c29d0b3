"""KL minimisation against plain torch, with a reference that is another model."""

import torch
from unlearning_cases import divergence, first_gradient, gradient_of, llama, nll_sums, part

from hfext.unlearning._terms import kl_rows


def test_the_gradient_is_that_of_the_formula(tmp_path):
    model, reference = llama(), llama(seed=4).double()
    options = {"gamma": 0.7, "alpha": 20.0}
    found, pairs = first_gradient("kl_min", tmp_path, model, options, ref_model=reference)
    f, n = nll_sums(model, part(pairs, "forget"))
    loss = 20 * divergence(model, reference, part(pairs, "retain")) - 0.7 * f.sum() / n.sum()
    torch.testing.assert_close(found, gradient_of(loss, model), rtol=0, atol=1e-9)


def test_at_the_start_it_is_gradient_ascent(tmp_path):
    """The divergence from oneself has no gradient."""
    one, _ = first_gradient("kl_min", tmp_path)
    other, _ = first_gradient("grad_ascent", tmp_path)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_the_direction_of_the_divergence():
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.25, 0.5])
    assert abs(float(kl_rows(p.log(), q.log())) - 0.25 * torch.log(torch.tensor(2.0))) < 1e-7
