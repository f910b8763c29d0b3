"""Gradient difference against plain torch, and where it is gradient ascent."""

import torch
from unlearning_cases import first_gradient, gradient_of, llama, nll_sums, part


def test_the_gradient_is_that_of_the_formula(tmp_path):
    model = llama()
    found, pairs = first_gradient("grad_diff", tmp_path, model, {"gamma": 0.7, "alpha": 1.3})
    f, n_f = nll_sums(model, part(pairs, "forget"))
    r, n_r = nll_sums(model, part(pairs, "retain"))
    wanted = gradient_of(1.3 * r.sum() / n_r.sum() - 0.7 * f.sum() / n_f.sum(), model)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)


def test_without_the_retain_loss_it_is_gradient_ascent(tmp_path):
    one, _ = first_gradient("grad_diff", tmp_path, options={"alpha": 0.0})
    other, _ = first_gradient("grad_ascent", tmp_path)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_without_the_forget_loss_it_is_fine_tuning(tmp_path):
    model = llama()
    found, pairs = first_gradient("grad_diff", tmp_path, model, {"gamma": 0.0})
    r, n = nll_sums(model, part(pairs, "retain"))
    torch.testing.assert_close(found, gradient_of(r.sum() / n.sum(), model), rtol=0, atol=1e-10)
