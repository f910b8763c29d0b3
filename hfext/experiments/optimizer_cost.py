"""What two passes cost: time of an update, copies of the weights and bytes in a checkpoint, against the base.

Times are CPU seconds on one thread. The optimizers take turns, update by update is timed, and the ratio of medians is
reported, so that a change of the machine's speed meets all of them.
"""

import gc
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers.utils import logging

from ._timed_training import trainer


@dataclass(kw_only=True)
class Config:
    """
    Args:
        methods: `optim` names to compare with AdamW.
        bars: The largest time ratio that meets the bar, for the methods that have one.
        rounds: Turns of each optimizer.
        steps: Updates in a turn; the first two are not counted.
        rows, hidden, layers, vocab, length: Size of the batch and of the Llama.
    """

    methods: list[str] = field(default_factory=lambda: ["sam", "asam", "bisam", "sam_on", "sampa", "ignite"])
    bars: dict[str, float] = field(default_factory=lambda: {"sam": 2.15, "bisam": 2.15})
    rounds: int = 3
    steps: int = 8
    rows: int = 8
    hidden: int = 128
    layers: int = 4
    vocab: int = 512
    length: int = 64

    def __post_init__(self):
        for name in ("rounds", "rows", "hidden", "layers", "vocab", "length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)} but must be >= 1.")
        if self.steps < 4:
            raise ValueError(f"steps is {self.steps} but must be >= 4, since the first two are not counted.")


def checkpoint_bytes(job) -> int:
    with tempfile.NamedTemporaryFile() as file:
        torch.save(job.optimizer.state_dict(), file)
        return file.seek(0, 2)


def extra_copies(job) -> float:
    """Copies of the weights alive at a forward pass beyond weights, gradients and moments; the largest of a run."""
    params = [p for p in job.model.parameters() if p.dim() > 1]
    shapes, peak = {p.shape for p in params}, 0

    def count(*_):
        nonlocal peak
        owned = {p.data_ptr() for p in params} | {p.grad.data_ptr() for p in params if p.grad is not None}
        owned |= {t.data_ptr() for s in job.optimizer.state.values() for t in s.values() if torch.is_tensor(t)}
        alive = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter) and x.shape in shapes]
        peak = max(peak, sum({x.data_ptr(): x.nbytes for x in alive if x.data_ptr() not in owned}.values()))

    gc.collect()
    hook = job.model.register_forward_pre_hook(count)
    job.train()
    hook.remove()
    return peak / sum(p.nbytes for p in params)


def run(config: Config, out: Path) -> dict:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    size = {k: getattr(config, k) for k in ("rows", "hidden", "layers", "vocab", "length")}
    names = ["adamw_torch", *config.methods]
    seconds, bytes_, copies = {name: [] for name in names}, {}, {}
    try:
        bar = logging.tqdm(total=config.rounds * len(names), desc="updates")
        for turn in range(config.rounds):
            for name in names:
                job, times = trainer(name, None, steps=config.steps, clock=time.process_time, **size)
                job.train()
                seconds[name] += times.seconds[2:]
                if turn == 0:
                    bytes_[name] = checkpoint_bytes(job)
                    del job
                    copies[name] = extra_copies(trainer(name, None, steps=3, clock=time.process_time, **size)[0])
                bar.update()
        bar.close()
    finally:
        torch.set_num_threads(threads)
    base = statistics.median(seconds["adamw_torch"])
    rows = []
    for name in names:
        ratio = statistics.median(seconds[name]) / base
        row = {
            "optim": name,
            "ms an update": round(1e3 * statistics.median(seconds[name]), 2),
            "time ratio": round(ratio, 3),
            "bar": config.bars.get(name),
            "checkpoint ratio": round(bytes_[name] / bytes_["adamw_torch"], 4),
            "extra weight copies": round(copies[name], 2),
        }
        if name in config.bars:
            row["met"] = ratio <= config.bars[name]
        rows.append(row)
    return {"tables": {"Cost of an update against AdamW (Llama, one thread, CPU seconds)": rows}}
