"""One short run of the stock Trainer on a tiny language task, shared by the optimizer tests."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
from transformers.utils import logging


def language_data(n=20, length=10, vocab=128):
    """Rows whose labels are masked to different lengths, so that micro-batches hold different numbers of items."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, vocab, (length,), generator=generator) for _ in range(n)]
    return [
        {"input_ids": x, "labels": x.clone().masked_fill(torch.arange(length) < i % 7, -100)}
        for i, x in enumerate(rows)
    ]


def gpt2(dropout=0.0, dtype=torch.float32):
    """A tiny GPT-2, the same every time."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=128,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=32,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
    )
    return GPT2LMHeadModel(config).to(dtype)


def run_training(
    model,
    optim,
    optim_args,
    out,
    *,
    data=None,
    trainer=Trainer,
    resume=None,
    callbacks=None,
    eval_dataset=None,
    **options,
):
    """The Trainer after its run. Linear schedule and clipping are on."""
    logging.set_verbosity_error()
    defaults = dict(
        output_dir=str(out),
        per_device_train_batch_size=4,
        max_steps=3,
        learning_rate=0.1,
        max_grad_norm=0.5,
        optim=optim,
        optim_args=optim_args,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        use_cpu=True,
    )
    args = TrainingArguments(**{**defaults, **options})
    data = language_data() if data is None else data
    job = trainer(model=model, args=args, train_dataset=data, eval_dataset=eval_dataset, callbacks=callbacks)
    job.train(resume_from_checkpoint=resume)
    return job


def flat(model):
    """All parameters as one float64 vector."""
    return torch.cat([p.detach().flatten().double() for p in model.parameters()])
