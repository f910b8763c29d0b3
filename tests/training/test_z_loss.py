"""z-loss: its gradient in closed form, and the Trainer, where the tokens of an update count as one batch."""

from functools import partial

import pytest
import torch
from optim_training import flat, gpt2, language_data
from processes import run_two
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainingArguments

from hfext.training.z_loss import ZLossConfig, ZLossTrainer, log_z, z_loss


def example(rows=9, vocab=7, dtype=torch.float64):
    labels = torch.randint(0, vocab, (rows,))
    labels[::4] = -100
    return (3 * torch.randn(rows, vocab, dtype=torch.float64)).to(dtype).requires_grad_(), labels


def test_gradient_is_the_closed_form():
    z, labels = example()
    loss = z_loss(z, labels, coefficient=0.3)
    mask = labels != -100
    normaliser = z.detach().exp().sum(-1).log()
    torch.testing.assert_close(loss, 0.3 * normaliser[mask].square().mean(), rtol=1e-13, atol=0)
    expected = 2 * 0.3 * normaliser[:, None] * z.detach().softmax(-1) * mask[:, None] / mask.sum()
    torch.testing.assert_close(torch.autograd.grad(loss, z)[0], expected, rtol=1e-12, atol=1e-15)
    assert torch.autograd.gradcheck(lambda x: z_loss(x, labels, 0.3), z)


def test_items_chunks_and_masked_rows():
    z, labels = example()
    with torch.no_grad():
        z[labels == -100] = torch.nan
    mask = labels != -100
    torch.testing.assert_close(z_loss(z, labels, 1.0, num_items_in_batch=4), z_loss(z, labels, 1.0) * mask.sum() / 4)
    for chunk in (1, 2, 100):
        (grad,) = torch.autograd.grad(log_z(z, mask, chunk).sum(), z)
        torch.testing.assert_close(grad, z.softmax(-1).masked_fill(~mask[:, None], 0.0))
    empty = z_loss(z, torch.full_like(labels, -100))
    assert empty == 0 and torch.autograd.grad(empty, z)[0].abs().sum() == 0


def test_bfloat16_is_the_same_values_in_float32():
    z, labels = example(vocab=300, dtype=torch.bfloat16)
    wide = z.detach().float().requires_grad_()
    losses = [z_loss(x, labels, 0.1) for x in (z, wide)]
    assert losses[0].dtype == torch.float32 and torch.equal(*losses)
    low, high = (torch.autograd.grad(loss, x)[0] for loss, x in zip(losses, (z, wide), strict=True))
    assert torch.equal(low, high.bfloat16())


def test_it_is_the_offset_that_is_held():
    """The penalty sees what the cross-entropy cannot: a constant added to all logits."""
    z, labels = example()
    moved = z.detach() + 5
    torch.testing.assert_close(cross_entropy(z, labels), cross_entropy(moved, labels))
    assert z_loss(moved, labels) > z_loss(z, labels)
    centred = z.detach() - z.detach().logsumexp(-1, keepdim=True)
    assert z_loss(centred, labels) < 1e-25


