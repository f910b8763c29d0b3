"""At which learning rates does a small Llama still train when its products have fewer bits, and is it sharp before?

Characters of Tiny Shakespeare, the same weights and batches for every format and learning rate of a seed. A run trains
when it has not diverged and has gained at least `enough` of what the first format gains at its best learning rate.
"""

import math
import re
import statistics
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from transformers import Trainer
from transformers.utils import logging

from ..training.logit_sharpness import LogitSharpnessCallback, diverged, spikes
from ..training.reduced_precision import METHOD, PrecisionEmulator, check_format
from ._plots import lines
from ._shakespeare import make_llama, quiet_trainer, read_characters, rows_of


@dataclass(kw_only=True)
class Config:
    """
    Args:
        formats: Names such as `E8M3`; the first is what the others are compared with.
        learning_rates: Ascending.
        mode: `rne` or `trunc`.
        hidden, layers: Size of the model.
        length, rows: Of a batch.
        steps: Of a run, after which the cosine has ended.
        every: Steps between two measurements of the sharpness.
        enough: Share of the best gain, in (0, 1), from which a run counts as trained.
        narrow: Format with few mantissa bits, of the claim.
        short: Format with an exponent bit less, of the claim.
        seeds: How many.
        data_dir: Folder that holds `tinyshakespeare`; `HFEXT_DATA` or `shared/data` beside the checkout when left out.
    """

    formats: tuple[str, ...] = ("E8M7", "E8M3", "E8M1", "E7M7", "E5M2", "E4M3")
    learning_rates: tuple[float, ...] = (5e-3, 2e-2, 8e-2)
    mode: str = "rne"
    hidden: int = 64
    layers: int = 1
    length: int = 64
    rows: int = 8
    steps: int = 150
    every: int = 10
    enough: float = 0.75
    narrow: str = "E8M1"
    short: str = "E7M7"
    seeds: int = 1
    data_dir: str | None = None

    def __post_init__(self):
        for name in self.formats:
            bits_of(name)
        for name in ("hidden", "layers", "length", "rows", "steps", "every", "seeds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)} but must be >= 1.")
        if not 0 < self.enough < 1:
            raise ValueError(f"enough is {self.enough} but must be in (0, 1).")
        if list(self.learning_rates) != sorted(self.learning_rates) or not self.learning_rates:
            raise ValueError(f"learning_rates is {self.learning_rates} but must ascend.")
        if not {self.narrow, self.short} <= set(self.formats[1:]):
            raise ValueError(f"narrow and short are {self.narrow}, {self.short} but must be among formats[1:].")


def bits_of(name: str) -> tuple[int, int]:
    """Exponent and mantissa bits of `E8M3`."""
    match = re.fullmatch(r"E(\d)M(\d+)", name)
    if match is None:
        raise ValueError(f"formats has {name!r} but names must look like E8M3.")
    exp_bits, man_bits = int(match[1]), int(match[2])
    check_format(exp_bits, man_bits, "rne")
    return exp_bits, man_bits


