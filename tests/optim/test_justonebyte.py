"""Just One Byte: the byte, machines against one machine with all samples, late machines, and machines that differ."""

import math
from pathlib import Path

import pytest
import torch
from optim_training import flat, gpt2, language_data, run_training
from processes import run_two
from torch import nn
from transformers import TrainingArguments

from hfext.optim import JustOneByte
from hfext.optim import justonebyte as module
from hfext.optim._zeroth import Move, apply_, mix
from hfext.optim.justonebyte import LEVELS, decode, encode

OPTIONS = dict(learning_rate=1e-2, max_steps=3, weight_decay=0.1)

# ---- the byte ---------------------------------------------------------------------------------------------------


def test_there_are_255_values_and_each_comes_back():
    values = {decode(code, -20) for code in range(256)}
    assert len(values) == 255  # minus zero is zero
    for code in range(256):
        assert encode(decode(code, -20), -20) == (0 if code == 128 else code)
        assert encode(decode(code, -20), -20, coin=0.999999) == (0 if code == 128 else code)
    assert decode(1, -20) == 2.0**-20 and decode(LEVELS, -20) == 2.0**11.5


def test_rounding_to_the_nearest_level_is_within_an_eighth_of_an_octave():
    draw = torch.Generator().manual_seed(0)
    values = 2 ** torch.empty(10_000, dtype=torch.float64).uniform_(-20, 11.5, generator=draw)
    for value in values.tolist():
        for signed in (value, -value):
            sent = decode(encode(signed, -20), -20)
            assert math.copysign(1, sent) == math.copysign(1, signed)
            assert abs(sent / signed - 1) <= 2 ** (1 / 8) - 1 + 1e-12


@pytest.mark.parametrize("value", [0.3, -1.7, 900.0, 2.0**-20.4, -(2.0**-23), 0.0])
def test_rounding_at_random_is_the_value_in_the_mean(value):
    coins = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    mean = sum(decode(encode(value, -20, coin), -20) for coin in coins.tolist()) / len(coins)
    assert mean == pytest.approx(value, rel=2e-4, abs=1e-12)


def test_what_cannot_be_sent_is_zero_or_the_largest_and_is_said(caplog):
    for value in (math.nan, math.inf, -math.inf):
        assert encode(value, -20) == encode(value, -20, 0.5) == 0
    assert encode(1e9, -20) == LEVELS and encode(-1e9, -20, 0.1) == LEVELS | 128
    assert encode(2.0**-22, -20) == 0 and encode(0.51 * 2.0**-20, -20) == 1


# ---- machines ---------------------------------------------------------------------------------------------------


def quadratics(count=4):
    draw = torch.Generator().manual_seed(2)
    return [torch.randn(6, generator=draw, dtype=torch.float64) for _ in range(count)]


def test_one_update_is_the_sum_over_samples_divided_by_its_root():
    targets = quadratics()
    w = nn.Parameter(torch.ones(6, dtype=torch.float64))
    optimizer = JustOneByte([w], lr=0.1, weight_decay=0.5, eps=0.01, seed=4, rounding="nearest")
    expected = torch.ones(6, dtype=torch.float64) * (1 - 0.1 * 0.5)
    for s, target in enumerate(targets):
        z = torch.zeros(6, dtype=torch.float64)
        apply_(z, [Move(mix(4, 0, s), 1.0)], 0)
        g = decode(encode(float((1 - target) @ z), -20), -20)  # exact for a quadratic
        expected -= 0.1 / math.sqrt(4) * g * z
    loss = optimizer.step([lambda t=t: 0.5 * ((w - t) ** 2).sum() for t in targets])
    assert torch.allclose(w, expected, rtol=1e-12)
    middle = sum(0.5 * ((1 - t) ** 2).sum() for t in targets) / 4
    assert loss == pytest.approx(float(middle), rel=1e-2) and optimizer.bytes_sent == 4


