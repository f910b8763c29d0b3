"""Min-K %++: the golden distribution, invariances of a standardised score, and degenerate distributions."""

import math

import numpy as np
import pytest
import torch
from learnt_rows import learnt, random_rows

from hfext.metrics._token_scores import score_rows, token_scores
from hfext.metrics.min_k_plus_plus import compute, min_k_plus_plus, standardised

P = torch.tensor([1 / 2, 1 / 4, 1 / 8, 1 / 8], dtype=torch.float64)


def scores_of(p, targets):
    """One row whose every position has the distribution p."""
    n = len(targets)
    return token_scores(p.log().expand(1, n + 1, -1), torch.tensor([[0, *targets]]))


def test_the_golden_distribution():
    s = scores_of(P, [0, 1, 2, 3])
    z = standardised(s.log_p[0], s.mean[0], s.std[0])
    assert z.tolist() == pytest.approx([0.9045340, -0.3015113, -1.5075567, -1.5075567], abs=1e-7)
    assert min_k_plus_plus(s, 0.5).item() == pytest.approx(1.5075567, abs=1e-7)
    assert min_k_plus_plus(s, 1).item() == pytest.approx(-z.mean().item())


def test_z_has_mean_0_and_variance_1_under_the_model():
    p = torch.randn(50, dtype=torch.float64).softmax(-1)
    s = scores_of(p, list(range(50)))
    z = standardised(s.log_p[0], s.mean[0], s.std[0])
    assert (p * z).sum().item() == pytest.approx(0, abs=1e-12)
    assert (p * z * z).sum().item() == pytest.approx(1, abs=1e-12)


def test_two_tokens_have_the_closed_form():
    p = torch.tensor([0.9, 0.1], dtype=torch.float64)
    s = scores_of(p, [0, 1])
    z = standardised(s.log_p[0], s.mean[0], s.std[0])
    assert z.tolist() == pytest.approx([math.sqrt(0.1 / 0.9), -math.sqrt(0.9 / 0.1)])


def test_flat_and_certain_distributions_are_finite():
    assert min_k_plus_plus(scores_of(torch.full((4,), 0.25, dtype=torch.float64), [0, 3])).item() == pytest.approx(0)
    certain = scores_of(torch.tensor([1.0, 0.0], dtype=torch.float64), [0, 0])
    assert min_k_plus_plus(certain).item() == pytest.approx(0, abs=1e-9)


def test_the_floor_is_of_the_variance():
    log_p, mean = torch.tensor([1.0]), torch.tensor([0.0])
    # sigma 1e-4, variance 1e-8: z is 1 / sqrt(1e-6); sigma 1e-2 is above the floor.
    assert standardised(log_p, mean, torch.tensor([1e-4])).item() == pytest.approx(1e3, rel=1e-5)
    assert standardised(log_p, mean, torch.tensor([1e-2])).item() == pytest.approx(1e2, rel=1e-5)


def test_learnt_rows_score_lower(tiny_llama):
    rows = random_rows(12)
    s = score_rows(learnt(tiny_llama(), rows[:6]), rows)
    found = compute(s.log_p, s.mean, s.std, members=[1] * 6 + [0] * 6)
    assert found["auc"] == 1
    assert found["scores"] == min_k_plus_plus(s).tolist()
    assert found["min_k_plus_plus"] == pytest.approx(np.mean(found["scores"]))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="the same rows of the same lengths"):
        compute([[-1.0]], [[-1.0]], [[1.0, 2.0]])
    with pytest.raises(ValueError, match="k is 0"):
        compute([[-1.0]], [[-1.0]], [[1.0]], k=0)
