"""The two passes inside the Trainer, where every detail that goes wrong in practice has its test."""

import copy

import pytest
import torch
from optim_training import flat, language_data, run_training
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import hfext
from hfext.optim import SharpnessAware, sam_step
from hfext.optim._install import check_arguments


class Net(nn.Module):
    """Two layers with what makes a replay hard: BatchNorm, dropout, a parameter that gets no gradient."""

    def __init__(self, norm=True, dropout=0.0, momentum=0.1, tied=False):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)
        self.norm = nn.BatchNorm1d(6, momentum=momentum) if norm else nn.Identity()
        self.drop, self.unused = nn.Dropout(dropout), nn.Parameter(torch.ones(2))
        self.c = self.a if tied else nn.Identity()

    def forward(self, x, labels=None):
        logits = self.b(self.drop(self.c(torch.tanh(self.norm(self.a(x))))))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def vectors(n=16):
    generator = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(6, generator=generator), "labels": i % 3} for i in range(n)]


def by_hand(net, data, rho, steps, batch, lr=0.1, clip=None, ga=1):
    """SAM with SGD and a linear schedule, written out: the reference that shares no code with the library."""
    net.train()
    params = [p for p in net.parameters() if p is not net.unused]
    for t in range(steps):
        parts = [data[i * batch : (i + 1) * batch] for i in range(t * ga, (t + 1) * ga)]

        def gradient(parts=parts):
            total = 0.0
            for part in parts:
                x, y = torch.stack([d["x"] for d in part]), torch.tensor([d["labels"] for d in part])
                total = total + net(x, y)["loss"] / ga
            return torch.autograd.grad(total, params)

        g = gradient()
        norm = torch.sqrt(sum((v.double() ** 2).sum() for v in g))
        old = [p.detach().clone() for p in params]
        statistics = copy.deepcopy(
            {k: v for k, v in net.state_dict().items() if "norm." in k and "weight" not in k and "bias" not in k}
        )
        with torch.no_grad():
            for p, v in zip(params, g, strict=True):
                p += (rho / norm * v).to(p.dtype)
        g = gradient()
        net.load_state_dict(statistics, strict=False)
        if clip:
            total = torch.sqrt(sum((v**2).sum() for v in g))
            g = [v * min(1.0, clip / (total + 1e-6)) for v in g]
        with torch.no_grad():
            for p, o, v in zip(params, old, g, strict=True):
                p.copy_(o - lr * (1 - t / steps) * v)
    return net


class InOrder(Trainer):
    def _get_train_sampler(self, *args):
        return torch.utils.data.SequentialSampler(self.train_dataset)


@pytest.mark.parametrize("ga", [1, 2])
def test_equals_sam_by_hand_with_clipping_and_schedule(ga, tmp_path):
    data = vectors(32)
    job = run_training(
        Net(),
        "sam",
        "rho=0.3,base=sgd",
        tmp_path,
        data=data,
        trainer=InOrder,
        max_grad_norm=0.05,
        max_steps=4,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=ga,
    )
    hand = by_hand(Net(), data, 0.3, 4, 4, clip=0.05, ga=ga)
    assert (flat(job.model) - flat(hand)).abs().max() < 1e-7
    assert (flat(job.model) - flat(Net())).abs().max() > 1e-3


@pytest.mark.parametrize("momentum", [0.1, None])
def test_batchnorm_counts_each_batch_once_and_at_clean_weights(momentum, tmp_path):
    job = run_training(
        Net(momentum=momentum), "sam", "rho=2,base=sgd", tmp_path, data=vectors(), trainer=InOrder, max_grad_norm=0
    )
    hand = by_hand(Net(momentum=momentum), vectors(), 2.0, 3, 4)
    assert job.model.norm.num_batches_tracked == 3
    torch.testing.assert_close(job.model.norm.running_mean, hand.norm.running_mean)
    torch.testing.assert_close(job.model.norm.running_var, hand.norm.running_var)


def test_both_passes_see_the_same_noise_unless_told_otherwise(tmp_path):
    masks = []

    class Watched(Net):
        def forward(self, x, labels=None):
            masks.append(self.drop(torch.ones(64)))
            return super().forward(x, labels)

    run_training(Watched(dropout=0.5), "sam", "base=sgd", tmp_path, data=vectors())
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[1], masks[2])
    masks.clear()
    run_training(Watched(dropout=0.5), "sam", "base=sgd,same_rng=false", tmp_path, data=vectors())
    assert not torch.equal(masks[0], masks[1]) and not torch.equal(masks[1], masks[2])


