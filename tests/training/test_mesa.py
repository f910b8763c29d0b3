"""MESA: the averaged model against its recursion, the term against a hand-written loop, and the real Trainer."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from hfext.experiments._digits import MLP, Digits
from hfext.training import MESAConfig, MESATrainer, SAFConfig, SAFMixin
from hfext.training.mesa import AveragedModel, average_, without_labels


def data(n=24, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return Digits(torch.rand(n, 64, generator=generator), torch.randint(0, 10, (n,), generator=generator))


def mlp(seed=0, norm="none", dropout=0.0):
    torch.manual_seed(seed)
    model = MLP(hidden=16, norm=norm)
    if dropout:
        model.fc2 = nn.Sequential(model.fc2, nn.Dropout(dropout))
    return model


def texts(n=8, length=9, prefix=3, seed=1):
    """Token rows of which some are padding and some prompt, which the loss leaves out."""
    rows = torch.randint(3, 120, (n, length), generator=torch.Generator().manual_seed(seed))
    labels = rows.clone()
    for i in range(n):
        labels[i, : prefix + i % 3] = -100
    return [{"input_ids": x, "labels": y} for x, y in zip(rows, labels, strict=True)]


def arguments(folder, **overrides):
    settings = dict(
        learning_rate=0.05,
        num_train_epochs=3,
        per_device_train_batch_size=8,
        optim="sgd",
        max_grad_norm=0,
        lr_scheduler_type="constant",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        use_cpu=True,
    )
    return TrainingArguments(str(folder), **{**settings, **overrides})


def trained(cls, folder, model=None, dataset=None, resume=None, **kwargs):
    options = {k: kwargs.pop(k) for k in ("saf", "mesa", "callbacks") if k in kwargs}
    trainer = cls(
        model or mlp(), arguments(folder, **kwargs), train_dataset=data() if dataset is None else dataset, **options
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


ON = MESAConfig(start=-1, decay=0.7, temperature=2.0)


class Trajectory(TrainerCallback):
    """The weights at the start and after every step."""

    def __init__(self):
        self.weights = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.weights.append(weights(model))

    on_step_end = on_train_begin


# the average


def test_the_average_follows_its_recursion(tmp_path):
    seen = Trajectory()
    trainer = trained(MESATrainer, tmp_path, mesa=ON, callbacks=[seen])
    expected = seen.weights[0].double()
    for w in seen.weights[1:]:
        expected = 0.7 * expected + 0.3 * w.double()
    torch.testing.assert_close(weights(trainer.averaged.module).double(), expected, rtol=0, atol=1e-6)


def test_decay_zero_is_the_model_one_step_ago(tmp_path):
    """The teacher that the batch of step k meets, noted before the step."""
    teachers, seen = [], Trajectory()

    class Spy(MESATrainer):
        def compute_loss(self, *args, **kwargs):
            teachers.append(weights(self.averaged.module))
            return super().compute_loss(*args, **kwargs)

    trained(Spy, tmp_path, mesa=MESAConfig(start=-1, decay=0.0), callbacks=[seen])
    assert all(torch.equal(a, b) for a, b in zip(teachers, seen.weights[:-1], strict=True))


def test_decay_one_is_the_initial_model(tmp_path):
    model, first = mlp(norm="batch"), mlp(norm="batch")
    trainer = trained(MESATrainer, tmp_path, model, mesa=MESAConfig(start=-1, decay=1.0))
    teacher = trainer.averaged.module
    assert torch.equal(weights(teacher), weights(first)) and not torch.equal(weights(model), weights(first))
    assert torch.equal(teacher.norm1.running_mean, first.norm1.running_mean)


def test_the_average_of_bfloat16_weights_moves():
    model = nn.Linear(4, 4).bfloat16()
    averaged = AveragedModel(model, 0.999)
    start = averaged.module.weight.float().clone()
    with torch.no_grad():
        model.weight += 1
    for _ in range(500):
        averaged.update()
    assert averaged.module.weight.dtype == torch.bfloat16
    moved = (averaged.module.weight.float() - start).mean()
    assert moved == pytest.approx(1 - 0.999**500, abs=0.02)


def test_frozen_weights_are_shared_and_trained_ones_are_not():
    model = mlp()
    model.fc1.requires_grad_(False)
    averaged = AveragedModel(model, 0.9)
    assert averaged.module.fc1.weight is model.fc1.weight
    assert averaged.module.fc2.weight is not model.fc2.weight
    assert not any(name.startswith("fc1") for name in averaged.average)
    assert model.fc2.weight.requires_grad and not averaged.module.fc2.weight.requires_grad


def test_tied_weights_stay_tied(tiny_gpt2):
    averaged = AveragedModel(tiny_gpt2(), 0.5)
    averaged.update()
    assert averaged.module.lm_head.weight is averaged.module.transformer.wte.weight


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9998, 1.0])
def test_equal_entries_stay_equal_bit_for_bit(decay):
    w = torch.randn(1000)
    v = w.clone()
    average_([v], [w], decay)
    assert torch.equal(v, w)


# in the Trainer


@pytest.mark.parametrize(
    "mesa", [MESAConfig(coefficient=0.0, start=-1), MESAConfig(start=2), MESAConfig(start=-1, end=0)]
)
def test_without_a_term_training_is_plain_bit_for_bit(tmp_path, mesa):
    model, other = mlp(dropout=0.3), mlp(dropout=0.3)
    trained(Trainer, tmp_path, model, optim="adamw_torch")
    trained(MESATrainer, tmp_path, other, optim="adamw_torch", mesa=mesa)
    assert torch.equal(weights(model), weights(other))


def test_training_equals_a_hand_written_loop(tmp_path):
    seen = []

    class Spy(MESATrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            seen.append(dict(inputs))
            return super().compute_loss(model, inputs, *args, **kwargs)

    ours = trained(Spy, tmp_path, mlp(norm="batch"), mesa=ON)
    model, teacher = mlp(norm="batch"), mlp(norm="batch").eval()
    optimizer, t = torch.optim.SGD(model.parameters(), lr=0.05), ON.temperature
    for batch in seen:
        with torch.no_grad():
            old = teacher(batch["pixel_values"])["logits"]
        z = model(batch["pixel_values"])["logits"]
        kl = F.kl_div(F.log_softmax(z / t, -1), F.softmax(old / t, -1), reduction="batchmean")
        optimizer.zero_grad()
        (F.cross_entropy(z, batch["labels"]) + ON.coefficient * t * t * kl).backward()
        optimizer.step()
        for v, w in zip(teacher.state_dict().values(), model.state_dict().values(), strict=True):
            v.copy_(0.7 * v + 0.3 * w if v.is_floating_point() else w)
    torch.testing.assert_close(weights(ours.model), weights(model), rtol=0, atol=1e-6)
    torch.testing.assert_close(ours.averaged.module.norm1.running_var, teacher.norm1.running_var, rtol=0, atol=1e-6)


def test_language_model_term_is_the_mean_over_predicted_tokens(tmp_path, tiny_llama):
    """One update at a teacher that differs, against the formula on all tokens at once."""
    model, other = tiny_llama(0), tiny_llama(1)
    rows = texts()
    trainer = MESATrainer(model, arguments(tmp_path), train_dataset=rows, mesa=MESAConfig(start=-1))
    batch = {k: torch.stack([r[k] for r in rows]) for k in rows[0]}
    trainer.averaged = AveragedModel(other, 0.9)
    trainer.current_gradient_accumulation_steps = 1
    model.train()
    items = (batch["labels"][:, 1:] != -100).sum()
    loss = trainer.compute_loss(model, dict(batch), num_items_in_batch=items)
    z, old = (m(batch["input_ids"]).logits[:, :-1][batch["labels"][:, 1:] != -100] for m in (model, other))
    kl = F.kl_div(F.log_softmax(z / 5, -1), F.softmax(old / 5, -1), reduction="batchmean")
    expected = model(**batch).loss + 0.8 * 25 * kl
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["mlp", "llama"])
def test_accumulation_splits_agree(tmp_path, tiny_llama, kind):
    """Masked labels make the micro-batches of the language model hold different numbers of tokens."""
    found = [
        trained(
            MESATrainer,
            tmp_path,
            tiny_llama() if kind == "llama" else mlp(),
            texts() if kind == "llama" else data(),
            mesa=ON,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=steps,
        ).model
        for batch, steps in ((1, 8), (2, 4))
    ]
    torch.testing.assert_close(*map(weights, found), rtol=0, atol=1e-6)


@pytest.mark.parametrize("step", [4, 6])
def test_resume_is_bitwise(tmp_path, step):
    """In the middle and at the end of an epoch, with dropout, BatchNorm and AdamW's moments."""
    settings = dict(mesa=ON, optim="adamw_torch")
    first, second = mlp(norm="batch", dropout=0.3), mlp(9, norm="batch", dropout=0.3)
    whole = trained(MESATrainer, tmp_path / "a", first, save_strategy="steps", save_steps=step, **settings)
    again = trained(MESATrainer, tmp_path / "b", second, resume=str(tmp_path / "a" / f"checkpoint-{step}"), **settings)
    assert torch.equal(weights(whole.model), weights(again.model))
    ours, other = (t.averaged.module.state_dict() for t in (whole, again))
    assert all(torch.equal(ours[name], other[name]) for name in ours)


