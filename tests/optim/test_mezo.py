"""MeZO: its estimate against closed forms, its moves against a loop written out, its memory, and the real Trainer."""

import contextlib
import copy
import math
import pickle
import signal
from pathlib import Path

import pytest
import torch
from optim_training import flat, gpt2, language_data, run_training
from processes import run_two
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import hfext
from hfext.experiments._live_bytes import LiveBytes
from hfext.optim import MeZO
from hfext.optim._zeroth import CHUNK, Move, apply_, digest, mix

QUIET = dict(learning_rate=1e-2, max_steps=3)


def noise(optimizer, seed):
    """The direction of a seed, one tensor for each weight."""
    found = []
    for place, _, weight in optimizer.weights():
        z = torch.zeros_like(weight)
        apply_(z, [Move(seed, 1.0)], place)
        found.append(z)
    return found


def double(dropout=0.0):
    return gpt2(dropout).double()


class InDouble(Trainer):
    """The models of transformers take their loss in float32, which the division by 2 eps makes coarse."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None, **kwargs):
        logits = model(inputs["input_ids"]).logits[:, :-1]
        labels = inputs["labels"][:, 1:]
        loss = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="sum") / num_items_in_batch
        loss = loss * self.accelerator.num_processes  # the mean over processes takes this back
        return (loss, logits) if return_outputs else loss


# ---- the moves and the estimate ---------------------------------------------------------------------------------


def test_noise_is_standard_normal_and_differs_between_weights_seeds_and_chunks():
    z = torch.zeros(CHUNK + 1000)
    apply_(z, [Move(mix(1, 2), 1.0)], 0)
    assert abs(z.mean()) < 4e-3 and abs(z.std() - 1) < 4e-3 and abs((z**4).mean() - 3) < 0.05
    assert not torch.equal(z[:1000], z[CHUNK:])
    others = [(mix(1, 2), 1), (mix(1, 3), 0), (mix(2, 1), 0)]
    for seed, place in others:
        other = torch.zeros(4096)
        apply_(other, [Move(seed, 1.0)], place)
        assert abs((other * z[:4096]).mean()) < 0.08


def test_seeds_of_small_numbers_do_not_collide():
    seeds = {mix(a, b, c) for a in range(20) for b in range(200) for c in range(5)}
    assert len(seeds) == 20 * 200 * 5 and all(0 <= s < 2**63 for s in seeds)


def test_moves_are_w_times_keep_plus_scale_times_noise_in_order():
    torch.manual_seed(0)
    w, seeds = torch.randn(7, 5, dtype=torch.float64), (mix(3), mix(4))
    z = [torch.zeros_like(w) for _ in seeds]
    for noise_of, seed in zip(z, seeds, strict=True):
        apply_(noise_of, [Move(seed, 1.0)], 2)
    expected = ((w * 0.9 + 0.3 * z[0]) - 0.2 * z[1]) * 0.5 + 0.1 * z[0]
    moved = w.clone()
    apply_(moved, [Move(seeds[0], 0.3, 0.9), Move(seeds[1], -0.2), Move(seeds[0], 0.1, 0.5)], 2)
    assert torch.allclose(moved, expected, rtol=0, atol=1e-14)


def test_a_weight_that_is_not_contiguous_moves_as_one_that_is():
    torch.manual_seed(0)
    base = torch.randn(6, 4)
    view, same = base.clone().t(), base.t().contiguous()
    for w in (view, same):
        apply_(w, [Move(9, 0.5, 0.9)], 1)
    assert torch.equal(view, same) and not view.is_contiguous()


def test_projected_gradient_of_a_linear_loss_is_exact():
    a = torch.randn(11, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    w = nn.Parameter(torch.zeros(11, dtype=torch.float64))
    optimizer = MeZO([w], lr=0.1, eps=0.3)
    z = noise(optimizer, optimizer.directions(1)[0])[0]
    optimizer.step(lambda: (a * w).sum())
    assert optimizer.projected[0][0] == pytest.approx(float((a * z).sum()), rel=1e-12)
    assert torch.allclose(w, -0.1 * (a * z).sum() * z, rtol=1e-9)


def test_the_estimate_is_the_gradient_in_the_mean():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(6, 6, dtype=torch.float64, generator=generator)
    hessian, start = root @ root.T, torch.randn(6, dtype=torch.float64, generator=generator)
    w = nn.Parameter(start.clone())
    optimizer = MeZO([w], lr=1e-3, eps=0.1, directions=10_000)
    optimizer.probe([lambda count: 0.5 * w @ hessian @ w])
    mean = torch.zeros(6, dtype=torch.float64)
    for g, seed in zip(optimizer._probed, optimizer.directions(10_000), strict=True):
        mean += g * noise(optimizer, seed)[0] / 10_000
    exact = hessian @ start
    assert (mean - exact).norm() / exact.norm() < 0.05
    before = w.detach().clone()
    optimizer.step()
    assert torch.allclose(w, before - 1e-3 * mean, rtol=1e-9)


def test_weight_decay_and_learning_rate_are_those_of_the_group():
    first, second = (nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2))
    groups = [{"params": [first], "lr": 0.1, "weight_decay": 0.5}, {"params": [second], "lr": 0.2}]
    optimizer = MeZO(groups, lr=9.0, eps=0.01, directions=2)
    z = [noise(optimizer, seed) for seed in optimizer.directions(2)]
    optimizer.step(lambda: 3 * first.sum() + second.sum())
    g = [float(3 * a.sum() + b.sum()) for a, b in z]
    expected = [
        1 - 0.1 * (0.5 * 1 + (g[0] * z[0][0] + g[1] * z[1][0]) / 2),
        1 - 0.2 * (g[0] * z[0][1] + g[1] * z[1][1]) / 2,
    ]
    assert torch.allclose(first, expected[0], rtol=1e-9) and torch.allclose(second, expected[1], rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_probe_leaves_at_most_rounding_and_an_exact_one_nothing(dtype):
    torch.manual_seed(0)
    start = torch.randn(1000).to(dtype)
    for restore in ("copyless", "exact"):
        w = nn.Parameter(start.clone())
        MeZO([w], restore=restore).probe([lambda count, w=w: w.float().sum()])
        # The walk rounds where the weight is largest, |w| + eps |z| in magnitude.
        ulp = torch.finfo(dtype).eps * (start.float().abs() + 5e-3)
        assert ((w.float() - start.float()).abs() <= 2 * ulp).all()
        assert torch.equal(w, start) == (restore == "exact")


def test_an_exception_on_either_side_leaves_the_weights():
    for failing in (1, 2):
        for restore, tolerance in (("exact", 0.0), ("copyless", 3e-7)):
            w, calls = nn.Parameter(torch.ones(50)), []

            def loss(w=w, calls=calls, failing=failing):
                calls.append(1)
                if len(calls) == failing:
                    raise KeyboardInterrupt
                return w.sum()

            optimizer = MeZO([w], restore=restore)
            with pytest.raises(KeyboardInterrupt):
                optimizer.step(loss)
            assert (w - 1).abs().max() <= tolerance
            assert not optimizer.is_perturbed and optimizer.updates == 0


# ---- in the Trainer ---------------------------------------------------------------------------------------------


def test_the_trainer_makes_the_moves_of_a_loop_written_out(tmp_path):
    model, data = double(), language_data(8)
    job = run_training(
        double(0.1), "mezo", "eps=0.01,seed=5", tmp_path, trainer=InDouble, weight_decay=0.1,
        lr_scheduler_type="linear", data=data, per_device_train_batch_size=8, **QUIET,
    )  # fmt: skip
    decayed = {n for n, p in model.named_parameters() if p.dim() > 1}
    named = [(n, p) for n, p in model.named_parameters() if n in decayed]
    named += [(n, p) for n, p in model.named_parameters() if n not in decayed]
    ids, labels = (torch.stack([row[key] for row in data]) for key in ("input_ids", "labels"))
    model.eval()
    with torch.no_grad():
        for step in range(3):
            z, lr = [], 1e-2 * (1 - step / 3)
            for place, (_, p) in enumerate(named):
                draw = torch.Generator().manual_seed(mix(mix(5, step, 0), place))
                z.append(torch.randn(p.numel(), generator=draw, dtype=torch.float64).view_as(p))
            sides = []
            for sign in (1, -1):
                for (_, p), d in zip(named, z, strict=True):
                    p += sign * 0.01 * d
                # The Trainer divides by the labels of the update, those of first tokens with them.
                logits = model(ids).logits[:, :-1].transpose(1, 2)
                loss = nn.functional.cross_entropy(logits, labels[:, 1:], reduction="sum") / (labels != -100).sum()
                sides.append(loss.item())
                for (_, p), d in zip(named, z, strict=True):
                    p -= sign * 0.01 * d
            g = (sides[0] - sides[1]) / 0.02
            for (name, p), d in zip(named, z, strict=True):
                p -= lr * (g * d + (0.1 * p if name in decayed else 0))
            logged = job.state.log_history[step]
            assert logged["mezo/projected_grad"] == pytest.approx(abs(g), rel=1e-6)
            assert logged["loss"] == pytest.approx(sum(sides) / 2, rel=1e-4)
    assert (flat(model) - flat(job.model)).abs().max() < 1e-10
    assert (flat(model) - flat(double())).abs().max() > 1e-3


def test_accumulation_does_not_change_the_trajectory(tmp_path):
    runs = [
        flat(
            run_training(
                double(), "mezo", "eps=0.01,directions=2", tmp_path, trainer=InDouble, per_device_train_batch_size=b,
                gradient_accumulation_steps=8 // b, **QUIET,
            ).model
        )
        for b in (8, 4, 2)
    ]  # fmt: skip
    # 20 rows in updates of 8: the last update of an epoch is ragged.
    assert max((r - runs[0]).abs().max() for r in runs) < 1e-9
    assert (runs[0] - flat(double())).abs().max() > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_bitwise(tmp_path, dtype):
    options = dict(learning_rate=1e-2, max_steps=5, gradient_accumulation_steps=2, per_device_train_batch_size=2)
    straight = run_training(
        gpt2(0.1, dtype), "mezo", None, tmp_path / "a", save_strategy="steps", save_steps=3, **options
    )
    again = gpt2(0.1, dtype)
    with torch.no_grad():
        for p in again.parameters():
            p.zero_()
    resumed = run_training(again, "mezo", None, tmp_path / "b", resume=str(tmp_path / "a" / "checkpoint-3"), **options)
    assert torch.equal(flat(straight.model), flat(resumed.model))
    assert resumed.optimizer.optimizer.projected == straight.optimizer.optimizer.projected


def test_the_checkpoint_is_the_trajectory_and_replays_the_training(tmp_path):
    options = dict(save_strategy="steps", save_steps=3, weight_decay=0.1, **QUIET)
    run = run_training(gpt2(), "mezo", "restore=exact,directions=2", tmp_path, **options)
    path = tmp_path / "checkpoint-3" / "optimizer.pt"
    saved = torch.load(path, weights_only=True)
    assert saved["state"] == {} and path.stat().st_size < 20_000
    fresh = gpt2()
    decayed = [p for p in fresh.parameters() if p.dim() > 1]
    rest = [p for p in fresh.parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = MeZO(groups, lr=1.0, directions=2, run_seed=saved["hfext"]["seed"])
    optimizer.replay(saved["hfext"])
    assert torch.equal(flat(fresh), flat(run.model)) and optimizer.updates == 3


def test_the_trajectory_of_twenty_thousand_updates_is_small():
    optimizer = MeZO([nn.Parameter(torch.zeros(1))])
    optimizer.projected, optimizer.rates = [[0.5]] * 20_000, [[1e-6, 1e-6]] * 20_000
    own = optimizer.state_dict()["hfext"]
    assert sum(x.nbytes for x in own.values() if isinstance(x, torch.Tensor)) == 640_000


def test_every_evaluation_is_in_eval_mode_without_gradients_and_at_the_same_noise(tmp_path):
    seen = []

    class Notes(Trainer):
        def compute_loss(self, model, inputs, **kwargs):
            loss = super().compute_loss(model, inputs, **kwargs)
            parts = any(m.training for m in model.modules() if m is not model)
            assert model.training  # by which trainers and losses know that they train
            seen.append((parts, loss.requires_grad, [p.grad for p in model.parameters()], loss.item()))
            return loss

    model = gpt2(0.5)
    job = run_training(model, "mezo", None, tmp_path, trainer=Notes, gradient_accumulation_steps=2, **QUIET)
    assert len(seen) == 2 * (2 + 2 + 1)
    assert all(not training and not graph and grads == [None] * len(grads) for training, graph, grads, _ in seen)
    assert all(p.grad is None for p in job.model.parameters())
    assert job.state.log_history[0]["grad_norm"] == 0 and model.training


def test_dropout_does_not_move_the_global_generator(tmp_path):
    states = []
    for optim, options in (("mezo", "directions=3"), ("mezo", "directions=1")):
        torch.manual_seed(3)
        run_training(gpt2(0.2), optim, options, tmp_path, **QUIET)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_peak_memory_is_that_of_a_forward_pass(tiny_llama):
    model = tiny_llama()
    with torch.no_grad():
        ids = torch.randint(3, 100, (8, 64), generator=torch.Generator().manual_seed(0))
        with LiveBytes() as forward:
            model(input_ids=ids, labels=ids).loss.item()
        optimizer = MeZO(model.parameters(), lr=1e-4, directions=2)
        with LiveBytes() as update:
            optimizer.step(lambda: model(input_ids=ids, labels=ids).loss)
    assert forward.peak > 100_000
    assert update.peak <= 1.05 * forward.peak


def test_an_objective_without_gradient_trains():
    """Fraction of wrong signs, which is flat almost everywhere, by a step as long as the noise."""
    torch.manual_seed(0)
    x, truth = torch.randn(200, 5), torch.randn(5)
    w = nn.Parameter(torch.zeros(5))
    optimizer = MeZO([w], lr=0.3, eps=0.5, directions=4)

    def wrong():
        return ((x @ w > 0) != (x @ truth > 0)).float().mean()

    for _ in range(60):
        optimizer.step(wrong)
    assert wrong() < 0.12


def test_the_trainer_takes_an_error_rate_as_its_loss(tmp_path):
    def error_rate(outputs, labels, num_items_in_batch=None):
        scored = labels[:, 1:] != -100
        wrong = (outputs.logits[:, :-1].argmax(-1) != labels[:, 1:]) & scored
        return wrong.sum() / (scored.sum() if num_items_in_batch is None else num_items_in_batch)

    model = double()
    args = TrainingArguments(
        str(tmp_path), optim="mezo", optim_args="eps=0.3", max_steps=4, learning_rate=1e-2, report_to=[],
        use_cpu=True, disable_tqdm=True, logging_steps=1, per_device_train_batch_size=8,
    )  # fmt: skip
    job = Trainer(model, args, train_dataset=language_data(8), compute_loss_func=error_rate)
    job.train()
    losses = [line["loss"] for line in job.state.log_history if "loss" in line]
    assert all(0.5 < x <= 1 for x in losses) and not torch.equal(flat(model), flat(double()))


def test_a_loss_that_is_not_finite_never_reaches_the_weights(tmp_path):
    class Explodes(Trainer):
        def compute_loss(self, model, inputs, **kwargs):
            loss = super().compute_loss(model, inputs, **kwargs)
            return loss * float("nan") if self.state.global_step == 1 else loss

    job = run_training(double(), "mezo", "restore=exact", tmp_path, trainer=Explodes, logging_nan_inf_filter=False,
                       **QUIET)  # fmt: skip
    assert torch.isfinite(flat(job.model)).all()
    assert [any(found) for found in job.optimizer.optimizer.projected] == [True, False, True]


def test_evaluation_and_saving_see_the_trained_weights(tmp_path):
    seen, steps = [], {}

    class Evaluates(Trainer):
        def evaluate(self, *args, **kwargs):
            seen.append(flat(self.model))
            return super().evaluate(*args, **kwargs)

    class Note(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            steps[state.global_step] = flat(model)

    run_training(
        gpt2(), "mezo", None, tmp_path, trainer=Evaluates, callbacks=[Note()], eval_dataset=language_data(4),
        eval_strategy="steps", eval_steps=1, **QUIET,
    )  # fmt: skip
    assert len(seen) == 3 and all(torch.equal(a, b) for a, b in zip(seen, steps.values(), strict=True))


def test_lora_moves_the_adapter_alone(tmp_path):
    from peft import LoraConfig, get_peft_model

    base = gpt2()
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    job = run_training(model, "mezo", None, tmp_path, **QUIET)
    assert all(torch.equal(p, frozen[n]) for n, p in job.model.named_parameters() if not p.requires_grad)
    assert all(p.abs().max() > 0 for n, p in job.model.named_parameters() if "lora_B" in n)


TWO = """
import os, sys, torch
torch.set_num_threads(1)
sys.path.insert(0, "{here}")
from optim_training import *
from test_mezo import InDouble
rank = int(os.environ["RANK"])
model = gpt2().double()
if rank: [p.data.mul_(1.5) for p in model.parameters()]
seed = "seed=3" if {same} else f"seed={{3 + rank}}"
try:
    job = run_training(model, "{optim}", "eps=0.01," + seed, "{folder}", learning_rate=1e-2, max_steps=3,
        trainer=InDouble, per_device_train_batch_size=2, gradient_accumulation_steps=2)
