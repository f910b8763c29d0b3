"""Sharpness in the logits: the corner against all corners and random points, and what the Trainer logs."""

import itertools
import math

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainingArguments

from hfext.training.logit_sharpness import LogitSharpnessCallback, diverged, logit_sharpness, spikes


def example(rows=8, vocab=6, scale=4.0, dtype=torch.float64):
    return scale * torch.randn(rows, vocab, dtype=dtype), torch.randint(0, vocab, (rows,))


def of_points(z, label, points):
    """100 (max CE(z + d) - CE(z)) / (1 + CE(z)) over given d [points, vocab]."""
    at = cross_entropy(z[None], label[None])
    return 100 * (cross_entropy(z + points, label.expand(len(points)), reduction="none").max() - at) / (1 + at)


@pytest.mark.parametrize("eps", [5e-4, 1e-2, 0.5])
@pytest.mark.parametrize("vocab", [2, 4, 6])
def test_it_is_the_greatest_over_all_corners(vocab, eps):
    z, labels = example(vocab=vocab)
    corners = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=vocab)), dtype=torch.float64)
    expected = [of_points(row, y, corners * eps * (row.abs() + 1)) for row, y in zip(z, labels, strict=True)]
    torch.testing.assert_close(logit_sharpness(z, labels, eps), torch.stack(expected).mean(), rtol=1e-9, atol=1e-11)


def test_no_point_of_the_box_is_higher():
    z, labels = example(rows=1, vocab=6)
    inside = torch.empty(5000, 6, dtype=torch.float64).uniform_(-1, 1) * 0.1 * (z.abs() + 1)
    assert of_points(z[0], labels[0], inside) <= logit_sharpness(z, labels, 0.1)


def test_it_is_zero_without_a_box_and_grows_with_it():
    z, labels = example(rows=50, dtype=torch.float32)
    found = [logit_sharpness(z, labels, eps).item() for eps in (0, 1e-8, 1e-4, 1e-3, 0.1)]
    assert found[0] == 0 and found == sorted(found) and found[-1] > found[-2] > 0


def test_small_types_do_not_cancel():
    """The difference of two float32 losses is 1e-2 here and would keep four digits."""
    z, labels = example(rows=300, vocab=500, dtype=torch.float32)
    for eps, rtol in ((5e-4, 1e-5), (1e-6, 1e-4)):
        expected = logit_sharpness(z.double(), labels, eps)
        torch.testing.assert_close(logit_sharpness(z, labels, eps).double(), expected, rtol=rtol, atol=0)
    low = z.bfloat16()
    assert logit_sharpness(low, labels) == logit_sharpness(low.float(), labels)


def test_chunks_and_ignored_tokens_do_not_matter():
    z, labels = example(rows=20)
    labels[::3] = -100
    z[::3] = math.nan
    expected = logit_sharpness(z[labels != -100], labels[labels != -100])
    torch.testing.assert_close(logit_sharpness(z.view(4, 5, 6), labels.view(4, 5), chunk=3), expected)
    assert logit_sharpness(z[:1], labels[:1]).isnan()


def test_a_shift_of_all_logits_matters():
    z, labels = example()
    assert logit_sharpness(z + 100, labels) > 2 * logit_sharpness(z, labels)


def test_bad_values_are_named():
    z, labels = example()
    with pytest.raises(ValueError, match="eps is -1"):
        logit_sharpness(z, labels, eps=-1)
    with pytest.raises(ValueError, match=r"labels \(7,\)"):
        logit_sharpness(z, labels[:7])


# unstable runs


def test_spikes_are_what_lies_above_the_past():
    noise = torch.linspace(2, 1, 100) + 0.01 * torch.randn(100)
    losses = noise.tolist()
    losses[60], losses[80] = 4.0, math.inf
    assert spikes(losses, window=20) == [60, 80]
    assert spikes([1.0, 1.0, 1.0, 1.0, 9.0]) == [] and spikes([]) == []


def test_a_run_has_diverged_when_it_lost_what_it_had_gained():
    falling = torch.linspace(4, 1, 50).tolist()
    assert not diverged(falling) and not diverged([]) and not diverged(falling + [1.5] * 20)
    assert diverged(falling + [3.5] * 20) and diverged([*falling, math.nan]) and diverged([3.0, 3.1, 3.2, 3.3])


