"""DP2: gradients against rows taken alone, noise by its moments, the accountant against Gaussians in closed form."""

import json
import math

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from scipy import optimize, stats
from transformers import Trainer, TrainerCallback, TrainingArguments

from hfext.unlearning import dp2
from hfext.unlearning._data import collate
from hfext.unlearning._dp_guarantee import group_guarantee, noise_for, privacy_spent
from hfext.unlearning.dp2 import (
    DPConfig,
    DPTrainer,
    PoissonSampler,
    add_noise,
    by_length,
    clipped_sum,
    per_sample_gradients,
    unlearn_from_dp_base,
)

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")


def rows_of(n=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 9, (n,), generator=generator).tolist()
    ids = [torch.randint(3, 128, (k,), generator=generator).tolist() for k in lengths]
    return [{"input_ids": row, "labels": [-100, *row[1:]]} for row in ids]


def arguments(folder, **fields):
    options = dict(max_steps=3, per_device_train_batch_size=4, learning_rate=0.1, optim="sgd", save_strategy="no")
    options |= dict(lr_scheduler_type="constant") | fields
    return TrainingArguments(
        str(folder), use_cpu=True, report_to="none", disable_tqdm=True, dataloader_pin_memory=False, **options
    )


def trainer_of(model, folder, rows=None, dp=None, **fields):
    dp = dp or DPConfig(noise_multiplier=1.0, seed=5)
    return DPTrainer(model, arguments(folder, **fields), train_dataset=rows or rows_of(), dp=dp)


def moved(model, before):
    return {n: p.detach() - before[n] for n, p in model.named_parameters()}


def state(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


# pure functions


def test_rows_are_clipped_to_the_norm_and_weighted():
    grads = {"a": torch.randn(6, 3, 4) * 3, "b": torch.randn(6, 5)}
    grads["a"][1], grads["b"][1] = 1e-3, 1e-3
    grads["b"][2, 0] = math.nan
    weights = torch.tensor([1.0, 1, 1, 1, 0, 1])
    summed, norms = clipped_sum(grads, 0.5, weights)
    expected = torch.zeros(17)
    for i in (0, 1, 3, 5):
        g = torch.cat([grads["a"][i].flatten(), grads["b"][i]])
        assert norms[i] == pytest.approx(g.norm().item(), rel=1e-6)
        expected += g * min(1.0, 0.5 / g.norm().item())
    torch.testing.assert_close(torch.cat([summed["a"].flatten(), summed["b"]]), expected)
    one, _ = clipped_sum({k: g[:1] for k, g in grads.items()}, 0.5, torch.ones(1))
    assert math.hypot(*(g.norm().item() for g in one.values())) == pytest.approx(0.5, rel=1e-5)
    free, _ = clipped_sum({"a": grads["a"]}, math.inf, torch.ones(6))
    torch.testing.assert_close(free["a"], grads["a"].sum(0))


def test_noise_has_the_variance_it_says():
    totals = {"a": torch.zeros(200, 300), "b": torch.ones(40_000)}
    add_noise(totals, 0.7, torch.Generator().manual_seed(0))
    for n, x in ((60_000, totals["a"].flatten()), (40_000, totals["b"] - 1)):
        # The variance of n normals has the standard deviation sigma^2 sqrt(2 / n).
        assert x.var().item() == pytest.approx(0.49, abs=3 * 0.49 * math.sqrt(2 / n))
        assert abs(x.mean().item()) < 3 * 0.7 / math.sqrt(n)
    assert abs(np.corrcoef(totals["a"].flatten()[:40_000], totals["b"])[0, 1]) < 0.02


def test_batches_are_poisson_and_functions_of_the_step():
    sampler = PoissonSampler(200, 0.1, 500, seed=3)
    batches = list(sampler)
    sizes = np.array([len(b) for b in batches])
    assert sizes.mean() == pytest.approx(20, abs=3 * math.sqrt(18 / 500))
    assert sizes.var() == pytest.approx(18, rel=0.25)
    counts = np.bincount(sum(batches, []), minlength=200)
    assert counts.min() > 20 and counts.max() < 85, "each row in a tenth of 500"
    other = PoissonSampler(200, 0.1, 3, seed=3)
    other.step = 100
    assert list(other) == batches[100:103] and sampler.step == 500
    assert [] in list(PoissonSampler(3, 0.1, 50, 0)) and list(PoissonSampler(3, 1.0, 1, 0)) == [[0, 1, 2]]


def analytic_gaussian(sigma, delta):
    """epsilon of the Gaussian mechanism, exactly."""
    mu = 1 / sigma

    def gap(epsilon):
        tail = stats.norm.logcdf(-mu / 2 - epsilon / mu)
        return stats.norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon + tail) - delta

    return optimize.brentq(gap, 0, 200)


