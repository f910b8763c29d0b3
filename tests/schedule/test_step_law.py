"""Step Law: golden values, the interval, what counts as N, and the arguments that it writes."""

import math
import sys

import pytest
import torch
import transformers
from optim_training import gpt2, language_data
from transformers import Trainer, TrainingArguments

import hfext
from hfext.schedule import apply_step_law, step_law
from hfext.schedule.step_law import BATCH_MEAN, LR_MEAN, log_interval, non_embedding_parameters, split_batch

N, D = 4e8, 5e10  # inside the fitted range


@pytest.fixture
def warnings(monkeypatch):
    seen = []
    # The function hides its module as an attribute of the package.
    monkeypatch.setattr(sys.modules["hfext.schedule.step_law"].logger, "warning", seen.append)
    return seen


def arguments(folder, **options):
    return TrainingArguments(str(folder), use_cpu=True, report_to="none", **options)


# the law


@pytest.mark.parametrize(
    "n, d, mean, rounded, batch",
    [
        (7e9, 1.4e12, "9.3468e-04", "9.1656e-04", "4.997e+06"),
        (1e9, 1e11, "1.6624e-03", "1.6325e-03", "1.1075e+06"),
        (6e7, 1e9, "2.9980e-03", "2.9514e-03", "7.988e+04"),
    ],
)
def test_golden_values(n, d, mean, rounded, batch):
    """To all the digits that are known."""
    assert f"{step_law(n, d).lr:.4e}" == mean
    assert f"{step_law(n, d, mode='rounded').lr:.4e}" == rounded
    assert f"{step_law(n, d).batch_tokens:{'.3e' if len(batch) == 9 else '.4e'}}" == batch


def test_the_batch_in_rows():
    assert f"{step_law(7e9, 1.4e12, 2048).batch_sequences:.1f}" == "2439.9"
    assert step_law(N, D).batch_sequences is None


def test_the_rounded_law_is_the_printed_one():
    law = step_law(N, D, mode="rounded")
    assert law.lr == pytest.approx(1.79 * N**-0.713 * D**0.307, rel=1e-13)
    assert law.batch_tokens == pytest.approx(0.58 * D**0.571, rel=1e-13)
    assert law.interval is law.batch_interval is None


def test_the_mean_law_is_the_mean_of_the_published_fits():
    """The digits of the card of the method."""
    card = (0.5863077908, -0.7129222912, 0.3074909504, -0.5435421736, 0.5709443647)
    assert (*LR_MEAN, *BATCH_MEAN) == pytest.approx(card, abs=1e-10)


@pytest.mark.parametrize(
    "n, d, lr, batch",
    [
        # 5 % and 95 % quantiles of the predictions of the 1000 published fits
        (7e9, 1.4e12, (7.870568e-4, 1.101836e-3), (4.286713e6, 5.777978e6)),
        (1e9, 1e11, (1.545351e-3, 1.785898e-3), (1.028718e6, 1.186905e6)),
        (4.3e8, 5e10, (2.322042e-3, 2.577850e-3), (7.05023e5, 7.85360e5)),
    ],
)
def test_the_interval_is_near_the_quantiles_of_the_fits(n, d, lr, batch):
    law = step_law(n, d, mode="quantiles")
    assert law.interval == pytest.approx(lr, rel=0.01)
    assert law.batch_interval == pytest.approx(batch, rel=0.01)
    assert law.lr == step_law(n, d).lr == pytest.approx(math.sqrt(law.interval[0] * law.interval[1]))


def test_the_interval_against_draws():
    generator = torch.Generator().manual_seed(0)
    factor = torch.tensor([[2.0, 0.0], [0.3, 0.5]], dtype=torch.float64)
    covariance = tuple(map(tuple, (factor @ factor.T).tolist()))
    draws = torch.randn(200_000, 2, generator=generator, dtype=torch.float64) @ factor.T + torch.tensor([1.0, -2.0])
    values = draws @ torch.tensor([1.0, 3.0], dtype=torch.float64)
    low, high = log_interval((1.0, 3.0), (1.0, -2.0), covariance)
    assert [low, high] == pytest.approx(
        values.quantile(torch.tensor([0.05, 0.95], dtype=torch.float64)).tolist(), abs=0.03
    )


