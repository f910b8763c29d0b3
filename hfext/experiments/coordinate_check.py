"""How far a few optimizer steps move the activations of a network, as it grows: muP against standard parametrisation.

Mean |h_after - h_before| of every layer's output over the same batch, and the slope of its logarithm over log(width).
In muP it is 0 for every layer. Without `model`: a three-layer MLP on digits with SGD, and a one-layer Llama on random
tokens with AdamW and with SGD, its embeddings tied and untied. With `model`: that one, from its config.

Two kinds of noise fade as width^-1/2 and would give the movement of the logits a slope of -0.1 to -0.2 under SGD:
that of a random readout, so it begins at 0, as the paper recommends, where it is no embedding; and what the tokens of
a batch do to each other's logits, so there are few.
"""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, PreTrainedConfig
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from ..optim import mup
from ..registry import suggest
from . import _plots
from ._digits import load_digits
from ._width import MLP, check_widths, llama, slope

METHODS = ("muP", "standard")
NAMES = {"adam": "AdamW", "sgd": "SGD"}
TASKS = {
    "causal-lm": transformers.AutoModelForCausalLM,
    "masked-lm": transformers.AutoModelForMaskedLM,
    "sequence-classification": transformers.AutoModelForSequenceClassification,
}
# What grows with the width, by the names that configs of transformers use: more heads of one size.
WIDTHS = ("hidden_size", "n_embd", "d_model", "dim")
GROWING = (
    *WIDTHS,
    "intermediate_size",
    "n_inner",
    "num_attention_heads",
    "num_key_value_heads",
    "n_head",
    "n_heads",
    "embedding_size",
    "hidden_dim",
    "ffn_dim",
    "d_ff",
    "num_heads",
)


@dataclass(kw_only=True)
class Config:
    """Fields of the recipe.

    Args:
        widths: Widths to compare, multiples of 16.
        base_width: Width at which both parametrisations are the same.
        steps: Optimizer steps on one batch.
        seeds: Number of initialisations to average over.
        sgd_lr: Learning rate at the base width with SGD. Steps that overshoot tell nothing of the width: take a small
            one for a deep model. With tied embeddings a very small one shows the noise above.
        adam_lr: Learning rate at the base width with AdamW.
        llama: Whether to measure the Llama.
        model: Your model: a model type such as `qwen3`, or a config.json or its folder; `None` measures our own.
        task: Of your model.
        config_fields: Fields of its config to change first, such as fewer layers.
        growing: Fields of its config that grow in proportion to the width; `None` takes the usual names that it has.
        optimizers: With which your model is trained: `adam`, `sgd` or both.
        rows, length: Of the batch of random tokens.
        zero_readout: Whether an output layer that is no embedding begins at 0.
        bar: Largest |slope| that passes.
    """

    widths: tuple[int, ...] = (64, 128, 256, 512, 1024)
    base_width: int = 64
    steps: int = 3
    seeds: int = 4
    sgd_lr: float = 0.1
    adam_lr: float = 0.002
    llama: bool = True
    model: str | None = None
    task: Literal["causal-lm", "masked-lm", "sequence-classification"] = "causal-lm"
    config_fields: dict[str, Any] | None = None
    growing: tuple[str, ...] | None = None
    optimizers: tuple[Literal["adam", "sgd"], ...] = ("adam", "sgd")
    rows: int = 1
    length: int = 6
    zero_readout: bool = True
    bar: float = 0.1

    def __post_init__(self):
        check_widths("coordinate_check", self.widths, self.base_width, 16 if self.model is None else 1)
        for field in ("steps", "seeds", "sgd_lr", "adam_lr", "rows", "length", "bar"):
            if getattr(self, field) <= 0:
                raise ValueError(f"coordinate_check: {field} is {getattr(self, field)!r} but must be above 0.")
        if self.model is None:
            for field in ("config_fields", "growing"):
                if getattr(self, field) is not None:
                    raise ValueError(f"coordinate_check: {field} belongs to a model of yours: give `model` too.")
            return
        if not self.optimizers:
            raise ValueError("coordinate_check: optimizers is empty but must hold adam, sgd or both.")
        for width in (self.base_width, *self.widths):
            config_of(self, width)


