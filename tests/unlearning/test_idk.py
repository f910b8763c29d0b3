"""IDK: both ways to pool against plain torch."""

import pytest
import torch
from unlearning_cases import FORGET, first_gradient, gradient_of, llama, nll_sums, part, trainer

from hfext.unlearning import UnlearningTrainer


@pytest.mark.parametrize("pooling", ["parts", "tokens"])
def test_the_gradient_is_that_of_the_formula(pooling, tmp_path):
    model = llama()
    found, pairs = first_gradient("idk", tmp_path, model, {"gamma": 0.7, "alpha": 1.3, "pooling": pooling})
    i, n_i = nll_sums(model, part(pairs, "alternate"))
    r, n_r = nll_sums(model, part(pairs, "retain"))
    if pooling == "parts":
        loss = 0.7 * i.sum() / n_i.sum() + 1.3 * r.sum() / n_r.sum()
    else:
        loss = (0.7 * i.sum() + 1.3 * r.sum()) / (n_i.sum() + n_r.sum())
    torch.testing.assert_close(found, gradient_of(loss, model), rtol=0, atol=1e-10)


def test_the_alternate_has_the_prompt_of_its_row(tmp_path):
    data = trainer("idk", tmp_path).train_dataset
    for pair in (data[p] for p in range(len(data))):
        asked = pair["forget"]["labels"].count(-100)
        assert pair["alternate"]["input_ids"][:asked] == pair["forget"]["input_ids"][:asked]
        assert pair["alternate"]["input_ids"] == FORGET[pair["forget"]["index"]]["alternate"]["input_ids"]
    assert UnlearningTrainer.__doc__