# N


def test_embeddings_and_heads_do_not_count(tiny_llama, tiny_gpt2):
    llama = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32) + 32
    for tied in (False, True):
        assert non_embedding_parameters(tiny_llama(tie_word_embeddings=tied)) == llama
    block = (32 * 96 + 96) + (32 * 32 + 32) + (32 * 128 + 128) + (128 * 32 + 32) + 4 * 32
    assert non_embedding_parameters(tiny_gpt2()) == 2 * block + 2 * 32
    assert non_embedding_parameters(torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 3))) == 15


def test_wrapped_models_count_as_what_they_hold(tiny_llama, warnings):
    model = tiny_llama(tie_word_embeddings=False)
    for wrapped in (torch.compile(model), torch.nn.Sequential(model)):
        assert non_embedding_parameters(wrapped) == non_embedding_parameters(model)
        assert step_law(wrapped, D) == step_law(model, D)


def test_adapters_are_refused(tiny_llama):
    from peft import LoraConfig, get_peft_model

    inside = tiny_llama()
    inside.add_adapter(LoraConfig(r=4, target_modules=["q_proj"]))
    for model in (get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj"])), inside):
        with pytest.raises(ValueError, match="has adapters, but Step Law is for pretraining"):
            step_law(model, D)


def test_a_model_and_its_number_agree(tiny_llama, warnings):
    model = tiny_llama()
    assert step_law(model, D) == step_law(non_embedding_parameters(model), D)


# warnings


def test_outside_the_fitted_range_is_warned_about_with_the_range(warnings):
    step_law(N, D)
    assert not warnings
    step_law(7e9, 1e9)
    assert "6e+07 to 1.1e+09 parameters without embeddings and is asked for 7e+09" in warnings[0]
    assert "2e+09 to 1e+11 tokens and is asked for 1e+09" in warnings[1]


def test_loaded_weights_are_warned_about(tmp_path, tiny_llama, warnings):
    step_law(tiny_llama(), D)
    assert not any("fine-tuning" in text for text in warnings)
    tiny_llama().save_pretrained(tmp_path)
    step_law(transformers.LlamaForCausalLM.from_pretrained(tmp_path), D)
    assert any("fine-tuning" in text for text in warnings)


def test_experts_are_warned_about(tiny_llama, warnings):
    step_law(tiny_llama(), D)
    assert not any("experts" in text for text in warnings)
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    config = transformers.MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=2)
    step_law(transformers.MixtralForCausalLM(config), D)
    assert any("fitted on dense models" in text and "all experts are counted" in text for text in warnings)


@pytest.mark.parametrize("optim, warned", [("adamw_torch", 0), ("adamw_torch_fused", 0), ("sgd", 1), ("frugal", 1)])
def test_other_optimizers_are_warned_about(optim, warned, tmp_path, warnings):
    apply_step_law(arguments(tmp_path, optim=optim), N, D, seq_len=2048)
    assert (
        len(
            [
                text
                for text in warnings
                if f"fitted on AdamW; its learning rate may be far off for optim={optim!r}" in text
            ]
        )
        == warned
    )


# the arguments


@pytest.mark.parametrize(
    "sequences, per_device, devices, expected",
    [
        (2439.9, 8, 1, (8, 305)),
        (2439.9, 8, 8, (8, 39)),
        (5.2, 8, 1, (5, 1)),
        (12.0, 8, 1, (6, 2)),
        (3.0, 8, 8, (1, 1)),
    ],
)
def test_the_batch_is_split_without_growing(sequences, per_device, devices, expected):
    rows, accumulation = split_batch(sequences, per_device, devices)
    assert (rows, accumulation) == expected
    assert rows <= per_device