@pytest.mark.parametrize("sigma, steps, delta", [(2.0, 1, 1e-5), (4.0, 10, 1e-5), (10.0, 100, 1e-6)])
def test_without_sampling_the_accountants_are_gaussians(sigma, steps, delta):
    exact = analytic_gaussian(sigma / math.sqrt(steps), delta)
    assert privacy_spent(sigma, 1.0, steps, delta, "pld") == pytest.approx(exact, rel=2e-3)
    # Renyi divergence alpha T / (2 sigma^2), in its best conversion over alpha.
    renyi = min(
        a * steps / (2 * sigma**2) + math.log1p(-1 / a) - math.log(delta * a) / (a - 1)
        for a in np.linspace(1.01, 200, 20_000)
    )
    assert exact < privacy_spent(sigma, 1.0, steps, delta) == pytest.approx(renyi, rel=0.02)


def test_the_guarantee_grows_with_steps_and_rate_and_the_search_inverts_it():
    spent = [privacy_spent(1.0, 0.01, n, 1e-5) for n in (1, 10, 100, 1000)]
    assert spent == sorted(spent) and spent[0] > 0 and privacy_spent(1.0, 0.01, 0, 1e-5) == 0
    assert privacy_spent(1.0, 0.01, 100, 1e-5, "pld") < spent[2] < privacy_spent(1.0, 0.1, 100, 1e-5)
    assert privacy_spent(0.0, 0.01, 1, 1e-5) == math.inf
    for epsilon in (0.5, 100):
        sigma = noise_for(epsilon, 0.05, 200, 1e-12)
        assert privacy_spent(sigma, 0.05, 200, 1e-12) <= epsilon < privacy_spent(sigma * 0.999, 0.05, 200, 1e-12)


def test_the_guarantee_of_several_rows():
    assert group_guarantee(0.5, 1e-6, 1) == (0.5, 1e-6)
    epsilon, delta = group_guarantee(0.5, 1e-6, 3)
    assert epsilon == 1.5 and delta == pytest.approx(1e-6 * math.expm1(1.5) / math.expm1(0.5))
    assert group_guarantee(100, 1e-12, 40) == (4000, 1.0)
    # Exact for the Gaussian mechanism whose sensitivity grows k-fold: never above the bound.
    sigma, delta = 3.0, 1e-6
    one = analytic_gaussian(sigma, delta)
    bound = group_guarantee(one, delta, 2)
    assert analytic_gaussian(sigma / 2, bound[1]) <= bound[0]


# gradients


def each_alone(model, rows):
    """Gradients by backward of one unpadded row after the other."""
    found = []
    for row in rows:
        model.zero_grad()
        model(**{k: torch.tensor([v]) for k, v in row.items()}).loss.backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    model.zero_grad()
    return found


@pytest.mark.parametrize("how", ["batch", "lengths", "rows"])
@pytest.mark.parametrize("kind", ["llama", "tied", "lora", "frozen"])
def test_gradients_of_rows_are_those_of_rows_alone(tiny_llama, tiny_gpt2, kind, how):
    # GPT-2 looks for its padding token where it gets no mask.
    model = tiny_gpt2(pad_token_id=None) if kind == "tied" else tiny_llama()
    if kind == "lora":
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    if kind == "frozen":
        model.model.embed_tokens.requires_grad_(False)
    rows = rows_of(5)
    expected = each_alone(model, rows)
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if how == "batch":
        model.set_attn_implementation("eager")
    found = list(per_sample_gradients(model, params, collate(rows), how))
    numbers = torch.cat([i for i, _, _ in found])
    assert sorted(numbers.tolist()) == list(range(5))
    grads = {n: torch.cat([g[n] for _, g, _ in found]) for n in params}
    assert grads.keys() == expected[0].keys()
    for name, g in grads.items():
        torch.testing.assert_close(g, torch.stack([expected[i][name] for i in numbers]), rtol=1e-4, atol=1e-6)
    losses = torch.cat([loss for _, _, loss in found])
    alone = {k: torch.tensor([v]) for k, v in rows[2].items()}
    torch.testing.assert_close(losses[numbers.tolist().index(2)], model(**alone).loss.detach())


