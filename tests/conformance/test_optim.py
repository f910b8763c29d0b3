"""What every optimizer with two passes must do. A new one is tested from the day it is listed."""

import dataclasses
import importlib
import json
import pickle

import pytest
import torch
from optim_training import flat, gpt2, language_data, run_training
from transformers import (
    GPT2Config,
    HfArgumentParser,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import hfext
from hfext import registry

METHODS = [
    m
    for m in registry.methods("optim")
    if getattr(
        getattr(importlib.import_module(m.target.split(":")[0]), m.target.split(":")[1]), "hfext_two_pass", False
    )
]
NAMES = [m.name for m in METHODS]
# The setting in which the method must be its base optimizer, bit for bit.
NEUTRAL = {"ignite": "lam=0,learn_lam=false"}
NO_NEUTRAL = {"sampa": "SAMPa takes its gradient at another point even at rho=0"}
every_method = pytest.mark.parametrize("name", NAMES)


def test_there_are_methods_to_test():
    assert len(NAMES) >= 7


def model(dropout=0.0, dtype=torch.float32):
    made = gpt2(dropout, dtype)
    hfext.optim.mup.set_base_shapes(made, GPT2Config(**{**made.config.to_dict(), "n_embd": 16}))
    return made


@every_method
def test_accumulation_does_not_change_the_trajectory(name, tmp_path):
    results = [
        flat(
            run_training(
                model(),
                name,
                "base=sgd,base.momentum=0.9",
                tmp_path,
                per_device_train_batch_size=b,
                gradient_accumulation_steps=8 // b,
            ).model
        )
        for b in (8, 4, 2)
    ]
    # 20 rows in updates of 8: the last update of an epoch is ragged.
    assert max((r - results[0]).abs().max() for r in results) <= 1e-7
    assert (results[0] - flat(model())).abs().max() > 1e-4


@every_method
def test_neutral_setting_is_the_base_optimizer(name, tmp_path):
    if name in NO_NEUTRAL:
        pytest.skip(NO_NEUTRAL[name])
    options = NEUTRAL.get(name, "rho=0")
    kwargs = dict(learning_rate=1e-2, weight_decay=0.1, data=language_data(20), max_steps=3)
    ours = run_training(model(0.1), name, options, tmp_path, **kwargs)
    if name == "mup_sam":
        pytest.skip("muP moves the learning rates of wider models; its own test compares at equal shapes")
    stock = run_training(model(0.1), "adamw_torch", None, tmp_path, **kwargs)
    assert torch.equal(flat(ours.model), flat(stock.model))


@every_method
def test_resume_is_bitwise(name, tmp_path):
    kwargs = dict(learning_rate=1e-2, max_steps=5, gradient_accumulation_steps=2, per_device_train_batch_size=2)
    straight = run_training(model(0.1), name, None, tmp_path / "a", save_strategy="steps", save_steps=3, **kwargs)
    checkpoint = tmp_path / "a" / "checkpoint-3"
    again = model(0.1)
    with torch.no_grad():
        for p in again.parameters():
            p.zero_()
    resumed = run_training(again, name, None, tmp_path / "b", resume=str(checkpoint), **kwargs)
    assert torch.equal(flat(straight.model), flat(resumed.model))
    mine = {k: v for k, v in straight.state.log_history[3].items() if not k.startswith("train_")}
    theirs = {k: v for k, v in resumed.state.log_history[3].items() if not k.startswith("train_")}
    assert mine == theirs


@every_method
def test_checkpoint_holds_the_moments_and_little_else(name, tmp_path):
    job = run_training(model(), name, None, tmp_path, save_strategy="steps", save_steps=2, max_steps=2)
    path = tmp_path / "checkpoint-2" / "optimizer.pt"
    state = torch.load(path, weights_only=True)
    assert {"exp_avg", "exp_avg_sq"} <= set(next(iter(state["state"].values())))
    assert state["hfext"]["updates"] == 2
    weights = sum(p.nbytes for p in job.model.parameters())
    extra = path.stat().st_size - 2 * weights
    # This model is tiny, so the fixed cost of the file counts; 25 % of the weights is far below one more copy. SAMPa
    # has one gradient more, and its last batch with the state of the generators (20 KB).
    assert extra < 0.25 * weights + (1.0 * weights + 20_000 if name == "sampa" else 0)


@every_method
def test_step_without_second_pass_is_an_error(name, tmp_path):
    class Overrides(Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
            self.accelerator.backward(loss)
            return loss.detach()

    with pytest.raises(RuntimeError, match="super\\(\\).training_step"):
        run_training(model(), name, None, tmp_path, trainer=Overrides)


@every_method
def test_mixin_repairs_a_trainer_that_does_not_call_super(name, tmp_path):
    class Overrides(Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            model.train()
            inputs = self._prepare_inputs(inputs)
            loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
            self.accelerator.backward(loss)
            return loss.detach()

    class Repaired(hfext.optim.SharpnessAwareMixin, Overrides):
        pass

    stock = run_training(model(), name, None, tmp_path, max_steps=2)
    mixed = run_training(model(), name, None, tmp_path, max_steps=2, trainer=Repaired)
    assert torch.equal(flat(stock.model), flat(mixed.model))


@every_method
@pytest.mark.parametrize("failing", [3, 4, 5])
def test_exception_in_any_pass_leaves_the_weights(name, failing, tmp_path):
    calls = []

    class Fails(Trainer):
        def compute_loss(self, model, inputs, **kwargs):
            calls.append(1)
            if len(calls) == failing:  # in an update that moves the weights, for every method
                raise KeyboardInterrupt
            return super().compute_loss(model, inputs, **kwargs)

    seen = {}

    class Note(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            seen["weights"] = flat(model)

    job = Fails(
        model=model(),
        args=arguments(tmp_path, name, max_steps=5),
        train_dataset=language_data(),
        callbacks=[Note()],
    )
    with pytest.raises(KeyboardInterrupt):
        job.train()
    assert torch.equal(flat(job.model), seen["weights"])
    assert not job.optimizer.optimizer.is_perturbed


@every_method
def test_gradient_that_is_not_finite_never_reaches_the_weights(name, tmp_path):
    class Explodes(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
            if self.state.global_step == 1:
                outputs["logits"] = outputs["logits"] * float("inf")
                loss = loss * float("inf")
            return (loss, outputs) if return_outputs else loss

    job = run_training(
        model(), name, None, tmp_path, trainer=Explodes, logging_nan_inf_filter=False, max_grad_norm=0.0
    )
    assert torch.isfinite(flat(job.model)).all()
    assert job.state.global_step == 3


@every_method
def test_evaluation_and_saving_see_the_trained_weights(name, tmp_path):
    seen = []

    class Evaluates(Trainer):
        def evaluate(self, *args, **kwargs):
            seen.append(flat(self.model))
            return super().evaluate(*args, **kwargs)

    steps = {}

    class Note(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            steps[state.global_step] = flat(model)

    run_training(
        model(),
        name,
        None,
        tmp_path,
        trainer=Evaluates,
        callbacks=[Note()],
        eval_dataset=language_data(4),
        eval_strategy="steps",
        eval_steps=1,
        gradient_accumulation_steps=2,
    )
    assert len(seen) == 3 and all(torch.equal(a, b) for a, b in zip(seen, steps.values(), strict=True))


@every_method
def test_lora_trains_the_adapter_alone(name, tmp_path):
    from peft import LoraConfig, get_peft_model

    base = model()
    before = flat(base)
    modules = ["ln_f"] if name == "sam_on" else None
    if name == "mup_sam":
        pytest.skip("muP scales the parameters of the model it was applied to, not those of an adapter")
    peft_model = get_peft_model(
        base, LoraConfig(r=4, target_modules=["c_attn"], modules_to_save=modules, fan_in_fan_out=True)
    )
    job = run_training(peft_model, name, "base=adamw", tmp_path, learning_rate=1e-2)
    adapter = {n: p for n, p in job.model.named_parameters() if "lora_B" in n}
    assert all(p.abs().max() > 0 for p in adapter.values())
    frozen = torch.cat([p.detach().flatten().double() for n, p in job.model.named_parameters() if not p.requires_grad])
    assert len(frozen) >= len(before) - 64 and torch.isfinite(frozen).all()


@every_method
def test_gradient_checkpointing_changes_nothing(name, tmp_path):
    plain = run_training(model(0.1), name, "base=sgd", tmp_path, max_steps=2)
    checked = run_training(model(0.1), name, "base=sgd", tmp_path, max_steps=2, gradient_checkpointing=True)
    assert (flat(plain.model) - flat(checked.model)).abs().max() <= 1e-6


@every_method
def test_bfloat16_weights_train(name, tmp_path):
    options = "base=sgd" if name in ("sampa", "ignite") else "base=sgd,perturb=stochastic"
    job = run_training(model(dtype=torch.bfloat16), name, options, tmp_path)
    assert torch.isfinite(flat(job.model)).all() and not torch.equal(
        flat(job.model), flat(model(dtype=torch.bfloat16))
    )


@every_method
def test_name_works_in_every_form(name, tmp_path):
    args = arguments(tmp_path, name)
    assert pickle.loads(pickle.dumps(args)).optim == name
    assert json.loads(args.to_json_string())["optim"] == name
    assert (
        TrainingArguments(
            **{k: v for k, v in json.loads(args.to_json_string()).items() if k in ("output_dir", "optim")}
        ).optim
        == name
    )
    (parsed,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--optim", name]
    )
    assert parsed.optim == name
    assert TrainingArguments(output_dir=str(tmp_path)).set_optimizer(name=name).optim == name


@every_method
def test_every_option_is_documented_and_typos_are_answered(name, tmp_path):
    config = next(m.config for m in METHODS if m.name == name)
    documented = " ".join(c.__doc__ or "" for c in config.__mro__)
    for field in dataclasses.fields(config):
        assert f"{field.name}:" in documented or f"{field.name}," in documented, field.name
    with pytest.raises(ValueError, match="unknown key 'roh'. Did you mean 'rho'"):
        TrainingArguments(output_dir=str(tmp_path), optim=name, optim_args="roh=0.1")
    with pytest.raises(ValueError, match="rho"):
        TrainingArguments(output_dir=str(tmp_path), optim=name, optim_args="rho=-1")


def arguments(tmp_path, name, **options):
    defaults = dict(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        max_steps=3,
        learning_rate=1e-2,
        optim=name,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        use_cpu=True,
    )
    return TrainingArguments(**{**defaults, **options})