def test_noise_after_the_update_is_that_of_plain_training(tmp_path):
    """The second pass must not move the generators that data order and dropout are drawn from."""
    draws = {}

    class Draw(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            draws.setdefault(args.optim.value, []).append(torch.rand(1).item())

    for optim in ("sam", "sgd"):
        run_training(Net(dropout=0.5), optim, None, tmp_path, data=vectors(), callbacks=[Draw()])
    assert draws["sam"] == draws["sgd"]


def test_tied_weights_count_once(tmp_path):
    job = run_training(Net(tied=True, norm=False), "sam", "rho=0.5,base=sgd", tmp_path, data=vectors(), max_steps=1)
    assert job.state.log_history[0]["sam/perturb_norm"] == pytest.approx(0.5)
    hand = by_hand(Net(tied=True, norm=False), vectors(), 0.5, 1, 4)
    job = run_training(
        Net(tied=True, norm=False),
        "sam",
        "rho=0.5,base=sgd",
        tmp_path,
        data=vectors(),
        max_steps=1,
        trainer=InOrder,
        max_grad_norm=0,
    )
    assert (flat(job.model) - flat(hand)).abs().max() < 1e-7


def test_parameter_without_gradient_stays(tmp_path):
    job = run_training(Net(), "sam", "base=adamw", tmp_path, data=vectors(), weight_decay=0.1)
    assert torch.equal(job.model.unused, torch.ones(2))


def test_micro_scope_equals_update_scope_without_accumulation_and_not_with(tmp_path, tiny_gpt2):
    def weights(scope, ga):
        job = run_training(
            tiny_gpt2(),
            "sam",
            f"rho=0.5,scope={scope},base=sgd",
            tmp_path,
            gradient_accumulation_steps=ga,
            per_device_train_batch_size=4 // ga,
        )
        return flat(job.model)

    assert torch.equal(weights("micro", 1), weights("update", 1))
    assert (weights("micro", 2) - weights("update", 2)).abs().max() > 1e-6


def test_micro_scope_adds_the_gradients_of_its_micro_batches(tmp_path):
    data = vectors(8)
    job = run_training(
        Net(norm=False),
        "sam",
        "rho=0.5,scope=micro,base=sgd",
        tmp_path,
        data=data,
        trainer=InOrder,
        max_steps=1,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_grad_norm=0,
    )
    halves = [by_hand(Net(norm=False), data[i : i + 4], 0.5, 1, 4) for i in (0, 4)]
    start = flat(Net(norm=False))
    expected = start + sum((flat(h) - start) / 2 for h in halves)
    assert (flat(job.model) - expected).abs().max() < 1e-7


@pytest.mark.parametrize(
    "options, perturbed",
    [("every=2", [0, 2]), ("start=2", [2, 3]), ("end=1", [0]), ("start=0.5", [2, 3]), ("start=0.25,end=0.75", [1, 2])],
)
def test_second_pass_runs_in_the_updates_it_was_asked_for(options, perturbed, tmp_path):
    job = run_training(Net(), "sam", options, tmp_path, data=vectors(), max_steps=4)
    assert [i for i, h in enumerate(job.state.log_history[:4]) if "sam/perturb_norm" in h] == perturbed


def test_rho_schedules(tmp_path):
    def radii(schedule):
        job = run_training(Net(), "sam", f"rho=0.4,rho_schedule={schedule}", tmp_path, data=vectors(), max_steps=4)
        return [h["sam/perturb_norm"] for h in job.state.log_history[:4]]

    assert radii("constant") == pytest.approx([0.4] * 4)
    assert radii("linear") == pytest.approx([0.4, 0.3, 0.2, 0.1])
    assert radii("proportional_to_lr") == pytest.approx([0.4, 0.3, 0.2, 0.1])  # the Trainer's schedule is linear


def test_log_has_the_clean_loss_and_the_sharpness(tmp_path):
    sam = run_training(Net(), "sam", "rho=0.5,base=sgd", tmp_path, data=vectors(), max_steps=1).state.log_history[0]
    sgd = run_training(Net(), "sgd", None, tmp_path, data=vectors(), max_steps=1).state.log_history[0]
    assert sam["loss"] == sgd["loss"]
    assert (
        sam["sam/sharpness"] == pytest.approx(sam["sam/loss_perturbed"] - sam["loss"], abs=1e-6)
        and sam["sam/sharpness"] > 0
    )


def test_second_pass_counts_as_work(tmp_path, tiny_gpt2):
    flos = [
        run_training(tiny_gpt2(), *spec, tmp_path).state.total_flos
        for spec in [("sgd", None), ("sam", "base=sgd"), ("sam", "count_flos=false")]
    ]
    assert flos[1] == 2 * flos[0] and flos[2] == flos[0]


@pytest.mark.parametrize(
    "base",
    ["adamw", "sgd", "adafactor", "rmsprop", "adagrad", "schedule_free_adamw", "schedule_free_sgd", "stable_adamw"],
)
def test_any_stock_optimizer_is_a_base(base, tmp_path, monkeypatch):
    if (
        base == "stable_adamw"
    ):  # torch-optimi takes Triton on a CPU for a group without parameters, where it cannot run
        monkeypatch.setattr("optimi.utils.HAS_TRITON", False)
    job = run_training(
        Net(), "sam", f"rho=0.05,base={base}", tmp_path, data=vectors(), learning_rate=1e-2, max_steps=3
    )
    stock = {"adamw": "adamw_torch"}.get(base, base)
    plain = run_training(Net(), stock, None, tmp_path, data=vectors(), learning_rate=1e-2, max_steps=3)
    neutral = run_training(
        Net(), "sam", f"rho=0,base={base}", tmp_path, data=vectors(), learning_rate=1e-2, max_steps=3
    )
    assert torch.equal(flat(neutral.model), flat(plain.model)) and not torch.equal(flat(job.model), flat(plain.model))


def test_base_options_reach_the_base(tmp_path):
    job = run_training(
        Net(), "sam", "base=sgd,base.momentum=0.9,base.nesterov=true", tmp_path, data=vectors(), max_steps=1
    )
    group = job.optimizer.optimizer.base.param_groups[0]
    assert (group["momentum"], group["nesterov"]) == (0.9, True)
    with pytest.raises(ValueError, match="sgd has no option 'momentun'. Did you mean 'momentum'"):
        run_training(Net(), "sam", "base=sgd,base.momentun=0.9", tmp_path, data=vectors())


@pytest.mark.parametrize("base", ["lomo", "galore_adamw_layerwise", "sam", "adamv"])
def test_bases_that_cannot_be_are_refused_at_construction(base, tmp_path):
    with pytest.raises(ValueError, match=f"base='{base}'"):
        TrainingArguments(output_dir=str(tmp_path), optim="sam", optim_args=f"base={base}")


@pytest.mark.parametrize("option", [{"deepspeed": {"zero_optimization": {"stage": 1}}}, {"fsdp": "full_shard"}])
def test_unsupported_sharding_is_refused_at_construction(option, tmp_path):
    with pytest.raises((NotImplementedError, ImportError), match="DeepSpeed|DistributedDataParallel|deepspeed"):
        TrainingArguments(output_dir=str(tmp_path), optim="sam", **option)


@pytest.mark.parametrize("option", [{"deepspeed": {}}, {"fsdp": "full_shard"}])
def test_a_refusal_of_sharding_names_the_optimizer_as_it_was_given(option, tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), optim="sam")
    vars(args).update(option)
    with pytest.raises(NotImplementedError, match="^optim='sam' does not run with"):
        check_arguments(args)