except RuntimeError as error:
    assert not {same} and "different directions" in str(error), error
    sys.exit(0)
assert {same}
kind = type(job.model_wrapped).__name__
assert kind == "GPT2LMHeadModel", kind
torch.save(flat(job.model), f"{folder}/rank{{rank}}.pt")
"""


@pytest.mark.multiprocess
def test_two_processes_equal_one_and_hold_the_same_bits(tmp_path):
    run_two(TWO.format(same=True, optim="mezo", here=Path(__file__).parent, folder=tmp_path))
    first, second = (torch.load(tmp_path / f"rank{i}.pt") for i in range(2))
    assert torch.equal(first, second)
    one = run_training(
        double(), "mezo", "eps=0.01,seed=3", tmp_path, trainer=InDouble, per_device_train_batch_size=8, **QUIET
    )
    assert (first - flat(one.model)).abs().max() < 1e-9


@pytest.mark.slow
@pytest.mark.multiprocess
def test_processes_with_different_seeds_are_stopped(tmp_path):
    run_two(TWO.format(same=False, optim="mezo", here=Path(__file__).parent, folder=tmp_path))


def test_one_flipped_bit_changes_the_digest():
    torch.manual_seed(0)
    weights = [torch.randn(700, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.float64)]
    before = digest(weights)
    assert before == digest([w.clone() for w in weights])
    assert before != digest([weights[0], weights[1].flip(0), weights[2]])
    weights[1].view(torch.int16)[333] ^= 1
    assert digest(weights) != before


# ---- bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("eps=0", "eps is 0"),
        ("eps=.inf", "eps is inf"),
        ("directions=0", "directions is 0"),
        ("restore=copy", "restore is 'copy'"),
        ("seed=-1", "seed is -1"),
        ("epz=1", "unknown key 'epz'. Did you mean 'eps'"),
        ("base=adamw", "unknown key 'base'"),
        ("lr=1e-6", "Use learning_rate="),
    ],
)
def test_bad_options_are_named_when_the_arguments_are_made(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        TrainingArguments(str(tmp_path), optim="mezo", optim_args=text)


def test_settings_that_cannot_work_are_refused(tmp_path):
    with pytest.raises(NotImplementedError, match="bf16=True"):
        TrainingArguments(str(tmp_path), optim="mezo", fp16=True, use_cpu=True)
    with pytest.raises(ValueError, match="cannot be a base"):
        TrainingArguments(str(tmp_path), optim="sam", optim_args="base=mezo")
    with pytest.raises(RuntimeError, match="without values of the loss"):
        MeZO([nn.Parameter(torch.zeros(2))]).step()


def test_a_model_with_quantised_weights_is_refused(tmp_path, tiny_llama):
    model = tiny_llama()
    hfext.quantization.quantize(model, hfext.quantization.RTNConfig(bits=4, group_size=16))
    with pytest.raises(ValueError, match="purely quantized models. Please attach trainable adapters"):
        run_training(model, "mezo", None, tmp_path, data=language_data(4), **QUIET)


@pytest.mark.parametrize("spoil", ["projected", "rates", "counts", "seed"])
def test_a_corrupt_checkpoint_is_refused_and_nothing_changes(spoil):
    w = nn.Parameter(torch.ones(3))
    optimizer = MeZO([w], lr=0.1)
    optimizer.step(lambda: w.sum())
    state = optimizer.state_dict()
    bad = {
        "projected": torch.tensor([math.nan]),
        "rates": torch.zeros(4, 1),
        "counts": torch.tensor([2]),
        "seed": "7",
    }
    state["hfext"][spoil] = bad[spoil]
    before = (list(optimizer.projected), w.detach().clone())
    with pytest.raises(ValueError, match="Corrupt optimizer state"):
        optimizer.load_state_dict(state)
    assert optimizer.projected == before[0] and torch.equal(w, before[1])


def test_another_seed_does_not_go_on_from_a_checkpoint():
    w = nn.Parameter(torch.ones(3))
    optimizer = MeZO([w], seed=1)
    optimizer.step(lambda: w.sum())
    with pytest.raises(ValueError, match="trained with seed 1, this run has seed 2"):
        MeZO([w], seed=2).load_state_dict(optimizer.state_dict())


def test_autocast_around_the_step_sees_the_moved_weights():
    torch.manual_seed(0)
    layer, x = nn.Linear(8, 8), torch.randn(4, 8)
    inside, outside = (MeZO(copy.deepcopy(layer).parameters(), eps=0.1) for _ in range(2))
    models = []
    for optimizer, around in ((inside, False), (outside, True)):
        model = nn.Linear(8, 8)
        model.load_state_dict(layer.state_dict())
        optimizer.param_groups[0]["params"] = list(model.parameters())
        models.append(model)

        def loss(model=model, around=around):
            with contextlib.nullcontext() if around else torch.autocast("cpu", torch.bfloat16):
                return model(x).float().sum()

        with torch.autocast("cpu", torch.bfloat16) if around else contextlib.nullcontext():
            optimizer.step(loss)
    assert inside.projected == outside.projected and abs(inside.projected[0][0]) > 1


def test_frozen_parameters_stay_and_keep_their_place():
    frozen, trained = nn.Parameter(torch.ones(3), requires_grad=False), nn.Parameter(torch.ones(3))
    optimizer = MeZO([frozen, trained, trained], lr=0.1)
    assert [(place, weight is trained) for place, _, weight in optimizer.weights()] == [(1, True)]
    optimizer.step(lambda: (trained + frozen).sum())
    assert torch.equal(frozen, torch.ones(3)) and not torch.equal(trained, torch.ones(3))


def test_nothing_to_train_is_said(tmp_path):
    with pytest.raises(ValueError, match="is_trainable=True"):
        MeZO([nn.Parameter(torch.ones(2), requires_grad=False)])
    model = gpt2().requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter to train"):
        run_training(model, "mezo", None, tmp_path, **QUIET)


def test_noise_of_many_directions_takes_no_more_memory_than_of_one():
    peaks = []
    for directions in (1, 32):
        w = nn.Parameter(torch.zeros(5000))
        optimizer = MeZO([w], directions=directions)
        with LiveBytes() as update:
            optimizer.step(lambda w=w: w.sum())
        peaks.append(update.peak)
    assert peaks[1] <= 1.05 * peaks[0]


def test_the_model_is_in_training_mode_after_an_evaluation_and_its_inputs_are_for_training(tmp_path):
    seen = []

    class Notes(Trainer):
        def _prepare_inputs(self, inputs):
            seen.append(self.model.training)
            return super()._prepare_inputs(inputs)

        def evaluate(self, *args, **kwargs):
            count = len(seen)
            result = super().evaluate(*args, **kwargs)
            del seen[count:]
            return result

    run_training(gpt2(), "mezo", None, tmp_path, trainer=Notes, eval_dataset=language_data(4),
                 eval_strategy="steps", eval_steps=1, **QUIET)  # fmt: skip
    assert seen == [True] * 3


def test_penalties_of_a_trainer_are_part_of_the_loss(tmp_path):
    from hfext.training import ZLossConfig, ZLossTrainer

    args = dict(output_dir=str(tmp_path), optim="mezo", max_steps=2, learning_rate=1e-2, report_to=[], use_cpu=True,
                disable_tqdm=True, logging_steps=1)  # fmt: skip
    finals = []
    for coefficient in (0.0, 1.0):
        job = ZLossTrainer(gpt2(), TrainingArguments(**args), train_dataset=language_data(8),
                           z_loss=ZLossConfig(coefficient=coefficient))  # fmt: skip
        job.train()
        finals.append((flat(job.model), job.state.log_history[0].get("z_loss")))
    assert not torch.equal(finals[0][0], finals[1][0]) and finals[1][1] > 0


def test_metrics_of_a_trainer_count_each_batch_once(tmp_path):
    class Counts(Trainer):
        _metrics = None

        def compute_loss(self, model, inputs, **kwargs):
            self._metrics = {"batches": (self._metrics or {"batches": 0})["batches"] + 1}
            return super().compute_loss(model, inputs, **kwargs)

    job = run_training(gpt2(), "mezo", "directions=2", tmp_path, trainer=Counts, gradient_accumulation_steps=2,
                       **QUIET)  # fmt: skip
    assert job._metrics == {"batches": 5}  # 20 rows in batches of 4


def test_an_infinite_loss_and_a_batch_that_an_error_left_change_nothing(tmp_path):
    w = nn.Parameter(torch.ones(3))
    optimizer = MeZO([w], restore="exact", weight_decay=0.5, lr=0.1)
    optimizer.step(lambda: w.sum() * math.inf)
    assert torch.equal(w, torch.ones(3)) and optimizer.projected == [[]]

    class Once(Trainer):
        failed = False

        def compute_loss(self, model, inputs, **kwargs):
            if self.state.global_step == 1 and not self.failed:
                self.failed = True
                raise RuntimeError("once")
            return super().compute_loss(model, inputs, **kwargs)

    straight = run_training(gpt2(), "mezo", "restore=exact", tmp_path, gradient_accumulation_steps=2, **QUIET)
    job = Once(gpt2(), straight.args, train_dataset=language_data())
    with pytest.raises(RuntimeError, match="once"):
        job.train()
    job.train()
    assert job.optimizer.optimizer.updates == 4 and "_hfext_zeroth" not in vars(job)


def test_an_interrupt_in_the_middle_of_a_walk_waits_until_it_is_done(monkeypatch):
    w = [nn.Parameter(torch.ones(4)) for _ in range(3)]
    optimizer, calls = MeZO(w, eps=0.1), []
    original = apply_

    def interrupted(weight, moves, place):
        calls.append(place)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        original(weight, moves, place)

    monkeypatch.setattr("hfext.optim.mezo.apply_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(lambda: sum(x.sum() for x in w))
    assert calls == [0, 1, 2, 0, 1, 2] and not optimizer.is_perturbed
    assert all((x - 1).abs().max() < 1e-6 for x in w)


def test_a_copy_of_the_optimizer_goes_on():
    w = nn.Parameter(torch.ones(3))
    optimizer = MeZO([w], lr=0.1, seed=3)
    optimizer.step(lambda: w.sum())
    for again in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        v = again.param_groups[0]["params"][0]
        again.step(lambda v=v: v.sum())
        assert again.updates == 2 and again.seed == 3
    with pytest.raises(ValueError, match="groups cannot be added"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})


def test_state_of_others_and_a_second_replay_are_refused():
    w = nn.Parameter(torch.ones(3))
    optimizer = MeZO([w], lr=0.1)
    optimizer.step(lambda: w.sum())
    with pytest.raises(ValueError, match="replay begins with none"):
        optimizer.replay(optimizer.state_dict()["hfext"])
    adam = torch.optim.AdamW([w])
    with pytest.raises(ValueError, match="saved by another optimizer"):
        MeZO([w]).load_state_dict(adam.state_dict())
    byte = hfext.optim.JustOneByte([w])
    byte.step(lambda: w.sum())
    with pytest.raises(ValueError, match="method 'JustOneByte'"):
        MeZO([w]).load_state_dict(byte.state_dict())
    with pytest.raises(ValueError, match="lowest -20, this run has lowest -10"):
        hfext.optim.JustOneByte([w], lowest=-10).load_state_dict(byte.state_dict())
    two = [{"params": [w]}, {"params": [nn.Parameter(torch.ones(1))]}]
    with pytest.raises(ValueError, match="of 1 groups, the optimizer has 2"):
        MeZO(two).replay(optimizer.state_dict()["hfext"])


@pytest.mark.parametrize(
    "options",
    [dict(lr=-1.0), dict(lr=math.nan), dict(weight_decay=-1.0), dict(directions=1.5), dict(directions=True),
     dict(seed=1.5), dict(eps="x"), dict(eps=True)],
)  # fmt: skip
def test_numbers_out_of_range_are_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        MeZO([nn.Parameter(torch.ones(2))], **options)


def test_no_closure_is_said():
    with pytest.raises(ValueError, match="no closure"):
        MeZO([nn.Parameter(torch.ones(2))]).step([])
