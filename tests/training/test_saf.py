"""SAF: the KL term against its formulas, the ring of records against brute force, and the real Trainer."""

from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from processes import run_two
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset, IterableDataset
from transformers import DataCollatorWithPadding, Trainer, TrainerCallback, TrainingArguments

from hfext.experiments._digits import MLP, Digits
from hfext.training import MESAConfig, MESATrainer, SAFConfig, SAFMixin, SAFTrainer
from hfext.training._trajectory import chunked_kl, trajectory_kl
from hfext.training.saf import INDEX, Indexed, LogitHistory, slot_of


def data(n=24, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return Digits(torch.rand(n, 64, generator=generator), torch.randint(0, 10, (n,), generator=generator))


def mlp(seed=0, dropout=0.0):
    torch.manual_seed(seed)
    model = MLP(hidden=16)
    if dropout:
        model.fc2 = nn.Sequential(model.fc2, nn.Dropout(dropout))
    return model


def arguments(folder, **overrides):
    settings = dict(
        learning_rate=0.05,
        num_train_epochs=6,
        per_device_train_batch_size=8,
        optim="adamw_torch",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        use_cpu=True,
    )
    return TrainingArguments(str(folder), **{**settings, **overrides})


def trained(cls, folder, model=None, dataset=None, resume=None, **kwargs):
    options = {k: kwargs.pop(k) for k in ("saf", "mesa", "data_collator", "callbacks") if k in kwargs}
    trainer = cls(
        model or mlp(), arguments(folder, **kwargs), train_dataset=data() if dataset is None else dataset, **options
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


EARLY = SAFConfig(start=1, delay=2, coefficient=0.8, temperature=2.0)


# the formula


def test_kl_equals_the_sum_over_classes():
    z, old, t = torch.randn(5, 7), torch.randn(5, 7), 3.0
    p, q = (torch.softmax(x.double() / t, -1).numpy() for x in (old, z))
    expected = t * t * (p * (np.log(p) - np.log(q))).sum(-1)
    np.testing.assert_allclose(trajectory_kl(z, old, t).numpy(), expected, rtol=1e-4, atol=1e-6)


def test_identical_logits_have_no_kl():
    z = 10 * torch.randn(4, 6)
    assert torch.equal(trajectory_kl(z, z.clone(), 5.0), torch.zeros(4))


@pytest.mark.parametrize("kl", [trajectory_kl, chunked_kl])
def test_gradient_is_the_difference_of_the_tempered_softmaxes(kl):
    z, old, t, coefficient = torch.randn(6, 5, requires_grad=True), torch.randn(6, 5), 4.0, 0.3
    (coefficient * kl(z, old, t).mean()).backward()
    expected = coefficient * t * (torch.softmax(z / t, -1) - torch.softmax(old / t, -1)) / 6
    torch.testing.assert_close(z.grad, expected.detach(), rtol=1e-4, atol=1e-7)


def test_bfloat16_logits_are_compared_in_float32():
    z, old = torch.randn(4, 9).bfloat16(), torch.randn(4, 9).bfloat16()
    assert torch.equal(trajectory_kl(z, old, 5.0), trajectory_kl(z.float(), old.float(), 5.0))


@pytest.mark.parametrize("rows", [1, 3, 7, 9])
def test_chunks_change_neither_value_nor_gradient(rows):
    """The gradient that is made on the way against that of autograd."""
    z, old = torch.randn(rows, 5, requires_grad=True), torch.randn(rows, 5)
    whole, chunked = trajectory_kl(z, old, 2.0), chunked_kl(z, old, 2.0, chunk=3)
    assert torch.equal(whole, chunked)
    gradients = [torch.autograd.grad(x.sum(), z)[0] for x in (whole, chunked)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)


# the records


@pytest.mark.parametrize("delay", [1, 2, 3, 5])
def test_ring_returns_what_was_recorded_delay_epochs_ago(tmp_path, delay):
    """Against a memory of everything, with examples that miss some epochs."""
    n, k = 11, 4
    history, everything = LogitHistory(tmp_path, n, k, delay), {}
    for epoch in range(12):
        seen = torch.randperm(n)[: torch.randint(4, n + 1, ())]
        for index in seen.split(3):
            z = torch.randn(len(index), k)
            history.record(epoch, index, z)
            everything |= {(epoch, int(i)): row for i, row in zip(index, z, strict=True)}
            old, known = history.recall(epoch - delay, index)
            for i, row, have in zip(index, old, known, strict=True):
                expected = everything.get((epoch - delay, int(i)))
                assert bool(have) == (expected is not None)
                if have:
                    torch.testing.assert_close(row, expected - expected.max(), rtol=2e-3, atol=1e-3)


def test_the_slot_read_is_never_the_slot_written():
    for delay in range(1, 6):
        assert all(slot_of(e, delay) != slot_of(e - delay, delay) for e in range(delay, 40))


def test_the_first_record_of_an_epoch_stands(tmp_path):
    history = LogitHistory(tmp_path, 4, 3, 1)
    first, index = torch.randn(2, 3), torch.tensor([2, 0])
    history.record(0, index, first)
    before = history.logits.clone()
    history.record(0, torch.tensor([0, 1]), torch.randn(2, 3))
    assert torch.equal(history.logits[0, [2, 0]], before[0, [2, 0]])
    assert history.recall(0, torch.tensor([0, 1, 2, 3]))[1].tolist() == [True, True, True, False]


def test_huge_logits_stay_finite(tmp_path):
    history = LogitHistory(tmp_path, 2, 2, 1)
    history.record(0, torch.tensor([0, 1]), torch.tensor([[1e6, 1e6 + 1], [-3e38, 0.0]]))
    old, _ = history.recall(0, torch.tensor([0, 1]))
    assert old.isfinite().all() and old[0].tolist() == [-1.0, 0.0]


def test_no_file_is_left_behind(tmp_path):
    trained(SAFTrainer, tmp_path, saf=EARLY, num_train_epochs=4)
    assert not [p.name for p in tmp_path.iterdir() if "saf" in p.name]


# in the Trainer


@pytest.mark.parametrize(
    "saf", [SAFConfig(coefficient=0.0, start=-1), SAFConfig(start=5), SAFConfig(start=-1, delay=6)]
)
def test_without_a_term_training_is_plain_bit_for_bit(tmp_path, saf):
    model, other = mlp(dropout=0.3), mlp(dropout=0.3)
    plain, ours = trained(Trainer, tmp_path, model), trained(SAFTrainer, tmp_path, other, saf=saf)
    assert torch.equal(weights(plain), weights(ours))


def test_training_equals_a_hand_written_loop(tmp_path):
    """Order of batches from a plain run, the loss written out, torch's own kl_div, records in float16 as stated."""
    seen = []

    class Spy(SAFTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            seen.append(inputs[INDEX].clone())
            return super().compute_loss(model, inputs, *args, **kwargs)

    ours = trained(Spy, tmp_path, saf=EARLY, optim="sgd", max_grad_norm=0, lr_scheduler_type="constant")
    model, examples, memory = mlp(), data(), {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    t = EARLY.temperature
    for step, index in enumerate(seen):
        epoch = step // 3
        z = model(examples.pixel_values[index])["logits"]
        loss = F.cross_entropy(z, examples.labels[index])
        if epoch > EARLY.start and epoch >= EARLY.delay:
            old = torch.stack([memory[epoch - EARLY.delay, int(i)] for i in index]).float()
            kl = F.kl_div(F.log_softmax(z / t, -1), F.softmax(old / t, -1), reduction="batchmean")
            loss = loss + EARLY.coefficient * t * t * kl
        rows = (z - z.amax(-1, keepdim=True)).detach().half()
        memory |= {(epoch, int(i)): row for i, row in zip(index, rows, strict=True)}
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    hand = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.testing.assert_close(weights(ours), hand, rtol=0, atol=1e-6)
    assert not torch.equal(weights(ours), weights(trained(Trainer, tmp_path, optim="sgd", max_grad_norm=0)))


def test_accumulation_splits_agree(tmp_path):
    one, two = (
        trained(
            SAFTrainer,
            tmp_path,
            saf=EARLY,
            optim="sgd",
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=steps,
        )
        for batch, steps in ((1, 8), (2, 4))
    )
    torch.testing.assert_close(weights(one), weights(two), rtol=0, atol=1e-6)


@pytest.mark.parametrize("step", [7, 12])
def test_resume_is_bitwise(tmp_path, step):
    """In the middle and at the end of an epoch, with dropout and AdamW's moments."""
    whole = trained(SAFTrainer, tmp_path / "a", mlp(dropout=0.3), saf=EARLY, save_strategy="steps", save_steps=step)
    folder = str(tmp_path / "a" / f"checkpoint-{step}")
    again = trained(SAFTrainer, tmp_path / "b", mlp(9, dropout=0.3), saf=EARLY, resume=folder)
    assert torch.equal(weights(whole), weights(again))
    assert torch.equal(whole.history.logits, again.history.logits)


def test_resume_refuses_other_data_and_other_checkpoints(tmp_path):
    trained(SAFTrainer, tmp_path, saf=EARLY, save_strategy="steps", save_steps=9)
    folder = str(tmp_path / "checkpoint-9")
    with pytest.raises(ValueError, match="24 examples but there are 32"):
        trained(SAFTrainer, tmp_path, saf=EARLY, dataset=data(32), resume=folder)
    with pytest.raises(ValueError, match="2 delay but there are 3"):
        trained(SAFTrainer, tmp_path, saf=SAFConfig(start=1), resume=folder)
    (tmp_path / "checkpoint-9" / "saf_logits.safetensors").unlink()
    with pytest.raises(ValueError, match="was not saved by SAFTrainer"):
        trained(SAFTrainer, tmp_path, saf=EARLY, resume=folder)


@pytest.mark.parametrize("scope", ["update", "micro"])
def test_under_sam_the_records_are_of_the_clean_weights(tmp_path, scope):
    """The second pass evaluates the batch again at perturbed weights; the record must be the first pass'."""
    clean = {}

    class Spy(SAFTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            index = inputs[INDEX].clone()
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            if not self.optimizer.optimizer.is_perturbed:
                clean.update(
                    {(int(self.state.epoch), int(i)): z for i, z in zip(index, outputs["logits"], strict=True)}
                )
            return loss

    trainer = trained(
        Spy,
        tmp_path,
        saf=EARLY,
        optim="sam",
        optim_args=f"rho=0.5,base=sgd,scope={scope}",
        gradient_accumulation_steps=2,
    )
    for epoch in (3, 4, 5):
        if not EARLY.is_recorded(epoch):
            continue
        old, known = trainer.history.recall(epoch, torch.arange(24))
        assert known.all()
        expected = torch.stack([clean[epoch, i] for i in range(24)]).detach()
        torch.testing.assert_close(old, expected - expected.amax(-1, keepdim=True), rtol=2e-3, atol=2e-3)
    assert len(clean) == 6 * 24


class Texts(Dataset):
    """Token lists of different lengths, with a column that no model takes."""

    def __init__(self, n=12):
        self.rows = [{"input_ids": list(range(3, 5 + i % 4)), "label": i % 4, "text": "x"} for i in range(n)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


def hand_collator(items):
    """Keeps only what it knows, as many collators of images and speech do."""
    return {
        "pixel_values": torch.stack([x["pixel_values"] for x in items]),
        "labels": torch.tensor([int(x["labels"]) for x in items]),
    }


class Padder:
    """What `DataCollatorWithPadding` needs of a tokenizer."""

    deprecation_warnings = {}

    def pad(self, items, **kwargs):
        width = max(len(x["input_ids"]) for x in items)
        padded = [x["input_ids"] + [0] * (width - len(x["input_ids"])) for x in items]
        batch = {k: [x[k] for x in items] for k in items[0] if k != "input_ids"}
        return {k: torch.tensor(v) for k, v in {**batch, "input_ids": padded}.items()}


@pytest.mark.parametrize("kind", ["torch", "datasets", "shuffled"])
def test_indices_pass_padding_collators_and_column_removal(tmp_path, tiny_bert_classifier, kind):
    rows = Texts()
    if kind != "torch":
        rows = datasets.Dataset.from_list(rows.rows)
        rows = rows.shuffle(seed=1) if kind == "shuffled" else rows
    trainer = trained(
        SAFTrainer,
        tmp_path,
        tiny_bert_classifier(),
        rows,
        saf=SAFConfig(start=0, delay=1),
        data_collator=DataCollatorWithPadding(Padder()),
        num_train_epochs=3,
        per_device_train_batch_size=5,
    )
    old, known = trainer.history.recall(1, torch.arange(12))
    assert known.all() and old.shape == (12, 4)
    assert trainer.train_dataset is rows and INDEX not in rows[0]


def test_indices_pass_a_collator_that_keeps_only_what_it_knows(tmp_path):
    settings = dict(saf=EARLY, num_train_epochs=4)
    ours = trained(SAFTrainer, tmp_path, data_collator=hand_collator, **settings)
    assert torch.equal(weights(ours), weights(trained(SAFTrainer, tmp_path, **settings)))


def test_rows_that_were_skipped_get_no_term(tmp_path):
    """drop_last leaves other examples out each epoch; the loss stays finite and the others are known."""
    trainer = trained(SAFTrainer, tmp_path, saf=EARLY, dataset=data(21), dataloader_drop_last=True)
    known = trainer.history.recall(3, torch.arange(21))[1]
    assert known.sum() == 16 and weights(trainer).isfinite().all()


def test_evaluation_and_logs(tmp_path):
    class Logs(TrainerCallback):
        seen = []

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.seen.append(logs)

    trainer = trained(SAFTrainer, tmp_path, saf=EARLY, logging_strategy="epoch", callbacks=[Logs()])
    history = trainer.history.logits.clone()
    examples = data(9, seed=2)
    found = trainer.evaluate(examples)["eval_loss"]
    expected = float(F.cross_entropy(trainer.model(examples.pixel_values)["logits"].detach(), examples.labels))
    assert found == pytest.approx(expected, abs=1e-6)
    assert torch.equal(history, trainer.history.logits)
    terms = [logs.get("trajectory_loss") for logs in Logs.seen if "loss" in logs]
    assert terms[:2] == [None, None] and all(term > 0 for term in terms[2:])


# bad input


@pytest.mark.parametrize(
    "field, value",
    [
        ("coefficient", -1.0),
        ("coefficient", float("nan")),
        ("temperature", 0.0),
        ("delay", 0),
        ("start", -2),
        ("end", 5),
    ],
)
def test_bad_options_are_named(field, value):
    with pytest.raises(ValueError, match=f"{field} is {value!r}"):
        SAFConfig(**{field: value})


class Stream(IterableDataset):
    def __iter__(self):
        yield from ({"pixel_values": x, "labels": y} for x, y in zip(data().pixel_values, data().labels, strict=True))


def test_a_stream_is_refused(tmp_path):
    with pytest.raises(ValueError, match="MESATrainer"):
        SAFTrainer(mlp(), arguments(tmp_path, max_steps=2), train_dataset=Stream())


def test_items_that_are_no_dicts_are_refused():
    with pytest.raises(TypeError, match="item 0 of the dataset is a tuple"):
        Indexed([(1, 2)])[0]


def test_language_models_are_sent_to_mesa(tmp_path, tiny_llama):
    rows = [{"input_ids": torch.arange(3, 9), "labels": torch.arange(3, 9)} for _ in range(4)]
    with pytest.raises(NotImplementedError, match="MESATrainer"):
        trained(SAFTrainer, tmp_path, tiny_llama(), rows, saf=SAFConfig(start=-1))


def test_a_model_without_logits_is_refused(tmp_path):
    class Bare(MLP):
        def forward(self, pixel_values, labels=None):
            return {"loss": super().forward(pixel_values, labels)["loss"]}

    with pytest.raises(ValueError, match=r"Bare returned \['loss'\]"):
        trained(SAFTrainer, tmp_path, Bare(16), saf=SAFConfig(start=-1))


def test_a_dataloader_without_indices_is_refused(tmp_path):
    class Custom(SAFMixin, Trainer):
        def get_train_dataloader(self):
            return torch.utils.data.DataLoader(self.train_dataset, batch_size=4)

    with pytest.raises(ValueError, match="get_train_dataloader"):
        trained(Custom, tmp_path, saf=EARLY)


def test_a_wrong_kind_of_options_is_refused(tmp_path):
    with pytest.raises(TypeError, match="must be a SAFConfig"):
        SAFTrainer(mlp(), arguments(tmp_path), train_dataset=data(), saf={"delay": 2})


TWO_PROCESSES = """
import sys, torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
import time
from test_saf import *
from hfext.training import MESAConfig, MESATrainer, saf

def slowly(tensors, *args, save=saf.save_file, **kwargs):
    "The other process must not write into the file that is being saved."
    logits = tensors["logits"].clone()
    time.sleep(0.3)
    save({{"logits": logits, "written": tensors["written"].clone()}}, *args, **kwargs)

saf.save_file = slowly
for name, cls, option in (
    ("saf", SAFTrainer, dict(saf=EARLY)),
    ("mesa", MESATrainer, dict(mesa=MESAConfig(start=0, decay=0.7))),
):
    folder = {folder!r} + "/" + name
    settings = dict(optim="sgd", per_device_train_batch_size=4, ddp_backend="gloo", **option)
    trainer = trained(cls, folder, save_strategy="steps", save_steps=10, **settings)
    again = trained(cls, folder + "-again", mlp(5), resume=folder + "/checkpoint-10", **settings)
    assert torch.equal(weights(trainer), weights(again))
    if name == "saf":
        assert trainer.history.recall(3, torch.arange(24))[1].all()
    if trainer.is_world_process_zero():
        torch.save(weights(trainer), folder + ".pt")
"""


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_equal_one(tmp_path):
    """Each process records its own examples in the shared file and reads, epochs later, what the other one wrote."""
    script = TWO_PROCESSES.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    run_two(script)
    one = {
        "saf": trained(SAFTrainer, tmp_path, saf=EARLY, optim="sgd"),
        "mesa": trained(MESATrainer, tmp_path, mesa=MESAConfig(start=0, decay=0.7), optim="sgd"),
    }
    for name, trainer in one.items():
        torch.testing.assert_close(torch.load(tmp_path / f"{name}.pt"), weights(trainer), rtol=0, atol=1e-6)