def test_resume_refuses_other_models_and_other_checkpoints(tmp_path):
    trained(MESATrainer, tmp_path, mesa=ON, save_strategy="steps", save_steps=3)
    path = tmp_path / "checkpoint-3" / "mesa_average.safetensors"
    with pytest.raises(ValueError, match="belongs to another model"):
        AveragedModel(MLP(hidden=8), 0.5).load(path)
    path.unlink()
    with pytest.raises(ValueError, match="was not saved by MESATrainer"):
        trained(MESATrainer, tmp_path, mesa=ON, resume=str(tmp_path / "checkpoint-3"))


def test_under_sam_at_radius_zero_training_is_that_of_the_base(tmp_path):
    plain = trained(MESATrainer, tmp_path, mlp(), mesa=ON)
    sam = trained(MESATrainer, tmp_path, mlp(), mesa=ON, optim="sam", optim_args="rho=1e-9,base=sgd")
    torch.testing.assert_close(weights(plain.model), weights(sam.model), rtol=0, atol=1e-6)
    far = trained(MESATrainer, tmp_path, mlp(), mesa=ON, optim="sam", optim_args="rho=0.5,base=sgd")
    assert not torch.allclose(weights(plain.model), weights(far.model), atol=1e-4)


def test_the_teacher_meets_no_dropout_and_draws_no_noise(tmp_path):
    """Dropout of 1 in the teacher would leave its logits constant; noise drawn by it would shift the model's."""
    model = mlp(dropout=0.5)
    averaged = AveragedModel(model, 0.9)
    state, x = torch.get_rng_state(), data().pixel_values
    outputs = [averaged.module(x)["logits"] for _ in range(2)]
    assert torch.equal(*outputs) and torch.equal(state, torch.get_rng_state())
    assert model.training


