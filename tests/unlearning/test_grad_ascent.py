"""Gradient ascent against plain torch."""

import torch
from unlearning_cases import first_gradient, gradient_of, llama, nll_sums, part

from hfext.unlearning import UnlearningConfig


def test_the_gradient_is_that_of_the_formula(tmp_path):
    model = llama()
    found, pairs = first_gradient("grad_ascent", tmp_path, model, {"gamma": 0.7})
    sums, counts = nll_sums(model, part(pairs, "forget"))
    torch.testing.assert_close(found, gradient_of(-0.7 * sums.sum() / counts.sum(), model), rtol=0, atol=1e-10)


def test_no_retain_rows_are_asked_for(tmp_path):
    assert UnlearningConfig(str(tmp_path), objective="grad_ascent", use_cpu=True).max_grad_norm == 1.0
    alone, _ = first_gradient("grad_ascent", tmp_path, retain=None)
    both, _ = first_gradient("grad_ascent", tmp_path)
    assert torch.equal(alone, both)
