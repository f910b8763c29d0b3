"""Relearning: the curve, what is left untouched, and that a model which never knew is slower."""

import math

import pytest
import torch
from unlearning_cases import flat, llama, rows

from hfext.unlearning.relearning import RelearningConfig, mean_probability, recovery, relearning, steps_to

FORGET = rows(10, 1)
FAST = dict(learning_rate=1e-2, steps=(0, 2, 6), share=0.5)


def taught(seed=0):
    from transformers import Trainer, TrainingArguments

    from hfext.unlearning._data import collate

    model = llama(seed=seed)
    args = TrainingArguments("unused", max_steps=60, learning_rate=1e-2, use_cpu=True, report_to="none",
                             disable_tqdm=True, save_strategy="no", remove_unused_columns=False)  # fmt: skip
    Trainer(model, args, collate, FORGET).train()
    return model.eval()


def test_recovery_and_steps():
    assert recovery([0.2, 0.4, 1.0], 1.0) == pytest.approx([0.0, 0.25, 1.0])
    assert math.isnan(recovery([0.5], 0.5)[0])
    assert steps_to(0.5, [0, 5, 10], [0.0, 0.4, 0.6]) == 10 and steps_to(0.5, [0, 5], [0.0, 0.4]) is None


def test_the_curve_begins_at_the_model_and_nothing_is_touched():
    model, gold = llama(), llama(seed=2)
    before, rng = flat(model), torch.get_rng_state()
    model.train()
    found = relearning(model, FORGET, gold=gold, **FAST)
    assert torch.equal(flat(model), before) and torch.equal(torch.get_rng_state(), rng) and model.training
    assert all(p.grad is None for p in model.parameters())
    again = relearning(model, FORGET, gold=gold, **FAST)
    assert found == again and len(found["unlearned"]) == len(found["gold"]) == 3
    shown = RelearningConfig(**FAST)
    assert found["steps"] == list(shown.steps) and found["missing"] == {"recovered": "needs target"}


def test_only_unseen_rows_are_measured():
    import random

    model = llama()
    found = relearning(model, FORGET, steps=(0,), share=0.3)
    order = random.Random(0).sample(range(10), 10)
    assert found["unlearned"][0] == pytest.approx(mean_probability(model, [FORGET[i] for i in order[3:]]))
    benign = relearning(model, FORGET, attack_rows=rows(4, 8), steps=(0,))
    assert benign["unlearned"][0] == pytest.approx(mean_probability(model, FORGET))
    assert "gold" in found["missing"]


def test_what_was_only_hidden_comes_back_faster():
    """An unlearned model that is the taught one with a damaged head, against one that never saw the rows."""
    target = taught()
    hidden = taught()
    with torch.no_grad():
        hidden.lm_head.weight.add_(0.1 * torch.randn(hidden.lm_head.weight.shape))
    found = relearning(hidden, FORGET, gold=llama(seed=0), target=target, **{**FAST, "steps": (0, 5, 15)})
    assert found["unlearned"][-1] > found["gold"][-1]
    assert found["target"] > found["unlearned"][0] and found["recovered"][0] == 0


def test_a_frozen_model_can_be_attacked():
    found = relearning(llama().requires_grad_(False), FORGET, **FAST)
    assert len(set(found["unlearned"])) == 3


def test_bad_input_is_named():
    for options, problem in (
        ({"share": 1.0}, "share is 1.0"),
        ({"steps": (5, 10)}, "steps is \\(5, 10\\)"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"batch_size": 0}, "batch_size is 0"),
    ):
        with pytest.raises(ValueError, match=problem):
            relearning(llama(), FORGET, **options)
    with pytest.raises(ValueError, match="leaves none of the 2"):
        relearning(llama(), FORGET[:2], share=0.9)