def test_optimizer_given_as_object(tmp_path):
    net = Net()
    optimizer = SharpnessAware(torch.optim.SGD(net.parameters(), lr=0.1), rho=0.3)
    args = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=4,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="no",
        max_grad_norm=0,
    )
    job = InOrder(model=net, args=args, train_dataset=vectors(), optimizers=(optimizer, None))
    job.train()
    assert (flat(net) - flat(by_hand(Net(), vectors(), 0.3, 2, 4))).abs().max() < 1e-7


def test_scheduler_drives_the_base_after_accelerate_has_reloaded_it(tmp_path):
    job = run_training(Net(), "sam", "base=adamw", tmp_path, data=vectors(), max_steps=4)
    wrapper = job.optimizer.optimizer
    assert wrapper.base.param_groups is wrapper.param_groups and wrapper.base.state is wrapper.state
    assert wrapper.base.param_groups[0]["lr"] == 0


def test_torch_compile(tmp_path, tiny_gpt2):
    eager = run_training(tiny_gpt2(), "sam", "rho=0.1,base=sgd", tmp_path, max_steps=2)
    net = tiny_gpt2()
    net.forward = torch.compile(net.forward, backend="aot_eager")
    compiled = run_training(net, "sam", "rho=0.1,base=sgd", tmp_path, max_steps=2)
    assert (flat(eager.model) - flat(compiled.model)).abs().max() < 1e-6


