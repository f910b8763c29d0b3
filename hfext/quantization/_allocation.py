"""Bits for each layer of a model: measured sensitivities, and the integer program that spends a budget on them.

    hawq2   1/2 Tr(H_l)/n_l ||Q_b(W_l) - W_l||^2                    one double backward a draw (hawq2.py)
    loss    max(L(only layer l at b bits) - L(all at most bits), 1e-6)    one pass a layer and width (below)
    mixdq   metrics and budgets by the layers' role, every candidate measured (mixdq.py)

"loss" is the integer program of "Improving Post Training Neural Quantization: Layer-wise Calibration and Integer
Programming", arXiv 2006.10518.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils import logging

from .._fields import one_of
from ..registry import suggest
from ._bit_program import Choice, choose, falling, frontier
from ._config import KEPT, WeightConfig
from ._data import batches as batched
from ._data import token_rows
from ._modules import quantizable
from ._sensitivity import Layer, layers_of, mean_loss, measuring, quantizer, replaced
from .hawq2 import HAWQ2Config, hessian_traces, sensitivities
from .mixdq import MixDQConfig, mixed_allocation


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Options of `allocate(metric="loss")`.

    Args:
        floor (`float`, *optional*, defaults to 1e-6): Least rise of the loss that a layer is given, in nats, > 0.
        candidates (`int`, *optional*, defaults to 1): Allocations that are measured, of which the best is kept: the
            program's own, and others from sensitivities with noise. More than one finds out where rises do not add up.
        noise (`float`, *optional*, defaults to 0.3): Standard deviation of the noise on the logarithm of a rise, >= 0.
        seed (`int`, *optional*, defaults to 0): Of the noise.
    """

    floor: float = 1e-6
    candidates: int = 1
    noise: float = 0.3
    seed: int = 0

    def __post_init__(self):
        if self.floor <= 0:
            raise ValueError(f"floor is {self.floor} but must be > 0.")
        if self.candidates < 1:
            raise ValueError(f"candidates is {self.candidates} but must be >= 1.")
        if self.noise < 0:
            raise ValueError(f"noise is {self.noise} but must be >= 0.")


CONFIGS = {"hawq2": HAWQ2Config, "loss": LossConfig, "mixdq": MixDQConfig}


class Allocation(dict):
    """Bits by module name: `bits=` of any quantiser of weights takes it as it is.

    Attributes:
        average_bits (`float`): Mean bits of a weight, without scales and offsets.
        objective (`float`): What was minimised. "hawq2": estimated rise of the loss; "loss": sum of the measured
            rises, or the measured loss when there are several candidates; "mixdq": the measured loss. Nats a token.
        metric (`str`): "hawq2", "loss" or "mixdq".
        sensitivities (`dict[str, dict[int, float]]`): By module and bits: the rise of the loss, or for "mixdq" the
            metric of the module's family, higher = better. Of modules with a shared weight the first stands for all.
        sizes (`dict[str, int]`): Number of weights by module; a shared weight counts once.
        pareto (`list[tuple[float, float]]`): (average bits, objective) of allocations that no other beats in both.
        protected (`list[str]`): Modules whose inputs should not be quantised ("mixdq" with `protect`).
    """

    def __init__(
        self,
        bits: Mapping[str, int],
        *,
        average_bits: float,
        objective: float,
        metric: str,
        sensitivities: Mapping[str, Mapping[int, float]],
        sizes: Mapping[str, int],
        pareto: Iterable[Sequence[float]],
        protected: Iterable[str] = (),
    ):
        super().__init__(bits)
        self.average_bits, self.objective, self.metric = average_bits, objective, metric
        self.sensitivities = {n: {int(b): v for b, v in row.items()} for n, row in sensitivities.items()}
        self.sizes, self.protected = dict(sizes), list(protected)
        self.pareto = [(float(b), float(v)) for b, v in pareto]

    def to_dict(self) -> dict[str, Any]:
        """Everything in JSON types."""
        found = {"bits": dict(self), **vars(self), "pareto": [list(point) for point in self.pareto]}
        found["sensitivities"] = {n: {str(b): v for b, v in row.items()} for n, row in self.sensitivities.items()}
        return found

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> "Allocation":
        """From what `to_dict` gave."""
        return cls(**found)

    def plot(self, path: str | Path) -> Path:
        """Draw the Pareto front and this allocation into a PNG."""
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("Plots need matplotlib: pip install 'hfext[demo]'.") from error

        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        axes = figure.add_subplot()
        axes.plot(*zip(*self.pareto, strict=True), label="Pareto front", drawstyle="steps-post")
        axes.plot([self.average_bits], [self.objective], "o", label=f"chosen: {self.average_bits:.3g} bits")
        what = "estimated rise of the loss" if self.metric == "hawq2" else "loss"
        axes.set(xlabel="bits of a weight", ylabel=f"{what}, nats a token", title=f"bit allocation by {self.metric}")
        if min(value for _, value in self.pareto) > 0:
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png", dpi=150)
        return path


