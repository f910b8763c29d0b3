"""Tokens that SOAP needs to the loss of AdamW, and what an update of each costs.

A small Llama learns Tiny Shakespeare by characters in large batches. AdamW has its best learning rate and the better
of two pairs of betas. SOAP has its best learning rate of the same grid and is then trained anew, each time to the end
of its own schedule, for a share of the tokens. Learning rates are chosen with the first seed, on windows that are not
in the result.
"""

import statistics
from dataclasses import dataclass
from pathlib import Path

from transformers.utils import logging

from ..optim.soap import METHOD
from ._optimizer_runs import Task, kept


@dataclass(kw_only=True)
class Config:
    """
    Args:
        hidden, layers: Size of the Llama.
        length, rows: Of a batch.
        steps: Updates of AdamW.
        shares: Of these, the updates that SOAP is given, rising; the last is that of the claim.
        lrs: Learning rates to choose from.
        adamw_betas: Pairs of betas to choose from for AdamW.
        precondition_frequency: Of SOAP.
        seeds: Seeds of the result.
        texts: Held-out windows of the result.
        data_dir: Folder that holds `tinyshakespeare`; `HFEXT_DATA` or `shared/data` beside the checkout when left out.
    """

    hidden: int = 128
    layers: int = 2
    length: int = 32
    rows: int = 64
    steps: int = 300
    shares: tuple[float, ...] = (0.4, 0.6, 0.8)
    lrs: tuple[float, ...] = (7.5e-4, 1.5e-3, 3e-3, 6e-3)
    adamw_betas: tuple[tuple[float, float], ...] = ((0.9, 0.999), (0.95, 0.95))
    precondition_frequency: int = 10
    seeds: int = 2
    texts: int = 512
    data_dir: str | None = None

    def __post_init__(self):
        for name in ("hidden", "layers", "length", "rows", "steps", "seeds", "texts", "precondition_frequency"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)} but must be >= 1.")
        if not self.lrs or min(self.lrs) <= 0:
            raise ValueError(f"lrs is {self.lrs} but must hold numbers > 0.")
        if (
            not self.shares
            or list(self.shares) != sorted(self.shares)
            or not 0 < min(self.shares) <= max(self.shares) <= 1
        ):
            raise ValueError(f"shares is {self.shares} but must hold rising numbers in (0, 1].")
        if not self.adamw_betas:
            raise ValueError("adamw_betas is empty but must hold a pair at least.")


