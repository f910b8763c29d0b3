"""`UnlearningTrainer`: what must hold for every objective, whatever it computes."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
import transformers
from processes import run_two
from unlearning_cases import (
    DECOUPLE,
    FORGET,
    OBJECTIVES,
    RETAIN,
    flat,
    gradient_of,
    llama,
    nll_sums,
    rows,
    run,
    text_tokenizer,
    trainer,
)

from hfext.unlearning import UnlearningConfig, UnlearningTrainer
from hfext.unlearning._data import EpochSampler, PairedDataset, collate
from hfext.unlearning._objective import TwoGradientObjective, objectives

each_objective = pytest.mark.parametrize("name", OBJECTIVES)
# One of each kind in the default run: two gradients, a precomputed reference, states in place of logits.
KINDS = ("ngdiff", "npo", "rmu")
each_kind = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in KINDS else pytest.mark.slow) for name in OBJECTIVES]
)


def distance(a, b, start):
    return float((a - b).norm() / (a - start).norm())


def test_every_objective_is_tested_here():
    assert set(objectives()) - {"dmm"} == set(OBJECTIVES)


@each_objective
def test_accumulation_changes_nothing(name, tmp_path):
    """Ragged rows: a mean of means differs by a quarter."""
    start = flat(llama())
    found = [
        run(name, tmp_path, per_device_train_batch_size=b, gradient_accumulation_steps=k) for b, k in ((4, 1), (1, 4))
    ]
    assert distance(*found, start) < 1e-5
    micro = run(
        name, tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4, loss_normalization="micro"
    )
    assert torch.isfinite(micro).all()


def test_micro_normalisation_is_the_mean_of_means(tmp_path):
    start = flat(llama())
    options = dict(num_train_epochs=1, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    window, micro = (run("grad_diff", tmp_path, **options, loss_normalization=kind) for kind in ("window", "micro"))
    assert distance(window, micro, start) > 0.05


@each_objective
def test_a_resumed_run_is_the_straight_run(name, tmp_path):
    options = dict(save_strategy="steps", save_steps=1, optim="adamw_torch", learning_rate=1e-3)
    if name == "ngdiff":
        options["objective_args"] = {"lr_interval": 1}
    straight = trainer(name, tmp_path / "a", **options)
    straight.train()
    steps = straight.state.global_step
    for at in {1, steps - 1}:
        again = trainer(name, tmp_path / "b", **options)
        again.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{at}"))
        assert torch.equal(flat(again.model), flat(straight.model))
        rates = [[h["learning_rate"] for h in t.state.log_history if "learning_rate" in h] for t in (straight, again)]
        assert rates[0][at:] == rates[1][-(steps - at) :]


TWO = """
import sys
sys.path[:0] = [{tests!r}, {root!r}]
import torch
from unlearning_cases import OBJECTIVES, RETAIN, flat, trainer
found, logs = {{}}, {{}}
for name in OBJECTIVES:
    made = trainer(name, {folder!r}, per_device_train_batch_size=2, retain=RETAIN[:12])
    made.train()
    found[name], logs[name] = flat(made.accelerator.unwrap_model(made.model)), made.state.log_history
    if made.reference is not None and made.reference.mode == "precompute":
        found[name + " reference"] = made.reference.known["forget"]
if made.is_world_process_zero():
    torch.save((found, logs), {folder!r} + "/two.pt")
