"""What every optimizer with one gradient an update must do, as checks that its tests call with its name."""

import copy
import dataclasses
import io
import json
import pickle

import pytest
import torch
from optim_training import flat, gpt2, language_data, run_training
from torch import nn
from torch.nn import functional as F
from transformers import GPT2Config, HfArgumentParser, TrainingArguments

from hfext import registry
from hfext.optim import mup

X = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))
Y = torch.arange(16) % 5


def net(dtype=torch.float32, seed=0):
    """6-8-5 with biases, the same for a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).to(dtype)


def train(model, optimizer, steps, start=0):
    """Steps on batches that differ from step to step; returns the weights."""
    for i in range(start, start + steps):
        optimizer.zero_grad()
        rows = (torch.arange(8) * 3 + i) % 16
        F.cross_entropy(model(X[rows].to(next(model.parameters()).dtype)), Y[rows]).backward()
        optimizer.step()
    return flat(model)


def through_a_file(state):
    """A state dict after `torch.save` and a load that lets only plain types in."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def check_resume(make, dtype, before, after):
    """`make(model)` saved after `before` steps and loaded into a new one ends with the same bits."""
    straight = net(dtype)
    optimizer = make(straight)
    train(straight, optimizer, before)
    weights, state = copy.deepcopy(straight.state_dict()), through_a_file(optimizer.state_dict())
    resumed = net(dtype)
    again = make(resumed)
    resumed.load_state_dict(weights)
    again.load_state_dict(state)
    for mine, theirs in zip(optimizer.state.values(), again.state.values(), strict=True):
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            if torch.is_tensor(value):
                assert value.dtype == theirs[key].dtype and torch.equal(value, theirs[key]), key
    assert torch.equal(train(straight, optimizer, after, before), train(resumed, again, after, before))
    assert not torch.equal(flat(straight), flat(net(dtype)))


def check_trainer_resume(name, optim_args, tmp_path, dtype=torch.float32, **options):
    """A Trainer that goes on from its checkpoint ends with the same bits."""
    kwargs = dict(learning_rate=1e-3, max_steps=5, gradient_accumulation_steps=2, per_device_train_batch_size=2)
    kwargs |= options
    straight = run_training(
        gpt2(0.1, dtype), name, optim_args, tmp_path / "a", save_strategy="steps", save_steps=3, **kwargs
    )
    checkpoint = tmp_path / "a" / "checkpoint-3"
    torch.load(checkpoint / "optimizer.pt", weights_only=True)
    resumed = run_training(gpt2(0.1, dtype), name, optim_args, tmp_path / "b", resume=str(checkpoint), **kwargs)
    assert torch.equal(flat(straight.model), flat(resumed.model))
    assert not torch.equal(flat(straight.model), flat(gpt2(0.1, dtype)))
    return straight


def check_accumulation(name, optim_args, tmp_path, tolerance=1e-7, **options):
    """Rows of an update in one batch, two or four: the same weights. In float64, since signs and roots magnify."""
    ends = [
        flat(
            run_training(
                gpt2(dtype=torch.float64),
                name,
                optim_args,
                tmp_path,
                per_device_train_batch_size=rows,
                gradient_accumulation_steps=8 // rows,
                learning_rate=1e-3,
                **options,
            ).model
        )
        for rows in (8, 4, 2)
    ]
    assert max((end - ends[0]).abs().max() for end in ends) <= tolerance
    assert (ends[0] - flat(gpt2(dtype=torch.float64))).abs().max() > 1e-4