def base_config(config: Config) -> PreTrainedConfig:
    """The config of the user's model with `config_fields`, at whatever width it has."""
    path = Path(config.model)
    if path.exists():
        found = AutoConfig.from_pretrained(path.parent if path.is_file() else path)
    elif "/" in config.model or config.model.endswith(".json"):
        raise FileNotFoundError(f"coordinate_check: model is {config.model!r}, but there is no such file or folder.")
    else:
        try:
            found = AutoConfig.for_model(config.model)
        except ValueError as error:
            known = transformers.CONFIG_MAPPING.keys()
            raise ValueError(
                f"coordinate_check: model {config.model!r} is no model type. {suggest(config.model, known)}"
            ) from error
    for name, value in (config.config_fields or {}).items():
        if name not in found.to_dict():
            raise ValueError(
                f"coordinate_check: config_fields has {name!r}, which the config of {config.model} lacks. "
                f"{suggest(name, found.to_dict())}"
            )
        setattr(found, name, value)
    # Dropout would move activations by itself.
    for name, value in found.to_dict().items():
        if ("dropout" in name or name.endswith("pdrop")) and isinstance(value, float):
            setattr(found, name, 0.0)
    return found


def config_of(config: Config, width: int) -> PreTrainedConfig:
    """That config at `width`: every field in `growing` in proportion to the width field."""
    made = base_config(config)
    values = made.to_dict()
    # A config may read `hidden_size` from a field of another name: only stored fields grow.
    name = next((field for field in WIDTHS if isinstance(values.get(field), int)), None)
    if name is None:
        raise ValueError(f"coordinate_check: the config of {config.model} has no width: none of {', '.join(WIDTHS)}.")
    growing = [f for f in GROWING if isinstance(values.get(f), int)] if config.growing is None else config.growing
    start = values[name]
    for field in dict.fromkeys((name, *growing)):
        if not isinstance(values.get(field), int):
            raise ValueError(
                f"coordinate_check: growing has {field!r}, which is no number of the config of {config.model}. "
                f"{suggest(field, [k for k, v in values.items() if isinstance(v, int)])}"
            )
        new = values[field] * width / start
        if new != int(new) or new < 1:
            raise ValueError(
                f"coordinate_check: at width {width}, {field} would be {new:g} (it is {values[field]} at "
                f"{name} = {start}). Choose other widths, or set {field} with config_fields."
            )
        setattr(made, field, int(new))
    return made


def outputs(model: nn.Module, forward: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
    """What every linear layer and embedding returns in one forward pass, by module name."""
    found: dict[str, Tensor] = {}

    def keep(name):
        return lambda module, args, output: found.__setitem__(name, output.detach().clone())

    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding | Conv1D)]
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


def measure(make, loss, kind: str, lr: float, config: Config, method: str) -> dict[str, list[float]]:
    """{layer: [mean |change| for each width]}, averaged over seeds."""
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
    return {name: values for name, values in moved.items() if any(values)}  # what is never moved has no slope


def with_zero_readout(model: nn.Module, wanted: bool) -> nn.Module:
    head = model.get_output_embeddings()
    if wanted and head is not None and head.weight is not model.get_input_embeddings().weight:
        nn.init.zeros_(head.weight)
    return model


