"""TOFU's measures: definitions written out, golden values of the published logs, and p-values by counting orders."""

import itertools
import json
import logging
import math

import numpy as np
import pytest

from hfext.experiments._data import shared_data
from hfext.metrics._rouge import rouge_1, rouge_l
from hfext.metrics.tofu import (
    AUTHORS,
    FORGET,
    RETAIN,
    WORLD,
    _log10_p,
    forget_quality,
    forget_quality_from_logs,
    harmonic_mean,
    model_utility,
    part,
    part_from_log,
    probability,
    retain_utility,
    rouge_recall,
    truth_ratio,
    truth_ratio_score,
    utility_from_log,
)


def log_of(name):
    folder = shared_data("tofu")
    if folder is None:
        pytest.skip("the TOFU logs are not there")
    return json.loads((folder / f"eval_log_llama2_7b_{name}.json").read_text())


def test_truth_ratio_by_hand():
    paraphrase, wrong = [math.log(2), 0.0], [[math.log(4), math.log(8)], [math.log(3)]]
    # P_paraphrase = 1/2, P_wrong = (1/4 + 1/8) / 2 or sqrt(1/32); then 1 and 1/3.
    assert truth_ratio(paraphrase, wrong, "arithmetic").tolist() == pytest.approx([3 / 8, 1 / 3])
    assert truth_ratio(paraphrase, wrong, "geometric").tolist() == pytest.approx([math.sqrt(1 / 8), 1 / 3])
    assert truth_ratio_score([0.5, 4.0]) == pytest.approx(0.25)
    assert truth_ratio_score([0.5, 4.0], forget=True) == pytest.approx(3 / 8)
    assert truth_ratio_score([0.0, math.inf], forget=True) == 0


def test_geometric_is_at_most_arithmetic_and_the_same_for_one_wrong_answer():
    g = np.random.default_rng(0)
    right, wrong = g.exponential(size=50), g.exponential(size=(50, 5))
    a, b = (truth_ratio(right, wrong, agg) for agg in ("arithmetic", "geometric"))
    assert (b <= a + 1e-12).all()
    single = [truth_ratio(right, wrong[:, :1], agg) for agg in ("arithmetic", "geometric")]
    np.testing.assert_allclose(*single, rtol=1e-12)


def test_probability_alone_and_among_wrong_answers():
    assert probability([math.log(2)]).tolist() == pytest.approx([0.5])
    assert probability([math.log(2)], [[math.log(4), math.log(8)]]).tolist() == pytest.approx([4 / 7])
    assert probability([2000.0, 2000.0], [[2000.0], [0.0]]).tolist() == [0.5, 0.0]


def test_infinite_losses_are_probabilities_of_0():
    inf = math.inf
    assert probability([inf, 1.0, inf], [[1.0, inf], [inf, inf], [1.0, 2.0]]).tolist() == [0.0, 1.0, 0.0]
    for agg, values in (("arithmetic", [inf, 0.0, math.exp(-1) / 2]), ("geometric", [inf, 0.0, 0.0])):
        assert truth_ratio([inf, 1.0, 0.0], [[1.0, 2.0], [inf, inf], [1.0, inf]], agg).tolist() == pytest.approx(
            values
        )
    assert truth_ratio([inf], [[1.0, inf]], "arithmetic").tolist() == [inf]
    for call in (
        lambda: probability([1.0, inf], [[1.0], [inf, inf]]),
        lambda: truth_ratio([1.0, inf], [[1.0], [inf, inf]], "arithmetic"),
        lambda: truth_ratio([1.0, inf], [[1.0], [1.0, inf]], "geometric"),
    ):
        with pytest.raises(ValueError, match="Row 1 has infinite losses on both sides"):
            call()


def test_utility_is_a_harmonic_mean():
    one = {"probability": 0.5, "rouge": 0.25, "truth_ratio_score": 1.0}
    assert retain_utility(one) == pytest.approx(3 / 7)
    assert model_utility(one, one, one) == pytest.approx(3 / 7)
    assert model_utility(one, one, {**one, "rouge": 0.0}) == 0
    assert harmonic_mean([0.3, 0.3]) == pytest.approx(0.3)


def test_part_gathers_the_three_numbers():
    found = part([math.log(2)], [math.log(2)], [[math.log(4)]], [0.75])
    assert found == pytest.approx({"probability": 0.5, "rouge": 0.75, "truth_ratio_score": 0.5})
    found = part([math.log(2)], [math.log(4)], [[math.log(2)]], [0.75], share=True, forget=True)
    assert found == pytest.approx({"probability": 0.5, "rouge": 0.75, "truth_ratio_score": 0.5})


def exact(a, b):
    """p by counting, among all orders of the values, those with a statistic at least as large."""

    def gap(first):
        positions, found = np.isin(np.arange(len(a) + len(b)), first), 0
        n, m = positions.cumsum(), (~positions).cumsum()
        found = np.abs(n * len(b) - m * len(a)).max()
        return found

    order = np.argsort(np.concatenate([a, b]))
    seen = gap(np.flatnonzero(order < len(a)))
    gaps = [gap(list(c)) for c in itertools.combinations(range(len(a) + len(b)), len(a))]
    return np.mean([g >= seen for g in gaps])


@pytest.mark.parametrize("n, m, shift", [(5, 5, 0.0), (4, 6, 1.0), (6, 3, 0.5), (5, 5, 9.0)])
def test_forget_quality_counts_orders(n, m, shift):
    g = np.random.default_rng(n)
    a, b = np.exp(g.normal(size=n)), np.exp(g.normal(size=m) + shift)
    found = forget_quality(a, b)
    assert found["forget_quality"] == pytest.approx(exact(a, b), rel=1e-9)
    assert _log10_p(a, b) == pytest.approx(found["log10_forget_quality"], abs=1e-9)
    inverse = forget_quality(1 / a, 1 / b)
    assert inverse["forget_quality"] == pytest.approx(found["forget_quality"], rel=1e-9)