def allocate(
    model: nn.Module,
    data: Any,
    metric: Literal["hawq2", "loss", "mixdq"] = "hawq2",
    average_bits: float = 3.0,
    bits: Sequence[int] = (2, 3, 4, 8),
    group_size: int = 64,
    *,
    quantize: Any = None,
    modules_to_not_convert: Iterable[str] | None = None,
    tokenizer: Any = None,
    num_samples: int = 32,
    sequence_length: int = 512,
    batch_size: int = 1,
    **options: Any,
) -> Allocation:
    """Give each linear layer of a causal language model its own number of bits.

    The model is measured in float32, whatever its type, and left as it was found.

    Args:
        model (`PreTrainedModel`): A model that is not quantised.
        data: Text that the model is to keep: a path, texts, token ids, a tensor [rows, tokens], dicts with `input_ids`
            and `attention_mask`, or a dataset. Padding that a mask names is cut off.
        metric (`str`, *optional*, defaults to "hawq2"): "hawq2" costs 10 to 100 double backwards a row; "loss" a
            pass over the data for each layer and width; "mixdq" that and up to 100 passes more.
        average_bits (`float`, *optional*, defaults to 3.0): Most bits of a weight on average, without scales and
            offsets.
        bits (`Sequence[int]`, *optional*, defaults to (2, 3, 4, 8)): To choose from; 16 keeps a layer as it is.
        group_size (`int`, *optional*, defaults to 64): Inputs that share a scale and an offset; -1 for a whole row.
        quantize (*optional*): What rounds a weight when sensitivities are measured: a function `(weight, bits,
            group_size) -> Quantized` or a config that needs no data; round-to-nearest by default.
        modules_to_not_convert (`Iterable[str]`, *optional*): As in the quantiser's config, which must have the same.
        tokenizer (*optional*): For texts; that of the model's folder by default.
        num_samples, sequence_length (`int`, *optional*, default to 32 and 512): Rows, and tokens of a row from text.
        batch_size (`int`, *optional*, defaults to 1): Rows that run together.
        **options: Fields of [`HAWQ2Config`], [`LossConfig`] or [`MixDQConfig`].

    Returns:
        [`Allocation`]

    Raises:
        ValueError: A value out of range, with the range; no linear layers; data without tokens; NaN in the model.
        TypeError: An unknown option.
        NotImplementedError: An encoder-decoder, or stacked experts.
    """
    config = _config(metric, options)
    bits = _bits(bits)
    quantized = quantizer(quantize, group_size)
    modules = quantizable(model, modules_to_not_convert)
    _no_stacks(model, modules_to_not_convert)
    layers = layers_of(modules)
    sizes = [layer.size for layer in layers]
    if not bits[0] <= average_bits <= bits[-1]:
        raise ValueError(f"average_bits is {average_bits} but attainable are {bits[0]} to {bits[-1]}.")
    rows = token_rows(data, model, tokenizer, num_samples, sequence_length)
    batches = batched([row for row in rows if len(row) > 1], batch_size)

    if metric == "mixdq":
        mixed = mixed_allocation(model, layers, batches, average_bits, bits, quantized, config)
        measured = [(_average(found, sizes), loss) for found, loss in mixed.measured]
        names = {name for layer in layers if layer.name in mixed.protected for name in layer.names}
        return _result(
            metric,
            modules,
            layers,
            mixed.bits,
            mixed.loss,
            mixed.sensitivities,
            falling(measured),
            [name for name in modules if name in names],
        )
    costs = np.outer(sizes, bits)
    budget = int(average_bits * sum(sizes) * (1 + 1e-12))
    ordered = metric == "hawq2" and config.monotone
    if metric == "hawq2":
        losses, order = _by_hessian(model, layers, batches, bits, quantized, config)
    else:
        losses, order = loss_rises(model, layers, batches, bits, quantized, config.floor), list(range(len(layers)))
    choice = choose(losses[order], costs[order], budget, ordered)
    objective = choice.loss
    if metric == "loss" and config.candidates > 1:
        choice, objective = _noisy(model, layers, batches, losses, costs, budget, bits, quantized, config)
    chosen = [0] * len(layers)
    for i, option in zip(order, choice.options, strict=True):
        chosen[i] = bits[option]
    front = [(cost / sum(sizes), loss) for cost, loss in frontier(losses[order], costs[order], ordered)]
    by_bits = [dict(zip(bits, row, strict=True)) for row in losses.tolist()]
    return _result(metric, modules, layers, chosen, objective, by_bits, front)


