"""Training on digits with wrong labels: who keeps the clean test accuracy, how flat, how fast, and who flips what.

Every entry of `methods` trains the same MLP from the same weights, on the same wrong labels and batches of a seed, in
the stock Trainer. An entry is a name with options, such as `sam(rho=0.1)`: `sgd` and `adamw` are plain; `bisam_tanh`,
`bisam_log` and every two-pass optimizer of the library run around the same SGD as `sgd`; `saf` and `mesa` are mixins.

`flipped` is measured apart from training: from the same SGD weights, SAM's and BiSAM's perturbations of each batch at
the same rho, and the share of the batch that was right (by its training label) before and wrong after.
"""

import dataclasses
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from scipy import stats
from torch.nn import functional as F
from transformers.utils import logging

from .. import registry
from ..optim.bisam import bisam_rows
from ..optim.sam import sam_direction
from ..recipe import write_json
from ._digits import Digits, accuracy, corrupt, load_digits, make_mlp, top_eigenvalue
from ._digits_rivals import MIXINS, PLAIN, SURROGATES, Observer, make_trainer, parse_entry
from ._plots import lines

OBJECTIVES = {
    "sam": F.cross_entropy,
    "bisam_tanh": lambda z, y: bisam_rows(z, y, "tanh").mean(),
    "bisam_log": lambda z, y: bisam_rows(z, y, "log").mean(),
}


@dataclass(kw_only=True)
class Config:
    """Args:
    methods: Entries `name` or `name(option=value, ...)`; `lr` is an option of every entry.
    method: Name of the entry that the evidence is about.
    baseline: Name of the entry it is compared with.
    metric: `last` (clean test accuracy after the last epoch), `best` (of the best epoch), `flipped` (share of the
        batch flipped by the perturbation at `flip_rhos[0]`), or `speed` (CPU seconds an epoch over the baseline's,
        measured apart, in turns).
    tolerance: If given, the claim is "at least as good": it holds when the one-sided 95 % bound of the difference lies
        above minus this many points. Otherwise it is "better": a difference above 0 with p < 0.05.
    max_time: With `speed`: the ratio up to which the claim holds.
    turns: With `speed`: how often method and baseline take turns at three epochs each, of which two are timed.
    turn_hidden: Width of the MLP that is timed. The Trainer's own work for a step is about 1 ms, and the step of a
        narrow MLP not much more.
    seeds: How many repeats; a repeat draws weights, wrong labels and batches.
    first_seed: Of the repeats.
    split: `test`, or `validation` for choosing options: another 360 digits, taken from the training digits.
    noise: Share of training labels that are wrong.
    epochs, batch_size, learning_rate, momentum, weight_decay, schedule: Of the base optimizer of all.
    hidden, norm: Of the MLP.
    hessian: Measure the top Hessian eigenvalue of the training loss at the end.
    flip_rhos: Radii at which flips are measured; the evidence is that of the first.
    flip_epochs: After which epochs of the plain SGD run; empty for none.
    """

    methods: list[str] = field(default_factory=lambda: ["sgd", "sam(rho=0.05)"])
    method: str = "sam"
    baseline: str = "sgd"
    metric: Literal["last", "best", "flipped", "speed"] = "last"
    tolerance: float | None = None
    max_time: float = 1.05
    turns: int = 15
    turn_hidden: int = 2048
    seeds: int = 10
    first_seed: int = 0
    split: Literal["test", "validation"] = "test"
    noise: float = 0.4
    epochs: int = 30
    batch_size: int = 64
    learning_rate: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: str = "cosine"
    hidden: int = 512
    norm: Literal["none", "layer", "batch"] = "layer"
    hessian: bool = True
    flip_rhos: list[float] = field(default_factory=lambda: [0.05])
    flip_epochs: list[int] = field(default_factory=list)

    def __post_init__(self):
        names = [parse_entry(entry)[0] for entry in self.methods]
        if len(set(self.methods)) < len(names):
            raise ValueError(f"methods has an entry twice: {self.methods}.")
        if self.method in PLAIN:
            raise ValueError(f"method is {self.method!r} but must be a method of the library; {self.method} is stock.")
        for label, value in {"method": self.method, "baseline": self.baseline}.items():
            known = OBJECTIVES if self.metric == "flipped" else names
            if value not in known:
                raise ValueError(f"{label} is {value!r} but must be one of {', '.join(known)}.")
        for label in ("seeds", "epochs", "batch_size", "hidden", "turns", "turn_hidden"):
            if getattr(self, label) < 1:
                raise ValueError(f"{label} is {getattr(self, label)} but must be >= 1.")
        if self.tolerance is not None and (self.tolerance <= 0 or self.seeds < 2):
            raise ValueError(
                f"tolerance is {self.tolerance} but must be > 0, with at least 2 seeds (here {self.seeds})."
            )
        if not 0 <= self.noise < 1:
            raise ValueError(f"noise is {self.noise} but must be in [0, 1).")
        if self.flip_epochs and "sgd" not in names:
            raise ValueError("flip_epochs needs the entry sgd: flips are measured from its weights.")
        if self.metric == "flipped" and not (self.flip_epochs and self.flip_rhos):
            raise ValueError("metric is 'flipped' but flip_epochs or flip_rhos is empty.")
        if any(not 1 <= epoch <= self.epochs for epoch in self.flip_epochs):
            raise ValueError(f"flip_epochs is {self.flip_epochs} but must lie in 1 to epochs ({self.epochs}).")