def test_bad_values_are_named(tiny_llama, tmp_path):
    with pytest.raises(ValueError, match="coefficient is -1 but must be finite and >= 0"):
        ZLossConfig(coefficient=-1)
    for value in (None, "x", True):
        with pytest.raises(ValueError, match=f"ZLossConfig: coefficient is {value!r} but must be float"):
            ZLossConfig(coefficient=value)
    with pytest.raises(ValueError, match=r"labels \(8,\)"):
        z_loss(torch.zeros(9, 4), torch.zeros(8, dtype=torch.long))
    with pytest.raises(TypeError, match="z_loss is a float"):
        ZLossTrainer(tiny_llama(), TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"), z_loss=1e-4)


# the Trainer


def run(out, model=None, kind=ZLossTrainer, z_loss=None, **options):
    settings = dict(
        max_steps=3,
        learning_rate=0.1,
        optim="sgd",
        per_device_train_batch_size=8,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="no",
        dataloader_pin_memory=False,
    )
    own = {k: options.pop(k) for k in ("compute_loss_func",) if k in options}
    own |= {"z_loss": z_loss} if kind is ZLossTrainer else {}
    data = options.pop("data", None) or language_data(24)
    job = kind(model or gpt2(), TrainingArguments(str(out), **{**settings, **options}), train_dataset=data, **own)
    job.train()
    return job


def test_coefficient_0_is_plain_training(tmp_path):
    options = dict(optim="adamw_torch", learning_rate=1e-2)
    plain = run(tmp_path, gpt2(0.1), Trainer, **options)
    ours = run(tmp_path, gpt2(0.1), z_loss=ZLossConfig(coefficient=0.0), **options)
    assert torch.equal(flat(plain.model), flat(ours.model))
    assert not torch.equal(flat(plain.model), flat(run(tmp_path, gpt2(0.1), z_loss=ZLossConfig(), **options).model))


@pytest.mark.parametrize("options", [{}, {"label_smoothing_factor": 0.1}, {"average_tokens_across_devices": False}])
def test_micro_batches_of_different_length_equal_one_batch(options, tmp_path):
    config = ZLossConfig(coefficient=0.05)
    wanted = [
        run(tmp_path, z_loss=config, per_device_train_batch_size=b, gradient_accumulation_steps=8 // b, **options)
        for b in (8, 2)
    ]
    gap = (flat(wanted[0].model) - flat(wanted[1].model)).abs().max()
    assert gap <= (1e-7 if "label_smoothing_factor" not in options else 1e-2)  # whose stock loss is a mean of means
    logged = [[row["z_loss"] for row in job.state.log_history if "loss" in row] for job in wanted]
    assert logged[0] == pytest.approx(logged[1], rel=1e-5)


def test_a_step_is_that_of_the_sum_of_both_losses(tiny_llama, tmp_path):
    """One SGD step of the Trainer, against the losses written out in float64."""
    data, model = language_data(8), tiny_llama().double()
    batch = {k: torch.stack([row[k] for row in data]) for k in data[0]}
    logits, labels = model(batch["input_ids"]).logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    kept = labels != -100
    normaliser = logits[kept].exp().sum(-1).log()
    (cross_entropy(logits[kept], labels[kept]) + 0.05 * normaliser.square().mean()).backward()
    with torch.no_grad():
        for p in model.parameters():
            p -= 0.1 * p.grad
    job = run(
        tmp_path,
        tiny_llama().double(),
        z_loss=ZLossConfig(coefficient=0.05),
        data=data,
        max_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
    )
    assert (flat(model) - flat(job.model)).abs().max() <= 1e-7


def test_evaluation_reports_the_plain_loss(tmp_path):
    job = run(tmp_path, z_loss=ZLossConfig(coefficient=10.0), learning_rate=0.0, max_steps=1)
    data = language_data(8)
    plain = Trainer(gpt2(), job.args, eval_dataset=data).evaluate()["eval_loss"]
    assert job.evaluate(data)["eval_loss"] == pytest.approx(plain, rel=1e-6)


def test_log_z_falls_under_the_penalty(tmp_path):
    model = gpt2()
    heavy = run(tmp_path, model, z_loss=ZLossConfig(coefficient=0.1), max_steps=25, optim="adamw_torch")
    values = [row["z_loss"] for row in heavy.state.log_history if "z_loss" in row]
    assert values[0] == pytest.approx(0.1 * 4.87**2, rel=0.05) and values[-1] < 0.1 * values[0]  # log 128 = 4.85


def test_it_trains_adapters_alone(tmp_path):
    from peft import LoraConfig, get_peft_model

    def adapted():
        torch.manual_seed(1)
        return get_peft_model(gpt2(), LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True))

    with_it, without = (run(tmp_path, adapted(), z_loss=ZLossConfig(coefficient=c), max_steps=2) for c in (0.1, 0.0))
    moved = {n for n, p in with_it.model.named_parameters() if not torch.equal(p, without.model.get_parameter(n))}
    assert moved and all("lora_" in name for name in moved)


TWO = """
import sys
import torch
sys.path.insert(0, FOLDER)
from test_z_loss import run, ZLossConfig
from optim_training import flat
job = run(OUT, z_loss=ZLossConfig(coefficient=0.05), per_device_train_batch_size=2, gradient_accumulation_steps=2,
          data_seed=0, seed=0)
if job.args.process_index == 0:
    torch.save(flat(job.model), OUT + "/two.pt")
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_equal_one(tmp_path):
    run_two(f"FOLDER, OUT = {str(__file__).rpartition('/')[0]!r}, {str(tmp_path)!r}\n" + TWO)
    one = partial(run, z_loss=ZLossConfig(coefficient=0.05), data_seed=0, seed=0)
    job = one(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert (flat(job.model) - torch.load(tmp_path / "two.pt")).abs().max() <= 1e-7