def loss_rises(
    model: nn.Module,
    layers: Sequence[Layer],
    batches: Sequence[Tensor],
    bits: Sequence[int],
    quantized: Callable[[Layer, int], Tensor],
    floor: float = 1e-6,
) -> np.ndarray:
    """[layers, bits]: how much the loss rises, at least `floor`, when one layer goes from the most bits to fewer while
    all others have the most; 0 at the most. `bits` rise."""
    rises = np.zeros((len(layers), len(bits)))
    with measuring(model):
        most = [quantized(layer, bits[-1]) for layer in layers]

        def loss(index: int | None = None, weight: Tensor | None = None) -> float:
            with replaced((layer, weight if i == index else most[i]) for i, layer in enumerate(layers)):
                return mean_loss(model, batches)

        base = loss()
        for i, layer in enumerate(logging.tqdm(layers, desc="one layer at a time")):
            rises[i, :-1] = [max(loss(i, quantized(layer, b)) - base, floor) for b in bits[:-1]]
    return rises


def _noisy(model, layers, batches, losses, costs, budget, bits, quantized, config: LossConfig) -> tuple[Choice, float]:
    """The best of several allocations by their measured loss; the first is the program's own."""
    generator = np.random.default_rng(config.seed)
    tried: dict[tuple[int, ...], Choice] = {}
    for k in range(config.candidates):
        noise = np.exp(config.noise * generator.standard_normal(losses.shape)) if k else 1.0
        found = choose(losses * noise, costs, budget)
        tried.setdefault(tuple(found.options), found)
    measured = []
    with measuring(model):
        for found in logging.tqdm(tried.values(), desc="measured allocations"):
            values = ((layer, quantized(layer, bits[p])) for layer, p in zip(layers, found.options, strict=True))
            with replaced(values):
                measured.append((mean_loss(model, batches), found.cost, found))
    value, _, choice = min(measured, key=lambda row: row[:2])
    return choice, value


def _by_hessian(model, layers, batches, bits, quantized, config: HAWQ2Config) -> tuple[np.ndarray, list[int]]:
    """Omega [layers, bits], and the layers by falling average trace."""
    errors = {}
    with torch.no_grad(), measuring(model):
        for layer in layers:
            weight = layer.module.weight
            errors[layer.name] = {b: (quantized(layer, b) - weight).double().square().sum().item() for b in bits}
    traces = hessian_traces(model, layers, batches, config)
    found = sensitivities(traces, errors)
    average = [traces.average[layer.name] for layer in layers]
    order = sorted(range(len(layers)), key=lambda i: -average[i])
    return np.array([[found[layer.name][b] for b in bits] for layer in layers]), order


def _config(metric: str, options: Mapping[str, Any]) -> Any:
    if metric not in CONFIGS:
        raise ValueError(f"metric is {metric!r}. {suggest(str(metric), CONFIGS)}")
    fields = CONFIGS[metric].__dataclass_fields__
    unknown = next((name for name in options if name not in fields), None)
    if unknown is not None:
        raise TypeError(f"metric={metric!r} has no option {unknown!r}. {suggest(unknown, fields)}")
    return CONFIGS[metric](**options)


def _bits(bits: Sequence[int]) -> tuple[int, ...]:
    """Rising and without repeats."""
    allowed = (*WeightConfig.widths, KEPT)
    for b in bits:
        one_of("bits", b, allowed)
    if not bits:
        raise ValueError(f"bits is empty but must hold some of {', '.join(map(str, allowed))}.")
    return tuple(sorted(set(bits)))


def _no_stacks(model: nn.Module, modules_to_not_convert: Iterable[str] | None) -> None:
    """A quantiser turns stacked experts into layers, which need bits by name that the model as it is does not have."""
    for name, module in model.named_modules():
        if not should_convert_module(name, list(modules_to_not_convert or ())):
            continue
        if "expert" in type(module).__name__.lower() and any(p.dim() == 3 for p in module.parameters(recurse=False)):
            raise NotImplementedError(
                f"{name} holds stacked experts, to which no bits can be allocated: leave them out with "
                "modules_to_not_convert, or use one number of bits for all."
            )


def _average(bits: Sequence[int], sizes: Sequence[int]) -> float:
    return sum(b * n for b, n in zip(bits, sizes, strict=True)) / sum(sizes)


def _result(metric, modules, layers, chosen, objective, sensitivities, front, protected=()) -> Allocation:
    bits = {name: int(b) for layer, b in zip(layers, chosen, strict=True) for name in layer.names}
    return Allocation(
        {name: bits[name] for name in modules},
        average_bits=_average(chosen, [layer.size for layer in layers]),
        objective=objective,
        metric=metric,
        sensitivities={layer.name: row for layer, row in zip(layers, sensitivities, strict=True)},
        sizes={layer.name: layer.size for layer in layers},
        pareto=front,
        protected=protected,
    )