def test_smaller_batches_after_out_of_memory(tmp_path):
    class Hungry(InOrder):
        def compute_loss(self, model, inputs, **kwargs):
            if len(inputs["x"]) > 4:
                # The second pass of the first update fails: weights are moved at that moment.
                self.failures = getattr(self, "failures", 0) + 1
                if self.failures == 2:
                    raise RuntimeError("CUDA out of memory.")
            return super().compute_loss(model, inputs, **kwargs)

    job = run_training(
        Net(norm=False),
        "sam",
        "rho=0.3,base=sgd",
        tmp_path,
        data=vectors(64),
        trainer=Hungry,
        max_steps=2,
        max_grad_norm=0,
        per_device_train_batch_size=8,
        auto_find_batch_size=True,
    )
    size = job._train_batch_size
    assert size < 8
    assert (flat(job.model) - flat(by_hand(Net(norm=False), vectors(64), 0.3, 2, size))).abs().max() < 1e-7


def test_training_stopped_in_the_middle_of_an_update_leaves_trained_weights(tmp_path):
    weights = []

    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            weights.append(flat(model))

        def on_substep_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2

    job = run_training(
        Net(),
        "sampa",
        "base=sgd",
        tmp_path,
        data=vectors(),
        callbacks=[Stop()],
        gradient_accumulation_steps=2,
        max_steps=5,
    )
    assert job.state.global_step == 2 and torch.equal(flat(job.model), weights[2])
    job.train()  # and a second run starts clean


