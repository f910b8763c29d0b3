"""The power schedule: golden values, what it must not depend on, and the real Trainer."""

import json
import math

import pytest
import torch
from optim_training import flat, gpt2, language_data, run_training
from processes import run_two
from torch.utils.data import IterableDataset
from transformers import HfArgumentParser, Trainer, TrainingArguments, get_scheduler
from transformers.trainer_utils import SchedulerType

import hfext  # noqa: F401
from hfext.optim import mup
from hfext.schedule import PowerConfig, power_schedule
from hfext.schedule.power import decay_factor, power_rate

EARLY = {"a": 1e-3, "b": -0.5}  # below a limit of 1e-2 after 10 rows of 10 tokens in batches of 4


def sgd(lr=0.02, groups=1):
    groups = [{"params": [torch.nn.Parameter(torch.ones(1))], "lr": lr / 4**i} for i in range(groups)]
    return torch.optim.SGD(groups, lr=lr)


def rates(warmup=0, steps=40, lr=0.02, group=0, optimizer=None, **options):
    """The rate of each update, and the one after the last."""
    optimizer = optimizer or sgd(lr)
    schedule = power_schedule(optimizer, warmup, steps, **{"batch_size": 8, "tokens_per_step": 4096, **options})
    found = []
    for _ in range(steps + 1):
        found.append(optimizer.param_groups[group]["lr"])
        optimizer.step()
        schedule.step()
    return found


def trained(folder, model=None, resume=None, **options):
    settings = dict(learning_rate=1e-2, lr_scheduler_type="power", lr_scheduler_kwargs=EARLY, max_steps=6)
    return run_training(model or gpt2(), "adamw_torch", None, folder, resume=resume, **{**settings, **options})


def logged(job):
    return [row["learning_rate"] for row in job.state.log_history if "learning_rate" in row]


# the rule


@pytest.mark.parametrize(
    "batch, tokens, expected",
    [(1024, 1e11, "0.0100545"), (1024, 1e12, "0.00310713"), (256, 1e10, "0.00813392"), (256, 1e12, "0.000776783")],
)
def test_golden_values(batch, tokens, expected):
    assert f"{power_rate(tokens, batch, 4, -0.51, 0.02):.6g}" == expected


def test_the_limit_holds_before_and_the_law_after_they_cross():
    cross = (0.02 / (1024 * 4)) ** (1 / -0.51)
    assert power_rate(0, 1024, 4, -0.51, 0.02) == power_rate(cross * 0.99, 1024, 4, -0.51, 0.02) == 0.02
    assert power_rate(cross * 1.01, 1024, 4, -0.51, 0.02) == pytest.approx(0.02 * 1.01**-0.51, rel=1e-12)


def test_every_update_has_the_rate_of_the_tokens_before_it():
    found = rates(steps=50, a=0.2, b=-0.51)
    assert found == pytest.approx([power_rate(4096 * s, 8, 0.2, -0.51, 0.02) for s in range(51)], rel=1e-14)
    assert found[1] == 0.02 > found[6] > found[50]


def test_a_limit_of_its_own_leaves_the_law_alone():
    limited, free = (rates(steps=50, a=0.2, lr_max=lr_max) for lr_max in (0.01, None))
    assert limited == pytest.approx([min(0.01, x) for x in free], rel=1e-14)


def test_a_schedule_is_a_prefix_of_a_longer_one():
    short, long = (rates(warmup=5, steps=steps, a=0.2) for steps in (30, 60))
    assert short == long[:31]


def test_twice_the_batch_has_twice_the_rate_at_as_many_tokens():
    one = rates(steps=60, batch_size=8, tokens_per_step=4096, a=0.1)
    two = rates(steps=30, batch_size=16, tokens_per_step=8192, a=0.1)
    power = [(x, y) for x, y in zip(one[::2], two, strict=True) if y < 0.02]
    assert len(power) > 20 and all(y == 2 * x for x, y in power)


