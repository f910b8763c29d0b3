"""Resampling with an imperfect verifier: exact sums, simulated verifiers, and a search over K."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from hfext.decoding.resampling import ResampleUntilAccepted, calibrate, optimal_num_samples, resampling_curve

CARD = {"priors": [0.58, 0.42], "successes": [0.87, 0.13], "completeness": 1.0, "soundness": 0.75}


def exact_utilities(last, priors, successes, completeness, soundness, value_correct=1, value_wrong=-1, cost=0):
    """U(0) ... U(last) attempt by attempt, in rational numbers of the very floats."""
    utilities, reach = [Fraction(0)], list(map(Fraction, priors))
    for _ in range(last):
        gain = Fraction(0)
        for i, r in enumerate(map(Fraction, successes)):
            right, wrong = Fraction(completeness) * r, (1 - Fraction(soundness)) * (1 - r)
            gain += reach[i] * (Fraction(value_correct) * right + Fraction(value_wrong) * wrong - Fraction(cost))
            reach[i] *= 1 - right - wrong
        utilities.append(utilities[-1] + gain)
    return utilities


@pytest.mark.parametrize(
    "value_wrong, samples, utility",
    [(-0.7, 3, 0.5246), (-1.0, 2, 0.4724), (-2.0, 1, 0.3388), (-4.0, 1, 0.1184), (-0.5, math.inf, 0.5744)],
)
def test_values_of_the_card(value_wrong, samples, utility):
    best = optimal_num_samples(**CARD, value_wrong=value_wrong)
    assert best.num_samples == samples and best.utility == pytest.approx(utility, abs=5e-5)


def test_the_accuracy_of_unlimited_attempts_is_the_ceiling_whatever_the_budget():
    best = optimal_num_samples(**CARD, value_wrong=-0.5)
    assert best.accuracy == pytest.approx(0.7162, abs=5e-5) and best.accepted == pytest.approx(1)
    curve = resampling_curve(**CARD, value_wrong=-2.0, max_samples=400)
    assert curve.utility[15] == pytest.approx(0.1493, abs=5e-5)
    assert curve.accuracy[400] == pytest.approx(best.accuracy, abs=1e-12)
    # One type alone: no number of attempts changes the accuracy.
    one = resampling_curve([1.0], [0.3], 0.9, 0.8, max_samples=50)
    np.testing.assert_allclose(one.accuracy[1:], 0.27 / (0.27 + 0.2 * 0.7), rtol=1e-13)


CASES = [
    {**CARD, "value_wrong": -2.0},
    {"priors": [0.2, 0.5, 0.3], "successes": [0.99, 0.4, 0.01], "completeness": 0.7, "soundness": 0.95, "cost": 0.01},
    {
        "priors": [0.5, 0.5],
        "successes": [1e-9, 0.5],
        "completeness": 0.5,
        "soundness": 1 - 2**-40,
        "value_wrong": -9.0,
    },
    {"priors": [0.25, 0.75], "successes": [1.0, 0.0], "completeness": 1.0, "soundness": 0.0, "value_wrong": -3.0},
]


@pytest.mark.parametrize("case", CASES)
def test_the_curve_is_that_of_exact_rational_sums(case):
    curve = resampling_curve(**case, max_samples=60)
    for found, exact in zip(curve.utility, exact_utilities(60, **case), strict=True):
        assert abs(Fraction(found) - exact) <= Fraction(1, 10**12)


def test_a_type_that_is_hardly_ever_accepted_keeps_its_digits():
    """b = 1 - 1e-15: 1 - b^K by subtraction would have one digit."""
    success = 1e-15
    curve = resampling_curve([1.0], [success], 1.0, 1.0, max_samples=1000)
    assert curve.accepted[1000] == pytest.approx(1000 * success, rel=1e-12)
    assert curve.attempts[1000] == pytest.approx(1000, rel=1e-12)


@pytest.mark.parametrize("seed", range(25))
def test_the_optimum_is_that_of_a_search_over_exact_sums(seed):
    draw = np.random.default_rng(seed)
    types = int(draw.integers(1, 4))
    case = {
        "priors": (p := draw.dirichlet(np.ones(types))).tolist(),
        "successes": draw.uniform(size=types).tolist(),
        "completeness": draw.uniform(0.2, 1),
        "soundness": draw.uniform(0.2, 1),
        "value_wrong": -draw.uniform(0, 4),
        "cost": draw.choice([0.0, 0.02]),
    }
    assert abs(p.sum() - 1) < 1e-9
    exact = exact_utilities(25, **case)
    expected = max(range(26), key=lambda k: (exact[k], -k))
    found = optimal_num_samples(**case, max_samples=25)
    assert found.num_samples == expected
    assert abs(Fraction(found.utility) - exact[expected]) <= Fraction(1, 10**12)


def test_the_utility_is_that_of_simulated_verifiers():
    draw, runs, limit = np.random.default_rng(0), 400_000, 4
    priors, successes, c, s, cost = np.array([0.3, 0.7]), np.array([0.8, 0.2]), 0.85, 0.7, 0.05
    r = successes[draw.choice(2, size=runs, p=priors)][:, None]
    right = draw.uniform(size=(runs, limit)) < r
    accept = draw.uniform(size=(runs, limit)) < np.where(right, c, 1 - s)
    ended = accept.any(1)
    first = np.where(ended, accept.argmax(1), limit - 1)
    good = right[np.arange(runs), first] & ended
    gain = good * 1.0 - (ended & ~good) * 1.5 - cost * (first + 1)
    curve = resampling_curve(priors, successes, c, s, value_wrong=-1.5, cost=cost, max_samples=limit)
    assert abs(gain.mean() - curve.utility[limit]) < 3 * gain.std() / runs**0.5
    assert abs(ended.mean() - curve.accepted[limit]) < 3 * ended.std() / runs**0.5
    assert abs(good[ended].mean() - curve.accuracy[limit]) < 3 * good[ended].std() / ended.sum() ** 0.5
    assert abs((first + 1).mean() - curve.attempts[limit]) < 3 * first.std() / runs**0.5


def test_abstaining_wins_when_every_attempt_loses():
    best = optimal_num_samples([1.0], [0.1], 1.0, 0.5, value_wrong=-5.0)
    assert (best.num_samples, best.utility, best.accuracy, best.accepted, best.attempts) == (0, 0.0, None, 0.0, 0.0)
    # An attempt that is worth nothing is not made either.
    assert optimal_num_samples([1.0], [0.5], 1.0, 0.0, value_wrong=-1.0).num_samples == 0


def test_a_perfect_verifier_that_costs_nothing_is_asked_for_ever():
    best = optimal_num_samples([0.5, 0.5], [0.9, 0.001], 1.0, 1.0)
    assert best.num_samples == math.inf and best.utility == pytest.approx(1) and best.accuracy == pytest.approx(1)
    limited = optimal_num_samples([0.5, 0.5], [0.9, 0.001], 1.0, 1.0, max_samples=100_000)
    assert limited.num_samples == 100_000 and limited.utility <= best.utility


def test_a_far_optimum_is_found_exactly():
    """Hard tasks that pay little less than they cost: the peak lies beyond ten thousand samples."""
    case = {"priors": [0.5, 0.5], "successes": [0.001, 0.0], "completeness": 1.0, "soundness": 0.9999}
    for value_wrong in (-1.0, -0.01, -1e-4):
        brute = resampling_curve(**case, value_wrong=value_wrong, max_samples=30_000).utility
        assert optimal_num_samples(**case, value_wrong=value_wrong).num_samples == int(brute.argmax())
    far = optimal_num_samples([0.5, 0.5], [1e-9, 0.0], 1.0, 1 - 1e-10)
    assert 1e9 < far.num_samples < math.inf and far.utility > 0


def test_a_verifier_that_prefers_wrong_answers_pays_late_or_never():
    """With c + s < 1 the easy tasks are rejected most: U falls, then rises, so it is all or nothing."""
    case = {"priors": [0.7, 0.3], "successes": [1.0, 0.0], "completeness": 0.1, "soundness": 0.1, "value_wrong": -1.0}
    utility = resampling_curve(**case, max_samples=200).utility
    assert utility[1] < 0 < utility[200]
    assert optimal_num_samples(**case).num_samples == math.inf
    assert optimal_num_samples(**case, max_samples=3).num_samples == 0


def test_the_marginal_value_changes_its_sign_at_most_once():
    draw = np.random.default_rng(1)
    for _ in range(100):
        rates = (draw.dirichlet(np.ones(5)), draw.uniform(size=5), *draw.uniform(size=2))
        utility = resampling_curve(*rates, value_wrong=-draw.uniform(0, 3), max_samples=40).utility
        steps = np.diff(utility)
        signs = np.sign(steps[abs(steps) > 1e-13])
        assert (np.diff(signs) != 0).sum() <= 1


@pytest.mark.parametrize(
    "change, message",
    [
        ({"successes": [0.87, 1.2]}, r"successes has the probability 1.2, but it must be in \[0, 1\]"),
        ({"soundness": -0.1}, "soundness has the probability -0.1"),
        ({"completeness": float("nan")}, "completeness has the probability nan"),
        ({"priors": [0.5, 0.4]}, "priors sum to 0.9 but must sum to 1"),
        ({"priors": [1.0]}, "lists of one length"),
        ({"completeness": 0.0, "soundness": 1.0}, "never accepted"),
        ({"cost": -1.0}, "cost is -1.0 but must be >= 0"),
        ({"value_wrong": float("inf")}, "value_wrong is inf"),
        ({"max_samples": 0}, r"max_samples is 0 but must be in \[1"),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        optimal_num_samples(**{**CARD, **change})
    with pytest.raises(TypeError, match="max_samples is 2.5"):
        optimal_num_samples(**CARD, max_samples=2.5)


def test_types_that_can_hardly_be_told_apart_are_no_trouble():
    close = {"priors": [0.5, 0.5], "successes": [0.5, 0.5 + 1e-12], "completeness": 1.0, "soundness": 0.5}
    assert optimal_num_samples(**close, max_samples=50).num_samples == 50
    assert optimal_num_samples(**close).num_samples == math.inf


def test_calibration_gives_the_arguments():
    correct = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0]], dtype=torch.bool)
    accepted = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 0, 0]], dtype=torch.bool)
    rates = calibrate(correct, accepted)
    assert rates["successes"] == [0.0, 0.5] and rates["priors"] == pytest.approx([1 / 3, 2 / 3])
    assert rates["completeness"] == 0.75 and rates["soundness"] == pytest.approx(7 / 8)
    assert optimal_num_samples(**rates, max_samples=20).num_samples >= 1
    with pytest.raises(ValueError, match="right and wrong"):
        calibrate(torch.ones(2, 2), torch.ones(2, 2))


def test_the_loop_stops_at_acceptance_and_repeats_from_its_seed(tiny_llama):
    model, prompts = tiny_llama(), torch.tensor([[0, 5, 6], [7, 8, 9], [3, 4, 5]])
    options = {"max_new_tokens": 3, "top_k": 0}
    seen = []

    def even(row, tokens):
        seen.append((row, tokens.tolist()))
        return row != 2 and int(tokens[0]) % 2 == 0

    before = torch.get_rng_state()
    loop = ResampleUntilAccepted(model, even, max_attempts=6, seed=3, **options)
    out = loop(prompts, (prompts != 0).long())
    assert torch.equal(torch.get_rng_state(), before)
    assert out.sequences[2] is None and out.attempts[2] == 6
    for row in (0, 1):
        tried = [tokens for r, tokens in seen if r == row]
        assert len(tried) == out.attempts[row] and tried[-1] == out.sequences[row].tolist()
        assert all(t[0] % 2 for t in tried[:-1]) and tried[-1][0] % 2 == 0
    again = loop(prompts, (prompts != 0).long())
    assert again.attempts == out.attempts and torch.equal(again.sequences[0], out.sequences[0])
    none = ResampleUntilAccepted(model, even, optimal_num_samples([1.0], [0.1], 1.0, 0.5, value_wrong=-5.0))(prompts)
    assert none.sequences == [None] * 3 and none.attempts == [0] * 3
    with pytest.raises(ValueError, match="max_attempts is inf"):
        ResampleUntilAccepted(model, even, optimal_num_samples([1.0], [0.5], 1.0, 1.0))
    with pytest.raises(ValueError, match="do_sample"):
        ResampleUntilAccepted(model, even, 3, do_sample=False)


def test_a_verifier_that_accepts_everything_is_asked_once():
    for limit in ({}, {"max_samples": 7}):
        assert optimal_num_samples([1.0], [1.0], 1.0, 1.0, **limit).num_samples == 1
        assert optimal_num_samples([1.0], [1.0], 1.0, 0.5, 1, -2, **limit).num_samples == 1
