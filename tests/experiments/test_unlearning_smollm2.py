"""Unlearning on a language model with adapters: the choice of a rate, adapters kept on disk, and a short run."""

import json
import math

import pytest
import torch
from tiny_chat import save_tiny_chat

from hfext.experiments import unlearning_smollm2
from hfext.experiments._fact_unlearning import UntilForgotten, fact_rows, forgotten, knowledge, twin
from hfext.experiments._facts import answers, make_facts, recalled
from hfext.experiments._stage_teach import add_lora, learn, load_language_model
from hfext.experiments.unlearning_smollm2 import BEFORE, GOLD, Config, adapter, chosen, kept_adapter, put, run

SMALL = dict(methods=["ngdiff", "npo"], authors=3, fields=2, unseen_authors=2, teach_epochs=60, passes=30)
SMALL |= dict(relearn_share=0.5, relearn_steps=(0, 2), windows=1)


@pytest.fixture
def folder(tiny_llama, tmp_path):
    return str(save_tiny_chat(tmp_path / "model", tiny_llama, 5))


def tried(forgot, p, retain):
    return {"forgot": forgot, "forget": {"taught_probability": p}, "retain": retain}


def test_the_rate_is_the_best_of_those_that_forgot():
    found = {1.0: tried(False, 0.3, 0.99), 2.0: tried(True, 0.1, 0.7), 3.0: tried(True, 0.04, 0.8)}
    found |= {4.0: tried(False, 0.0, 0.1), 5.0: {"diverged": True}}
    assert chosen(found) == (3.0, True)
    assert chosen({rate: found[rate] for rate in (1.0, 4.0, 5.0)}) == (4.0, False)
    assert chosen({5.0: {"diverged": True}}) == (None, False)


def taught(folder, facts, epochs):
    lesson = Config(model=folder, teach_epochs=epochs).lesson()
    model, tokenizer = load_language_model(lesson)
    model = add_lora(model, lesson)
    learn(model, tokenizer, facts, lesson, "", optim="adamw_torch")
    return model.eval(), tokenizer


@pytest.mark.parametrize("epochs", [1, 12, 40])
def test_knowledge_is_what_asking_and_scoring_one_by_one_says(folder, epochs):
    facts = make_facts(3, 2)
    model, tokenizer = taught(folder, facts, epochs)
    found = knowledge(model, tokenizer, facts)
    for name, questions in (
        ("taught", [f.question for f in facts]),
        ("reworded", [f.paraphrase for f in facts]),
    ):
        assert found[f"{name}_recall"] == pytest.approx(recalled(facts, answers(model, tokenizer, questions)))
        p = []
        for r in fact_rows(tokenizer, facts, name):
            with torch.no_grad():
                log_p = model(torch.tensor([r["input_ids"]])).logits[0, :-1].double().log_softmax(-1)
            scored = [float(log_p[t, y]) for t, y in enumerate(r["labels"][1:]) if y != -100]
            p.append(math.exp(sum(scored) / len(scored)))
        assert found[f"{name}_probability"] == pytest.approx(sum(p) / len(p), rel=1e-5)
    assert knowledge(model, tokenizer, facts, ["taught"]) == {k: v for k, v in found.items() if "taught" in k}
    if epochs == 40:
        assert found["taught_recall"] == 1


def test_a_twin_shares_what_is_frozen(folder):
    lesson = Config(model=folder).lesson()
    model = add_lora(load_language_model(lesson)[0], lesson)
    other = twin(model)
    mine = dict(model.named_parameters())
    assert {name for name, p in other.named_parameters() if p is not mine[name]} == set(adapter(model))


def test_adapters_come_back_with_the_same_settings_alone(folder, tmp_path):
    lesson = Config(model=folder).lesson()
    model = add_lora(load_language_model(lesson)[0], lesson)
    made = []

    def make():
        made.append(1)
        put(model, {name: torch.full_like(p, len(made)) for name, p in adapter(model).items()})
        return {"p": 0.5}

    path = tmp_path / "deep" / "a.safetensors"
    for settings in ({"a": 1}, {"a": 1}, {"a": 2}):
        put(model, {name: torch.zeros_like(p) for name, p in adapter(model).items()})
        assert kept_adapter(path, settings, model, make) == {"p": 0.5}
        assert all((p == settings["a"]).all() for p in adapter(model).values())
    assert len(made) == 2 and [p.name for p in path.parent.iterdir()] == ["a.safetensors"]
    with pytest.raises(ValueError, match="The adapter has 1 tensors"):
        put(model, {"x": torch.zeros(1)})