def fit(config: Config, entry: str, seed: int, clean: Digits, test: Digits, skip: int = 0) -> tuple[dict, list[dict]]:
    """Train one entry from one seed: what is measured of it, and the flips from its weights if it is plain SGD. The
    first `skip` epochs are not timed."""
    train = Digits(clean.pixel_values, corrupt(clean.labels, config.noise, seed))
    model = make_mlp(seed, config.hidden, config.norm)
    keep = config.flip_epochs if parse_entry(entry)[0] == "sgd" else []
    observer = Observer(test, keep)
    with tempfile.TemporaryDirectory() as folder:
        make_trainer(config, entry, model, train, folder, seed, callbacks=[observer]).train()
    found = {
        "entry": entry,
        "seed": seed,
        "accuracy": observer.accuracy,
        "last": observer.accuracy[-1],
        "best": max(observer.accuracy),
        "drop": observer.accuracy[-1] - max(observer.accuracy),
        "train": accuracy(model, train),
        "seconds": float(np.median(observer.seconds[skip:])),
    }
    if config.hessian:
        model.train()
        params = [p for p in model.parameters() if p.requires_grad]
        found["hessian"] = top_eigenvalue(lambda: model(train.pixel_values, train.labels)["loss"], params)
    rows = []
    for epoch, weights in observer.weights.items():
        model.load_state_dict(weights)
        for rho in config.flip_rhos:
            part = flips(model, train, rho, config.batch_size)
            rows += [{"epoch": epoch, "seed": seed, "rho": rho, **row} for row in part]
    return found, rows


def time_in_turns(config: Config, clean: Digits, test: Digits) -> dict[str, list[float]]:
    """CPU seconds of an epoch of method and baseline, which follow each other closely: a machine that slows down or
    has other work meets both. The terms of SAF and MESA are on from the beginning."""
    short, found = dataclasses.replace(config, epochs=3, hidden=config.turn_hidden, flip_epochs=[], hessian=False), {}
    entries = [next(e for e in config.methods if parse_entry(e)[0] == n) for n in (config.baseline, config.method)]
    for turn in logging.tqdm(range(config.turns), desc="turns"):
        for entry in entries if turn % 2 == 0 else reversed(entries):
            name, options = parse_entry(entry)
            options |= {"start": -1} if name in MIXINS else {}
            timed = f"{name}({','.join(f'{k}={v}' for k, v in options.items())})"
            found.setdefault(name, []).append(fit(short, timed, 0, clean, test, skip=1)[0]["seconds"])
    return found


def flips(model, train: Digits, rho: float, batch_size: int) -> list[dict[str, Any]]:
    """For each objective: what e = rho * g / ||g|| of a batch does to that batch, averaged over batches; w is kept."""
    model.eval()
    params = [p for p in model.parameters() if p.requires_grad]
    totals = {name: np.zeros(3) for name in OBJECTIVES}
    for x, y in zip(train.pixel_values.split(batch_size), train.labels.split(batch_size), strict=True):
        for name, objective in OBJECTIVES.items():
            z = model(x)["logits"]
            grads = list(torch.autograd.grad(objective(z, y), params))
            with torch.no_grad():
                before = [p.clone() for p in params]
                torch._foreach_add_(params, grads, alpha=rho / float(sam_direction(grads)))
                moved = model(x)["logits"]
                torch._foreach_copy_(params, before)
                right, still = z.argmax(-1) == y, moved.argmax(-1) == y
                lost = (right & ~still).sum(), (right.sum() - still.sum())
                rise = F.cross_entropy(moved, y, reduction="sum") - F.cross_entropy(z, y, reduction="sum")
            totals[name] += np.array([*map(float, lost), float(rise)])
    columns = ("flipped", "zero_one_rise", "loss_rise")
    return [{"objective": n, **dict(zip(columns, t / len(train), strict=True))} for n, t in totals.items()]


