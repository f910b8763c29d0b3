"""A small character Llama, taken from Shakespeare to Wikipedia by forward passes alone, and by gradients.

The model learns Tiny Shakespeare with AdamW. It is then fine-tuned on WikiText-2 (in the characters that both texts
share) by AdamW and by MeZO or Just One Byte, all weights, each at its best learning rate. How much of what gradients
gain do losses alone gain, and how many bytes of tensors live at one time in an update?
"""

import copy
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.utils import logging

from .. import registry
from ..optim import JustOneByte, MeZO
from ._data import shared_data, wikitext2
from ._live_bytes import LiveBytes
from ._shakespeare import held_out_loss, make_llama, quiet_trainer, read_characters, rows_of

METHODS = ("mezo", "justonebyte")


@dataclass(kw_only=True)
class Config:
    """
    Args:
        method: The record that the run is evidence for, `mezo` or `justonebyte`.
        hidden, layers: Size of the Llama.
        length, rows: Of a batch.
        pretrain_steps, pretrain_lr: On Shakespeare.
        adam_steps, adam_lrs: Of fine-tuning with gradients.
        steps, lrs: Of the method.
        samples: Micro-batches of an update of Just One Byte, one for each machine; they split `rows`.
        seeds: How many pretrained models.
        texts: Held-out windows of WikiText-2; learning rates are chosen on as many others.
        data_dir: Folder that holds `tinyshakespeare` and `wikitext2`.
    """

    method: str = "mezo"
    hidden: int = 64
    layers: int = 2
    length: int = 64
    rows: int = 16
    pretrain_steps: int = 600
    pretrain_lr: float = 4e-3
    adam_steps: int = 200
    adam_lrs: tuple[float, ...] = (1e-3, 3e-3)
    steps: int = 1500
    lrs: tuple[float, ...] = (1e-4, 3e-4, 1e-3)
    samples: int = 4
    seeds: int = 2
    texts: int = 64
    data_dir: str | None = None

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"method is {self.method!r} but must be one of {', '.join(METHODS)}.")
        if self.rows % self.samples:
            raise ValueError(f"samples is {self.samples} but must divide rows, which is {self.rows}.")
        for name in ("hidden", "layers", "length", "rows", "pretrain_steps", "adam_steps", "steps", "seeds", "texts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)!r} but must be >= 1.")


def wikipedia(config: Config) -> tuple[Tensor, Tensor]:
    """Ids of valid.txt and of test.txt in the characters of Shakespeare; others are left out."""
    text = (shared_data("tinyshakespeare", config.data_dir) / "input.txt").read_text(encoding="utf-8")
    known, folder = {c: i for i, c in enumerate(sorted(set(text)))}, wikitext2(config.data_dir)
    need = 4 * config.texts * config.length
    train = (folder / "valid.txt").read_text(encoding="utf-8")
    test = (folder / "test.txt").read_text(encoding="utf-8")[: 2 * need]
    return tuple(torch.tensor([known[c] for c in part if c in known]) for part in (train, test))


def tuned(model: nn.Module, data: list, config: Config, optim: str, lr: float, steps: int, seed: int, split: int = 1):
    """A copy of `model` after training it by the stock Trainer; `split` micro-batches an update."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = quiet_trainer(
            Trainer, copy.deepcopy(model), data, folder, optim=optim, learning_rate=lr, max_steps=steps, seed=seed,
            per_device_train_batch_size=config.rows // split, gradient_accumulation_steps=split,
        )  # fmt: skip
        trainer.train()
    return trainer


def live_bytes(model: nn.Module, ids: Tensor) -> dict[str, int]:
    """Most bytes of new tensors in a forward pass without gradients, and in an update after the first of each kind."""
    found = {}

    def loss():
        return model(input_ids=ids, labels=ids).loss

    def adam_step(optimizer):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    model.eval()
    with torch.no_grad(), LiveBytes() as forward:
        loss()
    found["forward pass"] = forward.peak
    for name, kind in (("mezo", MeZO), ("justonebyte", JustOneByte)):
        optimizer = kind(model.parameters(), lr=1e-9)
        with LiveBytes() as update:
            optimizer.step(loss)
        found[name] = update.peak
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9)
    with LiveBytes() as update:  # gradients and moments are made in it, and stay
        adam_step(optimizer)
        adam_step(optimizer)
    found["adamw"] = update.peak
    return found


def run(config: Config, out: Path) -> dict:
    text, _, vocab = read_characters(config.data_dir)
    train, test = wikipedia(config)
    span = config.texts * config.length
    data, rows, shares, sent = rows_of(train, config.length), [], [], None
    held = {"chosen on": test[span : 2 * span], "held out": test[:span]}
    todo = {"adamw": ("adamw_torch", config.adam_lrs, config.adam_steps, 1)}
    todo[config.method] = (config.method, config.lrs, config.steps, config.samples if config.method != "mezo" else 1)
    with logging.tqdm(total=config.seeds * (1 + len(config.adam_lrs) + len(config.lrs)), desc="trainings") as bar:
        for seed in range(config.seeds):
            start = make_llama(seed, vocab, config.hidden, config.layers, config.length)
            start = tuned(start, rows_of(text, config.length), config, "adamw_torch", config.pretrain_lr,
                          config.pretrain_steps, seed).model  # fmt: skip
            bar.update()
            row: dict[str, Any] = {"seed": seed, "before": held_out_loss(start, held["held out"], config.length)}
            for name, (optim, lrs, steps, split) in todo.items():
                best = None
                for lr in lrs:
                    trainer = tuned(start, data, config, optim, lr, steps, seed, split)
                    found = [held_out_loss(trainer.model, ids, config.length) for ids in held.values()]
                    best = min(best or (*found, lr), (*found, lr))
                    if name == "justonebyte":
                        sent = trainer.optimizer.optimizer.bytes_sent / steps
                    bar.update()
                row |= {name: best[1], f"lr of {name}": best[2]}
            rows.append({key: round(x, 4) if "lr" not in key else x for key, x in row.items()})
            shares.append((row["before"] - row[config.method]) / (row["before"] - row["adamw"]))
    weights = sum(p.numel() for p in start.parameters())
    live = live_bytes(start, data[0]["input_ids"][None].expand(config.rows, -1))
    peak = live[config.method] / live["forward pass"]
    adam = live["adamw"] / live["forward pass"]
    note = f"peak of new tensors in an update {peak:.2f} times that of a forward pass, with AdamW {adam:.1f} times"
    if sent is not None:
        note = f"{sent:g} bytes an update for {config.samples} samples; a gradient of this model has {4 * weights}"
    method = registry.get(config.method)
    return {
        "evidence": {
            "claim": method.claim,
            "paper": f"{method.headline.metric}: {method.headline.value} ({method.headline.setting})",
            "metric": "share of AdamW's gain in held-out loss",
            "setting": f"Llama of {weights} weights, Shakespeare to Wikipedia by characters, {config.steps} updates "
            f"of {config.rows} x {config.length}, AdamW {config.adam_steps}",
            "method": config.method,
            "ours": statistics.fmean(shares),
            "ours_sd": statistics.stdev(shares) if len(shares) > 1 else None,
            "n": config.seeds,
            "baseline_name": "AdamW",
            "baseline": 1.0,
            "baseline_sd": None,
            "reproduced": statistics.fmean(shares) >= 0.8,
            "note": f"{note}; reproduced means four fifths of the gain",
        },
        "tables": {
            "held-out loss, nats a character": rows,
            "most bytes of new tensors at one time": [{"in": name, "bytes": size} for name, size in live.items()],
        },
    }
