"""`Trainer.push_to_hub` of runs with methods of hfext: one commit, our card, no pickle, no token."""

import json

import pytest
import torch
from huggingface_hub import ModelCard
from offline_hub import TOKEN
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

import hfext
from hfext import hub as api

OWN = "hf_givenInTheArguments"
ROWS = [{"input_ids": torch.arange(3, 11), "labels": torch.arange(3, 11)} for _ in range(4)]


def arguments(tmp_path, kind=TrainingArguments, **given):
    given = {"max_steps": 2, "learning_rate": 1e-3, "per_device_train_batch_size": 2, "report_to": [], **given}
    given = {"use_cpu": True, "hub_model_id": "user/thing", "disable_tqdm": True, "save_strategy": "no", **given}
    return kind(str(tmp_path / "run"), **given)


def published(server, branch="main"):
    files = server.files("user/thing", branch)
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
    assert not [name for name, data in files.items() if OWN.encode() in data or TOKEN.encode() in data]
    return files, ModelCard(files["README.md"].decode())


def test_the_stock_trainer_with_an_optimizer_of_ours(server, tmp_path, tiny_llama):
    trainer = Trainer(
        tiny_llama(),
        arguments(tmp_path, optim="bisam", optim_args="rho=0.05", lr_scheduler_type="power", hub_token=OWN),
        train_dataset=ROWS,
        eval_dataset=ROWS,
    )
    trainer.train()
    trainer.evaluate()
    done = trainer.push_to_hub(dataset="four rows", license="mit")
    files, card = published(server)
    assert server.commits("user/thing") == 1 and done.oid == server.find("user/thing", "main")["id"]
    record = json.loads(files["hfext.json"])
    assert record["methods"] == ["bisam", "power"] and record["config"]["optim_args"] == "rho=0.05"
    assert card.data.license == "mit" and {"bisam", "arxiv:2407.12993"} <= set(card.data.tags)
    (result,) = card.data.eval_results
    assert (result.dataset_name, result.metric_type) == ("four rows", "loss") and result.metric_value > 0
    assert "generated_from_trainer" not in card.content and "seed 42" in card.text
    assert OWN in server.tokens and not api.problems_of(card)
    again = AutoModelForCausalLM.from_pretrained(api.fetch("user/thing"))
    for name, x in trainer.model.state_dict().items():
        assert torch.equal(x, again.state_dict()[name])


def test_without_a_method_of_ours_the_stock_push_is_as_it_was(server, tmp_path, tiny_llama):
    trainer = Trainer(tiny_llama(), arguments(tmp_path), train_dataset=ROWS)
    trainer.train()
    trainer.push_to_hub()
    files = server.files("user/thing")
    assert api.methods_of_trainer(trainer) == [] and "hfext.json" not in files
    assert b"generated_from_trainer" in files["README.md"] and "training_args.bin" in files


def test_unlearning_names_its_objective_and_what_was_measured(server, tmp_path, tiny_llama):
    server.add("org/base", {"README.md": "---\nlicense: llama3.1\n---\nBase."}, gated="manual")
    model = tiny_llama()
    model.config._name_or_path = "org/base"
    args = arguments(tmp_path, hfext.UnlearningConfig, objective="npo", hub_private_repo=True, hub_revision="forgot")
    rows = [{"input_ids": list(range(3, 11)), "labels": list(range(3, 11))} for _ in range(4)]
    trainer = hfext.UnlearningTrainer(
        model,
        args,
        forget_dataset=rows[:2],
        retain_dataset=[{**row, "input_ids": list(range(20, 28))} for row in rows],
        evaluators=[lambda model, tokenizer: {"forget_probability": 0.25}],
    )
    trainer.train()
    trainer.evaluate()
    trainer.push_to_hub()
    assert server.files("user/thing") == {} and server.repos["user/thing"]["private"]
    files, card = published(server, "forgot")
    assert json.loads(files["hfext.json"])["config"]["objective"] == "npo"
    assert card.data.license == "llama3.1" and card.data.base_model == "org/base"
    assert card.data.to_dict()["base_model_relation"] == "finetune"
    assert "granted on request by its owner" in card.text and "asked to forget" in card.text
    assert [(r.metric_name, r.metric_value) for r in card.data.eval_results] == [("forget probability", 0.25)]


@pytest.mark.parametrize("strategy, state", [("every_save", None), ("checkpoint", "last-checkpoint")])
def test_checkpoints_are_published_with_our_card(server, tmp_path, tiny_llama, strategy, state):
    args = arguments(
        tmp_path, optim="sam", push_to_hub=True, save_strategy="steps", save_steps=1, hub_strategy=strategy,
        hub_always_push=True, save_total_limit=1, hub_token=OWN,
    )  # fmt: skip
    trainer = Trainer(tiny_llama(), args, train_dataset=ROWS)
    trainer.train()
    commits = server.repos["user/thing"]["refs"]["main"][1:]
    messages = [commit["message"] for commit in commits]
    assert messages[:2] == ["Training in progress, step 1", "Training in progress, step 2"]
    for commit in commits:
        files = commit["files"]
        assert {"model.safetensors", "hfext.json", "README.md"} <= set(files)
        assert b"library_name: hfext" in files["README.md"] and "training_args.bin" not in files
        assert not [name for name, data in files.items() if OWN.encode() in data]
    if state:
        assert (
            f"{state}/optimizer.pt" in commits[1]["files"] and f"{state}/training_args.bin" not in commits[1]["files"]
        )
    else:
        assert not [name for name in commits[-1]["files"] if name.endswith(".pt")]
    assert not list((tmp_path / "run").glob("_hub-*"))