def run(config: Config, out: Path) -> dict[str, Any]:
    clean, test = load_digits(config.split)
    runs, flipped = [], []
    bar = logging.tqdm(total=config.seeds * len(config.methods), desc="runs")
    for seed in range(config.first_seed, config.first_seed + config.seeds):
        # Times are compared within a seed; turning the order round lets a slow drift of the machine cancel.
        for entry in config.methods if seed % 2 == 0 else reversed(config.methods):
            found, rows = fit(config, entry, seed, clean, test)
            runs.append(found)
            flipped += rows
            bar.update()
    bar.close()
    by_entry = {
        entry: sorted((r for r in runs if r["entry"] == entry), key=lambda r: r["seed"]) for entry in config.methods
    }
    lines(
        out / "accuracy.png",
        {entry: _curve(rows) for entry, rows in by_entry.items()},
        xlabel="epoch",
        ylabel=f"clean {config.split} accuracy, %",
        title=f"digits, {config.noise:.0%} wrong training labels, {config.seeds} seeds",
    )
    tables = {_setting(config): [_row(config, entry, by_entry) for entry in config.methods]}
    if flipped:
        tables["what a perturbation of the same SGD weights does to its batch"] = _flip_table(flipped)
    seconds = time_in_turns(config, clean, test) if config.metric == "speed" else {}
    if seconds:
        tables[f"CPU time of an epoch, MLP 64-{config.turn_hidden}-{config.turn_hidden}-10"] = [
            {"method": name, "ms, median": round(1000 * float(np.median(t)), 1), "least": round(1000 * min(t), 1)}
            for name, t in seconds.items()
        ]
    evidence = _evidence(config, by_entry, flipped, seconds)
    curves = {entry: [r["accuracy"] for r in rows] for entry, rows in by_entry.items()}
    write_json(out / "accuracy.json", {"of": "each entry, seed and epoch", "accuracy": curves})
    last = [{k: _short(v) for k, v in r.items() if k != "accuracy"} for r in runs]
    flipped = [{k: _short(v) for k, v in r.items()} for r in flipped]
    artifacts = ["accuracy.png", "accuracy.json"]
    return {"evidence": evidence, "tables": tables, "artifacts": artifacts, "runs": last, "flips": flipped}


