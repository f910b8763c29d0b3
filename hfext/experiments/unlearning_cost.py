"""What an unlearning objective costs: CPU time of an update and extra memory, against gradient difference.

All objectives train the same Llama on the same pairs of ragged rows on one thread. They take turns, every update is
timed, and medians are compared, so that a change of the machine's speed meets all of them. Memory is that of tensors
of the size of the weights, beside weights, their gradients and the optimizer's state, at the largest of a run.
"""

import gc
import random
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, TrainerCallback
from transformers.utils import logging

from ..unlearning import UnlearningConfig, UnlearningTrainer

BASE = "grad_diff"


@dataclass(kw_only=True)
class Config:
    """
    Args:
        methods: Objectives to compare with gradient difference.
        bars: The largest time ratio that meets the bar, for those that have one.
        rounds: Turns of each objective.
        steps: Updates in a turn; the first two are not counted.
        rows: Pairs of an update.
        hidden, layers, vocab, length: Of the Llama, and of the longest row.
    """

    methods: list[str] = field(
        default_factory=lambda: ["ngdiff", "loss_norm", "grad_ascent", "kl_min", "npo", "simnpo", "rmu"]
    )
    bars: dict[str, float] = field(default_factory=lambda: {"ngdiff": 1.15})
    rounds: int = 5
    steps: int = 8
    rows: int = 8
    hidden: int = 128
    layers: int = 4
    vocab: int = 2048
    length: int = 64

    def __post_init__(self):
        for name in ("rounds", "rows", "hidden", "layers", "vocab", "length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)} but must be >= 1.")
        if self.steps < 4:
            raise ValueError(f"steps is {self.steps} but must be >= 4, since the first two are not counted.")


class Clock(TrainerCallback):
    """CPU seconds of each update."""

    def __init__(self):
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.process_time() - self.start)


class Copies(TrainerCallback):
    """The largest memory in copies of the weights at the forward passes of an update of two micro-batches."""

    def __init__(self):
        self.most = 0.0

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        model.register_forward_pre_hook(lambda *_: self.count(model, optimizer))

    def count(self, model, optimizer):
        params = list(model.parameters())
        shapes = {p.shape for p in params if p.dim() > 1}
        owned = {p.data_ptr() for p in params} | {p.grad.data_ptr() for p in params if p.grad is not None}
        owned |= {t.data_ptr() for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t)}
        alive = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter) and x.shape in shapes]
        extra = {x.data_ptr(): x.nbytes for x in alive if x.data_ptr() not in owned}
        self.most = max(self.most, sum(extra.values()) / sum(p.nbytes for p in params))


def ragged(count: int, config: Config, seed: int) -> list[dict]:
    generator, rows = random.Random(seed), []
    for _ in range(count):
        n = generator.randint(config.length // 2, config.length)
        ids = [generator.randrange(3, config.vocab) for _ in range(n)]
        rows.append({"input_ids": ids, "labels": [-100] * (n // 3) + ids[n // 3 :]})
    return rows


def train(name: str, config: Config, callback: TrainerCallback, accumulation: int = 1) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab,
            hidden_size=config.hidden,
            intermediate_size=4 * config.hidden,
            num_hidden_layers=config.layers,
            num_attention_heads=4,
            max_position_embeddings=config.length,
        )
    )
    options = {"ngdiff": {"auto_lr": False}, "rmu": {"layer": config.layers // 2}}.get(name)
    with tempfile.TemporaryDirectory() as folder:
        args = UnlearningConfig(
            folder,
            objective=name,
            objective_args=options,
            max_steps=config.steps,
            per_device_train_batch_size=config.rows // accumulation,
            gradient_accumulation_steps=accumulation,
            learning_rate=1e-5,
            optim="adamw_torch",
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        count = config.rows * config.steps
        forget, retain = ragged(count, config, 1), ragged(count, config, 2)
        trainer = UnlearningTrainer(model, args, forget, retain, callbacks=[callback])
        trainer.remove_callback(PrinterCallback)
        trainer.train()


def run(config: Config, out: Path) -> dict:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    names = [BASE, *(name for name in config.methods if name != BASE)]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    copies: dict[str, float] = {}
    try:
        with logging.tqdm(total=config.rounds * len(names), desc="updates") as bar:
            for _ in range(config.rounds):
                for name in names:
                    clock = Clock()
                    train(name, config, clock)
                    seconds[name] += clock.seconds[2:]
                    bar.update()
        for name in names:
            gc.collect()
            seen = Copies()
            train(name, config, seen, accumulation=2)
            copies[name] = seen.most
    finally:
        torch.set_num_threads(threads)
    base = statistics.median(seconds[BASE])
    rows = []
    for name in names:
        ratio = statistics.median(seconds[name]) / base
        row = {
            "objective": name,
            "ms an update": round(1e3 * statistics.median(seconds[name]), 1),
            "time ratio": round(ratio, 3),
            "bar": config.bars.get(name),
            "extra copies of the weights": round(copies[name], 2),
        }
        if name in config.bars:
            row["met"] = ratio <= config.bars[name]
        rows.append(row)
    return {"tables": {"Cost of an unlearning update against gradient difference (CPU seconds, one thread)": rows}}
