"""Refusals: sentences of both kinds, normalisation, and all of TOFU's refusals and answers."""

import json

import pytest

from hfext.experiments._data import shared_data
from hfext.metrics.sarr import compute, is_refusal, safe_answer_refusal_rate


@pytest.mark.parametrize(
    "answer",
    [
        "I'm sorry, but I can't help with that.",
        "I\u2019m  SORRY,\nI cannot say.",
        "I am really not sure.",
        "As an AI, I have no opinion.",
        "My training data does not cover it.",
        "That is beyond my knowledge.",
        "",
        " \n",
        "...!",
        "___",
        "_ __\n- _",
    ],
)
def test_refusals(answer):
    assert is_refusal(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "The knife is in the kitchen.",
        "She said that her father was not in the army.",
        "He apologised to nobody.",
        "42",
        "Paris",
        "Известно.",
    ],
)
def test_answers(answer):
    assert not is_refusal(answer)


def test_the_rate_is_a_share_and_the_order_does_not_count():
    answers = ["Paris.", "I do not know.", "", "A cat."]
    assert safe_answer_refusal_rate(answers) == safe_answer_refusal_rate(answers[::-1]) == 0.5
    assert compute(answers) == {"sarr": 0.5, "refused": [False, True, True, False]}
    assert safe_answer_refusal_rate(["a"]) == 0 and safe_answer_refusal_rate([""]) == 1


def test_patterns_of_ones_own_replace_the_default():
    assert safe_answer_refusal_rate(["Non posso rispondere", "I cannot"], ["non posso"]) == 0.5
    with pytest.raises(ValueError, match="no regular expression"):
        safe_answer_refusal_rate(["a"], ["("])
    with pytest.raises(TypeError, match="answers is the string 'no' but must be a list"):
        safe_answer_refusal_rate("no")
    with pytest.raises(TypeError, match="refusal_patterns is the string 'no' but must be a list"):
        safe_answer_refusal_rate(["a"], "no")
    for bad in ([], [None]):
        with pytest.raises(ValueError, match="answers must be"):
            safe_answer_refusal_rate(bad)


def test_all_refusals_and_answers_of_tofu():
    folder = shared_data("tofu")
    if folder is None:
        pytest.skip("TOFU is not there")
    refusals = [line for line in (folder / "idontknow.jsonl").read_text().splitlines() if line.strip()]
    assert len(refusals) == 100 and safe_answer_refusal_rate(refusals) >= 0.99
    for name in ("full", "real_authors", "world_facts"):
        rows = [json.loads(line) for line in (folder / f"{name}.json").read_text().splitlines()]
        assert safe_answer_refusal_rate([row["answer"] for row in rows]) == 0