# the Trainer


def texts(n=8, length=9):
    rows = torch.randint(3, 120, (n, length))
    return [{"input_ids": x, "labels": torch.where(torch.arange(length) < i % 4, -100, x)} for i, x in enumerate(rows)]


def trainer_of(model, folder, data, **overrides):
    options = {k: overrides.pop(k) for k in ("compute_loss_func",) if k in overrides}
    settings = dict(
        max_steps=5,
        learning_rate=0.1,
        optim="sgd",
        per_device_train_batch_size=4,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        save_strategy="no",
    )
    args = TrainingArguments(str(folder), **{**settings, **overrides})
    return Trainer(model, args, train_dataset=data, **options)


def logged(trainer, key="logit_sharpness"):
    return {row["step"]: row[key] for row in trainer.state.log_history if key in row}


def by_hand(model, data):
    with torch.no_grad():
        logits = torch.cat([model(x["input_ids"][None]).logits[0, :-1] for x in data])
    return logit_sharpness(logits, torch.cat([x["labels"][1:] for x in data])).item()


@pytest.mark.parametrize("rows, accumulation", [(8, 1), (2, 4)])
def test_the_first_measure_is_that_of_the_untrained_model(rows, accumulation, tiny_llama, tmp_path):
    """Also with micro-batches of different numbers of tokens, and labels shifted as the model's own loss does."""
    model, data = tiny_llama(initializer_range=0.1), texts()
    expected = by_hand(model, data)
    trainer = trainer_of(
        model, tmp_path, data, per_device_train_batch_size=rows, gradient_accumulation_steps=accumulation
    )
    trainer.add_callback(LogitSharpnessCallback(trainer, every=2))
    trainer.train()
    assert list(logged(trainer)) == [1, 3, 5]
    assert logged(trainer)[1] == pytest.approx(expected, rel=1e-5)
    assert set(logged(trainer, "diverged").values()) <= {0.0, 1.0} and len(logged(trainer, "loss_spikes")) == 1
    assert "compute_loss" not in vars(trainer)


def test_training_is_the_same_with_it(tiny_llama, tmp_path):
    data, found = texts(), []
    for watched in (False, True):
        trainer = trainer_of(tiny_llama(), tmp_path, data)
        if watched:
            trainer.add_callback(LogitSharpnessCallback(trainer, every=1))
        trainer.train()
        found.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    assert torch.equal(*found)


def test_losses_that_take_the_labels_away_are_seen(tiny_llama, tmp_path):
    """Label smoothing and `compute_loss_func` leave the model without labels."""
    data = texts()

    def own(outputs, labels, num_items_in_batch=None):
        return cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    expected = by_hand(tiny_llama(), data)
    for option in ({"label_smoothing_factor": 0.1}, {"compute_loss_func": own}):
        trainer = trainer_of(tiny_llama(), tmp_path, data, per_device_train_batch_size=8, max_steps=1, **option)
        trainer.add_callback(LogitSharpnessCallback(trainer))
        trainer.train()
        assert logged(trainer)[1] == pytest.approx(expected, rel=1e-5)


def test_a_classifier_is_not_shifted(tiny_bert_classifier, tmp_path):
    model = tiny_bert_classifier(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    rows, labels = torch.randint(3, 120, (4, 6)), torch.arange(4)
    data = [{"input_ids": x, "labels": y} for x, y in zip(rows, labels, strict=True)]
    with torch.no_grad():
        expected = logit_sharpness(model(rows).logits, labels).item()
    trainer = trainer_of(model, tmp_path, data, max_steps=1)
    trainer.add_callback(LogitSharpnessCallback(trainer))
    trainer.train()
    assert logged(trainer)[1] == pytest.approx(expected, rel=1e-5)


def test_a_callback_that_cannot_work_is_refused(tiny_llama, tmp_path):
    trainer = trainer_of(tiny_llama(), tmp_path, texts())
    with pytest.raises(TypeError, match="must be the Trainer"):
        LogitSharpnessCallback(50)
    with pytest.raises(ValueError, match="every is 0"):
        LogitSharpnessCallback(trainer, every=0)
    with pytest.raises(ValueError, match="window is 4"):
        LogitSharpnessCallback(trainer, window=4)
