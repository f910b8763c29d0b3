"""TopKLD: the loss against a naive form in float64 with autograd, its special cases, and the real Trainer."""

from functools import partial
from pathlib import Path

import pytest
import torch
from processes import run_two
from torch.nn.functional import cross_entropy, kl_div
from transformers import AutoModelForCausalLM, TrainingArguments

from hfext.training import TopKLDConfig, TopKLDTrainer, teacher_top_k, topkld_loss

WHOLE = dict(k=5, weight=0.6)


def logits(rows=12, vocab=17, dtype=torch.float64, seed=3):
    generator = torch.Generator().manual_seed(seed)
    z, t = (2 * torch.randn(rows, vocab, generator=generator, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(0, vocab, (rows,), generator=generator)
    labels[::4] = -100
    return z.to(dtype).requires_grad_(), t.to(dtype), labels


def naive(z, t, labels, k, weight):
    """Token by token, with probabilities and lists."""
    total, count = 0.0, 0
    for z_row, t_row, label in zip(z, t, labels, strict=True):
        if label == -100:
            continue
        p, q = t_row.softmax(-1), z_row.softmax(-1)
        order = t_row.argsort(descending=True).tolist()
        top, rest = order[:k], order[k:]
        row = sum(p[i] * (p[i] / q[i]).log() for i in top)
        if rest:
            p_rest, q_rest = p[rest].sum(), q[rest].sum()
            row = row + p_rest * (p_rest / q_rest).log()
            if weight is not None:
                inner = p[rest] / p_rest * ((p[rest] / p_rest) / (q[rest] / q_rest)).log()
                row = row + max(weight, p_rest) * inner.sum()
        total, count = total + row, count + 1
    return total / count


def plain_kl(z, t, labels):
    rows = kl_div(z.log_softmax(-1), t.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    return rows[labels != -100].mean()


@pytest.mark.parametrize("weight", [None, 0.0, 0.3, 1.0])
@pytest.mark.parametrize("k", [1, 4, 16, 17])
def test_loss_and_gradient_are_those_of_the_naive_form(k, weight):
    z, t, labels = logits()
    loss, expected = topkld_loss(z, t, labels, k, weight), naive(z, t, labels, k, weight)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-13)
    (found,) = torch.autograd.grad(loss, z)
    torch.testing.assert_close(found, torch.autograd.grad(expected, z)[0], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("k, weight", [(0, 0.2), (0, 1.0), (17, 1.0), (99, 0.5), (4, 0.0)])
def test_special_cases_are_the_plain_kl(k, weight):
    z, t, labels = logits()
    torch.testing.assert_close(topkld_loss(z, t, labels, k, weight), plain_kl(z, t, labels), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight", [None, 0.0, 1.0])
def test_a_student_that_equals_its_teacher_has_no_loss_and_no_gradient(weight, dtype):
    z, _, labels = logits(vocab=1000, dtype=dtype)
    loss = topkld_loss(z, z.detach().clone(), labels, 10, weight)
    loss.backward()
    assert loss == 0 and not z.grad.any()


@pytest.mark.parametrize("weight", [None, 0.0, 1.0])
def test_a_rest_that_underflows_is_harmless(weight):
    """The teacher's rest has e^-300 of the mass, which float32 cannot hold; float64 can and is the reference."""
    z, t, labels = logits(dtype=torch.float32)
    t[:, 3:] -= 300
    loss = topkld_loss(z, t, labels, 3, weight)
    (gradient,) = torch.autograd.grad(loss, z)
    assert gradient.isfinite().all()
    wide = z.detach().double().requires_grad_()
    expected = naive(wide, t.double(), labels, 3, weight)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient.double(), torch.autograd.grad(expected, wide)[0], rtol=1e-5, atol=1e-6)


def test_tokens_that_both_exclude_are_harmless():
    """A vocabulary masked with -inf, in the rest and, with K above what is left, in S."""
    z, t, labels = logits()
    keep = torch.arange(17) < 9
    whole = torch.where(keep, z, -torch.inf).detach().requires_grad_()
    for k in (4, 12):
        loss = topkld_loss(whole, torch.where(keep, t, -torch.inf), labels, k, 1.0)
        torch.testing.assert_close(loss, naive(z[:, :9], t[:, :9], labels, min(k, 9), 1.0))
        assert torch.autograd.grad(loss, whole)[0].isfinite().all()


def test_bfloat16_is_near_float32():
    z, t, labels = logits(vocab=300, dtype=torch.bfloat16)
    loss = topkld_loss(z, t, labels, 20, 1.0)
    (gradient,) = torch.autograd.grad(loss, z)
    assert gradient.dtype == torch.bfloat16 and loss.dtype == torch.float32
    z32 = z.detach().float().requires_grad_()
    same = topkld_loss(z32, t.float(), labels, 20, 1.0)
    assert loss == same
    torch.testing.assert_close(gradient.float(), torch.autograd.grad(same, z32)[0], rtol=1e-2, atol=1e-6)


def test_ignored_rows_are_never_read():
    z, t, labels = logits()
    expected = topkld_loss(z, t, labels, **WHOLE)
    (gradient,) = torch.autograd.grad(expected, z)
    broken, t_broken = z.detach().clone(), t.clone()
    broken[labels == -100] = t_broken[labels == -100] = torch.nan
    broken.requires_grad_()
    loss = topkld_loss(broken, t_broken, labels, **WHOLE)
    assert torch.equal(loss, expected) and torch.equal(torch.autograd.grad(loss, broken)[0], gradient)


def test_the_sum_over_given_items_adds_up_to_the_mean():
    z, t, labels = logits()
    n = (labels != -100).sum()
    parts = [topkld_loss(z[s], t[s], labels[s], **WHOLE, num_items_in_batch=n) for s in (slice(5), slice(5, 12))]
    torch.testing.assert_close(sum(parts), topkld_loss(z, t, labels, **WHOLE))


def test_no_labels_at_all_give_zero():
    z, t, _ = logits()
    loss = topkld_loss(z, t, torch.full((12,), -100), **WHOLE)
    loss.backward()
    assert loss == 0 and not z.grad.any()


# the Trainer


@pytest.fixture
def model(tiny_llama):
    """Factory of models that differ: with the usual small weights all are nearly uniform."""
    return partial(tiny_llama, initializer_range=0.15, num_hidden_layers=1)


def texts(n=8, length=9, seed=1):
    """Rows of different length; those of a batch are padded by `collate`."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, 120, (length - i % 3,), generator=generator) for i in range(n)]
    return [
        {"input_ids": row, "labels": torch.where(torch.arange(len(row)) < 2 + i % 2, -100, row)}
        for i, row in enumerate(rows)
    ]


class Collate:
    def __init__(self, side="right", length=9):
        self.side, self.length = side, length

    def __call__(self, features):
        batch = {"input_ids": [], "labels": [], "attention_mask": []}
        for x in features:
            gap = self.length - len(x["input_ids"])
            for name, fill in (("input_ids", 0), ("labels", -100), ("attention_mask", 0)):
                row = x.get(name, torch.ones_like(x["input_ids"]))
                pad = torch.full((gap,), fill)
                batch[name].append(torch.cat([row, pad] if self.side == "right" else [pad, row]))
        return {name: torch.stack(rows) for name, rows in batch.items()}


def arguments(folder, **overrides):
    settings = dict(
        learning_rate=0.1,
        max_steps=2,
        per_device_train_batch_size=4,
        optim="sgd",
        max_grad_norm=0,
        lr_scheduler_type="constant",
        save_strategy="no",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        use_cpu=True,
    )
    return TrainingArguments(str(folder), **{**settings, **overrides})


def trained(folder, student, teacher=None, topkld=None, data=None, side="right", resume=None, **kwargs):
    trainer = TopKLDTrainer(
        student,
        arguments(folder, **kwargs),
        data_collator=Collate(side),
        train_dataset=texts() if data is None else data,
        eval_dataset=texts(6, seed=2) if data is None else data,
        teacher=teacher,
        topkld=topkld or TopKLDConfig(**WHOLE),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(model):
    return torch.cat([p.detach().flatten().float() for p in model.parameters()])


def losses(trainer, key="loss"):
    return [row[key] for row in trainer.state.log_history if key in row]


def by_hand(student, teacher, data, topkld, alpha=0.0):
    """The mean over all tokens of a batch that a causal model predicts, from unpadded rows one by one."""
    total, task, count = 0.0, 0.0, 0
    for x in data:
        with torch.no_grad():
            z, t = (m(x["input_ids"][None]).logits[0, :-1] for m in (student, teacher))
        labels = x["labels"][1:]
        n = (labels != -100).sum()
        total += n * topkld_loss(z, t, labels, topkld.k, topkld.weight)
        task += cross_entropy(z, labels, reduction="sum")
        count += n
    return float((alpha * task + (1 - alpha) * total) / count)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("alpha", [0.0, 0.25])
def test_training_and_evaluation_have_the_loss_of_unpadded_rows(alpha, side, model, tmp_path):
    student, teacher, start = model(), model(seed=1), model()
    config = TopKLDConfig(**WHOLE, alpha=alpha)
    trainer = trained(tmp_path, student, teacher, config, side=side, max_steps=1, per_device_train_batch_size=8)
    assert losses(trainer) == pytest.approx([by_hand(start, teacher, texts(), config, alpha)], rel=1e-5)
    found = trainer.evaluate(texts(4, seed=2))["eval_loss"]
    assert found == pytest.approx(by_hand(student, teacher, texts(4, seed=2), config, alpha), rel=1e-5)
    if alpha:
        assert losses(trainer, "topkld_loss") == pytest.approx([by_hand(start, teacher, texts(), config)], rel=1e-5)


def test_accumulation_does_not_change_the_steps(model, tmp_path):
    """Micro-batches have different numbers of tokens."""
    options = dict(teacher=model(seed=1), topkld=TopKLDConfig(**WHOLE, alpha=0.3))
    one = trained(tmp_path, model(), **options, per_device_train_batch_size=8)
    two = trained(tmp_path, model(), **options, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    torch.testing.assert_close(weights(one.model), weights(two.model), rtol=0, atol=1e-6)
    assert losses(one) == pytest.approx(losses(two), rel=1e-5)


def test_resume_continues_the_run(model, tmp_path):
    teacher = model(seed=1)
    options = dict(teacher=teacher, optim="adamw_torch", learning_rate=1e-3)
    whole = trained(tmp_path / "a", model(), **options, save_strategy="steps", save_steps=2, max_steps=4)
    again = trained(tmp_path / "b", model(seed=7), **options, max_steps=4, resume=str(tmp_path / "a/checkpoint-2"))
    assert torch.equal(weights(whole.model), weights(again.model))
    assert losses(whole) == losses(again)


def test_the_teacher_is_frozen_and_not_saved(model, tmp_path):
    student, teacher = model(), model(seed=1).train()
    before = weights(teacher)
    trainer = trained(tmp_path, student, teacher)
    assert torch.equal(weights(teacher), before) and not teacher.training
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    trainer.save_model(tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(weights(saved), weights(student)) and saved.num_parameters() == student.num_parameters()


def test_a_perfect_student_does_not_move(model, tmp_path):
    student = model()
    trainer = trained(tmp_path, student, model())
    assert torch.equal(weights(student), weights(model())) and losses(trainer) == [0, 0]


def test_a_peft_student_learns_from_its_base(model, tmp_path):
    from peft import LoraConfig, get_peft_model

    student = get_peft_model(model(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2))
    teacher = model(seed=1)
    expected = by_hand(student, teacher, texts(), TopKLDConfig(**WHOLE))
    trainer = trained(tmp_path, student, teacher, per_device_train_batch_size=8)
    assert losses(trainer)[0] == pytest.approx(expected, rel=1e-5)
    assert losses(trainer)[-1] < losses(trainer)[0]
    for name, p in student.named_parameters():
        assert p.requires_grad == ("lora_" in name)


@pytest.mark.slow
def test_bfloat16_training_is_near_float32(model, tmp_path):
    teacher = model(seed=1)
    wide, low = (trained(tmp_path, model(), teacher, bf16=bf16) for bf16 in (False, True))
    assert losses(low) == pytest.approx(losses(wide), rel=0.02)
    half = trained(tmp_path, model().bfloat16(), model(seed=1).bfloat16())
    assert half.model.dtype == torch.bfloat16
    assert losses(half)[0] == pytest.approx(losses(wide)[0], rel=0.02)


def test_an_encoder_decoder_is_not_shifted(tiny_t5, tmp_path):
    student, teacher = tiny_t5(dropout_rate=0.0), tiny_t5(seed=1, dropout_rate=0.0)
    ids = torch.randint(3, 120, (4, 6))
    data = [{"input_ids": x, "labels": y} for x, y in zip(ids, ids.flip(1), strict=True)]
    with torch.no_grad():
        z, t = (m(input_ids=ids, labels=ids.flip(1)).logits for m in (student, teacher))
    expected = topkld_loss(z, t, ids.flip(1), **WHOLE)
    args = arguments(tmp_path, max_steps=1)
    trainer = TopKLDTrainer(student, args, train_dataset=data, teacher=teacher, topkld=TopKLDConfig(**WHOLE))
    trainer.train()
    assert losses(trainer) == pytest.approx([float(expected)], rel=1e-5)


# a cached teacher


def with_cache(teacher, data, k=5):
    columns = teacher_top_k(teacher, {"input_ids": [x["input_ids"] for x in data]}, k)
    return [
        {**x, "teacher_ids": ids, "teacher_log_probs": log_p}
        for x, ids, log_p in zip(data, *columns.values(), strict=True)
    ]


@pytest.mark.parametrize("side, cached_k", [("right", 5), ("left", 9)])
def test_a_cached_teacher_equals_a_live_one_without_the_implicit_part(side, cached_k, model, tmp_path):
    """A larger cache serves a smaller k."""
    teacher, config = model(seed=1), TopKLDConfig(k=5, weight=None)
    live = trained(tmp_path, model(), teacher, config, side=side)
    cached = trained(tmp_path, model(), None, config, with_cache(teacher, texts(), cached_k), side=side)
    assert losses(cached) == pytest.approx(losses(live), rel=1e-5)
    torch.testing.assert_close(weights(cached.model), weights(live.model), rtol=0, atol=1e-6)
    assert cached.evaluate()["eval_loss"] == pytest.approx(live.evaluate(texts())["eval_loss"], rel=1e-4)


def test_the_cache_is_a_dataset_column(model, tmp_path):
    """Through `datasets.map` and a disk, from which come plain lists."""
    datasets = pytest.importorskip("datasets")
    teacher, config = model(seed=1), TopKLDConfig(k=5, weight=None)
    rows = [{k: v.tolist() for k, v in x.items()} for x in texts()]
    datasets.disable_progress_bars()
    data = datasets.Dataset.from_list(rows).map(
        lambda batch: teacher_top_k(teacher, batch, k=5), batched=True, batch_size=3, new_fingerprint="cached"
    )
    data.save_to_disk(tmp_path / "data")
    data = datasets.load_from_disk(tmp_path / "data")

    class Tensors(Collate):
        def __call__(self, features):
            return super().__call__([{k: torch.tensor(v) for k, v in x.items()} for x in features])

    args = arguments(tmp_path)
    trainer = TopKLDTrainer(model(), args, data_collator=Tensors(), train_dataset=data, topkld=config)
    trainer.train()
    live = trained(tmp_path, model(), teacher, config)
    assert losses(trainer) == pytest.approx(losses(live), rel=1e-5)


# bad input


@pytest.mark.parametrize(
    "field, value", [("k", -1), ("k", 2.5), ("weight", -0.1), ("weight", 1.5), ("alpha", 1.0), ("alpha", -0.1)]
)
def test_a_value_out_of_range_is_named(field, value):
    with pytest.raises(ValueError, match=f"TopKLDConfig: {field} is {value}"):
        TopKLDConfig(**{field: value})


def test_nothing_to_learn_is_refused():
    with pytest.raises(ValueError, match="k is 0"):
        TopKLDConfig(k=0, weight=None)


def test_what_cannot_be_distilled_is_refused(model, tmp_path):
    student, teacher, data = model(), model(seed=1), texts()
    with pytest.raises(ValueError, match="must be None without a teacher"):
        trained(tmp_path, student)
    with pytest.raises(ValueError, match="shares trained parameters"):
        trained(tmp_path, student, student)
    with pytest.raises(TypeError, match="must be a model"):
        trained(tmp_path, student, "teacher")
    with pytest.raises(TypeError, match="must be a TopKLDConfig"):
        TopKLDTrainer(student, arguments(tmp_path), teacher=teacher, topkld={"k": 3})
    with pytest.raises(ValueError, match="same tokenizer and vocabulary"):
        trained(tmp_path, student, model(vocab_size=130))
    only = TopKLDConfig(k=5, weight=None)
    with pytest.raises(ValueError, match="needs the column teacher_ids"):
        trained(tmp_path, student, None, only)
    with pytest.raises(ValueError, match="only the top 3"):
        trained(tmp_path, student, None, only, with_cache(teacher, data, 3))
    short = [{**x, "teacher_ids": x["teacher_ids"][1:]} for x in with_cache(teacher, data)]
    with pytest.raises(ValueError, match="teacher_ids has .* positions"):
        trained(tmp_path, student, None, only, short)


TWO_PROCESSES = """
import sys, torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from test_topkld import *
from transformers import LlamaConfig, LlamaForCausalLM

trainer = two_process_run({folder!r}, 2, ddp_backend="gloo")
if trainer.is_world_process_zero():
    torch.save((weights(trainer.model), losses(trainer)), {folder!r} + "/two.pt")
"""


def two_process_run(folder, rows, **kwargs):
    from transformers import LlamaConfig, LlamaForCausalLM

    size = LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    student, teacher = (torch.manual_seed(seed) and LlamaForCausalLM(size) for seed in (1, 2))
    config = TopKLDConfig(**WHOLE, alpha=0.3)
    return trained(folder, student, teacher, config, per_device_train_batch_size=rows, **kwargs)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_equal_one(tmp_path):
    script = TWO_PROCESSES.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    run_two(script)
    one, (found, log) = two_process_run(tmp_path, 4), torch.load(tmp_path / "two.pt")
    torch.testing.assert_close(found, weights(one.model), rtol=0, atol=1e-6)
    assert log == pytest.approx(losses(one), rel=1e-5)