def test_rows_of_one_length_are_cut_and_left_padding_is_refused():
    batch = collate(rows_of(7)) | {"token_type_ids": torch.arange(56).view(7, 8), "score": torch.arange(7)}
    found = by_length(batch)
    assert sorted(torch.cat([i for i, _ in found]).tolist()) == list(range(7))
    for rows, part in found:
        n = int(batch["attention_mask"][rows[0]].sum())
        assert part.keys() == {"input_ids", "labels", "token_type_ids", "score"}
        assert torch.equal(part["token_type_ids"], batch["token_type_ids"][rows, :n])
        assert torch.equal(part["score"], rows)
    with pytest.raises(NotImplementedError, match="not padded on the right"):
        by_length(batch | {"attention_mask": batch["attention_mask"].flip(1)})


# the Trainer


@pytest.mark.parametrize("microbatch", [None, 5])
def test_without_noise_and_clipping_a_full_batch_is_sgd(tiny_llama, tmp_path, microbatch):
    # Rows of one length, so that the mean over tokens is the mean over rows.
    ids = [(r["input_ids"] * 2)[:6] for r in rows_of(12)]
    rows = [{"input_ids": row, "labels": [-100, *row[1:]]} for row in ids]
    ours, theirs = tiny_llama(), tiny_llama()
    dp = DPConfig(noise_multiplier=0.0, max_grad_norm=math.inf, microbatch_size=microbatch, seed=0)
    mine = trainer_of(ours, tmp_path, rows, dp, per_device_train_batch_size=12)
    mine.train()
    args = arguments(tmp_path, per_device_train_batch_size=12, max_grad_norm=0.0)
    plain = Trainer(theirs, args, collate, rows)
    plain.train()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    losses = [[row["train_loss"] for row in t.state.log_history if "train_loss" in row] for t in (mine, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert mine.guarantee()["epsilon"] is None, "no noise, no bound"


def test_one_step_is_clipped_rows_and_noise_over_the_mean_batch_size(tiny_llama, tmp_path):
    rows, model = rows_of(12), tiny_llama()
    before, gradients = state(model), each_alone(model, rows)
    sampler = PoissonSampler(12, 4 / 12, 1, 5)
    drawn = next(iter(sampler))
    assert 0 < len(drawn) != 4
    quiet = trainer_of(model, tmp_path, rows, DPConfig(noise_multiplier=0.0, max_grad_norm=0.3, seed=5), max_steps=1)
    quiet.train()
    expected = {n: torch.zeros_like(p) for n, p in before.items()}
    for i in drawn:
        norm = math.sqrt(sum(g.square().sum().item() for g in gradients[i].values()))
        for name, g in gradients[i].items():
            expected[name] += g * min(1, 0.3 / norm)
    step = moved(model, before)
    for name in before:
        torch.testing.assert_close(step[name], -0.1 * expected[name] / 4, rtol=1e-3, atol=1e-7)
    # The same step with noise differs by a normal of standard deviation lr sigma C / B.
    noisy = tiny_llama()
    trainer_of(noisy, tmp_path, rows, DPConfig(noise_multiplier=2.0, max_grad_norm=0.3, seed=5), max_steps=1).train()
    noise = torch.cat([(moved(noisy, before)[n] - step[n]).flatten() for n in before])
    std = 0.1 * 2.0 * 0.3 / 4
    assert noise.var().item() == pytest.approx(std**2, abs=3 * std**2 * math.sqrt(2 / len(noise)))


def test_an_empty_batch_is_noise_alone(tiny_llama, tmp_path):
    rows, seed = rows_of(12), next(s for s in range(200) if next(iter(PoissonSampler(12, 1 / 12, 1, s))) == [])
    model, other = tiny_llama(), tiny_llama()
    before = state(model)
    dp = DPConfig(noise_multiplier=1.0, max_grad_norm=0.1, seed=seed)
    trainer_of(model, tmp_path, rows, dp, max_steps=1, per_device_train_batch_size=1).train()
    trainer_of(other, tmp_path, rows_of(12, seed=8), dp, max_steps=1, per_device_train_batch_size=1).train()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    step = torch.cat([x.flatten() for x in moved(model, before).values()])
    assert step.std().item() == pytest.approx(0.01, rel=0.02)


def test_a_resumed_run_has_the_bits_and_the_steps_of_a_straight_one(tiny_llama, tmp_path):
    options = dict(max_steps=8, save_strategy="steps", save_steps=5, optim="adamw_torch", learning_rate=1e-2)
    straight = trainer_of(tiny_llama(), tmp_path / "a", **options)
    straight.train()
    resumed = trainer_of(tiny_llama(), tmp_path / "a", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-5"))
    for a, b in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    saved = json.loads((tmp_path / "a" / "checkpoint-5" / "dp.json").read_text())
    assert saved["steps"] == 5 and saved["epsilon"] == privacy_spent(1.0, 4 / 12, 5, 1e-12)
    assert resumed.guarantee() == straight.guarantee() and resumed.guarantee()["steps"] == 8
    other = trainer_of(tiny_llama(), tmp_path / "a", dp=DPConfig(noise_multiplier=2.0, seed=5), **options)
    with pytest.raises(ValueError, match="trained with noise_multiplier 1.0, this run has 2.0"):
        other.train(resume_from_checkpoint=True)


def test_steps_of_a_second_training_would_not_be_counted(tiny_llama, tmp_path):
    trainer = trainer_of(tiny_llama(), tmp_path, max_steps=4, save_strategy="steps", save_steps=3)
    trainer.train()
    trained = state(trainer.model)
    for resume in (None, False):
        with pytest.raises(ValueError, match="already trained here: resume from a checkpoint, or start from the base"):
            trainer.train(resume_from_checkpoint=resume)
    assert all(torch.equal(p, trained[n]) for n, p in trainer.model.named_parameters())
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert trainer.guarantee()["steps"] == 4
    assert all(torch.equal(p, trained[n]) for n, p in trainer.model.named_parameters())

    # One that was interrupted has seen rows as well.
    class Stop(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            raise KeyboardInterrupt

    broken = trainer_of(tiny_llama(), tmp_path / "b")
    broken.add_callback(Stop())
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    with pytest.raises(ValueError, match="already trained here"):
        broken.train()


def test_no_generator_is_used_twice(tiny_llama, tmp_path, monkeypatch):
    """Neither by two steps nor by sampling and noise, which must not depend on one another."""
    made = []

    def watched(seed, step, stream, device="cpu"):
        made.append((step, stream, generator := real(seed, step, stream, device)))
        return generator

    real = dp2._generator
    monkeypatch.setattr(dp2, "_generator", watched)
    trainer_of(tiny_llama(), tmp_path, max_steps=5).train()
    asked = {(step, stream): generator.initial_seed() for step, stream, generator in made}
    assert {(step, stream) for step in range(5) for stream in (0, 1)} <= set(asked)
    assert len(set(asked.values())) == len(asked)
    # The first numbers too, as some generators read a part of the seed alone.
    first = {float(torch.rand((), generator=real(5, step, stream), dtype=torch.float64)) for step, stream in asked}
    assert len(first) == len(asked)


def test_the_target_is_met_at_the_last_step_and_secret_noise_differs(tiny_llama, tmp_path):
    found = []
    for _ in range(2):
        trainer = trainer_of(tiny_llama(), tmp_path, dp=DPConfig(epsilon=4.0, delta=1e-5), max_steps=3)
        trainer.train()
        found.append(torch.cat([p.flatten() for p in trainer.model.parameters()]))
    spent = trainer.guarantee()
    assert 3.99 < spent["epsilon"] <= 4 and spent["steps"] == 3 and spent["secret_seed"]
    assert not torch.equal(*found)


def test_a_model_that_cannot_be_vectorised_gives_the_same(tiny_llama, tmp_path):
    eager, sdpa, looking = tiny_llama(), tiny_llama(), tiny_llama()
    eager.set_attn_implementation("eager")
    layer = looking.model.layers[0]
    forward = layer.forward

    def with_a_look(hidden_states, *args, **kwargs):
        if hidden_states.sum().item() == math.inf:
            raise AssertionError
        return forward(hidden_states, *args, **kwargs)

    layer.forward = with_a_look
    dp = DPConfig(noise_multiplier=0.5, max_grad_norm=0.3, seed=5)
    for model, how in ((eager, "batch"), (sdpa, "lengths"), (looking, "rows")):
        trainer = trainer_of(model, tmp_path, dp=dp)
        trainer.train()
        assert trainer._how == how
        for a, b in zip(eager.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["mixed", "bfloat16", "dropout", "checkpointing"])
def test_other_precisions_and_dropout(tiny_llama, tiny_gpt2, tmp_path, kind):
    model = tiny_gpt2() if kind == "dropout" else tiny_llama()
    model = model.bfloat16() if kind == "bfloat16" else model
    before = state(model)
    fields = {"bf16": kind == "mixed", "activation_checkpointing": kind == "checkpointing"}
    trainer_of(model, tmp_path, dp=DPConfig(noise_multiplier=1.0, max_grad_norm=1.0, seed=5), **fields).train()
    step = torch.cat([x.float().flatten() for x in moved(model, before).values()])
    # Three steps of noise 0.1 / 4 and a little signal.
    assert step.std().item() == pytest.approx(0.1 / 4 * math.sqrt(3), rel=0.1)


def test_unlearning_is_plain_training_of_the_kept_base(tiny_llama, tmp_path):
    rows = rows_of(12)
    base = trainer_of(tiny_llama(), tmp_path / "base", rows)
    base.train()
    base.save_model(str(tmp_path / "base"))
    kept = {p.name: p.read_bytes() for p in (tmp_path / "base").iterdir()}
    args = arguments(tmp_path / "out", max_grad_norm=1.0)
    unlearned = unlearn_from_dp_base(tmp_path / "base", rows[:8], args).model
    plain = tiny_llama()
    plain.load_state_dict(base.model.state_dict())
    Trainer(plain, arguments(tmp_path / "plain", max_grad_norm=1.0), collate, rows[:8]).train()
    for a, b in zip(unlearned.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)
    assert {p.name: p.read_bytes() for p in (tmp_path / "base").iterdir()} == kept
    said = {"base": False, "covers": "rows that are not among the retain rows"}
    assert json.loads((tmp_path / "out" / "dp.json").read_text()) == {**base.guarantee(), **said}
    loaded = type(plain).from_pretrained(tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), plain.parameters(), strict=True))
    # It saw the retained rows without noise: no base, and no checkpoint of one.
    with pytest.raises(ValueError, match="fine-tuned without noise after DPTrainer: it is no base"):
        unlearn_from_dp_base(tmp_path / "out", rows[:4], arguments(tmp_path / "next"))
    with pytest.raises(ValueError, match="it is no base"):
        trainer_of(tiny_llama(), tmp_path / "next", rows).train(resume_from_checkpoint=str(tmp_path / "out"))
    with pytest.raises(ValueError, match="base's own folder"):
        unlearn_from_dp_base(tmp_path / "base", rows[:8], arguments(tmp_path / "base"))
    with pytest.raises(ValueError, match="retain_rows is empty"):
        unlearn_from_dp_base(tmp_path / "base", [], args)
    with pytest.raises(ValueError, match="was not trained by DPTrainer"):
        unlearn_from_dp_base(tmp_path / "plain", rows[:8], args)


def test_a_base_of_adapters_is_fine_tuned_as_such(tiny_llama, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "dense")
    dense = type(tiny_llama()).from_pretrained(tmp_path / "dense")
    model = get_peft_model(dense, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    base = trainer_of(model, tmp_path / "base")
    base.train()
    base.save_model(str(tmp_path / "base"))
    unlearned = unlearn_from_dp_base(tmp_path / "base", rows_of(8), arguments(tmp_path / "out")).model
    trained = {n for n, p in unlearned.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in n for n in trained)
    before = dict(base.model.named_parameters())
    for name, p in unlearned.named_parameters():
        assert torch.equal(p, before[name]) == ("lora_" not in name)
    assert (tmp_path / "out" / "adapter_config.json").is_file() and (tmp_path / "out" / "dp.json").is_file()


def test_bad_settings_are_named(tiny_llama, tmp_path):
    for fields, text in (
        ({"epsilon": 0.0}, "epsilon is 0.0"),
        ({"delta": 1.0}, "delta is 1.0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm is 0.0"),
        ({"max_grad_norm": math.inf}, "max_grad_norm is inf"),
        ({"noise_multiplier": -1.0}, "noise_multiplier is -1.0"),
        ({"accountant": "zcdp"}, "accountant is 'zcdp'"),
        ({"microbatch_size": -1}, "microbatch_size is -1"),
    ):
        with pytest.raises(ValueError, match=text):
            DPConfig(**fields)
    with pytest.raises(ValueError, match="gradient_accumulation_steps is 2 but must be 1"):
        trainer_of(tiny_llama(), tmp_path, gradient_accumulation_steps=2)
    with pytest.raises(NotImplementedError, match="auto_find_batch_size changes the sampling rate"):
        trainer_of(tiny_llama(), tmp_path, auto_find_batch_size=True)
    with pytest.raises(ValueError, match=r"per_device_train_batch_size is 13 but must be in \[1, 12\]"):
        trainer_of(tiny_llama(), tmp_path, per_device_train_batch_size=13)
    model = tiny_llama()
    model.add_module("norm", torch.nn.BatchNorm1d(3))
    with pytest.raises(NotImplementedError, match="norm mixes the rows"):
        trainer_of(model, tmp_path)
    with pytest.raises(NotImplementedError, match="two-pass"):
        trainer_of(tiny_llama(), tmp_path, optim="sam").train()


def test_the_missing_library_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(ImportError, match="pip install dp-accounting"):
        privacy_spent(1.0, 0.1, 1, 1e-5)
