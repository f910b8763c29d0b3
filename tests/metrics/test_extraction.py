"""Memorisation: counts by hand, brute force over prefixes, and a text that was learnt by heart."""

import pytest
import torch
from learnt_rows import learnt, random_rows

from hfext.metrics._token_scores import score_rows
from hfext.metrics.extraction import (
    compute,
    exact_memorization,
    extraction_likelihood,
    extraction_strength,
    memorization_accuracy,
    overlap,
)


@pytest.mark.parametrize(
    "flags, strength, exact",
    [
        ([1, 1, 1, 1], 1.0, 1.0),
        ([0, 1, 1, 1], 0.75, 0.75),
        ([1, 0, 1, 1], 0.5, 0.75),
        ([1, 1, 1, 0], 0.0, 0.75),
        ([0, 0, 0, 0], 0.0, 0.0),
    ],
)
def test_strength_and_exactness_by_hand(flags, strength, exact):
    assert extraction_strength([flags]).item() == strength and exact_memorization([flags]).item() == exact


def test_the_end_of_sequence_counts_unless_left_out():
    assert extraction_strength([[0, 1, 0]]).item() == 0 and extraction_strength([[0, 1, 0]], False).item() == 0.5
    assert exact_memorization([[1, 1, 0]], include_eos=False).item() == 1
    with pytest.raises(ValueError, match="Row 1 has no scored token .include_eos=False"):
        exact_memorization([[1, 1], [1]], include_eos=False)


def test_strength_is_the_least_prefix_from_which_the_rest_follows(tiny_llama):
    rows = random_rows(6)
    scores = score_rows(learnt(tiny_llama(), rows, steps=9), rows)
    for flags, found in zip(scores.correct, extraction_strength(scores), strict=True):
        n = len(flags)
        least = next(k for k in range(n + 1) if flags[k:].all())
        assert found.item() == pytest.approx(1 - least / n)


def test_accuracy_is_that_of_one_step_generation(tiny_llama):
    rows = random_rows(4)
    model = learnt(tiny_llama(), rows, steps=8)
    found = memorization_accuracy(score_rows(model, rows)).tolist()
    for row, value in zip(rows, found, strict=True):
        ids = row["input_ids"]
        hits = [int(model(torch.tensor([ids[:t]])).logits[0, -1].argmax()) == ids[t] for t in range(1, len(ids))]
        assert value == pytest.approx(sum(hits) / len(hits))
    assert 0 < sum(found) < 4


def test_overlap_counts_generated_grams_with_multiplicity():
    assert overlap([1, 2, 1, 2], [1, 2, 3], 2) == 1.0
    assert overlap([1, 2, 3], [1, 2, 4, 5], 2) == pytest.approx(1 / 3)
    assert overlap([2, 1], [1, 2], 1) == 1 and overlap([2, 1], [1, 2], 2) == 0
    assert overlap([1], [1, 2], 2) == 0 and overlap([1, 2], [1], 2) == 0


def test_likelihood_is_the_mean_over_all_prefixes(tiny_llama):
    model, n = tiny_llama(initializer_range=0.3), 1
    model.generation_config.eos_token_id = None
    rows = [[5, 6, 7, 8, 9, 5, 6], [9, 10, 11]]
    expected = []
    for ids in rows:
        terms = []
        for t in range(1, len(ids) - n + 1):
            new = ids[:t]
            while len(new) < len(ids):
                new = [*new, int(model(torch.tensor([new])).logits[0, -1].argmax())]
            true = ids[t:]
            terms.append(sum(x in true for x in new[t:]) / len(true))
        expected.append(sum(terms) / (len(ids) - n))
    assert extraction_likelihood(model, rows, n, batch_size=4).tolist() == pytest.approx(expected)
    assert extraction_likelihood(model, rows, n, batch_size=1).tolist() == pytest.approx(expected)


def test_learnt_texts_come_back_and_others_do_not(tiny_llama):
    rows = random_rows(6, length=16)
    model = learnt(tiny_llama(), rows[:3], steps=120)
    model.generation_config.eos_token_id = None
    found = extraction_likelihood(model, [row["input_ids"] for row in rows], n=10)
    accuracy = memorization_accuracy(score_rows(model, rows))
    assert (found[:3] > 0.8).all() and (found[3:] < 0.1).all()
    assert (accuracy[:3] > 0.9).all() and (accuracy[3:] < 0.3).all()


def test_an_early_end_leaves_fewer_grams(tiny_llama):
    rows = random_rows(1, length=12)
    model = learnt(tiny_llama(), rows, steps=120)
    ids = rows[0]["input_ids"]
    model.generation_config.eos_token_id = None
    whole = extraction_likelihood(model, [ids], n=2).item()
    model.generation_config.eos_token_id = [ids[6]]
    assert extraction_likelihood(model, [ids], n=2).item() < whole


def test_arrays_in_and_means_out():
    found = compute([[1, 2, 3], [4, 5]], [[9, 2, 3], [4, 5]])
    assert found == pytest.approx({"exact_memorization": 5 / 6, "extraction_strength": 5 / 6})
    with pytest.raises(ValueError, match="the same rows of the same lengths"):
        compute([[1]], [[1, 2]])


def test_bad_input_is_named(tiny_llama):
    with pytest.raises(ValueError, match="n is 0"):
        extraction_likelihood(tiny_llama(), [[5, 6]], n=0)
    with pytest.raises(ValueError, match="text 1 is shorter"):
        extraction_likelihood(tiny_llama(), [[5, 6, 7], [5, 6]], n=2)
    with pytest.raises(ValueError, match="scores has no scored token"):
        extraction_strength([])
