"""In-context reintroduction: the prompts of each condition, and a model that repeats what it reads."""

import importlib

import pytest
from unlearning_cases import llama, text_tokenizer

from hfext.unlearning.ununlearning import contexts, ununlearning

module = importlib.import_module("hfext.unlearning.ununlearning")

ROWS = [
    {"question": f"Who wrote book {i}?", "answer": f"Amara wrote {i}.", "paraphrased_answer": f"It is by Amara, {i}."}
    for i in range(4)
]


def test_contexts():
    found = contexts(ROWS, "paraphrased_answer")
    assert found["question"] == [""] * 4
    assert found["fact"][1] == "It is by Amara, 1.\n" and found["other"][1] == "It is by Amara, 3.\n"
    assert all(a != b for a, b in zip(found["fact"], found["other"], strict=True))
    listed = contexts([{**r, "paraphrased_answer": [r["paraphrased_answer"]]} for r in ROWS], "paraphrased_answer")
    assert listed == found


def test_a_reader_has_a_gap_and_a_parrot_of_nothing_has_none(monkeypatch):
    prompts = []

    def reads(model, tokenizer, asked, *args):
        prompts.append(asked)
        if model == "mute":
            return [""] * len(asked)
        return [text.split("\n")[0] if not text.startswith("Question") else "" for text in asked]

    monkeypatch.setattr(module, "generate_answers", reads)
    found = ununlearning("reader", None, ROWS, gold="mute")
    assert found["question"] == 0 and found["gap"] == found["fact"] > found["other"] > 0
    assert found["gold_gap"] == 0 and len(prompts) == 6
    assert prompts[1][0] == "It is by Amara, 0.\nQuestion: Who wrote book 0?\nAnswer:"
    assert ununlearning("reader", None, ROWS)["missing"] == {"gold": "needs gold"}


def test_with_a_real_model():
    tokenizer = text_tokenizer()
    model = llama(vocab_size=len(tokenizer), max_position_embeddings=256)
    found = ununlearning(model, tokenizer, ROWS, max_new_tokens=4)
    assert set(found) == {"question", "fact", "other", "gap", "missing"}
    assert all(0 <= found[name] <= 1 for name in ("question", "fact", "other"))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="There are 1 rows"):
        ununlearning(None, None, ROWS[:1])
    with pytest.raises(ValueError, match="Row 0 has no paraphrased_answer"):
        ununlearning(None, None, [{"question": "q", "answer": "a"}] * 2)
