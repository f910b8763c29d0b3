"""Renyi scores: golden numbers, order and limits, and image positions without ids."""

import math

import numpy as np
import pytest
import torch
from learnt_rows import learnt, random_rows

from hfext.metrics._membership import auc
from hfext.metrics._token_scores import modified_renyi, renyi_entropy, score_rows
from hfext.metrics.renyi import compute, max_renyi, min_renyi, modified_score, position_entropies

P = torch.tensor([1 / 2, 1 / 4, 1 / 8, 1 / 8], dtype=torch.float64)


@pytest.mark.parametrize("order, value", [(0.5, 1.2986137), (1, 1.2130076), (2, 1.0678406), (math.inf, 0.6931472)])
def test_golden_entropies(order, value):
    assert renyi_entropy(P.log(), order).item() == pytest.approx(value, abs=1e-7)


@pytest.mark.parametrize("order, value", [(0.5, 0.3921733), (1, 0.4518769), (2, 0.34375)])
def test_golden_modified_entropies(order, value):
    assert modified_renyi(P.log(), torch.tensor(0), order).item() == pytest.approx(value, abs=1e-7)


def test_entropies_fall_with_the_order_and_meet_their_limits():
    log_p = torch.randn(5, 40, dtype=torch.float64).log_softmax(-1)
    orders = [0.1, 0.5, 1 - 1e-6, 1, 1 + 1e-6, 2, 8, 1e4, math.inf]
    found = torch.stack([renyi_entropy(log_p, a, 0) for a in orders])
    assert (found.diff(dim=0) <= 1e-12).all() and (found <= math.log(40) + 1e-12).all()
    torch.testing.assert_close(found[2], found[3], rtol=0, atol=1e-5)
    torch.testing.assert_close(found[7], found[8], rtol=0, atol=1e-3)
    y = torch.randint(0, 40, (5,))
    torch.testing.assert_close(modified_renyi(log_p, y, 1 + 1e-7), modified_renyi(log_p, y, 1), rtol=1e-5, atol=0)
    flat = torch.full((40,), 1 / 40, dtype=torch.float64).log()
    assert all(renyi_entropy(flat, a).item() == pytest.approx(math.log(40)) for a in orders)


def test_the_clamp_bounds_probabilities_as_published():
    p = np.array([1 - 1e-15, 1e-15, 0.0])
    clamped = np.clip(p, 1e-10, 1 - 1e-10)
    log_p = torch.tensor([math.log1p(-1e-15), math.log(1e-15), -math.inf], dtype=torch.float64)
    assert renyi_entropy(log_p, 0.5).item() == pytest.approx(2 * np.log(np.sqrt(clamped).sum()), rel=1e-6)
    expected = -(1 - clamped[1]) * np.log(clamped[1]) - sum(clamped[i] * np.log(1 - clamped[i]) for i in (0, 2))
    assert modified_renyi(log_p, torch.tensor(1), 1).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("order", [0.5, 1, 2, 3])
@pytest.mark.parametrize("target", [0, 1, 2])
def test_without_a_clamp_a_certain_token_is_exact(order, target):
    """Against the definition in 200 digits: p of the likeliest token is 1 to all digits of a double."""
    import mpmath

    logits = [0.0, 60.0, 11.0]
    with mpmath.workdps(200):
        p = [mpmath.e**x for x in logits]
        p = [x / sum(p) for x in p]
        others = [x for v, x in enumerate(p) if v != target]
        p_y, b = p[target], mpmath.mpf(abs(1 - order))
        if order == 1:
            expected = -(1 - p_y) * mpmath.log(p_y) - sum(x * mpmath.log(1 - x) for x in others)
        else:
            expected = -((1 - p_y) * (p_y**b - 1) + sum(x * ((1 - x) ** b - 1) for x in others)) / b
    log_p = torch.tensor(logits, dtype=torch.float64).log_softmax(-1)
    assert modified_renyi(log_p, torch.tensor(target), order, 0).item() == pytest.approx(float(expected), rel=1e-12)


def test_without_a_clamp_two_tokens_have_the_closed_form():
    log_p = torch.tensor([0.0, 60.0], dtype=torch.float64).log_softmax(-1)
    assert modified_renyi(log_p, torch.tensor(0), 1, 0).item() == pytest.approx(120)


@pytest.mark.parametrize("k", [0, 0.1, 0.35, 1])
def test_scores_are_means_of_the_extreme_positions(k):
    rows = [np.random.default_rng(n).random(n) for n in (1, 4, 23)]
    take = [max(1, int(k * len(row))) for row in rows]
    largest = [np.mean(sorted(row)[-m:]) for row, m in zip(rows, take, strict=True)]
    smallest = [np.mean(sorted(row)[:m]) for row, m in zip(rows, take, strict=True)]
    assert max_renyi(rows, k).tolist() == pytest.approx(largest)
    assert min_renyi(rows, k).tolist() == pytest.approx(smallest)
    assert compute(rows, k=k)["scores"] == max_renyi(rows, k).tolist()
    assert compute(rows, k=k, smallest=True)["renyi"] == pytest.approx(np.mean(smallest))


def test_segments_are_scored_alone_and_without_ids(tiny_llama):
    model = tiny_llama()
    image, text = torch.randn(1, 6, 32), model.get_input_embeddings()(torch.tensor([[5, 6, 7, 8]]))
    logits = model(inputs_embeds=torch.cat([image, text], 1)).logits[0]
    found = position_entropies(logits, {"image": slice(0, 6), "text": [6, 7, 8, 9], "tail": slice(-2, None)}, 0.5)
    p = logits.double().softmax(-1).clamp(1e-10, 1 - 1e-10)
    whole = 2 * p.sqrt().sum(-1).log()
    torch.testing.assert_close(found["image"], whole[:6])
    torch.testing.assert_close(found["text"], whole[6:])
    torch.testing.assert_close(found["tail"], whole[-2:])
    assert max_renyi([found["image"]], 0).item() == pytest.approx(whole[:6].max().item())


def test_learnt_rows_are_found_without_and_with_targets(tiny_llama):
    rows = random_rows(12)
    s = score_rows(learnt(tiny_llama(), rows[:6]), rows, renyi=[0.5, 1, 2, math.inf], modified=[0.5, 1, 2])
    for a, values in s.renyi.items():
        scores = max_renyi(values, 0.5)
        assert auc(scores[:6], scores[6:]) > 0.9, a
    for a, values in s.modified.items():
        scores = modified_score(values)
        assert auc(scores[:6], scores[6:]) == 1, a
    assert compute(s.renyi[1], members=[1] * 6 + [0] * 6, k=1)["auc"] > 0.9


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="k is 1.5"):
        max_renyi([[1.0]], 1.5)
    with pytest.raises(ValueError, match="'image' is empty in a sequence of 3"):
        position_entropies(torch.randn(3, 4), {"image": slice(3, 9)})
    with pytest.raises(ValueError, match="of one sequence"):
        position_entropies(torch.randn(2, 3, 4), {"image": slice(0, 1)})
    with pytest.raises(ValueError, match="order -1"):
        position_entropies(torch.randn(3, 4), {"image": slice(0, 1)}, -1)