def test_evaluation_between_micro_batches_sees_trained_weights_and_disturbs_nothing(tmp_path):
    class Evaluates(Trainer):
        seen, at_step = [], []

        def prediction_step(self, model, *args, **kwargs):
            self.seen.append(flat(model))
            return super().prediction_step(model, *args, **kwargs)

    class Inside(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            Evaluates.at_step.append(flat(model))

        def on_substep_end(self, args, state, control, **kwargs):
            self.trainer.evaluate()

    inside = Inside()

    class Known(Evaluates):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            inside.trainer = self

    kwargs = dict(data=vectors(), gradient_accumulation_steps=2, eval_dataset=vectors(4))
    watched = run_training(Net(norm=False), "sampa", "base=sgd", tmp_path, trainer=Known, callbacks=[inside], **kwargs)
    plain = run_training(Net(norm=False), "sampa", "base=sgd", tmp_path, **kwargs)
    assert all(torch.equal(a, b) for a, b in zip(Evaluates.seen, Evaluates.at_step, strict=True))
    assert torch.equal(flat(watched.model), flat(plain.model))


def test_import_alone_changes_nothing(tmp_path):
    """20 AdamW updates of a stock Trainer, in processes with and without the import, end in the same bits."""
    import subprocess
    import sys

    script = """
import sys, hashlib, torch
torch.set_num_threads(1)
if sys.argv[2] == "with": import hfext
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
torch.manual_seed(0)
model = GPT2LMHeadModel(GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=4, n_positions=32))
data = [{"input_ids": x, "labels": x} for x in torch.randint(3, 128, (32, 10))]
args = TrainingArguments(sys.argv[1], max_steps=20, per_device_train_batch_size=4, gradient_accumulation_steps=2,
    learning_rate=1e-2, weight_decay=0.1, report_to=[], save_strategy="no",
    disable_tqdm=True, use_cpu=True, logging_steps=5)
job = Trainer(model=model, args=args, train_dataset=data); job.train()
keys = ("loss", "grad_norm", "learning_rate", "epoch", "step")
log = [[h.get(k) for k in keys] for h in job.state.log_history]
print(hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest(), log)
"""
    out = [
        subprocess.run(
            [sys.executable, "-c", script, str(tmp_path), how], capture_output=True, text=True, check=True, timeout=120
        ).stdout.splitlines()[-1]
        for how in ("with", "without")
    ]
    assert out[0] == out[1]


# ---- raw loops ------------------------------------------------------------------------------------------------------


def raw(net, optimizer, data, steps, **options):
    for t in range(steps):
        part = data[4 * t : 4 * t + 4]
        x, y = torch.stack([d["x"] for d in part]), torch.tensor([d["labels"] for d in part])

        def closure(x=x, y=y):
            loss = net(x, y)["loss"]
            loss.backward()
            return loss

        sam_step(optimizer, closure, model=net, **options)


def test_raw_loop_equals_sam_by_hand():
    net = Net()
    raw(net, SharpnessAware(torch.optim.SGD(net.parameters(), lr=0.1), rho=0.3), vectors(), 1)
    assert (flat(net) - flat(by_hand(Net(), vectors(), 0.3, 1, 4))).abs().max() < 1e-7


def test_raw_loop_with_accelerate():
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    # Accelerate keeps its state for the whole process, and an earlier Trainer may have left it in mid-accumulation.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    accelerator, net = Accelerator(cpu=True), Net()
    net, optimizer = accelerator.prepare(net, SharpnessAware(torch.optim.SGD(net.parameters(), lr=0.1), rho=0.3))
    part = vectors()[:4]
    x, y = torch.stack([d["x"] for d in part]), torch.tensor([d["labels"] for d in part])

    def closure():
        loss = net(x, y)["loss"]
        accelerator.backward(loss)
        return loss

    sam_step(optimizer, closure, model=net)
    assert (flat(net) - flat(by_hand(Net(), vectors(), 0.3, 1, 4))).abs().max() < 1e-7


def test_raw_loop_with_loss_scaling():
    """A loss scale cancels in the perturbation; an overflow skips the update and lowers the scale."""
    net = Net()
    optimizer = SharpnessAware(torch.optim.SGD(net.parameters(), lr=0.1), rho=0.3)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    part = vectors()[:4]
    x, y = torch.stack([d["x"] for d in part]), torch.tensor([d["labels"] for d in part])
    factor = 1.0

    def closure():
        loss = net(x, y)["loss"] * factor
        scaler.scale(loss).backward()
        return loss

    sam_step(optimizer, closure, model=net, scaler=scaler)
    assert (flat(net) - flat(by_hand(Net(), vectors(), 0.3, 1, 4))).abs().max() < 1e-6
    before, factor = flat(net), float("inf")
    sam_step(optimizer, closure, model=net, scaler=scaler)
    assert torch.equal(flat(net), before) and scaler.get_scale() == 512.0
    factor = 1.0
    sam_step(optimizer, closure, model=net, scaler=scaler)
    assert not torch.equal(flat(net), before)


def test_sam_step_refuses_a_plain_optimizer():
    with pytest.raises(TypeError, match="SharpnessAware"):
        sam_step(torch.optim.SGD(Net().parameters(), lr=0.1), lambda: None)


def test_wrapper_misuse():
    net = Net()
    optimizer = SharpnessAware(torch.optim.SGD(net.parameters(), lr=0.1))
    with pytest.raises(RuntimeError, match="sam_step"):
        optimizer.step(lambda: None)
    with pytest.raises(TypeError, match="itself a two-pass optimizer"):
        SharpnessAware(optimizer)
    with pytest.raises(TypeError, match="must be a torch.optim.Optimizer"):
        SharpnessAware(net.parameters())
    with pytest.raises(RuntimeError, match="no parameter"):
        sam_step(optimizer, lambda: torch.zeros(()))
    state = optimizer.state_dict()
    with pytest.raises(ValueError, match="hfext.updates"):
        optimizer.load_state_dict({**state, "hfext": {"method": "SharpnessAware", "updates": -1}})
    optimizer.load_state_dict(torch.optim.SGD(net.parameters(), lr=0.5).state_dict())  # the bare base's checkpoint
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_hooks_of_the_optimizer_fire_once():
    net, calls = Net(), []
    optimizer = SharpnessAware(torch.optim.SGD(net.parameters(), lr=0.1))
    optimizer.register_step_pre_hook(lambda *args: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *args: calls.append("post"))
    raw(net, optimizer, vectors(), 1)
    assert calls == ["pre", "post"]


def test_memory_is_one_copy_of_the_weights():
    """At the second forward pass there are weights, their backup, and no gradient."""
    net = Net()
    optimizer, seen = SharpnessAware(torch.optim.SGD(net.parameters(), lr=0.1)), []

    def closure():
        seen.append((sum(p.grad is not None for p in net.parameters()), optimizer.is_perturbed))
        loss = net(torch.ones(4, 6), torch.tensor([0, 1, 2, 0]))["loss"]
        loss.backward()
        return loss

    sam_step(optimizer, closure)
    assert seen == [(0, False), (0, True)]


def test_stochastic_rounding_keeps_the_perturbation_in_expectation():
    from hfext.optim._ascent import round_stochastically

    x = torch.full((200_000,), 1.0 + 2**-10)  # an eighth of the way from 1 to the next bfloat16
    rounded = round_stochastically(x, torch.bfloat16, torch.Generator().manual_seed(0)).double()
    assert rounded.mean().item() == pytest.approx(1.0 + 2**-10, abs=4e-5)
    assert set(rounded.tolist()) == {1.0, 1.0 + 2**-7}


def test_lost_perturbation_is_reported_for_bfloat16_weights(tmp_path):
    torch.manual_seed(0)
    net = nn.Linear(1000, 1000).bfloat16()
    optimizer = SharpnessAware(torch.optim.SGD(net.parameters(), lr=0.0), rho=0.01)

    def closure():
        loss = net(torch.randn(8, 1000, dtype=torch.bfloat16)).pow(2).mean()
        loss.backward()
        return loss

    sam_step(optimizer, closure)
    assert optimizer.metrics["sam/perturb_cosine"] < 0.9


def test_portable_training_args(tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), optim="bisam", optim_args="rho=0.1")
    torch.save(args, tmp_path / "training_args.bin")
    read = hfext.optim.portable_training_args(tmp_path / "training_args.bin")
    assert read["optim"] == "bisam" and read["optim_args"] == "rho=0.1"