def test_composes_with_saf(tmp_path):
    class Both(SAFMixin, MESATrainer):
        pass

    saf = SAFConfig(start=0, delay=1)
    both = trained(Both, tmp_path, saf=saf, mesa=ON, save_strategy="epoch")
    names = {p.name for p in (tmp_path / "checkpoint-9").iterdir()}
    assert {"saf_logits.safetensors", "mesa_average.safetensors"} <= names
    again = trained(Both, tmp_path / "b", mlp(4), saf=saf, mesa=ON, resume=str(tmp_path / "checkpoint-6"))
    assert torch.equal(weights(both.model), weights(again.model))


def test_labels_are_kept_for_the_teacher_only_where_forward_needs_them(tiny_t5, tiny_llama):
    class Strict(nn.Module):
        def forward(self, x, labels):
            return {"logits": x}

    batch = {"input_ids": 1, "labels": 2}
    assert without_labels(tiny_llama(), batch) == {"input_ids": 1}
    assert without_labels(tiny_t5(), batch) == batch
    assert without_labels(Strict(), {"x": 1, "labels": 2}) == {"x": 1, "labels": 2}


def test_sequence_to_sequence_models_train(tmp_path, tiny_t5):
    """From the initial model at decay 1 the first update has no KL; the second pulls back towards the start."""
    start = weights(tiny_t5())
    far = [
        trained(
            MESATrainer,
            tmp_path,
            tiny_t5(),
            texts(),
            mesa=MESAConfig(start=-1, decay=1.0, coefficient=c),
            learning_rate=0.1,
        ).model
        for c in (0.0, 1.0)
    ]
    free, held = (float((weights(model) - start).norm()) for model in far)
    assert 0 < held < free


# bad input


@pytest.mark.parametrize(
    "field, value", [("decay", 1.5), ("decay", -0.1), ("coefficient", -1.0), ("temperature", -1.0)]
)
def test_bad_options_are_named(field, value):
    with pytest.raises(ValueError, match=f"{field} is {value!r}"):
        MESAConfig(**{field: value})


class Stream(IterableDataset):
    def __iter__(self):
        while True:
            yield from (
                {"pixel_values": x, "labels": y} for x, y in zip(data().pixel_values, data().labels, strict=True)
            )


def test_a_stream_has_no_epochs_but_trains_from_the_beginning(tmp_path):
    with pytest.raises(ValueError, match="Set start=-1"):
        MESATrainer(mlp(), arguments(tmp_path, max_steps=2), train_dataset=Stream(), mesa=MESAConfig())
    model, other = mlp(), mlp()
    trained(MESATrainer, tmp_path, model, Stream(), max_steps=3, mesa=ON)
    trained(Trainer, tmp_path, other, Stream(), max_steps=3)
    assert not torch.equal(weights(model), weights(other))


def test_regression_and_float_labels_are_refused(tmp_path):
    class Scores(nn.Module):
        def __init__(self, outputs):
            super().__init__()
            self.linear = nn.Linear(64, outputs)

        def forward(self, pixel_values, labels=None):
            z = self.linear(pixel_values)
            return {"loss": (z.sum(-1) - labels.float()).square().mean() if labels is not None else None, "logits": z}

    with pytest.raises(NotImplementedError, match="one output"):
        trained(MESATrainer, tmp_path, Scores(1), mesa=ON)
    rows = [{"pixel_values": torch.rand(64), "labels": 0.5} for _ in range(8)]
    with pytest.raises(NotImplementedError, match="float labels"):
        trained(MESATrainer, tmp_path, Scores(3), rows, mesa=ON)


def test_a_term_that_never_comes_is_said(tmp_path, monkeypatch):
    from hfext.training._trajectory import logger

    said = []
    monkeypatch.setattr(logger, "warning", said.append)
    trained(MESATrainer, tmp_path, mesa=MESAConfig(start=5))
    assert said and "start=5 but training has 3 epochs" in said[0]