"""


@pytest.mark.multiprocess
def test_two_processes_are_one(tmp_path):
    here = Path(__file__).resolve()
    run_two(TWO.format(tests=str(here.parents[1]), root=str(here.parents[2]), folder=str(tmp_path)))
    found, logs = torch.load(tmp_path / "two.pt")
    start = flat(llama())
    for name in OBJECTIVES:
        one = trainer(name, tmp_path, retain=RETAIN[:12])
        one.train()
        assert distance(found[name], flat(one.model), start) < 1e-5, name
        if f"{name} reference" in found:
            torch.testing.assert_close(found[f"{name} reference"], one.reference.known["forget"])
        for a, b in zip(logs[name], one.state.log_history, strict=True):
            for key in a:
                if key.startswith("unlearn/"):
                    assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-4), (name, key)


@pytest.mark.parametrize("name", ["ngdiff", "npo", "grad_diff", "rmu"])
@pytest.mark.parametrize("optim, args", [("sam", "rho=0.05,base=adamw"), ("bisam", "rho=0.05,base=adamw")])
def test_sharpness_aware_optimizers(name, optim, args, tmp_path):
    """Radius 0 is the base optimizer; else the run differs, and accumulation still changes nothing."""
    options = dict(learning_rate=1e-3, num_train_epochs=1)
    start, base = flat(llama()), run(name, tmp_path, optim="adamw_torch", **options)
    zero = run(name, tmp_path, optim=optim, optim_args=args.replace("0.05", "0"), **options)
    assert distance(zero, base, start) < 1e-5
    whole, split = (
        run(name, tmp_path, optim=optim, optim_args=args, per_device_train_batch_size=b,
            gradient_accumulation_steps=k, **options)
        for b, k in ((4, 1), (1, 4))
    )  # fmt: skip
    assert distance(whole, base, start) > 1e-4
    # Adam divides by the root of squares: rounding errors of tiny gradients weigh fully.
    assert distance(whole, split, start) < 2e-2


@pytest.mark.parametrize("name", ["npo", "ngdiff", "dpo"])
def test_bisam_with_the_identity_is_sam(name, tmp_path):
    sam = run(name, tmp_path, optim="sam", optim_args="rho=0.05,base=sgd")
    bisam = run(name, tmp_path, optim="bisam", optim_args="rho=0.05,base=sgd,surrogate=identity")
    other = run(name, tmp_path, optim="bisam", optim_args="rho=0.05,base=sgd")
    start = flat(llama())
    assert distance(sam, bisam, start) < 1e-5 < distance(sam, other, start)


def test_two_gradients_and_optimizers_that_do_not_wait_for_them(tmp_path):
    with pytest.raises(NotImplementedError, match="does not wait for"):
        trainer("ngdiff", tmp_path, optim="sam", optim_args="rho=0.05,base=sgd,scope=micro").train()


def test_logs_name_both_losses_norms_and_cosine(tmp_path):
    for name, options in (("ngdiff", {}), ("grad_diff", {"log_gradients": True})):
        made = trainer(name, tmp_path, **options)
        made.train()
        (first, *_) = [h for h in made.state.log_history if "loss" in h]
        names = ("forget_loss", "retain_loss", "forget_norm", "retain_norm", "cosine")
        assert all(math.isfinite(first[f"unlearn/{n}"]) for n in names)
        assert -1 <= first["unlearn/cosine"] <= 1
        difference = first["unlearn/retain_loss"] - first["unlearn/forget_loss"]
        assert first["loss"] == pytest.approx(difference, abs=1e-4)


def test_logged_losses_are_means_over_updates_and_not_sums(tmp_path):
    every, fewer = (trainer("grad_diff", tmp_path, logging_steps=k, learning_rate=1e-9) for k in (1, 2))
    every.train(), fewer.train()
    single = [h["unlearn/forget_loss"] for h in every.state.log_history if "loss" in h]
    pairs = [h["unlearn/forget_loss"] for h in fewer.state.log_history if "loss" in h]
    assert pairs == pytest.approx([sum(single[i : i + 2]) / 2 for i in range(0, len(single), 2)], rel=1e-5)
    sam = trainer("grad_diff", tmp_path, optim="sam", optim_args="rho=0.05,base=sgd", learning_rate=1e-9)
    sam.train()
    again = [h["unlearn/forget_loss"] for h in sam.state.log_history if "loss" in h]
    assert again == pytest.approx(single, rel=1e-4), "the second pass is not counted"


# ---- pairs ------------------------------------------------------------------------------------------------------


def test_pairs_are_a_function_of_seed_and_position():
    def made(seed):
        return PairedDataset({"forget": FORGET, "retain": RETAIN}, seed=seed)

    data = made(3)
    positions = [e * len(data) + i for e in range(5) for i in range(len(data))]
    seen = [data[p]["retain"]["index"] for p in positions]
    assert seen == [
        PairedDataset({"forget": FORGET, "retain": RETAIN}, seed=3)[p]["retain"]["index"] for p in positions
    ]
    assert seen != [
        PairedDataset({"forget": FORGET, "retain": RETAIN}, seed=4)[p]["retain"]["index"] for p in positions
    ]
    for k in range(len(positions) // len(RETAIN)):
        assert sorted(seen[k * len(RETAIN) : (k + 1) * len(RETAIN)]) == list(range(len(RETAIN)))
    by_retain = PairedDataset({"forget": FORGET, "retain": RETAIN}, anchor="retain")
    assert len(by_retain) == len(RETAIN) and [by_retain[i]["retain"]["index"] for i in range(13)] == list(range(13))


def test_the_sampler_shuffles_and_carries_the_epoch():
    sampler = EpochSampler(8, seed=0)
    first = list(sampler)
    sampler.set_epoch(2)
    later = list(sampler)
    assert sorted(first) == list(range(8)) and sorted(later) == list(range(16, 24))
    assert [p - 16 for p in later] != first


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_workers_change_nothing(workers, tmp_path):
    one = run("grad_diff", tmp_path)
    several = run("grad_diff", tmp_path, dataloader_num_workers=workers, dataloader_persistent_workers=True)
    assert torch.equal(one, several)


def test_padding_does_not_depend_on_the_padding_token():
    """A pad id that equals the end of the sequence must not hide the end."""
    batch = collate(
        [{"forget": {"input_ids": [5, 6, 2], "labels": [-100, 6, 2]}}, {"forget": {"input_ids": [7], "labels": [7]}}]
    )
    assert batch["forget"]["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["forget"]["labels"].tolist() == [[-100, 6, 2], [7, -100, -100]]


@each_kind
def test_padding_changes_nothing(name, tmp_path):
    """A batch with one long row of another part gives the same as without its padding: rows one by one."""
    long = rows(1, 9, longest=30)
    forget = [{**row, "segment_mask": [1] * len(row["input_ids"])} for row in FORGET[:3]]
    start = flat(llama())
    options = dict(forget=forget, retain=RETAIN[:2] + long, num_train_epochs=1)
    whole = run(name, tmp_path, per_device_train_batch_size=3, **options)
    single = run(name, tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=3, **options)
    assert distance(whole, single, start) < 1e-5


# ---- text -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return text_tokenizer()


QA = [{"question": f"Who wrote book {i}?", "answer": f"Amara Belgard wrote {i}."} for i in range(6)]


def test_rows_of_text(tokenizer, tmp_path):
    model = llama(vocab_size=len(tokenizer), max_position_embeddings=256)
    made = trainer(
        "idk", tmp_path, model=model, forget=QA[:4], retain=QA[4:], decouple=None, processing_class=tokenizer
    )
    row = made.train_dataset.parts["forget"][0]
    text = tokenizer.decode(row["input_ids"])
    assert text == "Question: Who wrote book 0?\nAnswer: Amara Belgard wrote 0.<eos>"
    scored = [i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
    assert tokenizer.decode(scored) == " Amara Belgard wrote 0.<eos>"
    refusal = made.train_dataset.alternate(0)
    assert (
        refusal["input_ids"][: len(refusal["labels"]) - sum(x != -100 for x in refusal["labels"])]
        == row["input_ids"][: row["labels"].count(-100)]
    )
    assert made.train_dataset.alternate(0) == made.train_dataset.alternate(0)
    assert len({tuple(made.train_dataset.alternate(i)["labels"]) for i in range(4)}) > 1
    made.train()
    made.evaluate(eval_dataset=QA[4:])
    assert math.isfinite(made.state.log_history[-1]["eval_loss"])


def test_other_forms_of_rows(tokenizer):
    from hfext.unlearning._data import token_row

    completion = token_row({"prompt": "Who? ", "completion": "Amara"}, tokenizer)
    assert tokenizer.decode(completion["input_ids"]) == "Who? Amara<eos>" and completion["labels"][0] == -100
    text = token_row({"text": "Amara wrote"}, tokenizer)
    assert text["labels"] == text["input_ids"]
    spans = token_row({"text": "key = SECRET # end", "segments": [[6, 12]]}, tokenizer)
    inside = [i for i, m in zip(spans["input_ids"], spans["segment_mask"], strict=True) if m]
    assert "SECRET" in tokenizer.decode(inside) and "key" not in tokenizer.decode(inside)
    answer = token_row({"question": "q?", "answer": "my SECRET", "segments": [[3, 9]]}, tokenizer)
    inside = [i for i, m in zip(answer["input_ids"], answer["segment_mask"], strict=True) if m]
    assert tokenizer.decode(inside).strip() == "SECRET"
    other = token_row({**QA[0], "alternate": "No idea."}, tokenizer)["alternate"]
    assert tokenizer.decode(other["input_ids"]).endswith("Answer: No idea.<eos>")
    with pytest.raises(ValueError, match=r"segments holds \[3, 90\)"):
        token_row({"text": "short", "segments": [[3, 90]]}, tokenizer)
    with pytest.raises(ValueError, match="columns foo but must have"):
        token_row({"foo": 1}, tokenizer)


def test_datasets_of_the_library(tmp_path):
    import datasets

    made = datasets.Dataset.from_list([{k: r[k] for k in ("input_ids", "labels")} for r in FORGET])
    kept = datasets.Dataset.from_list(RETAIN)
    a = run("grad_diff", tmp_path, forget=made, retain=kept)
    assert torch.equal(a, run("grad_diff", tmp_path))


# ---- references -------------------------------------------------------------------------------------------------


def lora(model, trained=False, seed=0):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    made = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    if trained:
        for key, p in made.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(p, std=0.1)
    return made


@pytest.mark.parametrize("name", ["npo", "kl_min", "dpo", "rmu"])
@pytest.mark.parametrize("kind", ["plain", "fresh", "trained"])
def test_at_the_start_the_model_is_its_reference(name, kind, tmp_path):
    model = llama() if kind == "plain" else lora(llama(), kind == "trained")
    before = sum(p.numel() for p in model.parameters())
    made = trainer(name, tmp_path, model=model, learning_rate=1e-9, num_train_epochs=1)
    likelihoods = set(made.objective.reference.values()) == {"nll"}
    expected = {"plain": "precompute" if likelihoods else "copy", "fresh": "disable", "trained": "adapter"}[kind]
    assert made.reference.mode == expected
    extra = sum(p.numel() for p in model.parameters()) - before
    if made.reference.model is not None:
        extra += sum(p.numel() for p in made.reference.model.parameters())
    adapter = sum(p.numel() for key, p in model.named_parameters() if "lora_" in key and "default" in key)
    assert extra == {"precompute": 0, "disable": 0, "adapter": adapter, "copy": before}[expected]
    made.train()
    first = next(h for h in made.state.log_history if "loss" in h)
    if name in ("npo", "dpo"):
        assert first["unlearn/forget_loss"] == pytest.approx(2 * math.log(2) / 0.1, abs=1e-3)
    else:
        assert first["unlearn/retain_loss"] == pytest.approx(0, abs=1e-6)
    if kind != "plain":
        assert list(model.peft_config) == ["default"], "the copy of the adapter is gone after training"
        assert {k for k, p in model.named_parameters() if p.requires_grad} == {
            k for k, _ in model.named_parameters() if "lora_" in k
        }


def test_references_agree(tmp_path):
    """Precomputed likelihoods, a copy, a given model and a disabled adapter give the same run."""
    found = [run("npo", tmp_path, reference=mode) for mode in ("precompute", "copy")]
    found.append(run("npo", tmp_path, ref_model=llama()))
    for other in found[1:]:
        torch.testing.assert_close(found[0], other, rtol=0, atol=1e-6)
    adapters = [run("npo", tmp_path, model=lora(llama()), reference=m) for m in ("disable", "precompute", "copy")]
    for other in adapters[1:]:
        torch.testing.assert_close(adapters[0], other, rtol=0, atol=1e-6)
    trained = [run("npo", tmp_path, model=lora(llama(), True), reference=m) for m in ("adapter", "precompute")]
    torch.testing.assert_close(*trained, rtol=0, atol=1e-6)


def test_a_reference_that_would_be_wrong_is_refused(tmp_path):
    with pytest.raises(ValueError, match="never learnt the forget rows"):
        trainer("npo", tmp_path, model=lora(llama(), trained=True), reference="disable")
    with pytest.raises(ValueError, match="has no adapter of PEFT"):
        trainer("npo", tmp_path, reference="adapter")
    with pytest.raises(ValueError, match="needs whole distributions"):
        trainer("kl_min", tmp_path, reference="precompute")
    model = llama()
    with pytest.raises(ValueError, match="ref_model is the model"):
        trainer("npo", tmp_path, model=model, ref_model=model)


def test_a_resume_with_another_reference_is_refused(tmp_path):
    options = dict(save_strategy="steps", save_steps=1)
    for mode in ("precompute", "copy"):
        trainer("npo", tmp_path / mode, reference=mode, **options).train()
        other = trainer("npo", tmp_path / mode, model=llama(seed=5), reference=mode, **options)
        if mode == "copy":
            with pytest.raises(ValueError, match="The reference of the checkpoint"):
                other.train(resume_from_checkpoint=str(tmp_path / mode / "checkpoint-1"))
        else:  # the likelihoods come with the checkpoint
            other.train(resume_from_checkpoint=str(tmp_path / mode / "checkpoint-1"))
            assert torch.equal(flat(other.model), run("npo", tmp_path / "x", reference=mode))


@pytest.mark.parametrize("kind", ["fresh", "trained"])
def test_peft_resume(kind, tmp_path):
    options = dict(save_strategy="steps", save_steps=1, optim="adamw_torch", learning_rate=1e-2)
    straight = trainer("npo", tmp_path / "a", model=lora(llama(), kind == "trained"), **options)
    straight.train()
    again = trainer("npo", tmp_path / "b", model=lora(llama(), kind == "trained"), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert torch.equal(flat(again.model), flat(straight.model))


def test_gradient_checkpointing_with_adapters(tmp_path):
    plain = run("ngdiff", tmp_path, model=lora(llama()))
    model = lora(llama())
    model.enable_input_require_grads()
    other = run("ngdiff", tmp_path, model=model, gradient_checkpointing=True)
    torch.testing.assert_close(plain, other, rtol=0, atol=1e-6)


@each_kind
def test_half_precision(name, tmp_path):
    made = trainer(name, tmp_path, model=llama().to(torch.bfloat16))
    before = flat(made.model)
    made.train()
    assert torch.isfinite(flat(made.model)).all() and not torch.equal(before, flat(made.model))
    assert {p.dtype for p in made.model.parameters()} == {torch.bfloat16}
    mixed = trainer(name, tmp_path, bf16=True)
    mixed.train()
    single = run(name, tmp_path)
    start = flat(llama())
    assert distance(flat(mixed.model), single, start) < 0.3


# ---- evaluation while training ------------------------------------------------------------------------------------


def test_evaluators_choose_the_best_checkpoint(tmp_path):
    calls = []

    def evaluator(model, processing_class):
        calls.append(model.training)
        return {"kept": -abs(len(calls) - 2), "text": "not a number"}

    made = trainer(
        "grad_diff", tmp_path, evaluators=[evaluator], eval_strategy="steps", eval_steps=1, save_strategy="steps",
        save_steps=1, load_best_model_at_end=True, metric_for_best_model="kept", eval_dataset=RETAIN,
    )  # fmt: skip
    made.train()
    assert made.state.best_global_step == 2
    entry = [h for h in made.state.log_history if "eval_kept" in h]
    assert len(entry) == len(calls) and "eval_text" not in entry[0]
    without = trainer("grad_diff", tmp_path, evaluators=[evaluator])
    assert set(without.evaluate()) == {"eval_kept"}


# ---- bad input ----------------------------------------------------------------------------------------------------


def test_bad_data_is_named(tmp_path, caplog):
    with pytest.raises(ValueError, match="NGDiff needs retain_dataset"):
        trainer("ngdiff", tmp_path, retain=None)
    with pytest.raises(ValueError, match="forget_dataset is empty"):
        trainer("ngdiff", tmp_path, forget=[])
    with pytest.raises(ValueError, match="needs decouple_dataset"):
        trainer("prompt_decouple", tmp_path, decouple=None)
    silent = {"input_ids": [3, 4, 5], "labels": [-100] * 3}
    with pytest.raises(ValueError, match="no row has a token to score"):
        trainer("ngdiff", tmp_path, forget=[silent])
    with pytest.raises(ValueError, match="give processing_class"):
        trainer("ngdiff", tmp_path, forget=QA)
    with pytest.raises(ValueError, match="give processing_class=tokenizer for the refusals"):
        trainer("idk", tmp_path, forget=rows(4, 1))
    transformers.utils.logging.enable_propagation()
    try:
        with caplog.at_level("WARNING"):
            trainer("ngdiff", tmp_path, forget=[*FORGET, silent, RETAIN[0]])
    finally:
        transformers.utils.logging.disable_propagation()
    assert "1 of 10 rows have no token to score" in caplog.text
    assert "1 of 9 forget rows are retain rows too" in caplog.text


@pytest.mark.parametrize(
    "options, problem",
    [
        (dict(objective="ngdif"), "Did you mean 'ngdiff'"),
        (dict(objective="npo", objective_args={"betta": 1}), "no option 'betta'. Did you mean 'beta'"),
        (dict(objective="npo", objective_args={"beta": 0.0}), "beta is 0.0 but must be finite and > 0"),
        (dict(objective="npo", objective_args={"alpha": -1}), "alpha is -1 but must be finite and >= 0"),
        (dict(objective="grad_diff", objective_args={"gamma": math.nan}), "gamma is nan"),
        (dict(objective="ngdiff", objective_args={"lr_interval": 0}), "lr_interval is 0"),
        (dict(objective="ngdiff", objective_args={"lr_clip_factor": 1}), "lr_clip_factor is 1"),
        (dict(anchor="all"), "anchor is 'all'"),
        (dict(reference="none"), "reference is 'none'"),
        (dict(loss_normalization="sum"), "loss_normalization is 'sum'"),
        (dict(remove_unused_columns=True), "remove_unused_columns is True"),
        (dict(template="Answer:"), "must contain"),
        (dict(objective="prompt_decouple", objective_args={"base": "ngdiff"}), "has two gradients"),
    ],
)
def test_bad_settings_are_named(options, problem, tmp_path):
    with pytest.raises((ValueError, TypeError), match=problem):
        UnlearningConfig(str(tmp_path), use_cpu=True, **options)


def test_settings_survive_json(tmp_path):
    args = UnlearningConfig(str(tmp_path), objective="npo", objective_args='{"beta": 0.5}', use_cpu=True)
    assert args.objective_args == {"beta": 0.5} and args.max_grad_norm == 1.0
    assert UnlearningConfig(str(tmp_path), use_cpu=True).max_grad_norm == 0.0
    assert UnlearningConfig(str(tmp_path), use_cpu=True, max_grad_norm=0.3).max_grad_norm == 0.3
    (parsed,) = transformers.HfArgumentParser(UnlearningConfig).parse_args_into_dataclasses(
        [
            "--output_dir",
            str(tmp_path),
            "--objective",
            "npo",
            "--objective_args",
            json.dumps({"beta": 2.0}),
            "--use_cpu",
        ]
    )
    assert parsed.objective_args == {"beta": 2.0}


def test_a_loss_without_bound_ends_the_run(tmp_path):
    with pytest.raises(RuntimeError, match="The (loss|gradient) is .* in update"):
        run("grad_ascent", tmp_path, learning_rate=1e6, num_train_epochs=20, max_grad_norm=0.0)


def test_quantised_weights_are_refused(tmp_path):
    from hfext.quantization import RTNConfig, quantize

    with pytest.raises(ValueError, match="quantised or frozen"):
        trainer("ngdiff", tmp_path, model=quantize(llama(), RTNConfig(bits=4, group_size=16)))
    with pytest.raises(ValueError, match="quantised or frozen"):
        trainer("npo", tmp_path, model=llama().requires_grad_(False))


def test_wrong_arguments(tmp_path):
    with pytest.raises(TypeError, match="must be an UnlearningConfig"):
        UnlearningTrainer(llama(), transformers.TrainingArguments(str(tmp_path)), FORGET, RETAIN)
    args = UnlearningConfig(str(tmp_path), use_cpu=True)
    with pytest.raises(TypeError, match="in place of train_dataset"):
        UnlearningTrainer(llama(), args, FORGET, RETAIN, train_dataset=FORGET)
    with pytest.raises(ValueError, match="train_sampling_strategy"):
        trainer("ngdiff", tmp_path, train_sampling_strategy="group_by_length").train()


def test_an_exception_in_a_step_leaves_no_half_update(tmp_path):
    options = dict(per_device_train_batch_size=1, gradient_accumulation_steps=4)
    made = trainer("ngdiff", tmp_path, **options)
    original, calls = made.compute_loss, []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise KeyError("stop")
        return original(*args, **kwargs)

    made.compute_loss = failing
    before = flat(made.model)
    with pytest.raises(KeyError, match="stop"):
        made.train()
    assert torch.equal(flat(made.model), before) and made.gradient_pass is None
    made.compute_loss = original
    made.model.zero_grad()
    made.train()
    assert torch.equal(
        flat(made.model), run("ngdiff", tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    )


def test_the_stock_trainer_is_untouched():
    assert not issubclass(TwoGradientObjective, transformers.Trainer)
    assert copy.copy(DECOUPLE) == rows(5, 3)


# ---- what a review found ------------------------------------------------------------------------------------------

TWO_RESUME = """
import sys
sys.path[:0] = [{tests!r}, {root!r}]
import torch
from unlearning_cases import RETAIN, flat, trainer
same = []
for name, more in (("grad_diff", {{}}), ("ngdiff", {{"objective_args": {{"lr_interval": 1}}}})):
    options = dict(per_device_train_batch_size=2, save_strategy="steps", save_steps=1, retain=RETAIN[:12], **more)
    straight = trainer(name, {folder!r} + "/" + name, **options)
    straight.train()
    again = trainer(name, {folder!r} + "/again", **options)
    again.train(resume_from_checkpoint={folder!r} + "/" + name + "/checkpoint-3")
    weights = [flat(t.accelerator.unwrap_model(t.model)) for t in (straight, again)]
    same.append((name, torch.equal(*weights), straight.state.max_steps, straight.state.log_history))
