"""A small Llama in the Trainer, with the time of every update: shared by the benchmarks of optimizers.

Also a program, started by `torchrun` for runs over several processes: it prints the times as JSON.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging


class UpdateTimes(TrainerCallback):
    """Seconds of each update, from its first micro-batch to the end of its step."""

    def __init__(self, clock: Callable[[], float]):
        self.clock, self.seconds = clock, []

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = self.clock()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(self.clock() - self.start)


def trainer(
    optim: str, optim_args: str | None, rows: int, steps: int, *, hidden=128, layers=4, vocab=512, length=64, clock
):
    """A Trainer that is ready to train, and the callback that will hold its times."""
    logging.set_verbosity_error()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=length,
    )
    data = [{"input_ids": x, "labels": x} for x in torch.randint(3, vocab, (256, length))]
    times = UpdateTimes(clock)
    args = TrainingArguments(
        tempfile.mkdtemp(prefix="hfext-bench-"),
        optim=optim,
        optim_args=optim_args,
        per_device_train_batch_size=rows,
        max_steps=steps,
        learning_rate=1e-3,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_drop_last=True,
    )
    return Trainer(model=LlamaForCausalLM(config), args=args, train_dataset=data, callbacks=[times]), times


def main(spec: dict) -> None:
    torch.set_num_threads(1)
    job, times = trainer(**spec, clock=time.perf_counter)
    job.train()
    if job.args.process_index == 0:
        sys.stdout.write("\nTIMES " + json.dumps(times.seconds) + "\n")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    import hfext  # noqa: F401

    main(json.loads(sys.argv[1]))
