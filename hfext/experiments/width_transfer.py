"""Whether the learning rate and the radius found on a narrow network are right on a wide one.

A three-layer MLP learns digits with wrong labels by SGD with momentum, at every (lr, rho) of a grid in octaves and at
every width, in three ways: SAM in the standard parametrisation, SAM in muP (one global norm), and muP2. The optimum of
a grid is the mean place, in octaves, of the cells that are nearly as accurate as the best one: the best cell alone
hops along a ridge with the seed. A grid whose best cell lies on its edge grows there. At the base width all are one.
"""

import functools
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.utils import logging

from ..optim import mup, sam_step
from ..optim.mup_sam import MuPSAM
from ..optim.sam import SharpnessAware
from ._digits import corrupt, load_digits
from ._width import MLP, check_widths

METHODS = ("SP + SAM", "muP + SAM", "muP2")
Cell = tuple[int, int]


@dataclass(kw_only=True)
class Config:
    """Fields of the recipe.

    Args:
        widths: Widths to compare.
        base_width: The width at which lr and rho would be tuned, one of `widths`.
        lr_octaves: First grid of learning rates, as exponents of 2.
        rho_octaves: First grid of radii, as exponents of 2.
        grow: How often a grid may grow by a row or column when its optimum is on the edge.
        seeds: Number of runs in each cell, for each of `widths`; a seed fixes the initial weights, the wrong labels
            and the batches.
        near: Accuracy below the best that still counts as optimal.
        steps: Updates in a run.
        batch: Images in an update.
        images: Training images; the rest is for testing.
        noise: Fraction of wrong training labels.
        momentum: Of SGD.
    """

    widths: tuple[int, ...] = (64, 256, 1024)
    base_width: int = 64
    lr_octaves: tuple[int, ...] = (-5, -4, -3, -2, -1)
    rho_octaves: tuple[int, ...] = (-4, -3, -2, -1, 0)
    grow: int = 2
    seeds: tuple[int, ...] = (6, 3, 1)
    near: float = 0.02
    steps: int = 100
    batch: int = 100
    images: int = 300
    noise: float = 0.4
    momentum: float = 0.9

    def __post_init__(self):
        check_widths("width_transfer", self.widths, self.base_width)
        allowed = {
            "base_width": (self.base_width in self.widths, "one of widths"),
            "lr_octaves": (len(self.lr_octaves) > 1, "two or more exponents of 2"),
            "rho_octaves": (len(self.rho_octaves) > 1, "two or more exponents of 2"),
            "grow": (self.grow >= 0, ">= 0"),
            "seeds": (len(self.seeds) == len(self.widths) and min(self.seeds) >= 1, "one number >= 1 for each width"),
            "near": (0 <= self.near < 1, "in [0, 1)"),
            "steps": (self.steps >= 1, ">= 1"),
            "batch": (1 <= self.batch <= self.images, f"from 1 to images ({self.images})"),
            "images": (self.images < 1500, "below 1500"),
            "noise": (0 <= self.noise < 1, "in [0, 1)"),
            "momentum": (0 <= self.momentum < 1, "in [0, 1)"),
        }
        for field, (ok, what) in allowed.items():
            if not ok:
                raise ValueError(f"width_transfer: {field} is {getattr(self, field)!r} but must be {what}.")


@functools.cache
def images() -> tuple[Tensor, Tensor]:
    """All digits [n, 64] and their labels [n], in a fixed order."""
    parts = load_digits()
    return torch.cat([part.pixel_values for part in parts]), torch.cat([part.labels for part in parts])


def train(config: Config, method: str, width: int, lr: float, rho: float, seed: int) -> float:
    """Accuracy on clean test images after one run."""
    x, y = images()
    n = config.images
    labels = corrupt(y[:n], config.noise, seed)
    model = MLP(width, seed)
    if method == "SP + SAM":
        optimizer = SharpnessAware(torch.optim.SGD(model.parameters(), lr=lr, momentum=config.momentum), rho=rho)
    else:
        mup.apply(model, MLP(config.base_width))
        base = torch.optim.SGD(mup.param_groups(model, "sgd", lr=lr), lr=lr, momentum=config.momentum)
        optimizer = MuPSAM(base, rho=rho, perturbation="layerwise" if method == "muP2" else "global")
    generator = torch.Generator().manual_seed(seed)
    epochs = math.ceil(config.steps * config.batch / n)
    order = torch.cat([torch.randperm(n, generator=generator) for _ in range(epochs)])
    for rows in order[: config.steps * config.batch].split(config.batch):

        def closure(rows=rows):
            loss = F.cross_entropy(model(x[rows]), labels[rows])
            loss.backward()
            return loss

        sam_step(optimizer, closure)
    with torch.no_grad():
        return float((model(x[n:]).argmax(1) == y[n:]).float().mean())


def best(cells: dict[Cell, list[float]]) -> Cell:
    return max(cells, key=lambda cell: statistics.fmean(cells[cell]))


def optimum(cells: dict[Cell, list[float]], near: float) -> tuple[float, float]:
    """Mean (lr octave, rho octave) of the cells within `near` of the best."""
    mean = {cell: statistics.fmean(values) for cell, values in cells.items()}
    good = [cell for cell, value in mean.items() if value >= max(mean.values()) - near]
    return statistics.fmean(c[0] for c in good), statistics.fmean(c[1] for c in good)


