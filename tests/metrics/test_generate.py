"""Greedy answers against an argmax loop, under every batch size, order and generation config."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from word_tokens import text_of, word_tokenizer

from hfext.metrics._generate import ends_of, generate_answers, generate_ids


def greedy(model, prompt, count, ends):
    """A plain loop without cache, padding and batch."""
    ids = list(prompt)
    for _ in range(count):
        token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        if token in ends:
            break
        ids.append(token)
    return ids[len(prompt) :]


PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [0, 15], [16, 17, 0, 18, 19], [20, 21]]


@pytest.mark.parametrize("factory", ["tiny_llama", "tiny_gpt2"])
def test_answers_are_those_of_a_loop(factory, request):
    model = request.getfixturevalue(factory)(initializer_range=0.3)
    ends = list(range(40, 60))
    expected = [greedy(model, p, 6, ends) for p in PROMPTS]
    assert len({len(x) for x in expected}) > 1
    for batch_size in (1, 2, 4, 8):
        assert generate_ids(model, PROMPTS, 6, batch_size, ends) == expected
    assert generate_ids(model, PROMPTS[::-1], 6, 3, ends) == expected[::-1]
    counts = [1, 6, 2, 3, 5, 4]
    expected = [greedy(model, p, n, ends) for p, n in zip(PROMPTS, counts, strict=True)]
    assert generate_ids(model, PROMPTS, counts, 4, ends) == expected


def test_the_end_is_kept_when_asked_for(tiny_llama):
    model = tiny_llama(initializer_range=0.3)
    free = greedy(model, PROMPTS[0], 6, [])
    stop = free[3]
    first = free.index(stop)
    assert generate_ids(model, PROMPTS[:1], 6, ends=[stop]) == [free[:first]]
    assert generate_ids(model, PROMPTS[:1], 6, ends=[stop], keep_end=True) == [free[: first + 1]]
    assert generate_ids(model, PROMPTS[:1], 1, ends=[], keep_end=True) == [free[:1]]


def test_sampling_and_penalties_of_the_config_are_left_aside_and_all_is_restored(tiny_gpt2):
    model = tiny_gpt2(initializer_range=0.3)
    expected = [greedy(model, p, 6, [2]) for p in PROMPTS]
    config = model.generation_config
    config.do_sample, config.temperature, config.repetition_penalty, config.num_beams = True, 5.0, 9.0, 3
    config.eos_token_id, model.config.use_cache = 2, False
    before = config.to_dict()
    model.train()
    model.transformer.h[0].eval()
    modes = [m.training for m in model.modules()]
    assert generate_ids(model, PROMPTS, 6) == expected
    assert [m.training for m in model.modules()] == modes
    assert model.generation_config is config and config.to_dict() == before and model.config.use_cache is False


HOSTILE = [
    {"suppress_tokens": list(range(3, 60))},
    {"begin_suppress_tokens": list(range(3, 60))},
    {"forced_eos_token_id": 7},
    {"forced_bos_token_id": 7},
    {"sequence_bias": [[[9], 90.0]]},
    {"bad_words_ids": [[i] for i in range(3, 60)]},
    {"return_dict_in_generate": True, "output_scores": True},
    {"num_return_sequences": 2, "num_beams": 2},
    {"stop_strings": ["a"]},
    {"min_new_tokens": 6, "exponential_decay_length_penalty": (1, 5.0)},
    {"max_time": 1e-9},
    {"prompt_lookup_num_tokens": 2},
    {"eos_token_id": list(range(3, 128))},
]


@pytest.mark.parametrize("fields", HOSTILE, ids=lambda fields: next(iter(fields)))
@pytest.mark.parametrize("ends", [[2], []])
def test_no_field_of_the_config_changes_an_answer(tiny_llama, fields, ends):
    model = tiny_llama(initializer_range=0.3)
    expected = [greedy(model, p, 6, ends) for p in PROMPTS]
    config = model.generation_config
    for name, value in fields.items():
        setattr(config, name, value)
    before = config.to_dict()
    assert generate_ids(model, PROMPTS, 6, 4, ends) == expected
    assert model.generation_config is config and config.to_dict() == before


def test_the_config_comes_back_after_a_failure_and_in_a_peft_model(tiny_llama, monkeypatch):
    model = tiny_llama(initializer_range=0.3)
    expected = [greedy(model, p, 6, []) for p in PROMPTS]
    config = model.generation_config
    config.suppress_tokens = list(range(3, 60))
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert generate_ids(wrapped, PROMPTS, 6, ends=[]) == expected
    assert model.generation_config is config and wrapped.generation_config is config
    assert "generation_config" not in vars(wrapped)

    def broken(*args, **kwargs):
        raise KeyError

    monkeypatch.setattr(model, "forward", broken)
    for one in (model, wrapped):
        with pytest.raises(KeyError):
            generate_ids(one, PROMPTS, 6)
        assert model.generation_config is config and wrapped.generation_config is config


def test_texts_in_and_new_texts_out(tiny_llama):
    model, tokenizer = tiny_llama(initializer_range=0.3), word_tokenizer()
    model.generation_config.eos_token_id = None
    assert ends_of(model, tokenizer) == [2] and ends_of(model) == []
    prompts = [text_of(p) for p in PROMPTS]
    expected = [text_of(greedy(model, p, 5, [2])) for p in PROMPTS]
    assert generate_answers(model, tokenizer, prompts, 5, batch_size=4) == expected
    assert tokenizer.padding_side == "right" and tokenizer.pad_token is None


def test_bad_input_is_named(tiny_llama, tiny_t5):
    with pytest.raises(NotImplementedError, match="decoder-only"):
        generate_ids(tiny_t5(), [[5]], 3)
    for prompts, count, batch, message in [
        ([[5]], 0, 1, "max_new_tokens 0"),
        ([[5]], [1, 2], 1, "one number or 1"),
        ([[5]], 3, 0, "batch_size is 0"),
        ([[5], []], 3, 1, "Prompt 1 has no tokens"),
    ]:
        with pytest.raises(ValueError, match=message):
            generate_ids(tiny_llama(), prompts, count, batch)
    assert generate_ids(tiny_llama(), [], 3) == []