def test_forgotten_is_no_better_known_than_by_the_gold():
    gold = {"taught_recall": 0.2, "taught_probability": 0.1, "reworded_recall": 0.0, "reworded_probability": 0.05}
    assert forgotten(gold, gold, 0.0)
    assert forgotten({**gold, "taught_probability": 0.11}, gold, 0.02)
    assert not forgotten({**gold, "taught_probability": 0.13}, gold, 0.02)
    assert not forgotten({**gold, "reworded_recall": 0.2}, gold, 0.9)


def test_a_run_ends_when_the_facts_are_forgotten(folder):
    facts = make_facts(3, 2)
    model, tokenizer = taught(folder, facts, 40)
    keys = [f"{name}_{kind}" for name in ("taught", "reworded") for kind in ("recall", "probability")]
    knows, ignorant = dict.fromkeys(keys, 1.0), dict.fromkeys(keys, 0.0)
    only_likely = {**knows, "taught_recall": 0.0}
    for gold, step, stops in ((knows, 5, True), (knows, 4, False), (ignorant, 5, False), (only_likely, 5, False)):
        control = type("Control", (), {"should_training_stop": False})
        model.train()
        until = UntilForgotten(tokenizer, facts, gold, 0.0, 5)
        until.on_step_end(None, type("State", (), {"global_step": step}), control, model)
        assert control.should_training_stop is stops and model.training


def test_a_short_run_is_kept(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(unlearning_smollm2.ENTRIES, "ngdiff", (3e-3, 1e-2))
    monkeypatch.setitem(unlearning_smollm2.ENTRIES, "npo", (1e-2,))
    monkeypatch.setattr(unlearning_smollm2, "shared_data", lambda *given: None)
    config = Config(model=folder, **SMALL)
    found = run(config, tmp_path / "out")
    assert json.dumps(found)
    main, every = found["tables"].values()
    assert [row["method"] for row in main[:2]] == [BEFORE, GOLD]
    assert {row["method"] for row in main[2:]} == {"ngdiff", "npo"}
    assert [(row["method"], row["rate"]) for row in every] == [("ngdiff", 3e-3), ("ngdiff", 1e-2), ("npo", 1e-2)]
    before, gold, *others = main
    assert before["forget: p"] > 0.8 > 0.1 > gold["forget: p"] and gold["retain: p"] > 0.8 and gold["PrivLeak"] == 0
    bar = gold["forget: p"] + config.tolerance
    columns = ["forget: right, %", "forget: p"]
    for row in others:
        same = next(r for r in every if (r["method"], r["rate"]) == (row["method"], row["rate"]))
        assert [row[name] for name in columns] == pytest.approx([same[name] for name in columns], abs=1e-6)
        if row["forgot"]:
            assert row["forget: p"] <= bar and row["updates"] <= 60
            assert row["forget: right, %"] <= gold["forget: right, %"]
    assert any(row["forgot"] for row in others)

    def refuse(*args, **kwargs):
        raise AssertionError("measured again")

    for name in ("learn", "unlearn", "evaluate", "relearning", "knowledge"):
        monkeypatch.setattr(unlearning_smollm2, name, refuse)
    assert run(config, tmp_path / "out") == found


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(methods=["ngdif"]), "Did you mean 'ngdiff'"),
        (dict(forget_authors=10), "forget_authors is 10 but must be 1 to 9"),
        (dict(unseen_authors=0), "unseen_authors is 0"),
        (dict(tolerance=1.0), "tolerance is 1.0"),
        (dict(fields=9), "fields is 9"),
        (dict(teach_epochs=0), "teach_epochs is 0"),
    ],
)
def test_bad_config_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Config(**settings)