def machines(monkeypatch, count, samples, updates, tamper=None):
    """`count` machines in one process, that speak by a table; their weights after `updates`."""
    import threading

    barrier, table, local = threading.Barrier(count, timeout=20), {}, threading.local()

    def gathered(numbers):
        table[local.rank] = numbers
        barrier.wait()
        everyone = torch.stack([table[i] for i in range(count)])
        barrier.wait()
        return everyone

    monkeypatch.setattr(module, "gathered", gathered)
    monkeypatch.setattr(module, "rank_and_processes", lambda: (local.rank, count))
    targets, finals, errors = quadratics(count * samples), [None] * count, [None] * count

    def machine(rank):
        local.rank = rank
        torch.set_num_threads(1)
        w = nn.Parameter(torch.ones(6, dtype=torch.float32))
        mine = dict(seed=4 + rank) if tamper == "seed" else dict(seed=4)
        mine |= dict(lowest=-20 + rank) if tamper == "settings" else {}
        optimizer = JustOneByte([w], lr=0.05, eps=0.01, check_every=2, **mine)
        own = [targets[j * count + rank].float() for j in range(samples - (tamper == "samples" and rank))]
        try:
            for update in range(updates):
                if tamper == "weight" and rank == 1 and update == 1:
                    w.data.view(torch.int32)[3] ^= 1
                optimizer.step([lambda t=t: 0.5 * ((w - t) ** 2).sum() for t in own])
        except threading.BrokenBarrierError:
            pass
        except RuntimeError as error:
            errors[rank] = error
            barrier.abort()
        finals[rank] = (w.detach().clone(), optimizer)

    threads = [threading.Thread(target=machine, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return finals, errors


def test_machines_with_samples_of_their_own_are_one_machine_with_all(monkeypatch):
    (one,), _ = machines(monkeypatch, 1, 6, 5)
    for count in (2, 3):
        finals, errors = machines(monkeypatch, count, 6 // count, 5)
        assert errors == [None] * count
        assert all(torch.equal(w, one[0]) for w, _ in finals)
        assert all(optimizer.bytes_sent == 5 * 6 for _, optimizer in finals)
        assert finals[0][1].projected == one[1].projected


@pytest.mark.parametrize(
    ("tamper", "message"),
    [("weight", "weights differ"), ("seed", "seeds differ"), ("settings", "settings differ"),
     ("samples", "samples differ")],
)  # fmt: skip
def test_machines_that_differ_are_stopped(monkeypatch, tamper, message):
    finals, errors = machines(monkeypatch, 2, 2, 6, tamper)
    found = [error for error in errors if error is not None]
    assert found and all(message in str(error) for error in found)
    assert all(optimizer.updates <= 2 for _, optimizer in finals)


def test_a_late_machine_replays_the_log_to_the_same_bits(tmp_path):
    run = run_training(
        gpt2(), "justonebyte", None, tmp_path, gradient_accumulation_steps=3, save_strategy="steps", save_steps=3,
        **OPTIONS,
    )  # fmt: skip
    saved = torch.load(tmp_path / "checkpoint-3" / "optimizer.pt", weights_only=True)
    log = saved["hfext"]
    # 5 batches an epoch: the second update of an epoch has two samples.
    assert log["projected"].dtype == torch.uint8 and log["counts"].tolist() == [3, 2, 3]
    late = gpt2()
    groups = [
        {"params": [p for p in late.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in late.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = JustOneByte(groups, lr=1.0, seed=log["seed"])
    optimizer.replay(log)
    assert torch.equal(flat(late), flat(run.model))
    assert optimizer.projected == run.optimizer.optimizer.projected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_bitwise(tmp_path, dtype):
    options = dict(learning_rate=1e-2, max_steps=4, gradient_accumulation_steps=2, per_device_train_batch_size=4)
    straight = run_training(
        gpt2(0.1, dtype), "justonebyte", None, tmp_path / "a", save_strategy="steps", save_steps=2, **options
    )
    resumed = run_training(
        gpt2(0.0, dtype), "justonebyte", None, tmp_path / "b", resume=str(tmp_path / "a" / "checkpoint-2"), **options
    )
    assert torch.equal(flat(straight.model), flat(resumed.model))


TWO = """
import os, torch, hfext
torch.set_num_threads(1)
from optim_training import *
rank = int(os.environ["RANK"])
job = run_training(gpt2(), "justonebyte", "seed=3", "{folder}", learning_rate=1e-2, max_steps=3,
    per_device_train_batch_size=2, gradient_accumulation_steps=2, data=language_data(24))
optimizer = job.optimizer.optimizer
assert optimizer.bytes_sent == 3 * 4, optimizer.bytes_sent
assert type(job.model_wrapped).__name__ == "GPT2LMHeadModel"
torch.save(flat(job.model), f"{folder}/rank{{rank}}.pt")
"""


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_in_the_trainer_are_one_with_all_samples_bit_for_bit(tmp_path):
    run_two(TWO.format(folder=tmp_path))
    one = run_training(
        gpt2(), "justonebyte", "seed=3", tmp_path, learning_rate=1e-2, max_steps=3, per_device_train_batch_size=2,
        gradient_accumulation_steps=4, data=language_data(24),
    )  # fmt: skip
    for i in range(2):
        assert torch.equal(torch.load(Path(tmp_path) / f"rank{i}.pt"), flat(one.model))


def test_each_micro_batch_has_the_mean_loss_of_its_own_tokens(tmp_path):
    """A row with three labels counts as much as one with nine."""
    from transformers import Trainer

    seen = []

    class Notes(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None, **kwargs):
            loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch, **kwargs)
            shifted = inputs["labels"][:, 1:]
            logits = model(inputs["input_ids"]).logits[:, :-1]
            mean = nn.functional.cross_entropy(logits.transpose(1, 2), shifted)
            seen.append((loss.item(), mean.item(), num_items_in_batch))
            return loss

    run_training(gpt2(), "justonebyte", None, tmp_path, trainer=Notes, gradient_accumulation_steps=4,
                 per_device_train_batch_size=1, learning_rate=1e-2, max_steps=1)  # fmt: skip
    assert len(seen) == 8
    for loss, mean, items in seen:
        assert items is None and loss == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("eps=0", "eps is 0"),
        ("lowest=40", "lowest is 40"),
        ("rounding=up", "rounding is 'up'"),
        ("check_every=0", "check_every is 0"),
        ("directions=2", "unknown key 'directions'"),
    ],
)
def test_bad_options_are_named(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        TrainingArguments(str(tmp_path), optim="justonebyte", optim_args=text)


def test_every_sample_has_a_coin_of_its_own():
    optimizer = JustOneByte([nn.Parameter(torch.ones(2))], seed=4)
    between = 2 ** (1 / 8)  # halfway between two levels: about half of the coins go up
    codes = [optimizer._code(between, sample) for sample in range(400)]
    assert len(set(codes)) == 2 and 120 < codes.count(min(codes)) < 280
    directions = [seed / 2**63 for seed in optimizer.directions(400)]
    coins = [code == max(codes) for code in codes]
    low = sum(x for x, up in zip(directions, coins, strict=True) if up) / sum(coins)
    assert abs(low - 0.5) < 0.1  # the coin does not follow from the direction