@pytest.mark.parametrize("decay, ratio", [("linear", 0.0), ("linear", 0.1), ("exp", 0.01)])
def test_warm_up_and_decay_are_lines_that_meet_the_law(decay, ratio):
    found = rates(warmup=8, steps=40, a=0.2, decay=decay, decay_steps=10, min_lr_ratio=ratio)
    law = [power_rate(4096 * s, 8, 0.2, -0.51, 0.02) for s in range(41)]
    assert found[:9] == pytest.approx([law[8] * s / 8 for s in range(9)], rel=1e-14)
    assert found[8:31] == pytest.approx(law[8:31], rel=1e-14)
    expected = [law[30] * (ratio ** (i / 10) if decay == "exp" else 1 - (1 - ratio) * i / 10) for i in range(11)]
    assert found[30:] == pytest.approx(expected, rel=1e-12, abs=1e-18)
    assert decay_factor(1.0, decay, ratio) == pytest.approx(ratio)


def test_counted_tokens_give_the_same_schedule_and_stay_continuous():
    seen = [0]
    optimizer = sgd()
    options = dict(a=0.2, batch_size=8, decay="linear", decay_steps=10)
    schedule = power_schedule(optimizer, 8, 40, tokens_seen=lambda: seen[0], **options)
    found = []
    for _ in range(41):
        found.append(optimizer.param_groups[0]["lr"])
        seen[0] += 4096
        optimizer.step()
        schedule.step()
    assert found == pytest.approx(rates(warmup=8, a=0.2, decay="linear", decay_steps=10), rel=1e-12)


def test_groups_keep_their_ratios():
    first, second = (rates(warmup=3, a=0.2, optimizer=sgd(groups=2), group=i) for i in range(2))
    assert first == pytest.approx([4 * x for x in second], rel=1e-14)
    assert first == rates(warmup=3, a=0.2)


def test_groups_of_mup_keep_their_ratios_in_the_trainer(tmp_path, tiny_gpt2):
    model = tiny_gpt2(n_embd=64, n_head=8)
    mup.apply(model, tiny_gpt2().config)
    groups = mup.param_groups(model, "adam", lr=1e-2)
    ratios = [group["lr"] / 1e-2 for group in groups]
    assert len(set(ratios)) > 1
    job = trained(
        tmp_path, model, max_steps=5, trainer=lambda **k: Trainer(optimizers=(torch.optim.Adam(groups), None), **k)
    )
    last = [group["lr"] / power_rate(200, 4, 1e-3, -0.5, 1e-2) for group in job.optimizer.param_groups]
    assert last == pytest.approx(ratios, rel=1e-12)


# the Trainer


def test_the_trainer_counts_rows_and_tokens(tmp_path):
    """4 rows of 10 tokens, twice accumulated: 8 sequences and 80 tokens an update."""
    job = trained(tmp_path, gradient_accumulation_steps=2, data=language_data(48))
    assert logged(job) == pytest.approx([power_rate(80 * s, 8, 1e-3, -0.5, 1e-2) for s in range(6)], rel=1e-12)
    assert logged(job)[-1] < 1e-2
    assert job.args.lr_scheduler_kwargs == EARLY


def test_tokens_that_the_arguments_track_are_used(tmp_path):
    """Rows of two lengths: no number of tokens an update is right, so the count is."""
    data = language_data(24)
    for row in data[::3]:
        row.update(input_ids=row["input_ids"][:6], labels=row["labels"][:6])
    collator = Padding()
    job = trained(
        tmp_path,
        data=data,
        include_num_input_tokens_seen="non_padding",
        trainer=lambda **k: Trainer(data_collator=collator, **k),
    )
    seen = [0] + [row["num_input_tokens_seen"] for row in job.state.log_history if "learning_rate" in row]
    assert len(set(b - a for a, b in zip(seen, seen[1:], strict=False))) > 1
    assert logged(job) == pytest.approx([power_rate(n, 4, 1e-3, -0.5, 1e-2) for n in seen[:-1]], rel=1e-12)


class Padding:
    def __call__(self, rows):
        width = max(len(row["input_ids"]) for row in rows)

        def padded(name, value):
            return torch.stack(
                [torch.nn.functional.pad(r[name], (0, width - len(r[name])), value=value) for r in rows]
            )

        ids = padded("input_ids", 0)
        return {"input_ids": ids, "labels": padded("labels", -100), "attention_mask": (ids != 0).long()}