if straight.is_world_process_zero():
    torch.save((same, weights[0]), {folder!r} + "/same.pt")
"""


@pytest.mark.multiprocess
def test_two_processes_resume_in_the_second_epoch_and_choose_one_rate(tmp_path):
    here = Path(__file__).resolve()
    run_two(TWO_RESUME.format(tests=str(here.parents[1]), root=str(here.parents[2]), folder=str(tmp_path)))
    same, weights = torch.load(tmp_path / "same.pt")
    assert [(name, equal, steps) for name, equal, steps, _ in same] == [("grad_diff", True, 4), ("ngdiff", True, 4)]
    one = trainer("ngdiff", tmp_path, retain=RETAIN[:12], objective_args={"lr_interval": 1})
    one.train()
    # Curvatures are differences of nearly equal losses, in which the order of sums shows.
    rates = [[h["learning_rate"] for h in log if "learning_rate" in h] for log in (same[1][3], one.state.log_history)]
    assert rates[0] == pytest.approx(rates[1], rel=1e-2) and distance(weights, flat(one.model), flat(llama())) < 1e-2


def test_a_look_uses_all_of_the_update_in_eval_mode_and_leaves_no_trace(tmp_path):
    """With dropout; the split into micro-batches changes neither the rate nor what is drawn afterwards."""
    seen = {}

    def run_with(interval, batch, accumulation):
        model = llama(attention_dropout=0.5)
        made = trainer("ngdiff", tmp_path, model=model, objective_args={"lr_interval": interval}, max_steps=2,
                       per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation)  # fmt: skip
        model.model.layers[0].eval()
        original = made.create_optimizer

        def watched(*args, **kwargs):
            optimizer = original(*args, **kwargs)
            step = optimizer.step

            def noted(*a, **k):
                seen.setdefault("training", []).append(model.model.layers[1].training)
                return step(*a, **k)

            optimizer.step = noted
            return optimizer

        made.create_optimizer = watched
        made.train()
        return made, torch.rand(1)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        looked, after = run_with(1, 4, 1)
        torch.manual_seed(0)
        _, plain = run_with(99, 4, 1)
        assert torch.equal(after, plain)
    assert looked.model.model.layers[1].training
    rates = []
    for batch, accumulation in ((4, 1), (1, 4)):
        made = trainer("ngdiff", tmp_path, objective_args={"lr_interval": 1}, per_device_train_batch_size=batch,
                       gradient_accumulation_steps=accumulation)  # fmt: skip
        made.train()
        rates.append([h["learning_rate"] for h in made.state.log_history if "learning_rate" in h])
    assert rates[0] == pytest.approx(rates[1], rel=1e-2)


@pytest.mark.parametrize("kind", ["precompute", "copy", "disable", "adapter"])
def test_references_know_no_dropout(kind, tmp_path):
    model = llama(attention_dropout=0.5)
    if kind in ("disable", "adapter"):
        model = lora(model, trained=kind == "adapter")
    model.train()
    modes = [m.training for m in model.modules()]
    made = trainer("npo", tmp_path, model=model, reference=kind)
    assert [m.training for m in model.modules()][: len(modes)] == modes or kind == "adapter"
    batch = collate([made.train_dataset[i] for i in range(4)])
    model.eval()
    with torch.no_grad():
        wanted = made.objective.forward(model, {"forget": batch["forget"]})["forget"].nll
    model.train()
    torch.testing.assert_close(made.reference(model, batch)["forget"].nll, wanted, rtol=1e-5, atol=1e-5)


def test_weights_outside_of_the_adapter_may_not_move_the_reference(tmp_path):
    from peft import LoraConfig, get_peft_model

    def biased(**options):
        settings = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", bias="all")
        return get_peft_model(llama(attention_bias=True), settings)

    assert trainer("npo", tmp_path, model=biased()).reference.mode == "precompute"
    assert trainer("kl_min", tmp_path, model=biased()).reference.mode == "copy"
    with pytest.raises(ValueError, match="weights outside of the adapter are trained too"):
        trainer("npo", tmp_path, model=biased(), reference="disable")


@pytest.mark.parametrize("init", ["olora", "gaussian"])
def test_making_a_trainer_changes_nothing(init, tmp_path):
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=init)
    model = get_peft_model(llama(), settings).eval()
    for key, p in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(p, std=0.1)
    ids = torch.tensor([[5, 6, 7, 8]])
    before = model(ids).logits
    made = trainer("npo", tmp_path, model=model)
    assert made.reference.mode == "adapter" and torch.equal(model.eval()(ids).logits, before)
    made.train()
    made.train()  # the copy is there again
    assert list(model.peft_config) == ["default"]


def test_an_adapter_of_our_name_is_refused(tmp_path):
    model = lora(llama(), trained=True)
    model.add_adapter("reference", model.peft_config["default"])
    with pytest.raises(ValueError, match="an adapter called 'reference'"):
        trainer("npo", tmp_path, model=model)


def test_a_resume_with_the_half_unlearned_model_is_refused(tmp_path):
    from peft import PeftModel

    options = dict(save_strategy="steps", save_steps=1, optim="adamw_torch", learning_rate=1e-2)
    trainer("npo", tmp_path, model=lora(llama()), **options).train()
    folder = str(tmp_path / "checkpoint-2")
    half = PeftModel.from_pretrained(llama(), folder, is_trainable=True)
    with pytest.raises(ValueError, match="The reference of the checkpoint"):
        trainer("npo", tmp_path, model=half, **options).train(resume_from_checkpoint=folder)
    trainer("npo", tmp_path / "x", **options).train()
    other = trainer("npo", tmp_path / "x", forget=FORGET[::-1], **options)
    with pytest.raises(ValueError, match="The reference of the checkpoint"):
        other.train(resume_from_checkpoint=str(tmp_path / "x" / "checkpoint-2"))


def test_a_copy_runs_in_the_precision_of_the_model(tmp_path):
    model = llama(hidden_size=64, initializer_range=0.3)
    made = trainer("kl_min", tmp_path, model=model, bf16=True, learning_rate=1e-12, num_train_epochs=1)
    made.train()
    assert [h["unlearn/retain_loss"] for h in made.state.log_history if "loss" in h] == pytest.approx([0, 0], abs=1e-6)


def test_an_objective_object_decides_on_clipping(tmp_path):
    from hfext.unlearning.ngdiff import NGDiff
    from hfext.unlearning.npo import NPO

    for name, given, wanted in (("ngdiff", NPO(), 1.0), ("npo", NGDiff(), 0.0)):
        args = UnlearningConfig(str(tmp_path), objective=name, use_cpu=True)
        assert UnlearningTrainer(llama(), args, FORGET, RETAIN, objective=given).args.max_grad_norm == wanted
        args = UnlearningConfig(str(tmp_path), objective=name, use_cpu=True, max_grad_norm=0.3)
        assert UnlearningTrainer(llama(), args, FORGET, RETAIN, objective=given).args.max_grad_norm == 0.3


def test_logs_after_a_resume_are_means(tmp_path):
    options = dict(save_strategy="steps", save_steps=1)
    straight = trainer("grad_diff", tmp_path, **options)
    straight.train()
    again = trainer("grad_diff", tmp_path, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    key = "unlearn/forget_loss"
    logs = [[h[key] for h in t.state.log_history if key in h] for t in (straight, again)]
    assert logs[1][-2:] == pytest.approx(logs[0][-2:], rel=1e-6)
    again.train()
    assert [h[key] for h in again.state.log_history if key in h][-1] == pytest.approx(logs[0][-1], rel=0.1)


def test_padded_rows_are_unpadded(tmp_path):
    pad = [{"input_ids": [0, 0, *r["input_ids"]], "labels": [-100, -100, *r["labels"]],
            "attention_mask": [0, 0, *[1] * len(r["input_ids"])]} for r in FORGET]  # fmt: skip
    assert torch.equal(run("grad_diff", tmp_path, forget=pad), run("grad_diff", tmp_path))


def test_micro_denominators_are_those_of_the_micro_batch(tmp_path):
    options = dict(per_device_train_batch_size=1, gradient_accumulation_steps=4, max_steps=1, learning_rate=1.0)
    model = llama().double()
    before = flat(model)
    made = trainer("grad_ascent", tmp_path, model=model, loss_normalization="micro", max_grad_norm=0.0, **options)
    pairs = [made.train_dataset[p]["forget"] for p in list(made.train_dataset.sampler)[:4]]
    made.train()
    fresh = llama().double()
    sums, counts = nll_sums(fresh, pairs)
    torch.testing.assert_close(before - flat(model), gradient_of(-(sums / counts).mean(), fresh), rtol=0, atol=1e-9)


def test_likelihoods_are_float32_in_half_precision():
    from hfext.unlearning._terms import Scored

    logits = torch.randn(2, 5, 64).bfloat16()
    labels = torch.randint(0, 64, (2, 5))
    found = Scored(logits, labels).token_nll
    exact = torch.nn.functional.cross_entropy(logits.double().flatten(0, 1), labels.flatten(), reduction="none")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.flatten().double(), exact, rtol=1e-5, atol=1e-5)


def test_long_rows_are_cut_at_the_end(tokenizer):
    from hfext.unlearning._data import token_row, tokenize

    whole = token_row(QA[0], tokenizer)
    cut = token_row(QA[0], tokenizer, max_length=len(whole["input_ids"]) - 3)
    assert cut["input_ids"] == whole["input_ids"][:-3] and cut["labels"] == whole["labels"][:-3]
    assert tokenize(QA, tokenizer)[0] == whole
    data = PairedDataset({"forget": [whole]}, refusals=[[3, 4, 5]], max_length=10)
    assert len(data.alternate(0)["input_ids"]) == 10 and data.alternate(0)["labels"][-3:] == [3, 4, 5]


def test_a_gradient_that_is_not_finite_ends_the_run(tmp_path):
    for name in ("grad_diff", "ngdiff"):
        model = llama()
        model.model.norm.weight.register_hook(lambda g: g * float("inf"))
        before = flat(model)
        with pytest.raises(RuntimeError, match="The gradient is not finite in update 1"):
            trainer(name, tmp_path, model=model).train()
        assert torch.equal(flat(model), before)


def test_evaluators_see_the_weights_that_are_saved(tmp_path):
    seen = []

    def evaluator(model, processing_class):
        seen.append((model.training, flat(model)))
        return {"one": torch.tensor(2.0), "two": torch.ones(2).numpy().mean(), "text": "x", "many": torch.ones(2)}

    made = trainer("grad_diff", tmp_path, optim="schedule_free_adamw", learning_rate=1e-2, save_strategy="epoch",
                   eval_strategy="epoch", eval_dataset={"a": RETAIN, "b": FORGET}, evaluators=[evaluator])  # fmt: skip
    made.train()
    assert not any(training for training, _ in seen)
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    torch.testing.assert_close(seen[0][1], flat(saved), rtol=0, atol=1e-7)
    entries = [h for h in made.state.log_history if "eval_a_loss" in h or "eval_b_loss" in h]
    assert all(h["eval_one"] == 2.0 and h["eval_two"] == 1.0 for h in entries)
    assert not any("eval_many" in h or "eval_text" in h for h in entries)


def test_other_wrong_input(tmp_path):
    with pytest.raises(TypeError, match="must have a length and rows by number"):
        trainer("grad_diff", tmp_path, forget=iter(FORGET))
    with pytest.raises(ValueError, match="label_smoothing_factor is 0.1"):
        trainer("grad_diff", tmp_path, label_smoothing_factor=0.1)
    t5 = transformers.T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(NotImplementedError, match="encoder-decoder"):
        trainer("grad_diff", tmp_path, model=transformers.T5ForConditionalGeneration(t5))
    for base in ("rmu", "dmm", "task_vector", "prompt_decouple"):
        with pytest.raises(ValueError, match="to which no likelihood can be added|targets is None"):
            trainer("prompt_decouple", tmp_path, objective_args={"base": base})


def test_frozen_parameters_are_free_again_after_a_crash(tmp_path):
    model = llama()
    made = trainer("rmu", tmp_path, model=model)
    trainer("rmu", tmp_path, model=model)
    made.compute_loss = None
    with pytest.raises(TypeError):
        made.train()
    assert all(p.requires_grad for p in model.parameters())
