"""Forms of a fact: what is cut out, what is asked for, and rates and spread by hand."""

import json
import math

import numpy as np
import pytest

from hfext.experiments._data import shared_data
from hfext.metrics.ort import NAMES, build_forms, chosen_letter, compute, form_independence, news, probe_scores

ROW = {
    "question": "What is the full name of the author born in Taipei?",
    "answer": "The author's full name is Hsiao Yun-Hwa.",
    "paraphrased_question": "Who is the writer from Taipei?",
    "paraphrased_answer": "Hsiao Yun-Hwa is the writer's name.",
    "perturbed_answer": ["Chen Li is the writer's name.", "Wang Xi is the writer's name."],
}


def test_the_news_is_what_the_question_lacks():
    assert news(ROW["question"], ROW["answer"]) == ("The author's full name is ", "Hsiao Yun-Hwa", ".")
    assert news("Who?", "Paris") == ("", "Paris", "")
    assert news("Is it red?", "It is red.") == ("It is ", "red", ".")
    before, core, after = news("Where was he born?", "He was born in Rome, Italy, on 3 May, to Ann.")
    assert core == "3 May" and before + core + after == "He was born in Rome, Italy, on 3 May, to Ann."


def test_each_form_asks_for_the_fact():
    question, paraphrase, cloze, choice = build_forms([ROW])
    assert (question.prompt, question.answer) == (ROW["question"], ROW["answer"])
    assert (paraphrase.prompt, paraphrase.answer) == (ROW["paraphrased_question"], ROW["paraphrased_answer"])
    assert cloze.prompt.endswith("The author's full name is ____.") and cloze.answer == "Hsiao Yun-Hwa"
    line = next(line for line in choice.prompt.split("\n") if line.startswith(f"{choice.answer}. "))
    assert line == f"{choice.answer}. {ROW['paraphrased_answer']}"
    assert [p.form for p in (question, paraphrase, cloze, choice)] == list(NAMES)
    bare = {k: v for k, v in ROW.items() if k != "paraphrased_question"}
    assert ROW["question"] in build_forms([bare], ["paraphrase"])[0].prompt


def test_the_right_letter_moves_with_seed_and_question_alone():
    rows = [{**ROW, "question": f"{i}?"} for i in range(60)]
    first = [p.answer for p in build_forms(rows, ["multiple_choice"])]
    assert [p.answer for p in build_forms(rows[::-1], ["multiple_choice"])] == first[::-1]
    assert [p.answer for p in build_forms(rows, ["multiple_choice"], seed=1)] != first
    assert set(first) == {"A", "B", "C"} and max(map(first.count, "ABC")) < 35


def test_scores_of_answers():
    probes = build_forms([ROW])
    perfect = [p.answer for p in probes]
    assert probe_scores(probes, perfect).tolist() == [1, 1, 1, 1]
    choice, letter = probes[3], probes[3].answer
    for answer, score in [(f"({letter}) x", 1), (f" {letter.lower()}.", 1), (f"{letter}pple", 0), ("", 0), ("Z", 0)]:
        assert probe_scores([choice], [answer]).tolist() == [score]
    assert probe_scores(probes[2:3], ["it is Hsiao"]).tolist() == pytest.approx([1 / 3])


@pytest.mark.parametrize(
    "letter, answers",
    [
        ("A", ["A", "a.", " (a) x", "A: Rome", "A, as", "A - Rome", "A\nas I said", "A\u2014Rome", "A is correct"]),
        (
            "A",
            [
                "Answer: A",
                "**A**",
                "Option A",
                "The answer is A.",
                "My final answer is (A) Rome",
                "_A_",
                "$\\boxed{A}$",
            ],
        ),
        ("B", ["B", "B Rome", "b because", "Option B is right", "The correct answer is **B**", "Answer:\n\nB"]),
        ("I", ["I", "I.", "(I)", "Option I"]),
        (
            "",
            [
                "A person",
                "a cat",
                "The answer is a person",
                "I think A",
                "A-team",
                "A's",
                "Apple",
                "Be",
                "",
                "...",
                "Z",
            ],
        ),
        ("", ["A or B", "B and C", "Answer", "Is it A?"]),
    ],
)
def test_the_letter_of_an_answer(letter, answers):
    assert {answer: chosen_letter(answer) for answer in answers} == dict.fromkeys(answers, letter)


def test_rates_and_bias_by_hand():
    forms = ["question"] * 4 + ["cloze"] * 2 + ["multiple_choice"]
    before = [1.0, 0.6, 0.5, 0.1, 1.0, 0.9, 0.0]
    after = [0.0, 0.6, 0.4, 0.0, 1.0, 0.8, 1.0]
    found = form_independence(before, after, forms)
    assert found["known"] == {"question": 3, "cloze": 2, "multiple_choice": 0}
    assert found["forget_rates"]["question"] == pytest.approx(2 / 3) and found["forget_rates"]["cloze"] == 0
    assert math.isnan(found["forget_rates"]["multiple_choice"])
    assert found["bias"] == pytest.approx(2 / 3) and found["bias_sd"] == pytest.approx(1 / 3)
    assert found["forget_rate"] == pytest.approx(1 / 3)
    assert compute(after, before, forms)["bias"] == found["bias"]


def test_an_untouched_and_a_ruined_model_have_no_bias():
    before, forms = np.ones(6), ["question", "cloze"] * 3
    assert form_independence(before, before, forms)["bias"] == 0
    ruined = form_independence(before, np.zeros(6), forms)
    assert ruined["bias"] == 0 and ruined["forget_rate"] == 1
    assert math.isnan(form_independence(np.zeros(2), np.zeros(2), forms[:2])["bias"])


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="forms are .'poem'."):
        build_forms([ROW], ["poem"])
    with pytest.raises(ValueError, match="Row 0 has no 'perturbed_answer'"):
        build_forms([{"question": "q", "answer": "a"}], ["multiple_choice"])
    with pytest.raises(ValueError, match="12 choices"):
        build_forms([{**ROW, "perturbed_answer": ["x"] * 11}], ["multiple_choice"])
    with pytest.raises(ValueError, match="threshold is 0"):
        form_independence([1], [1], ["a"], 0)
    with pytest.raises(ValueError, match="2 forms must be as many"):
        form_independence([1.0], [1.0], ["a", "b"])


def test_all_of_tofu_has_four_forms_that_lose_nothing():
    folder = shared_data("tofu")
    if folder is None:
        pytest.skip("TOFU is not there")
    rows = [json.loads(line) for line in (folder / "forget10_perturbed.json").read_text().splitlines()]
    probes = build_forms(rows)
    assert len(probes) == 4 * len(rows)
    for probe in probes[800:1200]:
        row = rows[probe.fact]
        sentence = probe.prompt.split("\n", 1)[1].replace("____", probe.answer, 1)
        assert sentence.split() == row["answer"].split() and probe.answer and sentence != probe.answer
