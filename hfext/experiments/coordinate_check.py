"""How far a few optimizer steps move the activations of a network, as it grows: muP against standard parametrisation.

Mean |h_after - h_before| of every layer's output over the same batch, and the slope of its logarithm over log(width).
In muP it is 0 for every layer. Models: a three-layer MLP on digits with SGD, and a one-layer Llama on random tokens
with AdamW, its embeddings tied and untied.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils import logging

from ..optim import mup
from . import _plots
from ._digits import load_digits
from ._width import MLP, check_widths, llama, slope

METHODS = ("muP", "standard")


@dataclass(kw_only=True)
class Config:
    """Fields of the recipe.

    Args:
        widths: Widths to compare, multiples of 16.
        base_width: Width at which both parametrisations are the same.
        steps: Optimizer steps on one batch.
        seeds: Number of initialisations to average over.
        sgd_lr: Learning rate of the MLP at the base width.
        adam_lr: Learning rate of the Llama at the base width.
        llama: Whether to measure the Llama.
    """

    widths: tuple[int, ...] = (64, 128, 256, 512, 1024)
    base_width: int = 64
    steps: int = 3
    seeds: int = 4
    sgd_lr: float = 0.1
    adam_lr: float = 0.002
    llama: bool = True

    def __post_init__(self):
        check_widths("coordinate_check", self.widths, self.base_width, 16)
        for field in ("steps", "seeds", "sgd_lr", "adam_lr"):
            if getattr(self, field) <= 0:
                raise ValueError(f"coordinate_check: {field} is {getattr(self, field)!r} but must be above 0.")


def outputs(model: nn.Module, forward: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
    """What every linear layer and embedding returns in one forward pass, by module name."""
    found: dict[str, Tensor] = {}

    def keep(name):
        return lambda module, args, output: found.__setitem__(name, output.detach().clone())

    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding)]
    hooks = [m.register_forward_hook(keep(name)) for name, m in layers]
    try:
        with torch.no_grad():
            forward(model)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def movement(
    model: nn.Module, optimizer: torch.optim.Optimizer, loss: Callable[[nn.Module], Tensor], steps: int
) -> dict[str, float]:
    """Mean |change| of every layer's output after `steps` steps on one batch."""
    before = outputs(model, loss)
    for _ in range(steps):
        loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: float((after - before[name]).abs().mean()) for name, after in outputs(model, loss).items()}


def measure(make, loss, kind: str, config: Config, method: str) -> dict[str, list[float]]:
    """{layer: [mean |change| for each width]}, averaged over seeds."""
    lr = config.sgd_lr if kind == "sgd" else config.adam_lr
    moved: dict[str, list[float]] = {}
    for width in config.widths:
        seen: dict[str, list[float]] = {}
        for seed in range(config.seeds):
            model = make(width, seed)
            groups = [{"params": list(model.parameters())}]
            if method == "muP":
                base = make(config.base_width, 0)
                mup.apply(model, getattr(base, "config", base))
                groups = mup.param_groups(model, kind, lr=lr)
            if kind == "sgd":
                optimizer = torch.optim.SGD(groups, lr=lr)
            else:
                # Gradients fall with the width and must stay far above eps.
                optimizer = torch.optim.AdamW(groups, lr=lr, eps=1e-15, weight_decay=0.0)
            for name, value in movement(model, optimizer, loss, config.steps).items():
                seen.setdefault(name, []).append(value)
        for name, values in seen.items():
            moved.setdefault(name, []).append(statistics.fmean(values))
    return moved


def cases(config: Config):
    """Name, factory (width, seed) -> model, loss and optimizer kind."""
    train, _ = load_digits()
    x, y = train.pixel_values[:128], train.labels[:128]
    yield "MLP, SGD", MLP, lambda model: F.cross_entropy(model(x), y), "sgd"
    if config.llama:
        ids = torch.randint(3, 64, (2, 8), generator=torch.Generator().manual_seed(0))
        for tied in (False, True):
            yield (
                f"Llama {'tied' if tied else 'untied'}, AdamW",
                lambda width, seed, tied=tied: llama(width, seed, tied),
                lambda model: model(input_ids=ids, labels=ids).loss,
                "adam",
            )


def run(config: Config, out: Path) -> dict:
    slopes: dict[tuple[str, str], dict[str, float]] = {}
    artifacts = []
    todo = [(*case, method) for case in cases(config) for method in METHODS]
    for case, make, loss, kind, method in logging.tqdm(todo, desc="coordinate check"):
        moved = measure(make, loss, kind, config, method)
        for name, values in moved.items():
            slopes.setdefault((case, name), {})[method] = slope(config.widths, values)
        artifacts.append(f"{case}-{method}.png".replace(", ", "-").replace(" ", "_"))
        series = {name: (config.widths, values, None) for name, values in moved.items()}
        title = f"{case}, {method}"
        _plots.lines(out / artifacts[-1], series, "width", "mean |change of output|", title, logx=True, logy=True)
    worst = {method: max(abs(by[method]) for by in slopes.values()) for method in METHODS}
    return {
        "evidence": {
            "claim": "In muP a step changes every activation by an amount that does not depend on width.",
            "paper": "coordinate check: activations move alike at every width in muP, and blow up in standard form",
            "metric": "largest |log-log slope| over width of a layer's mean change of output",
            "setting": f"{len(slopes)} layers of an MLP (SGD) and a Llama (AdamW; tied, untied), {config.steps} "
            f"steps, widths {', '.join(map(str, config.widths))}",
            "method": "muP",
            "ours": worst["muP"],
            "ours_sd": None,
            "n": config.seeds,
            "baseline_name": "standard parametrisation",
            "baseline": worst["standard"],
            "baseline_sd": None,
            "reproduced": worst["muP"] <= 0.1 < worst["standard"],
            "note": "the bar is 0.1",
        },
        "tables": {
            f"log-log slope over width {min(config.widths)}-{max(config.widths)}, 0 is right": [
                {"model": case, "layer": name, **{method: round(by[method], 3) for method in METHODS}}
                for (case, name), by in slopes.items()
            ]
        },
        "artifacts": artifacts,
    }