def cases(config: Config) -> Iterator[tuple[str, Callable, Callable, str, float]]:
    """Name, factory (width, seed) -> model, loss, optimizer kind and learning rate."""
    rates = {"adam": config.adam_lr, "sgd": config.sgd_lr}
    if config.model is not None:
        make, loss = case_of_user(config)
        name = Path(config.model).parent.name if config.model.endswith(".json") else Path(config.model).name
        for kind in config.optimizers:
            yield f"{name}, {NAMES[kind]}", make, loss, kind, rates[kind]
        return
    train, _ = load_digits()
    x, y = train.pixel_values[:128], train.labels[:128]
    yield "MLP, SGD", MLP, lambda model: F.cross_entropy(model(x), y), "sgd", config.sgd_lr
    if config.llama:
        ids = torch.randint(3, 64, (config.rows, config.length), generator=torch.Generator().manual_seed(0))
        for tied in (False, True):
            for kind in ("adam", "sgd"):
                yield (
                    f"Llama {'tied' if tied else 'untied'}, {NAMES[kind]}",
                    lambda width, seed, tied=tied: with_zero_readout(llama(width, seed, tied), config.zero_readout),
                    lambda model: model(input_ids=ids, labels=ids).loss,
                    kind,
                    rates[kind],
                )


def case_of_user(config: Config) -> tuple[Callable, Callable]:
    kind_of_model = TASKS[config.task]

    def make(width: int, seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = kind_of_model.from_config(config_of(config, width), dtype=torch.float32)
        return with_zero_readout(model, config.zero_readout)

    generator = torch.Generator().manual_seed(0)
    vocab = base_config(config).vocab_size
    ids = torch.randint(min(3, vocab - 1), vocab, (config.rows, config.length), generator=generator)
    labels = ids if config.task != "sequence-classification" else torch.arange(config.rows) % 2
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return make, lambda model: model(**given).loss


def run(config: Config, out: Path) -> dict:
    slopes: dict[tuple[str, str], dict[str, float]] = {}
    artifacts = []
    todo = [(*case, method) for case in cases(config) for method in METHODS]
    for case, make, loss, kind, lr, method in logging.tqdm(todo, desc="coordinate check"):
        moved = measure(make, loss, kind, lr, config, method)
        for name, values in moved.items():
            slopes.setdefault((case, name), {})[method] = slope(config.widths, values)
        artifacts.append(f"{case}-{method}.png".replace(", ", "-").replace(" ", "_"))
        series = {name: (config.widths, values, None) for name, values in moved.items()}
        title = f"{case}, {method}"
        _plots.lines(out / artifacts[-1], series, "width", "mean |change of output|", title, logx=True, logy=True)
    worst = {method: max(abs(by[method]) for by in slopes.values()) for method in METHODS}
    widths = ", ".join(map(str, config.widths))
    measured = ", ".join(dict.fromkeys(case.replace(", ", " with ") for case, _ in slopes))
    batch = f"; rows x tokens {config.rows} x {config.length}" + ", untied readout begins at 0" * config.zero_readout
    return {
        "evidence": {
            "claim": "In muP a step changes every activation by an amount that does not depend on width.",
            "paper": "coordinate check: activations move alike at every width in muP, and blow up in standard form",
            "metric": "largest |log-log slope| over width of a layer's mean change of output",
            "setting": f"{len(slopes)} layers: {measured}; {config.steps} steps, widths {widths}"
            + batch * (config.llama or config.model is not None),
            "method": "muP",
            "ours": worst["muP"],
            "ours_sd": None,
            "n": config.seeds,
            "baseline_name": "standard parametrisation",
            "baseline": worst["standard"],
            "baseline_sd": None,
            "reproduced": worst["muP"] <= config.bar < worst["standard"],
            "note": f"the bar is {config.bar:g}",
        },
        "tables": {
            f"log-log slope over width {min(config.widths)}-{max(config.widths)}, 0 is right": [
                {
                    "model": case,
                    "layer": name,
                    **{method: round(by[method], 3) for method in METHODS},
                    "met": abs(by["muP"]) <= config.bar,
                }
                for (case, name), by in slopes.items()
            ]
        },
        "artifacts": artifacts,
    }