def test_language_data_is_ragged():
    assert len({(d["labels"] >= 0).sum().item() for d in language_data()}) > 3


# ---- what once went wrong -------------------------------------------------------------------------------------------


def test_position_in_training_starts_again_with_each_training(tmp_path):
    job = run_training(Net(), "sam", "rho=0.4,rho_schedule=linear,end=0.75", tmp_path, data=vectors(), max_steps=4)
    first = [h.get("sam/perturb_norm") for h in job.state.log_history[:4]]
    job.train()
    assert [h.get("sam/perturb_norm") for h in job.state.log_history[:4]] == pytest.approx(first)
    assert first[:3] == pytest.approx([0.4, 0.3, 0.2]) and first[3] is None


def test_parameters_outside_the_model_get_the_second_gradient_alone(tmp_path):
    class OwnHead(InOrder):
        def create_optimizer(self, model=None):
            torch.manual_seed(0)
            self.head = nn.Linear(3, 3)
            super().create_optimizer(model)
            self.optimizer.add_param_group({"params": list(self.head.parameters())})
            return self.optimizer

        def compute_loss(self, model, inputs, **kwargs):
            labels = inputs.pop("labels")
            return nn.functional.cross_entropy(
                self.head(model.drop(model.b(torch.tanh(model.a(inputs["x"]))))), labels
            )

    seen = []

    class Gradients(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            seen.append(job[0].head.weight.grad.clone())

    job = []

    class Known(OwnHead):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            job.append(self)

    kwargs = dict(data=vectors(), trainer=Known, callbacks=[Gradients()], max_steps=1, max_grad_norm=0)
    for optim, optim_args in [("sam", "rho=1e-9,base=sgd"), ("sgd", None)]:
        run_training(Net(norm=False), optim, optim_args, tmp_path, **kwargs)
        job.pop()
    torch.testing.assert_close(seen[0], seen[1])


def test_gradients_that_are_views_of_a_bucket_survive_the_next_pass():
    from hfext.optim import IGNITE, SAMPa

    net = nn.Linear(2, 1)
    for optimizer in (
        SAMPa(torch.optim.SGD(net.parameters(), lr=0.1)),
        IGNITE(torch.optim.SGD(net.parameters(), lr=0.1)),
    ):
        bucket = torch.ones(3)
        net.weight.grad, net.bias.grad = bucket[:2].view(1, 2), bucket[2:].view(1)
        _, grads = optimizer.take_gradients()
        bucket.zero_()
        assert all(g.abs().min() == 1 for g in grads)


def test_dtypes_may_be_mixed():
    from hfext.optim._wrapper import total_norm

    mixed = [torch.full((3,), 2.0), torch.full((2,), 3.0, dtype=torch.float64), torch.full((100_000,), 1.0).bfloat16()]
    assert total_norm(mixed).item() == pytest.approx((12 + 18 + 100_000) ** 0.5, rel=1e-6)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(10, 10), nn.Linear(1000, 1000).bfloat16())

    def moved(perturb):
        optimizer, seen = SharpnessAware(torch.optim.SGD(net.parameters(), lr=0.0), rho=0.01, perturb=perturb), []

        def closure():
            seen.append(net[1].weight.detach().clone())
            loss = (
                net[1](torch.ones(8, 1000, dtype=torch.bfloat16)).float().pow(2).mean() + net[0](torch.ones(10)).sum()
            )
            loss.backward()
            return loss

        sam_step(optimizer, closure)
        return (seen[0] != seen[1]).sum().item(), optimizer.metrics["sam/perturb_cosine"]

    (near, near_cosine), (stochastic, _) = moved("nearest"), moved("stochastic")
    assert stochastic > 1.5 * near and near_cosine < 0.9