def test_apply_writes_what_it_says(tmp_path):
    args = arguments(tmp_path, per_device_train_batch_size=8, optim="adamw_torch")
    done = apply_step_law(args, N, D, seq_len=2048)
    law = step_law(N, D, 2048)
    assert done.law == law and args.learning_rate == done.learning_rate == law.lr
    assert args.per_device_train_batch_size == done.per_device_train_batch_size == 8
    assert args.gradient_accumulation_steps == done.gradient_accumulation_steps == math.ceil(law.batch_sequences / 8)
    assert done.batch_sequences == pytest.approx(law.batch_sequences, rel=0.02)
    assert done.updates == math.ceil(D / (done.batch_sequences * 2048))
    assert args.lr_scheduler_type == "cosine_with_min_lr" and args.lr_scheduler_kwargs == {"min_lr": 1e-5}
    assert TrainingArguments(**{k: v for k, v in args.to_dict().items() if k in ("output_dir", "lr_scheduler_kwargs")})


def test_the_number_of_processes_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "world_size", property(lambda self: 4))
    args = arguments(tmp_path, per_device_train_batch_size=8)
    done = apply_step_law(args, N, D, seq_len=2048)
    assert args.gradient_accumulation_steps == math.ceil(done.law.batch_sequences / 32)
    assert done.batch_sequences == args.per_device_train_batch_size * args.gradient_accumulation_steps * 4


def test_too_many_devices_are_warned_about(tmp_path, monkeypatch, warnings):
    monkeypatch.setattr(TrainingArguments, "world_size", property(lambda self: 1024))
    apply_step_law(arguments(tmp_path), N, D, seq_len=2048)
    assert any("1024 devices make 1024 rows" in text for text in warnings)


def test_the_trainer_ends_at_the_fixed_rate(tmp_path, warnings):
    """18 updates of a tiny run: the peak is the law's and the last rate 1e-5."""
    args = arguments(tmp_path, max_steps=18, per_device_train_batch_size=4, logging_steps=1, save_strategy="no")
    done = apply_step_law(args, gpt2(), 2000, seq_len=10)
    job = Trainer(gpt2(), args, train_dataset=language_data())
    job.train()
    found = [row["learning_rate"] for row in job.state.log_history if "learning_rate" in row]
    assert found[0] == done.learning_rate == max(found)
    assert job.lr_scheduler.get_last_lr()[0] == pytest.approx(1e-5, rel=1e-6)


def test_the_names_of_the_design():
    assert hfext.optim.step_law is step_law and hfext.optim.apply_step_law is apply_step_law


# bad input


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: step_law(0, D), "model_or_params is 0 but must be a finite number > 0"),
        (lambda: step_law("1b", D), "model_or_params is '1b'"),
        (lambda: step_law(N, -1), "tokens is -1"),
        (lambda: step_law(N, float("inf")), "tokens is inf"),
        (lambda: step_law(N, D, 0), "seq_len is 0"),
        (lambda: step_law(N, D, mode="median"), "mode is 'median' but must be one of mean, rounded, quantiles"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_batch_needs_the_length_of_a_row(tmp_path):
    with pytest.raises(ValueError, match="seq_len is missing"):
        apply_step_law(arguments(tmp_path), N, D)
    args = arguments(tmp_path)
    args.max_length = 512  # as TRL's SFTConfig has it
    assert apply_step_law(args, N, D).law.batch_sequences == step_law(N, D, 512).batch_sequences


def test_a_length_of_ones_own_and_swapped_arguments_are_said(tmp_path, warnings):
    args = TrainingArguments(str(tmp_path), max_steps=3, use_cpu=True)
    done = apply_step_law(args, 5e8, tokens=5e9, seq_len=1024)
    assert args.max_steps == 3 and any(f"take {done.updates} updates, and max_steps=3" in text for text in warnings)
    warnings.clear()
    apply_step_law(TrainingArguments(str(tmp_path), use_cpu=True), 5e8, tokens=5e9, seq_len=1024)
    assert not any("max_steps" in text for text in warnings)
    with pytest.raises(TypeError, match="apply_step_law\\(args, model"):
        apply_step_law(5e8, args, tokens=5e9, seq_len=1024)