def test_a_failed_push_of_a_checkpoint_does_not_end_the_training(server, tmp_path, tiny_llama, caplog):
    args = arguments(tmp_path, optim="sam", push_to_hub=True, save_strategy="steps", save_steps=1)
    trainer = Trainer(tiny_llama(), args, train_dataset=ROWS)
    server.fail("POST", "/commit/", "403", times=99)
    trainer.train()
    assert trainer.state.global_step == 2 and server.files("user/thing") == {}
    with pytest.raises(OSError, match="user/thing was not changed") as caught:
        trainer.push_to_hub()
    assert TOKEN not in str(caught.value) + caplog.text


def test_trainers_of_caches_publish_what_their_configs_read(server, tmp_path, tiny_llama):
    model = tiny_llama()
    text = torch.randint(3, 100, (4, 16), generator=torch.Generator().manual_seed(0))
    config = hfext.kv_cache.CSKVConfig(k_density=0.5, v_density=0.5).calibrate(model, text)
    trainer = hfext.kv_cache.CSKVTrainer(
        model, config, arguments(tmp_path), train_dataset=[{"input_ids": row} for row in text]
    )
    trainer.train()
    trainer.push_to_hub()
    files, card = published(server)
    assert json.loads(files["hfext.json"])["methods"] == ["cskv"] and "KVCacheConfig.from_pretrained" in card.text
    again = hfext.kv_cache.KVCacheConfig.from_pretrained(api.fetch("user/thing"))
    assert again.to_dict() == trainer.config.to_dict()


def test_a_predictor_is_published_by_its_trainer(server, tmp_path, tiny_llama):
    base = tiny_llama()
    predictor = hfext.kv_cache.KVPredictor(tiny_llama(seed=1, num_hidden_layers=1), base)
    trainer = hfext.kv_cache.KVPredictionTrainer(predictor, arguments(tmp_path), train_dataset=ROWS)
    trainer.train()
    trainer.push_to_hub()
    files, card = published(server)
    assert (
        json.loads(files["hfext.json"])["methods"] == ["kv_prediction"] and "KVPredictor.from_pretrained" in card.text
    )
    again = hfext.kv_cache.KVPredictor.from_pretrained(api.fetch("user/thing"), base)
    for name, x in predictor.state_dict().items():
        assert torch.equal(x, again.state_dict()[name])


def test_a_card_that_somebody_wrote_stays(server, tmp_path, tiny_llama):
    class Writes(TrainerCallback):
        def on_push_begin(self, args, state, control, **kwargs):
            (tmp_path / "run" / "README.md").write_text("Mine.")

    trainer = Trainer(tiny_llama(), arguments(tmp_path, optim="sam"), train_dataset=ROWS, callbacks=[Writes()])
    trainer.train()
    job = trainer.push_to_hub(blocking=False)
    assert job.result().oid and server.files("user/thing")["README.md"] == b"Mine."
    assert "hfext.json" in server.files("user/thing")


def test_an_adapter_trained_by_the_stock_trainer(server, tmp_path, tiny_llama):
    from peft import LoraConfig, get_peft_model

    server.add("org/base", {"README.md": "---\nlicense: mit\n---\n"})
    model = tiny_llama()
    model.config._name_or_path = model.name_or_path = "org/base"
    adapter = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    args = arguments(tmp_path, optim="adamr", push_to_hub=True, save_strategy="steps", save_steps=1)
    trainer = Trainer(adapter, args, train_dataset=ROWS)
    trainer.train()
    trainer.push_to_hub()
    files, card = published(server)
    data = card.data.to_dict()
    assert (data["base_model"], data["base_model_relation"], data["license"]) == ("org/base", "adapter", "mit")
    assert "AutoPeftModelForCausalLM" in card.text and "adapter_model.safetensors" in files


def test_a_loss_of_ours_is_seen_and_plain_parts_are_not(tmp_path, tiny_llama):
    trainer = hfext.training.ZLossTrainer(tiny_llama(), arguments(tmp_path, optim="sam"), train_dataset=ROWS)
    assert api.methods_of_trainer(trainer) == ["z_loss", "sam"]

    def plain(outputs, labels, num_items_in_batch=None):
        return outputs.logits.sum()

    trainer = Trainer(tiny_llama(), arguments(tmp_path), train_dataset=ROWS, compute_loss_func=plain)
    assert api.methods_of_trainer(trainer) == []
