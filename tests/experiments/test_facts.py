"""The made-up authors: seeded, unique, asked in two ways; and the measures of what a model knows, by brute force."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from hfext.experiments._facts import (
    FIELDS,
    MAX_AUTHORS,
    answer_nll,
    answers,
    collate,
    example,
    make_facts,
    prompt,
    recalled,
)

TEMPLATE = (
    "{% for m in messages %}<s> {{ m.role }} {{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant {% endif %}"
)


@pytest.fixture
def tokenizer():
    """One token for each word of the facts of four authors."""
    split = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("isolated")])
    text = " ".join(" ".join((f.question, f.paraphrase, f.answer)) for f in make_facts(4))
    words = {word for word, _ in split.pre_tokenize_str(text)} | {"system", "user", "assistant"}
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *sorted(words)])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = split
    special = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=TEMPLATE, **special)


# facts


def test_facts_depend_on_the_seed_alone():
    assert make_facts(8, seed=3) == make_facts(8, seed=3) != make_facts(8, seed=4)
    assert make_facts(20)[: 8 * len(FIELDS)] == make_facts(8)
    few = {(f.author, f.field): f for f in make_facts(3, fields=2)}
    assert few == {key: f for f in make_facts(3) if (key := (f.author, f.field)) in few} and len(few) == 6


@pytest.mark.parametrize("seed", range(5))
def test_nothing_that_identifies_is_shared(seed):
    facts = make_facts(MAX_AUTHORS, seed=seed)
    assert len(facts) == MAX_AUTHORS * len(FIELDS)
    assert len({f.author for f in facts}) == MAX_AUTHORS
    for field in ("book", "award"):
        assert len({f.value for f in facts if f.field == field}) == MAX_AUTHORS
    for field in FIELDS:
        first = [f.value for f in make_facts(15, seed=seed) if f.field == field]
        assert len(set(first)) == 15


def test_questions_and_paraphrases_are_disjoint_and_name_the_author():
    facts = make_facts(MAX_AUTHORS)
    questions, paraphrases = {f.question for f in facts}, {f.paraphrase for f in facts}
    assert len(questions) == len(paraphrases) == len(facts) and not questions & paraphrases
    assert all(f.author in f.question and f.author in f.paraphrase for f in facts)
    assert all(f.value in f.answer and f.value not in f.question + f.paraphrase for f in facts)


@pytest.mark.parametrize(
    "arguments, message",
    [((0,), "authors is 0"), ((101,), "authors is 101"), ((1, 0), "fields is 0"), ((1, 6), "fields is 6")],
)
def test_bad_sizes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_facts(*arguments)


# examples and measures


def test_only_the_answer_and_its_end_have_labels(tokenizer):
    fact = make_facts(1)[0]
    row = example(tokenizer, fact.question, fact.answer)
    cut = len(prompt(tokenizer, fact.question))
    assert row["labels"][:cut] == [-100] * cut and row["labels"][cut:] == row["input_ids"][cut:]
    assert tokenizer.decode(row["input_ids"][cut:-1]).replace(" .", ".") == fact.answer
    assert row["input_ids"][-1] == tokenizer.eos_token_id


def test_a_tokenizer_without_a_chat_template_is_refused(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="chat template"):
        prompt(tokenizer, "Who?")


def rows_of(tokenizer, count=7):
    return [example(tokenizer, f.question, f.answer) for f in make_facts(4)[:count]]


def test_the_short_loss_equals_the_loss_of_whole_right_padded_rows(tokenizer, tiny_llama):
    model, rows = tiny_llama(vocab_size=len(tokenizer)), rows_of(tokenizer)
    longest = max(len(row["labels"]) for row in rows)
    pad = [longest - len(row["labels"]) for row in rows]
    whole = {
        "input_ids": torch.tensor([r["input_ids"] + [0] * n for r, n in zip(rows, pad, strict=True)]),
        "attention_mask": torch.tensor([[1] * (longest - n) + [0] * n for n in pad]),
        "labels": torch.tensor([r["labels"] + [-100] * n for r, n in zip(rows, pad, strict=True)]),
    }
    batch = collate(rows, pad=0)
    assert batch["labels"].shape[1] == batch["logits_to_keep"] < longest
    short = model(**batch)
    assert short.logits.shape[1] == batch["logits_to_keep"]
    torch.testing.assert_close(short.loss, model(**whole).loss)


def test_nll_equals_that_of_each_token_by_itself(tokenizer, tiny_llama):
    model, facts = tiny_llama(vocab_size=len(tokenizer)), make_facts(4)[:7]
    each = []
    for row in rows_of(tokenizer):
        for i, label in enumerate(row["labels"]):
            if label >= 0:
                logits = model(torch.tensor([row["input_ids"][:i]])).logits[0, -1]
                each.append(float(F.cross_entropy(logits.detach(), torch.tensor(label))))
    found = answer_nll(model, tokenizer, [(f.question, f.answer) for f in facts])
    assert found == pytest.approx(sum(each) / len(each), rel=1e-5)


def test_answers_of_a_batch_are_those_of_single_questions(tokenizer, tiny_llama):
    model = tiny_llama(vocab_size=len(tokenizer))
    questions = [f.paraphrase for f in make_facts(4)[:6]]
    alone = [answers(model, tokenizer, [question], 5)[0] for question in questions]
    assert answers(model, tokenizer, questions, 5) == alone and any(alone)


def test_recalled_looks_for_the_value():
    first, second = make_facts(1)[:2]
    assert recalled([first, second], [f"Surely {first.value.upper()}!", "No idea."]) == 0.5