@pytest.mark.parametrize("tracked", [False, True])
def test_resume_is_bitwise(tmp_path, tracked):
    options = dict(
        warmup_steps=2,
        lr_scheduler_kwargs={**EARLY, "decay": "linear", "decay_steps": 2},
        include_num_input_tokens_seen=tracked,
        save_strategy="steps",
        save_steps=3,
    )
    straight = trained(tmp_path / "a", gpt2(dropout=0.1), **options)
    resumed = trained(tmp_path / "b", gpt2(dropout=0.1), resume=str(tmp_path / "a/checkpoint-3"), **options)
    assert torch.equal(flat(straight.model), flat(resumed.model))
    assert logged(straight) == logged(resumed)


TWO_PROCESSES = """
import json, torch
torch.set_num_threads(1)
from optim_training import gpt2, language_data, run_training
import hfext
job = run_training(
    gpt2(), "adamw_torch", None, {folder!r}, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=4,
    learning_rate=1e-2, lr_scheduler_type="power", lr_scheduler_kwargs={kwargs!r}, data=language_data(32),
    ddp_backend="gloo"
)
if job.is_world_process_zero():
    rates = [row["learning_rate"] for row in job.state.log_history if "loss" in row]
    open({folder!r} + "/rates.json", "w").write(json.dumps(rates))
"""


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_count(tmp_path):
    run_two(TWO_PROCESSES.format(folder=str(tmp_path), kwargs=EARLY))
    one = trained(
        tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=4, data=language_data(32)
    )
    found = json.loads((tmp_path / "rates.json").read_text())
    assert found == logged(one) == pytest.approx([power_rate(80 * s, 8, 1e-3, -0.5, 1e-2) for s in range(4)])


def test_stock_schedules_are_untouched(tmp_path):
    """The patched method calls the stock one and no more."""
    stock = Trainer.create_scheduler._hfext_original

    class Stock(Trainer):
        create_scheduler = stock

    ours, theirs = (
        trained(tmp_path, lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr": 1e-4}, trainer=kind)
        for kind in (Trainer, Stock)
    )
    assert torch.equal(flat(ours.model), flat(theirs.model)) and logged(ours) == logged(theirs)


def test_forms_of_the_name(tmp_path):
    kwargs = {"a": 3, "batch_size": 16}
    args = TrainingArguments(str(tmp_path), lr_scheduler_type="power", lr_scheduler_kwargs=kwargs, use_cpu=True)
    assert args.lr_scheduler_type == SchedulerType("power") == "power"
    line = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--lr_scheduler_type", "power"]
    (parsed,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(
        [*line, "--lr_scheduler_kwargs", json.dumps(kwargs)]
    )
    (tmp_path / "args.json").write_text(args.to_json_string())
    saved = json.loads((tmp_path / "args.json").read_text())
    assert saved["lr_scheduler_type"] == "power"
    (read,) = HfArgumentParser(TrainingArguments).parse_dict(
        {k: saved[k] for k in ("output_dir", "use_cpu", "lr_scheduler_type", "lr_scheduler_kwargs")}
    )
    for other in (parsed, read):
        assert other.lr_scheduler_type is args.lr_scheduler_type and other.lr_scheduler_kwargs == kwargs
    plain = TrainingArguments(str(tmp_path), use_cpu=True).set_lr_scheduler("power")
    assert plain.lr_scheduler_type is args.lr_scheduler_type
    schedule = get_scheduler(
        "power", sgd(), 0, 10, scheduler_specific_kwargs={**kwargs, "tokens_per_step": 100, "b": -1.0}
    )
    assert schedule.get_last_lr() == [0.02]


# bad input


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"a": 0}, "a is 0.0 but must be finite and > 0"),
        ({"b": 0.5}, "b is 0.5 but must be finite and < 0"),
        ({"b": math.nan}, "b is nan"),
        ({"lr_max": 0}, "lr_max is 0.0"),
        ({"batch_size": 0}, "batch_size is 0 but must be 'auto' or >= 1"),
        ({"tokens_per_step": "all"}, "tokens_per_step is 'all'"),
        ({"decay_steps": -1, "decay": "linear"}, "decay_steps is -1"),
        ({"decay_steps": 3}, "give both or neither"),
        ({"decay": "linear"}, "give both or neither"),
        ({"decay": "cosine", "decay_steps": 3}, "must be one of 'linear', 'exp', 'none'"),
        ({"decay": "exp", "decay_steps": 3}, "never gets there"),
        ({"min_lr_ratio": 1.0}, r"min_lr_ratio is 1.0 but must be in \[0, 1\)"),
        ({"batchsize": 3}, "no option 'batchsize'. Did you mean 'batch_size'"),
        ({"warmup": 3}, r"TrainingArguments\(warmup_steps="),
    ],
)
def test_bad_options_are_named_when_the_arguments_are_made(tmp_path, kwargs, message):
    with pytest.raises(ValueError, match=message):
        TrainingArguments(str(tmp_path), lr_scheduler_type="power", lr_scheduler_kwargs=kwargs, use_cpu=True)