def spread(values: list[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def first_share(losses: dict[float, float], goal: float) -> float | None:
    """The smallest share with a loss of at most `goal`."""
    return min((share for share, loss in losses.items() if loss <= goal), default=None)


def run(config: Config, out: Path) -> dict:
    c = config
    task = Task(hidden=c.hidden, layers=c.layers, length=c.length, rows=c.rows, texts=c.texts, data_dir=c.data_dir)
    total = (len(c.adamw_betas) + 1) * len(c.lrs) + c.seeds - 1 + len(c.shares) * c.seeds
    bar = logging.tqdm(total=total, desc="trainings")

    def once(optim: str, lr: float, steps: int, seed: int, betas: tuple[float, float] | None = None) -> dict:
        soap = optim == "soap"
        name = f"{optim}-{lr:g}-{steps}-{seed}" + ("" if betas is None else f"-{betas[0]:g}-{betas[1]:g}")
        made = kept(
            out / "runs", name, task, optim=optim, lr=lr, steps=steps, seed=seed,
            optim_args=f"precondition_frequency={c.precondition_frequency}" if soap else None,
            **({} if betas is None else {"adam_beta1": betas[0], "adam_beta2": betas[1]}),
        )  # fmt: skip
        bar.update()
        return made

    adamw = {(lr, betas): once("adamw_torch", lr, c.steps, 0, betas) for betas in c.adamw_betas for lr in c.lrs}
    (lr, betas) = min(adamw, key=lambda key: adamw[key]["tuning"])
    base = [adamw[lr, betas], *(once("adamw_torch", lr, c.steps, seed, betas) for seed in range(1, c.seeds))]
    soap = {rate: once("soap", rate, c.steps, 0) for rate in c.lrs}
    best = min(soap, key=lambda rate: soap[rate]["tuning"])
    shares = {
        share: [once("soap", best, round(share * c.steps), seed) for seed in range(c.seeds)] for share in c.shares
    }
    bar.close()

    goal = statistics.fmean(r["loss"] for r in base)
    losses = {share: statistics.fmean(r["loss"] for r in runs) for share, runs in shares.items()}
    share = first_share(losses, goal)
    # Of the runs that reach the loss, in which an update need not take as long as in the whole run.
    cost = statistics.fmean(r["ms"] for r in shares[c.shares[-1] if share is None else share]) / base[0]["ms"]
    edges = [name for name, rate in (("AdamW", lr), ("SOAP", best)) if rate in (min(c.lrs), max(c.lrs))]
    beyond = f". The learning rate of {' and '.join(edges)} lies at the edge of the grid: a better one may lie beyond"
    tried = f"of the shares {', '.join(map(str, c.shares))}"
    reached = f"None {tried} reaches it" if share is None else f"{share:g} is the smallest {tried} that reaches it"
    rows = [
        {
            "optimizer": "AdamW",
            "lr": lr,
            "updates": c.steps,
            "share of AdamW's tokens": 1.0,
            "held-out loss": round(goal, 4),
            "each seed": " ".join(f"{r['loss']:.4f}" for r in base),
            "CPU ms an update": round(base[0]["ms"], 1),
            "state bytes": base[0]["peak_bytes"],
        }
    ]
    for part, runs in (*shares.items(), (1.0, [soap[best]])):
        rows.append(
            {
                "optimizer": "SOAP",
                "lr": best,
                "updates": round(part * c.steps),
                "share of AdamW's tokens": part,
                "held-out loss": round(statistics.fmean(r["loss"] for r in runs), 4),
                "each seed": " ".join(f"{r['loss']:.4f}" for r in runs),
                "CPU ms an update": round(statistics.fmean(r["ms"] for r in runs), 1),
                "state bytes": runs[0]["peak_bytes"],
            }
        )
    grid = [
        {"optimizer": f"AdamW {b}", **{f"lr {r:g}": round(adamw[r, b]["tuning"], 4) for r in c.lrs}}
        for b in c.adamw_betas
    ]
    grid.append({"optimizer": "SOAP", **{f"lr {r:g}": round(soap[r]["tuning"], 4) for r in c.lrs}})
    return {
        "tables": {
            f"Tiny Shakespeare, batches of {c.rows}x{c.length}: nats a character": rows,
            "Loss by learning rate (first seed, other windows)": grid,
        },
        "evidence": {
            "claim": METHOD.claim,
            "paper": METHOD.headline.value,
            "metric": f"held-out cross-entropy, nats a character; SOAP with {c.shares[-1]:g} of AdamW's tokens",
            "setting": f"Llama {c.hidden}x{c.layers}, Tiny Shakespeare, batches of {c.rows}x{c.length} characters, "
            f"{c.steps} updates of AdamW with lr {lr:g} and betas {betas}, SOAP with lr {best:g}",
            "method": "SOAP",
            "ours": round(losses[c.shares[-1]], 4),
            "ours_sd": spread([r["loss"] for r in shares[c.shares[-1]]]),
            "n": c.seeds,
            "baseline_name": "AdamW",
            "baseline": round(goal, 4),
            "baseline_sd": spread([r["loss"] for r in base]),
            "reproduced": losses[c.shares[-1]] <= goal,
            "note": f"Reproduced means at most AdamW's loss. {reached}, each with a whole schedule of its own. "
            f"An update of SOAP takes {cost:.2f} times AdamW's CPU time here"
            + ("" if share is None else f", so the time to that loss is {share * cost:.2f} of AdamW's")
            + beyond * bool(edges)
            + ". The model is small: beside the gradient, the factors cost less in larger batches.",
        },
    }
