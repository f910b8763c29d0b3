"""Loss and bytes of optimizer state: AdamW, FRUGAL, and GaLore and BAdam at FRUGAL's density.

A small Llama learns Tiny Shakespeare by characters. GaLore and BAdam are FRUGAL's own parts without a rule for the
rest of the gradient (`inactive=none`): GaLore with singular vectors whose moments outlive a refresh, BAdam with blocks
of whole tensors. All have the same grid of learning rates, chosen with the first seed on windows that are not in the
result; bytes are those of the tensors in the optimizer's state dict.
"""

import statistics
from dataclasses import dataclass
from pathlib import Path

from transformers.utils import logging

from ..optim.frugal import METHOD, FRUGALConfig
from ._optimizer_runs import Task, kept


@dataclass(kw_only=True)
class Config:
    """
    Args:
        hidden, layers: Size of the Llama; with 65 characters its embedding is small beside its layers.
        length, rows: Of a batch.
        steps: Updates.
        density, update_gap: Of FRUGAL, GaLore and BAdam.
        order: In which FRUGAL and BAdam take their blocks.
        lrs: Learning rates to choose from.
        seeds: Seeds of the result.
        texts: Held-out windows of the result.
        data_dir: Folder that holds `tinyshakespeare`; `HFEXT_DATA` or `shared/data` beside the checkout when left out.
    """

    hidden: int = 128
    layers: int = 2
    length: int = 64
    rows: int = 8
    steps: int = 1500
    density: float = 0.25
    update_gap: int = 200
    order: str = "descending"
    lrs: tuple[float, ...] = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
    seeds: int = 2
    texts: int = 256
    data_dir: str | None = None

    def __post_init__(self):
        for name in ("hidden", "layers", "length", "rows", "steps", "seeds", "texts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)} but must be >= 1.")
        if not self.lrs or min(self.lrs) <= 0:
            raise ValueError(f"lrs is {self.lrs} but must hold numbers > 0.")
        FRUGALConfig(density=self.density, update_gap=self.update_gap, order=self.order)


def methods_of(config: Config) -> dict[str, tuple[str, str | None]]:
    """optim and optim_args of each rival."""
    shared = f"density={config.density},update_gap={config.update_gap}"
    return {
        "AdamW": ("adamw_torch", None),
        "FRUGAL": ("frugal", f"{shared},projection=block,order={config.order}"),
        "GaLore": ("frugal", f"{shared},projection=galore,inactive=none,reset_statistics=false"),
        "BAdam": ("frugal", f"{shared},projection=block,order={config.order},inactive=none"),
    }


def run(config: Config, out: Path) -> dict:
    c = config
    task = Task(hidden=c.hidden, layers=c.layers, length=c.length, rows=c.rows, texts=c.texts, data_dir=c.data_dir)
    methods = methods_of(c)
    bar = logging.tqdm(total=len(methods) * (len(c.lrs) + c.seeds - 1), desc="trainings")
    rows, grid, loss, bytes_ = [], [], {}, {}
    for name, (optim, optim_args) in methods.items():

        def once(lr: float, seed: int, name=name, optim=optim, optim_args=optim_args) -> dict:
            made = kept(
                out / "runs", f"{name}-{lr:g}-{seed}", task,
                optim=optim, optim_args=optim_args, lr=lr, steps=c.steps, seed=seed,
            )  # fmt: skip
            bar.update()
            return made

        tuned = {lr: once(lr, 0) for lr in c.lrs}
        best = min(tuned, key=lambda lr: tuned[lr]["tuning"])
        runs = [tuned[best], *(once(best, seed) for seed in range(1, c.seeds))]
        grid.append({"method": name, **{f"lr {lr:g}": round(made["tuning"], 4) for lr, made in tuned.items()}})
        loss[name], bytes_[name] = [r["loss"] for r in runs], runs[0]["peak_bytes"]
        rows.append(
            {
                "method": name,
                "lr": best,
                "held-out loss": round(statistics.fmean(loss[name]), 4),
                "each seed": " ".join(f"{x:.4f}" for x in loss[name]),
                "over AdamW's": round(statistics.fmean(loss[name]) / statistics.fmean(loss["AdamW"]), 4),
                "state bytes, peak": bytes_[name],
                "peak over AdamW's": round(bytes_[name] / bytes_["AdamW"], 4),
                "mean over AdamW's": round(runs[0]["mean_bytes"] / bytes_["AdamW"], 4),
                "ms an update": round(runs[0]["ms"], 1),
            }
        )
    bar.close()
    mean = {name: statistics.fmean(values) for name, values in loss.items()}
    ratio, lean = mean["FRUGAL"] / mean["AdamW"], bytes_["FRUGAL"] / bytes_["AdamW"]
    below = all(mean["FRUGAL"] < mean[rival] for rival in ("GaLore", "BAdam"))
    return {
        "tables": {
            f"Tiny Shakespeare, {c.steps} updates, density {c.density:g}: nats a character": rows,
            "Loss by learning rate (first seed, other windows)": grid,
        },
        "evidence": {
            "claim": METHOD.claim,
            "paper": METHOD.headline.value,
            "metric": "held-out cross-entropy, nats a character",
            "setting": f"Llama {c.hidden}x{c.layers}, Tiny Shakespeare, {c.steps} updates of {c.rows}x{c.length} "
            f"characters, density {c.density:g}, blocks {c.order}, learning rate of each from the same grid",
            "method": "FRUGAL",
            "ours": round(mean["FRUGAL"], 4),
            "ours_sd": statistics.stdev(loss["FRUGAL"]) if c.seeds > 1 else None,
            "n": c.seeds,
            "baseline_name": "AdamW",
            "baseline": round(mean["AdamW"], 4),
            "baseline_sd": statistics.stdev(loss["AdamW"]) if c.seeds > 1 else None,
            "reproduced": bool(ratio <= 1.02 and below and lean <= 0.45),
            "note": f"Reproduced means at most 1.02 times AdamW's loss ({ratio:.4f}), below GaLore "
            f"({mean['GaLore']:.4f}) and BAdam ({mean['BAdam']:.4f}), and at most 0.45 times its bytes of state at "
            f"the peak ({lean:.3f}: tensors differ in size, so the largest block counts). GaLore and BAdam are "
            "FRUGAL's parts with inactive=none, not their authors' programs.",
        },
    }