def test_a_rate_of_zero_is_refused(tmp_path):
    with pytest.raises(ValueError, match="learning_rate is 0.0 but must be > 0"):
        TrainingArguments(str(tmp_path), lr_scheduler_type="power", learning_rate=0.0, use_cpu=True)


def test_batches_in_which_no_token_is_counted_are_an_error_that_says_what_to_pass(tmp_path):
    data = [{"inputs_embeds": torch.randn(10, 32), "labels": row["labels"]} for row in language_data()]
    options = dict(data=data, max_steps=2, include_num_input_tokens_seen=True)
    with pytest.raises(ValueError, match="no token was counted in 1 updates.*inputs_embeds.*tokens_per_step"):
        trained(tmp_path, **options)
    job = trained(tmp_path, lr_scheduler_kwargs={**EARLY, "tokens_per_step": 40}, **options)
    assert logged(job) == pytest.approx([power_rate(40 * s, 4, 1e-3, -0.5, 1e-2) for s in range(2)], rel=1e-12)


class Stream(IterableDataset):
    def __iter__(self):
        yield from language_data()


def uneven():
    return [{k: v[: 10 - i % 2] for k, v in row.items()} for i, row in enumerate(language_data())]


@pytest.mark.parametrize(
    "data, message",
    [(Stream(), "no rows to count"), (uneven(), "9 to 10 tokens"), ([{"x": 1}] * 4, "no list 'input_ids'")],
)
def test_tokens_that_cannot_be_counted_are_an_error_that_says_what_to_pass(tmp_path, data, message):
    options = {} if message != "no list 'input_ids'" else {"remove_unused_columns": False}
    with pytest.raises(ValueError, match=rf"{message}.*include_num_input_tokens_seen=True.*tokens_per_step"):
        trained(tmp_path, data=data, **options)


def test_tokens_that_are_passed_are_enough_for_a_stream(tmp_path):
    job = trained(tmp_path, data=Stream(), max_steps=4, lr_scheduler_kwargs={**EARLY, "tokens_per_step": 50})
    assert logged(job) == pytest.approx([power_rate(50 * s, 4, 1e-3, -0.5, 1e-2) for s in range(4)])


@pytest.mark.parametrize("name, value", [("batch_size", 8), ("tokens_per_step", 8)])
def test_auto_needs_a_trainer(name, value):
    with pytest.raises(ValueError, match="is 'auto', which only a Trainer can tell"):
        power_schedule(sgd(), 0, 10, **{name: value})


def test_phases_must_fit_into_the_run():
    with pytest.raises(ValueError, match=r"warmup_steps \(6\) and decay_steps \(5\) are more than the 10 updates"):
        rates(warmup=6, steps=10, decay="linear", decay_steps=5)


def test_a_limit_that_is_never_left_is_warned_about(caplog, monkeypatch):
    seen = []
    monkeypatch.setattr("hfext.schedule.power.logger.warning", seen.append)
    rates(lr=5e-5)
    assert "lr_max=5e-05 is below the power law to the end" in seen[0]
    seen.clear()
    rates(a=0.01)
    assert not seen


def test_defaults_are_the_papers():
    config = PowerConfig()
    assert (config.a, config.b, config.lr_max, config.decay) == (4.0, -0.51, None, "none")