def search(config: Config, method: str, width: int, bar: Any) -> dict[Cell, list[float]]:
    """{(lr octave, rho octave): accuracy of each seed} over a grid that has its best cell inside, if it may grow."""
    lrs, rhos = sorted(config.lr_octaves), sorted(config.rho_octaves)
    seeds = range(config.seeds[config.widths.index(width)])
    cells: dict[Cell, list[float]] = {}
    for _ in range(config.grow + 1):
        for cell in [(i, j) for i in lrs for j in rhos if (i, j) not in cells]:
            cells[cell] = [train(config, method, width, 2.0 ** cell[0], 2.0 ** cell[1], s) for s in seeds]
            bar.update()
        grown = False
        for octaves, at in ((lrs, best(cells)[0]), (rhos, best(cells)[1])):
            if at in (octaves[0], octaves[-1]):
                octaves.append(octaves[-1] + 1) if at == octaves[-1] else octaves.insert(0, at - 1)
                grown = True
        if not grown:
            break
    return cells


def on_edge(cells: dict[Cell, list[float]]) -> bool:
    at = best(cells)
    return any(at[k] in (min(c[k] for c in cells), max(c[k] for c in cells)) for k in (0, 1))


def heat_maps(path: Path, grids: dict[tuple[str, int], dict[Cell, list[float]]]) -> None:
    """One row per method, one column per width; a ring marks the optimum, a cross that of the base width."""
    from matplotlib.figure import Figure

    methods, widths = list(dict.fromkeys(m for m, _ in grids)), list(dict.fromkeys(w for _, w in grids))
    figure = Figure(figsize=(3.1 * len(widths), 2.7 * len(methods)), layout="constrained")
    axes = figure.subplots(len(methods), len(widths), squeeze=False, sharex=True, sharey=True)
    for (method, width), cells in grids.items():
        axis = axes[methods.index(method)][widths.index(width)]
        x, y = [c[1] for c in cells], [c[0] for c in cells]
        drawn = axis.scatter(x, y, c=[statistics.fmean(v) for v in cells.values()], s=330, marker="s", vmin=0.1)
        axis.plot(*best(cells)[::-1], "o", markerfacecolor="none", color="red", markersize=14)
        axis.plot(*best(grids[method, min(widths)])[::-1], "x", color="white")
        axis.set(title=f"{method}, width {width}", xlabel="log2 rho", ylabel="log2 lr")
        axis.margins(0.15)
        figure.colorbar(drawn, ax=axis)
    figure.savefig(path, format="png", dpi=120)


def run(config: Config, out: Path) -> dict:
    grids: dict[tuple[str, int], dict[Cell, list[float]]] = {}
    size = len(config.lr_octaves) * len(config.rho_octaves)
    widths = sorted(config.widths)
    with logging.tqdm(total=size * (len(METHODS) * (len(widths) - 1) + 1), desc="grid cells") as bar:
        shared = search(config, METHODS[0], config.base_width, bar)
        for method in METHODS:
            for width in widths:
                same = width == config.base_width
                grids[method, width] = shared if same else search(config, method, width, bar)
    base, centre = best(shared), optimum(shared, config.near)
    rows = []
    for (method, width), cells in grids.items():
        at, here = best(cells), optimum(cells, config.near)
        top, moved = statistics.fmean(cells[at]), statistics.fmean(cells[base])
        rows.append(
            {
                "method": method,
                "width": width,
                "best lr": 2.0 ** at[0],
                "best rho": 2.0 ** at[1],
                "lr shift, octaves": round(here[0] - centre[0], 2),
                "rho shift, octaves": round(here[1] - centre[1], 2),
                "best accuracy": round(top, 4),
                f"accuracy at the best of width {config.base_width}": round(moved, 4),
                "lost by not tuning": round(top - moved, 4),
                "on the edge": on_edge(cells),
            }
        )
    heat_maps(out / "width-transfer.png", grids)
    wide = {row["method"]: row for row in rows if row["width"] == widths[-1]}
    shift = {m: abs(row["lr shift, octaves"]) + abs(row["rho shift, octaves"]) for m, row in wide.items()}
    lost = {m: row["lost by not tuning"] for m, row in wide.items()}
    others = [m for m in METHODS if m != "muP2"]
    return {
        "evidence": {
            "claim": "The joint optimum of (lr, rho) transfers over width in muP2, and neither in standard "
            "parametrisation nor in muP with a global perturbation.",
            "paper": "MLP, ResNet, ViT: joint transfer with muP2 only (abstract)",
            "metric": f"shift of the optimum, octaves of lr plus of rho, width {config.base_width} to {widths[-1]}",
            "setting": f"3-layer MLP, {config.images} digits, {config.noise:.0%} wrong labels, "
            f"{config.steps} updates, widths {', '.join(map(str, widths))}",
            "method": "muP2",
            "ours": float(shift["muP2"]),
            "ours_sd": None,
            "n": min(config.seeds),
            "baseline_name": "SP + SAM",
            "baseline": float(shift["SP + SAM"]),
            "baseline_sd": None,
            "reproduced": shift["muP2"] <= 1 and all(shift[m] > shift["muP2"] for m in others),
            "note": f"muP + SAM {shift['muP + SAM']:.2f}; runs in a cell {', '.join(map(str, config.seeds))}; "
            "accuracy lost by not tuning again: " + ", ".join(f"{m} {lost[m]:.3f}" for m in METHODS),
        },
        "tables": {"optimum over width": rows},
        "artifacts": ["width-transfer.png"],
        "grids": {
            f"{method}, width {width}": {f"lr 2^{i}, rho 2^{j}": v for (i, j), v in sorted(cells.items())}
            for (method, width), cells in grids.items()
        },
    }