def test_gold_against_itself_is_1():
    a = np.random.default_rng(0).random(40)
    found = forget_quality(a, a)
    assert (found["forget_quality"], found["log10_forget_quality"], found["ks_statistic"]) == (1.0, 0.0, 0.0)


def test_the_logarithm_does_not_underflow():
    a = np.arange(400.0)
    # Disjoint samples: two of all C(2n, n) orders.
    assert forget_quality(a, a + 1e3)["log10_forget_quality"] == pytest.approx(
        math.log10(2) - math.log10(math.comb(800, 400)), abs=1e-6
    )
    found = forget_quality(np.arange(600.0), np.arange(600.0) + 1e3)
    assert found["log10_forget_quality"] == pytest.approx(math.log10(2) - math.log10(math.comb(1200, 600)), abs=1e-9)
    assert found["forget_quality"] < 1e-280


def test_published_forget_quality():
    full, gold = log_of("full"), log_of("retain99")
    found = forget_quality_from_logs(full, gold)
    assert found["ks_statistic"] == pytest.approx(0.4283333, abs=1e-7)
    assert found["forget_quality"] == pytest.approx(2.3451772527550457e-06, rel=1e-9)
    assert forget_quality_from_logs(gold, gold)["forget_quality"] == 1
    same_rows = forget_quality_from_logs(full, log_of("retain90"))
    assert same_rows["forget_quality"] == pytest.approx(1.834066410994743e-21, rel=1e-9)


def test_logs_of_different_questions_are_warned_about(caplog):
    full, gold = log_of("full"), log_of("retain99")
    logger = logging.getLogger("hfext.metrics.tofu")
    logger.addHandler(caplog.handler)
    try:
        forget_quality_from_logs(full, full)
        assert not caplog.records
        forget_quality_from_logs(full, gold)
        assert "300 and 40 rows" in caplog.text
    finally:
        logger.removeHandler(caplog.handler)


@pytest.mark.parametrize("agg, value", [("arithmetic", 0.585886), ("geometric", 0.622677)])
def test_published_utility(agg, value):
    found = utility_from_log(log_of("full"), agg)
    assert found["model_utility"] == pytest.approx(value, abs=5e-7)
    assert len(found) == 10
    assert harmonic_mean([v for k, v in found.items() if k != "model_utility"]) == pytest.approx(value, abs=5e-7)


def test_the_default_aggregations_are_the_authors():
    full, gold = log_of("full"), log_of("retain90")
    assert utility_from_log(full) == utility_from_log(full, "arithmetic") != utility_from_log(full, "geometric")
    expected = forget_quality_from_logs(full, gold, "geometric")
    assert forget_quality_from_logs(full, gold) == expected != forget_quality_from_logs(full, gold, "arithmetic")


@pytest.mark.parametrize("name", [FORGET, RETAIN, AUTHORS, WORLD])
def test_rouge_and_truth_ratio_of_every_logged_answer(name):
    log = log_of("retain90")[name]
    keys = list(log["generated_text"])
    answers, truths = ([log["generated_text"][k][i] for k in keys] for i in (1, 2))
    logged = [log["rougeL_recall"][k] for k in keys]
    np.testing.assert_allclose(rouge_recall(answers, truths), logged, rtol=0, atol=1e-12)
    ones = [rouge_1(a, b, stemmer=True).recall for a, b in zip(answers, truths, strict=True)]
    np.testing.assert_allclose(ones, [log["rouge1_recall"][k] for k in keys], rtol=0, atol=1e-12)
    assert any(rouge_l(a, b).recall != x for a, b, x in zip(answers, truths, logged, strict=True)) or name != FORGET
    ratios = truth_ratio(
        [log["avg_paraphrased_loss"][k] for k in keys], [log["average_perturb_loss"][k] for k in keys], "geometric"
    )
    np.testing.assert_allclose(ratios, [log["truth_ratio"][k] for k in keys], rtol=1e-5)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="wrong_agg is 'mean' but must be one of arithmetic, geometric"):
        truth_ratio([1.0], [[1.0]], "mean")
    with pytest.raises(ValueError, match="wrong has 1 rows but must have 2"):
        truth_ratio([1.0, 1.0], [[1.0]], "geometric")
    with pytest.raises(ValueError, match=r"wrong\[0\] has the shape"):
        probability([1.0], [[]])
    with pytest.raises(ValueError, match="without NaN"):
        forget_quality([math.nan], [1.0])
    with pytest.raises(ValueError, match="retain lacks rouge"):
        retain_utility({"probability": 1.0, "truth_ratio_score": 1.0})
    with pytest.raises(ValueError, match="must be >= 0"):
        harmonic_mean([-1.0])
    with pytest.raises(ValueError, match="The log has no 'eval_log.json'"):
        part_from_log({FORGET: {}}, RETAIN, "arithmetic")
    with pytest.raises(ValueError, match="The log has no 'avg_gt_loss'"):
        part_from_log({FORGET: {}}, FORGET, "arithmetic")
    with pytest.raises(ValueError, match="The log has no 'eval_log_forget.json'"):
        forget_quality_from_logs({}, {})
    with pytest.raises(ValueError, match="1 predictions and 2 references"):
        rouge_recall(["a"], ["a", "b"])
