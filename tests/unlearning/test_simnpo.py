"""SimNPO: the limit in which it is NPO, and its gradient against plain torch."""

import torch
from torch.nn.functional import logsigmoid
from unlearning_cases import first_gradient, gradient_of, llama, nll_sums, part

from hfext.unlearning.npo import npo_rows
from hfext.unlearning.simnpo import simnpo_rows


def test_without_margin_it_is_npo_on_means_against_certainty():
    s, n = torch.tensor([3.0, 7.0]), torch.tensor([2.0, 5.0])
    assert torch.equal(simnpo_rows(s / n, 2.5, 0.0), npo_rows(s / n, torch.zeros(2), 2.5))


def test_the_gradient_is_that_of_the_formula(tmp_path):
    model = llama()
    options = {"beta": 0.8, "delta": 0.3, "gamma": 0.7, "alpha": 1.3}
    found, pairs = first_gradient("simnpo", tmp_path, model, options)
    s, n = nll_sums(model, part(pairs, "forget"))
    r, n_r = nll_sums(model, part(pairs, "retain"))
    loss = 0.7 * (-2 / 0.8 * logsigmoid(0.8 * (s / n - 0.3))).mean() + 1.3 * r.sum() / n_r.sum()
    torch.testing.assert_close(found, gradient_of(loss, model), rtol=0, atol=1e-10)
