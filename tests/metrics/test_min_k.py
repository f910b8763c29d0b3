"""Min-K %: sorted by hand, its ends, and members that a model has learnt by heart."""

import numpy as np
import pytest
import torch
from learnt_rows import learnt, random_rows

from hfext.metrics._membership import loss
from hfext.metrics._token_scores import score_rows
from hfext.metrics.min_k import compute, min_k


@pytest.mark.parametrize("k", [0.05, 0.2, 0.4, 0.999, 1])
def test_the_score_is_the_mean_of_the_lowest(k):
    rows = [-np.random.default_rng(n).exponential(size=n) for n in (1, 3, 5, 10, 37)]
    expected = [-np.mean(sorted(row)[: max(1, int(k * len(row)))]) for row in rows]
    assert min_k(rows, k).tolist() == pytest.approx(expected, abs=1e-12)


def test_the_whole_is_the_loss_and_order_does_not_count():
    row = torch.randn(20, dtype=torch.float64)
    assert min_k([row], 1).item() == pytest.approx(loss([row]).item())
    assert min_k([row]).item() == pytest.approx(min_k([row.flip(0)]).item())
    assert min_k([row], 0.2) >= min_k([row], 0.5) >= min_k([row], 1)


def test_half_precision_and_lists():
    row = torch.randn(20).bfloat16()
    assert min_k([row]).item() == min_k([row.double()]).item() == min_k([row.tolist()]).item()


def test_learnt_rows_score_lower_from_model_to_auc(tiny_llama):
    rows = random_rows(12)
    model = learnt(tiny_llama(), rows[:6])
    found = compute(score_rows(model, rows).log_p, members=[1] * 6 + [0] * 6)
    assert found["auc"] == 1 and found["tpr_at_fpr"] == 1
    assert found["scores"] == min_k(score_rows(model, rows).log_p).tolist()
    assert found["min_k"] == pytest.approx(np.mean(found["scores"]))
    assert set(compute([[-1.0]])) == {"min_k", "scores"}


@pytest.mark.parametrize("k", [0, -0.1, 1.5])
def test_bad_shares_are_named(k):
    with pytest.raises(ValueError, match=f"k is {k} but must be in"):
        min_k([[-1.0]], k)