def check_lora(name, optim_args, tmp_path):
    """The adapter moves, what it stands on does not. Returns the Trainer."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(gpt2(), LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    job = run_training(model, name, optim_args, tmp_path, learning_rate=1e-2, max_steps=4)
    moved = {n for n, p in job.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n, p in job.model.named_parameters() if p.requires_grad} and len(moved) == 4
    return job


def check_bfloat16(make):
    """Weights in bfloat16 move, their state is float32."""
    model = net(torch.bfloat16)
    optimizer = make(model)
    end = train(model, optimizer, 6)
    assert end.isfinite().all() and not torch.equal(end, flat(net(torch.bfloat16)))
    kinds = {x.dtype for s in optimizer.state.values() for x in s.values() if torch.is_tensor(x)}
    assert torch.float32 in kinds and torch.bfloat16 not in kinds


def check_base_of_sam(name, options, tmp_path):
    """SAM of radius 0 over the optimizer is the optimizer, with its options behind `base.`."""
    own = ",".join(f"{key}={value}" for key, value in options.items())
    behind = "".join(f",base.{key}={value}" for key, value in options.items())
    kwargs = dict(learning_rate=1e-3, max_steps=4, weight_decay=0.0)
    plain = run_training(gpt2(0.1), name, own, tmp_path, **kwargs)
    zero = run_training(gpt2(0.1), "sam", f"rho=0,base={name}{behind}", tmp_path, **kwargs)
    assert torch.equal(flat(plain.model), flat(zero.model))
    sam = run_training(gpt2(0.1), "sam", f"rho=0.05,base={name}{behind}", tmp_path / "s", **kwargs, save_steps=2,
                       save_strategy="steps")  # fmt: skip
    again = run_training(gpt2(0.1), "sam", f"rho=0.05,base={name}{behind}", tmp_path / "r", **kwargs,
                         resume=str(tmp_path / "s" / "checkpoint-2"))  # fmt: skip
    assert torch.equal(flat(sam.model), flat(again.model)) and not torch.equal(flat(sam.model), flat(plain.model))


def check_not_finite(make, caplog):
    """A gradient with a NaN changes neither weights nor state."""
    model = net()
    optimizer = make(model)
    train(model, optimizer, 3)
    weights, state = flat(model), copy.deepcopy(optimizer.state_dict())
    model[0].weight.grad[0, 0] = float("nan")
    optimizer.step()
    assert torch.equal(flat(model), weights)
    after = optimizer.state_dict()
    assert after["hfext_one_pass"] == state["hfext_one_pass"]
    for old, new in zip(state["state"].values(), after["state"].values(), strict=True):
        assert all(
            torch.equal(a, b) if torch.is_tensor(a) else a == b
            for a, b in zip(old.values(), new.values(), strict=True)
        )


def check_width_groups(make, exact):
    """muP's groups: each parameter moves with its own rate. `exact`: the first move is proportional to the rate."""
    model, narrow = gpt2(), GPT2Config(**{**gpt2().config.to_dict(), "n_embd": 16, "n_head": 2})
    mup.apply(model, narrow)
    groups = mup.param_groups(model, "adam", lr=1e-3)
    rates = {id(p): g["lr"] for g in groups for p in g["params"]}
    assert len(set(rates.values())) > 1

    def moves(params):
        twin = copy.deepcopy(model)
        names = dict(twin.named_parameters())
        mine = {id(p): names[n] for n, p in model.named_parameters()}
        optimizer = make([{**g, "params": [mine[id(p)] for p in g["params"]]} for g in params], twin)
        batch = torch.stack([row["input_ids"] for row in language_data(4)])
        for _ in range(2):
            optimizer.zero_grad()
            twin(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            if exact(optimizer):
                break
        return {n: (names[n] - p).detach().norm() for n, p in model.named_parameters()}

    scaled, plain = moves(groups), moves([{"params": list(model.parameters()), "lr": 1e-3, "weight_decay": 0.0}])
    for name, p in model.named_parameters():
        if plain[name] > 0:
            assert scaled[name] / plain[name] == pytest.approx(rates[id(p)] / 1e-3, rel=1e-2), name


def check_refusals(name, tmp_path, bad):
    """The name works in every form; bad options and sharding are answered when the arguments are made."""
    args = TrainingArguments(output_dir=str(tmp_path), optim=name)
    assert pickle.loads(pickle.dumps(args)).optim == name == json.loads(args.to_json_string())["optim"]
    (parsed,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--optim", name]
    )
    assert parsed.optim == name == TrainingArguments(output_dir=str(tmp_path)).set_optimizer(name=name).optim
    config = registry.get(name).config
    for field in dataclasses.fields(config):
        assert f"{field.name}:" in config.__doc__ or f"{field.name}," in config.__doc__, field.name
    for text, message in bad:
        with pytest.raises((ValueError, TypeError), match=message):
            TrainingArguments(output_dir=str(tmp_path), optim=name, optim_args=text)
    for option in ({"deepspeed": {"zero_optimization": {"stage": 1}}}, {"fsdp": "full_shard"}):
        with pytest.raises((NotImplementedError, ImportError), match="DistributedDataParallel|deepspeed"):
            TrainingArguments(output_dir=str(tmp_path), optim=name, **option)
