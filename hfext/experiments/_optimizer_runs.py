"""Trainings of a small Llama on Tiny Shakespeare by an optimizer's name, kept on disk so that none is made twice."""

import functools
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

from ._shakespeare import held_out_loss, make_llama, quiet_trainer, read_characters, rows_of
from ._timed_training import UpdateTimes


@dataclass(frozen=True, kw_only=True)
class Task:
    """
    Args:
        hidden, layers: Size of the Llama.
        length, rows: Of a batch.
        texts: Held-out windows of the result; learning rates are chosen on as many others behind them.
        data_dir: Folder that holds `tinyshakespeare`.
    """

    hidden: int
    layers: int
    length: int
    rows: int
    texts: int
    data_dir: str | None = None


def tensors(state: Any) -> Iterator[Tensor]:
    """All tensors in nested dicts and lists."""
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, dict | list | tuple):
        for item in state.values() if isinstance(state, dict) else state:
            yield from tensors(item)


@functools.lru_cache(maxsize=1)
def text(length: int, data_dir: str | None) -> tuple[list[dict[str, Tensor]], Tensor, int]:
    """Windows to train on, held-out ids, and the number of characters."""
    train_ids, test, vocab = read_characters(data_dir)
    return rows_of(train_ids, length), test, vocab


class StateBytes(TrainerCallback):
    """Bytes of the optimizer's state dict, every `every` updates."""

    def __init__(self, every: int):
        self.every, self.seen = every, []

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        if state.global_step % self.every == 1 or state.global_step == state.max_steps:
            self.seen.append(sum(x.nbytes for x in tensors(optimizer.state_dict())))


def train(task: Task, optim: str, optim_args: str | None, lr: float, steps: int, seed: int, **arguments) -> dict:
    """Held-out losses at the end, bytes of the optimizer's state, CPU seconds of an update."""
    rows, test, vocab = text(task.length, task.data_dir)
    model = make_llama(seed, vocab, task.hidden, task.layers, task.length)
    times, sizes = UpdateTimes(time.process_time), StateBytes(max(1, min(50, steps // 4)))
    with tempfile.TemporaryDirectory() as folder:
        trainer = quiet_trainer(
            Trainer,
            model,
            rows,
            folder,
            optim=optim,
            optim_args=optim_args,
            learning_rate=lr,
            max_steps=steps,
            warmup_steps=max(1, steps // 15),
            per_device_train_batch_size=task.rows,
            seed=seed,
            **arguments,
        )
        for callback in (times, sizes):
            trainer.add_callback(callback)
        trainer.train()
    cut = task.texts * task.length
    return {
        "loss": held_out_loss(model, test, task.length, task.texts),
        "tuning": held_out_loss(model, test[cut:], task.length, task.texts),
        "peak_bytes": max(sizes.seen),
        "mean_bytes": sum(sizes.seen) / len(sizes.seen),
        "ms": 1e3 * sorted(times.seconds)[len(times.seconds) // 2],
    }


def kept(folder: Path, name: str, task: Task, **settings) -> dict:
    """`train`, or its result in `folder` when it was made with the same settings."""
    path = folder / f"{name}.json"
    wanted = json.loads(json.dumps({**asdict(task), **settings}))
    if path.exists():
        found = json.loads(path.read_text())
        if found["settings"] == wanted:
            return found["result"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        result = train(task, **settings)
    finally:
        torch.set_num_threads(threads)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"settings": wanted, "result": result}))
    return result