def test_hooks_of_a_copied_optimizer_fire(tmp_path):
    net, calls = Net(), []
    clone = copy.deepcopy(SharpnessAware(torch.optim.SGD(net.parameters(), lr=0.1)))
    clone.register_step_post_hook(lambda *args: calls.append(1))
    for p in clone.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    clone.begin()
    clone._ready = True
    clone.step()
    assert calls == [1]


def test_schedule_that_begins_at_zero(tmp_path):
    job = run_training(
        Net(), "sam", "rho=0.4,rho_schedule=proportional_to_lr", tmp_path, data=vectors(), learning_rate=0.0
    )
    assert job.state.global_step == 3


@pytest.mark.parametrize(
    "optim, text, message",
    [
        ("sam", "base.weight_decay=0.1", "base.weight_decay has no effect.*Use weight_decay="),
        ("sam", "base.lr=0.1", "Use learning_rate="),
        ("sam", "scope=micro,sync=true", "scope='micro'"),
        ("sam", "eps=.inf", "eps is inf"),
        ("bisam", "mu=.inf", "mu is inf"),
        ("asam", "eta=.inf", "eta is inf"),
        ("ignite", "lam=.inf", "lam is inf"),
        ("sampa", "lambda=0.1,lam=0.9", "same option"),
    ],
)
def test_more_bad_input_is_refused_at_construction(optim, text, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        TrainingArguments(output_dir=str(tmp_path), optim=optim, optim_args=text)


def test_base_option_of_the_wrong_kind_is_named(tmp_path):
    with pytest.raises(ValueError, match="base='sgd' with base.momentum=abc"):
        run_training(Net(), "sam", "base=sgd,base.momentum=abc", tmp_path, data=vectors())


def test_micro_scope_in_a_raw_loop_is_refused():
    net = Net()
    with pytest.raises(ValueError, match="scope='micro' is for the Trainer"):
        sam_step(SharpnessAware(torch.optim.SGD(net.parameters(), lr=0.1), scope="micro"), lambda: None)


def test_compute_loss_without_outputs_is_explained(tmp_path, tiny_llama):
    class NoOutputs(Trainer):
        def compute_loss(self, model, inputs, num_items_in_batch=None):
            return model(**inputs).loss

    with pytest.raises(TypeError, match="return_outputs=True.*optim='sam'"):
        run_training(tiny_llama(), "bisam", None, tmp_path, trainer=NoOutputs)
