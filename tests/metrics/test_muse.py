"""MUSE: cuts, leaks and curves by hand, and a model that recites what it has learnt."""

import logging
import math

import numpy as np
import pytest
import torch
from learnt_rows import learnt, random_rows
from word_tokens import text_of, word_tokenizer

from hfext.metrics._token_scores import score_rows
from hfext.metrics.min_k import min_k
from hfext.metrics.muse import (
    FORMS,
    cut_answer,
    few_shot_prompt,
    forget_auc,
    knowmem,
    privleak,
    scalability,
    sustainability,
    text_f1,
    verbmem,
)


@pytest.mark.parametrize(
    "answer, kept",
    [
        (" Paris.\n\nQuestion: and?", "Paris."),
        ("Paris\nQuestion: and?", "Paris"),
        ("Paris Question: and?", "Paris"),
        ("Paris\nof France ", "Paris\nof France"),
        ("\n\nParis", ""),
        ("", ""),
    ],
)
def test_an_answer_ends_where_the_next_question_begins(answer, kept):
    assert cut_answer(answer) == kept


def test_prompts_hold_the_examples_before_the_question():
    assert few_shot_prompt("q?", [("a?", "b")]) == "Question: a?\nAnswer: b\n\nQuestion: q?\nAnswer:"


def test_knowledge_of_a_callable():
    def answer(prompts):
        assert prompts == ["Question: a?\nAnswer:", "Question: b?\nAnswer:"]
        return [" the red house\n\nQuestion: c?", "no idea"]

    found = knowmem(answer, None, ["a?", "b?"], ["red house", "blue"])
    assert found["answers"] == ["the red house", "no idea"]
    assert found["scores"] == pytest.approx([0.8, 0.0]) and found["knowmem"] == pytest.approx(0.4)
    form = FORMS["knowmem"].compute([" the red house\n\nQ", "no idea"], ["red house", "blue"])
    assert form["scores"] == found["scores"]


def test_the_stemmer_is_off():
    assert text_f1(["houses"], ["house"]).tolist() == [0.0]


def test_what_was_learnt_is_recited_and_leaks(tiny_llama):
    rows, tokenizer = random_rows(12, length=16), word_tokenizer()
    model = learnt(tiny_llama(), rows[:6], steps=120)
    texts = [text_of(row["input_ids"]) for row in rows]
    known = verbmem(model, tokenizer, texts[:6], prompt_tokens=4, max_new_tokens=8, batch_size=4)
    assert known["verbmem"] == 1 and known["answers"] == [text_of(row["input_ids"][4:12]) for row in rows[:6]]
    unknown = verbmem(model, tokenizer, texts[6:], prompt_tokens=4, max_new_tokens=8)
    assert unknown["verbmem"] < 0.3
    forget, holdout = (score_rows(model, some).log_p for some in (rows[:6], rows[6:]))
    assert forget_auc(forget, holdout) == 0 and privleak(0, 0.5) == -100
    form = FORMS["privleak"].compute(min_k([*forget, *holdout], 0.4), [1] * 6 + [0] * 6)
    assert form == {"privleak": -100.0, "auc": 0.0}


def test_questions_are_answered_by_the_model(tiny_llama):
    model, tokenizer = tiny_llama(initializer_range=0.3), word_tokenizer()
    one = knowmem(model, tokenizer, ["w5 w6", "w7"], ["w9", "w10"], [("w11", "w12")], max_new_tokens=4, batch_size=1)
    two = knowmem(model, tokenizer, ["w5 w6", "w7"], ["w9", "w10"], [("w11", "w12")], max_new_tokens=4, batch_size=2)
    assert one == two and all(one["answers"])


def test_privleak_by_hand():
    assert privleak(0.5, 0.5) == 0 and privleak(1, 0.5) == 100 and privleak(0.3, 0.4) == pytest.approx(-25)
    # Forgotten texts look stranger than unseen ones: over-forgetting has the positive sign.
    assert privleak(forget_auc([[-9.0]], [[-1.0]]), 0.5) == 100


def test_privleak_without_a_base_is_nan_with_a_warning(caplog):
    logger = logging.getLogger("hfext.metrics.muse")
    logger.addHandler(caplog.handler)
    try:
        assert math.isnan(privleak(0.4, 0))
    finally:
        logger.removeHandler(caplog.handler)
    assert "not defined" in caplog.text


def test_curves_of_utility():
    found = scalability([1, 2, 4], [0.6, 0.5, 0.4], base=0.8)
    assert found["retained"] == pytest.approx([0.75, 0.625, 0.5]) and found["worst"] == pytest.approx(0.5)
    assert found["slope"] == pytest.approx(-0.125)
    utilities = np.random.default_rng(0).random(5)
    slope = np.polyfit(range(5), utilities / 0.7, 1)[0]
    assert sustainability(utilities, 0.7)["slope"] == pytest.approx(slope)
    assert sustainability([0.5], 0.5) == {"retained": [1.0], "worst": 1.0, "slope": 0.0}


def test_bad_input_is_named(tiny_llama):
    with pytest.raises(ValueError, match="Text 1 has 2 tokens but must have more than the 2"):
        verbmem(tiny_llama(), word_tokenizer(), ["w5 w6 w7", "w5 w6"], prompt_tokens=2)
    with pytest.raises(ValueError, match="prompt_tokens is 0"):
        verbmem(tiny_llama(), word_tokenizer(), ["w5"], prompt_tokens=0)
    with pytest.raises(ValueError, match="auc_gold is 1.5"):
        privleak(0.5, 1.5)
    with pytest.raises(ValueError, match="sizes are .2, 1. but must grow"):
        scalability([2, 1], [0.5, 0.5], 1)
    with pytest.raises(ValueError, match="base is 0"):
        sustainability([0.5], 0)
    with pytest.raises(TypeError, match=r"predictions\[0\] is a int"):
        text_f1([3], ["a"])
    with pytest.raises(ValueError, match="references must be 1"):
        FORMS["privleak"].compute(torch.ones(2), [0, 2])
