"""DPO: where it is NPO, and its gradient against plain torch."""

import torch
from torch.nn.functional import logsigmoid
from unlearning_cases import first_gradient, gradient_of, llama, nll_sums, part

from hfext.unlearning.dpo import dpo_rows
from hfext.unlearning.npo import npo_rows


def test_without_the_preferred_answer_it_is_npo():
    s, s_ref = torch.tensor([3.0, 1.0]), torch.tensor([1.0, 2.0])
    torch.testing.assert_close(dpo_rows(torch.zeros(2), s_ref - s, 0.1), npo_rows(s, s_ref, 0.1))


def test_the_gradient_is_that_of_the_formula(tmp_path):
    model, reference = llama(), llama(seed=4).double()
    found, pairs = first_gradient("dpo", tmp_path, model, {"beta": 0.3, "alpha": 1.3}, ref_model=reference)

    def margin(name):
        return nll_sums(reference, part(pairs, name))[0].detach() - nll_sums(model, part(pairs, name))[0]

    r, n = nll_sums(model, part(pairs, "retain"))
    loss = (-2 / 0.3 * logsigmoid(0.3 * (margin("alternate") - margin("forget")))).mean() + 1.3 * r.sum() / n.sum()
    torch.testing.assert_close(found, gradient_of(loss, model), rtol=0, atol=1e-9)