def one_run(config: Config, name: str, rate: float, seed: int, data: list, vocab: int) -> dict:
    """Losses of all steps, and the sharpness at the measured ones."""
    c = config
    model = make_llama(seed, vocab, c.hidden, c.layers, c.length)
    options = dict(max_steps=c.steps, learning_rate=rate, per_device_train_batch_size=c.rows, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        trainer = quiet_trainer(
            Trainer, model, data, folder, warmup_steps=10, adam_beta2=0.95, logging_nan_inf_filter=False, **options
        )
        trainer.add_callback(LogitSharpnessCallback(trainer, every=c.every))
        with PrecisionEmulator(model, *bits_of(name), c.mode):
            trainer.train()
    log = trainer.state.log_history
    losses = [row["loss"] for row in log if "loss" in row]
    sharp = [(row["step"], row["logit_sharpness"]) for row in log if "logit_sharpness" in row]
    return {"losses": losses, "sharp": sharp}


def final(losses: list[float]) -> float:
    """Mean of the last tenth of the steps."""
    return statistics.fmean(losses[-max(1, len(losses) // 10) :])


def before_worst(run: dict) -> float:
    """Sharpness at the last measurement before the highest loss of the second half over that at the least loss.

    The highest loss of a run that trains is no more than noise, and the ratio near 1.
    """
    losses = [x if math.isfinite(x) else math.inf for x in run["losses"]]
    half = len(losses) // 2
    worst = max(range(half, len(losses)), key=losses.__getitem__) + 1
    best = min(range(len(losses)), key=losses.__getitem__) + 1
    at_worst = [phi for step, phi in run["sharp"] if step <= worst]
    at_best = [phi for step, phi in run["sharp"] if step <= best]
    return at_worst[-1] / at_best[-1] if at_best[-1] else float("nan")


def run(config: Config, out: Path) -> dict:
    c = config
    text, _, vocab = read_characters(c.data_dir)
    data = rows_of(text, c.length)
    jobs = [(name, rate, seed) for name in c.formats for rate in c.learning_rates for seed in range(c.seeds)]
    runs = defaultdict(list)
    for name, rate, seed in logging.tqdm(jobs, desc="runs"):
        runs[name, rate].append(one_run(c, name, rate, seed, data, vocab))

    start = statistics.fmean(x["losses"][0] for found in runs.values() for x in found)
    reached = min(statistics.fmean(final(x["losses"]) for x in runs[c.formats[0], rate]) for rate in c.learning_rates)
    bar = start - c.enough * (start - reached)

    def trains(x: dict) -> bool:
        return not diverged(x["losses"]) and final(x["losses"]) <= bar

    rows, usable = [], defaultdict(list)
    for (name, rate), found in runs.items():
        good = [trains(x) for x in found]
        if all(good):
            usable[name].append(rate)
        rows.append(
            {
                "format": name,
                "learning rate": rate,
                "final loss": round(statistics.fmean(final(x["losses"]) for x in found), 3),
                "runs that train": f"{sum(good)} of {len(good)}",
                "diverged": sum(diverged(x["losses"]) for x in found),
                "spikes": sum(len(spikes(x["losses"])) for x in found),
                "sharpness, median": round(statistics.median(phi for x in found for _, phi in x["sharp"]), 3),
                "sharpness at the end": round(statistics.fmean(x["sharp"][-1][1] for x in found), 3),
                "sharpness before the worst step / at the best": round(statistics.fmean(map(before_worst, found)), 2),
            }
        )
    largest = {name: max(usable[name], default=0.0) for name in c.formats}
    first, narrow, short = c.formats[0], largest[c.narrow], largest[c.short]
    for i, rate in enumerate(c.learning_rates):
        series = {
            n: ([s for s, _ in runs[n, rate][0]["sharp"]], [p for _, p in runs[n, rate][0]["sharp"]], None)
            for n in c.formats
        }
        lines(out / f"sharpness-{i}.png", series, "step", "phi", f"sharpness in the logits, learning rate {rate:g}")
    best = [{"format": n, "largest learning rate that trains": largest[n] or "none"} for n in c.formats]
    return {
        "tables": {
            f"Llama {c.hidden}x{c.layers}, {c.steps} steps, {c.seeds} seeds": rows,
            f"Trains: loss <= {bar:.2f}, which is {c.enough:.0%} of the gain from {start:.2f} to {reached:.2f}": best,
        },
        "evidence": {
            "claim": METHOD.claim,
            "paper": METHOD.headline.value,
            "metric": "largest learning rate at which every run trains",
            "setting": f"Llama {c.hidden}x{c.layers}, characters of Tiny Shakespeare, {c.steps} steps, AdamW",
            "method": c.narrow,
            "ours": narrow,
            "ours_sd": None,
            "n": c.seeds,
            "baseline_name": first,
            "baseline": largest[first],
            "baseline_sd": None,
            "reproduced": narrow < largest[first] and short == 0,
            "note": f"Reproduced means a smaller one with {c.narrow} and none with {c.short}; seen with {c.short}: "
            f"{short:g}. Others: {', '.join(f'{n} {largest[n]:g}' for n in c.formats[1:])}. The paper's models are "
            "far larger and train for thousands of steps, where gradients reach ranges that these never do.",
        },
        "artifacts": [f"sharpness-{i}.png" for i in range(len(c.learning_rates))],
    }