def _short(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _curve(rows):
    values = 100 * np.array([row["accuracy"] for row in rows])
    return list(range(1, values.shape[1] + 1)), values.mean(0).tolist(), _sd(values).tolist()


def _sd(values) -> Any:
    return np.std(values, axis=0, ddof=1) if len(values) > 1 else np.zeros(np.shape(values)[1:])


def _named(by_entry, name: str) -> list[dict]:
    return next(rows for entry, rows in by_entry.items() if parse_entry(entry)[0] == name)


def _setting(config: Config) -> str:
    return (
        f"scikit-learn digits, {config.noise:.0%} wrong training labels, MLP 64-{config.hidden}-{config.hidden}-10, "
        f"{config.epochs} epochs, {config.seeds} seeds"
    )


def _row(config: Config, entry: str, by_entry) -> dict[str, Any]:
    rows, base = by_entry[entry], _named(by_entry, "sgd" if config.metric == "flipped" else config.baseline)
    last, best, drop, train = (100 * np.array([r[key] for r in rows]) for key in ("last", "best", "drop", "train"))
    row = {
        "method": entry,
        "last %": round(float(last.mean()), 2),
        "sd": round(float(_sd(last)), 2),
        "p vs base": float(f"{_p_value(last, 100 * np.array([r['last'] for r in base])):.1g}"),
        "best %": round(float(best.mean()), 2),
        "last - best": round(float(drop.mean()), 2),
        "train (noisy) %": round(float(train.mean()), 1),
    }
    if config.hessian:
        row["top eigenvalue"] = round(float(np.mean([r["hessian"] for r in rows])), 1)
    row["time / base"] = round(float(np.median(_ratio(rows, base))), 2)
    return row


def _p_value(ours, base) -> float:
    """Of the paired t-test; 1 where there is nothing to test."""
    return float(stats.ttest_rel(ours, base).pvalue) if len(ours) > 1 and np.any(ours != base) else 1.0


def _ratio(rows, base) -> list[float]:
    return [r["seconds"] / b["seconds"] for r, b in zip(rows, base, strict=True)]


def _flip_table(flipped: list[dict]) -> list[dict[str, Any]]:
    table = []
    for rho, epoch in sorted({(r["rho"], r["epoch"]) for r in flipped}):
        for name in OBJECTIVES:
            rows = [r for r in flipped if (r["rho"], r["epoch"], r["objective"]) == (rho, epoch, name)]
            share = 100 * np.array([r["flipped"] for r in rows])
            table.append(
                {
                    "rho": rho,
                    "epoch": epoch,
                    "objective": name,
                    "flipped %": round(float(share.mean()), 2),
                    "sd": round(float(_sd(share)), 2),
                    "0-1 loss rise %": round(100 * float(np.mean([r["zero_one_rise"] for r in rows])), 2),
                    "training loss rise": round(float(np.mean([r["loss_rise"] for r in rows])), 4),
                }
            )
    return table


def _evidence(config: Config, by_entry, flipped: list[dict], seconds: dict[str, list[float]]) -> dict[str, Any]:
    record = registry.get("bisam" if config.method in SURROGATES else config.method)
    headline = record.headline
    if config.metric == "flipped":
        pair = [_flips_by_seed(config, flipped, name) for name in (config.method, config.baseline)]
        what = f"training samples flipped at rho={config.flip_rhos[0]}, mean of epochs {config.flip_epochs}, %"
    else:
        key = "best" if config.metric == "best" else "last"
        pair = [100 * np.array([r[key] for r in _named(by_entry, name)]) for name in (config.method, config.baseline)]
        what = f"clean {config.split} accuracy, {key} epoch, %"
    ours, base = pair
    difference = ours - base
    p = _p_value(ours, base)
    note = f"{what}: {ours.mean():.2f} against {base.mean():.2f}, difference {difference.mean():+.2f}"
    note += f", paired t-test p={p:.2g}, ahead in {int((difference > 0).sum())} of {len(ours)} seeds."
    others = [e for e in by_entry if parse_entry(e)[0] == config.baseline][1:] if config.metric != "flipped" else []
    note += "".join(f" {e}: {100 * np.mean([r['last'] for r in by_entry[e]]):.2f}." for e in others)
    reproduced = bool(difference.mean() > 0 and p < 0.05)
    if config.tolerance is not None:
        bound = difference.mean() - stats.t.ppf(0.95, len(ours) - 1) * stats.sem(difference)
        reproduced = bool(bound > -config.tolerance)
        note += f" One-sided 95 % bound of the difference: {bound:+.2f}, claimed above {-config.tolerance:+.2f}."
    if config.metric == "speed":
        ours = np.divide(seconds[config.method], seconds[config.baseline])
        reproduced = bool(np.median(ours) <= config.max_time and difference.mean() >= 0)
        what = f"CPU time of an epoch over the base's, width {config.turn_hidden}; claimed: at most {config.max_time}"
        base = np.ones_like(ours)
        note = f"The ratio is the median of {config.turns} turns. " + note[0].upper() + note[1:]
    paper = ""
    if headline is not None:
        against = f" against {headline.baseline}" if headline.baseline else ""
        paper = f"{headline.metric}: {headline.value}{against} ({headline.setting})"
    return {
        "claim": record.claim,
        "paper": paper,
        "metric": what,
        "setting": _setting(config),
        "method": config.method,
        "ours": float(np.median(ours) if config.metric == "speed" else ours.mean()),
        "ours_sd": float(_sd(ours)),
        "n": len(ours),
        "baseline_name": config.baseline,
        "baseline": float(base.mean()),
        "baseline_sd": float(_sd(base)),
        "reproduced": reproduced,
        "note": note,
    }


def _flips_by_seed(config: Config, flipped: list[dict], name: str) -> np.ndarray:
    rows = [r for r in flipped if (r["rho"], r["objective"]) == (config.flip_rhos[0], name)]
    seeds = sorted({r["seed"] for r in rows})
    return 100 * np.array([np.mean([r["flipped"] for r in rows if r["seed"] == seed]) for seed in seeds])
