"""One training run for models of many sizes: every layer at several bit-widths, each with an adapter of its own.

Layer l has for each width b a frozen quantised weight Q_b(W_l) and a pair (down, up)_lb. A configuration gives each
layer a width; a training step draws one and trains only its pairs:

    y = x Q_b(W)^T + (alpha / rank) (x down_b^T) up_b^T,     b = b_l of the configuration

Drawn uniformly, configurations have nearly the same mean width; the balanced sampler makes the mean uniform (see
`_subnets.py`). After training the best configuration of a budget is searched on validation data and exported as an
ordinary quantised model with a LoRA adapter.

One QuantLLM for ALL: Fine-tuning Quantized LLMs Once for Efficient Deployments, arXiv 2405.20202.
"""

import copy
import dataclasses
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback

from .._fields import in_range, one_of
from ..compression import adopt_weights
from ..registry import Method
from ._calibration import Block
from ._config import KEPT, WeightConfig
from ._linear import QuantLinear, misfit
from ._ofa_linear import OFALinear
from ._quantizer import quantized_layers
from ._subnets import Found, draw_balanced, draw_between, draw_uniform, mean_of, search
from ._wrapper import WrapperConfig


@dataclass(kw_only=True, repr=False)
class OFAConfig(WrapperConfig):
    """A supernet around another quantiser: `OFAConfig(quantizer=GPTQConfig(group_size=128, dataset=texts))`.

    Args:
        quantizer (`WeightConfig`): What makes codes and grid of every width; its `bits` are the widths that run until
            [`set_subnet`] sets others. Later blocks are calibrated on what these give.
        choices (`tuple[int, ...]`, *optional*, defaults to (2, 3, 4)): Widths of a layer.
        rank (`int`, *optional*, defaults to 16): Of the adapters, >= 1.
        alpha (`float`, *optional*, defaults to 16.0): Adapters are multiplied by alpha / rank.
        adapter_seed (`int`, *optional*, defaults to 0): Of the first values of the adapters.

    Raises:
        ValueError: A value out of its range, `bits` of the quantiser that are no choice, or a quantiser that holds
            more than codes and grids.
    """

    method: ClassVar[str] = "ofa"
    choices: tuple[int, ...] = (2, 3, 4)
    rank: int = 16
    alpha: float = 16.0
    adapter_seed: int = 0

    def check(self) -> None:
        if type(self.quantizer).empty_layer is not WeightConfig.empty_layer:
            raise ValueError(f"quantizer is {self.quantizer.method} but must be one that holds codes and grids alone.")
        if not self.choices or len(set(self.choices)) < len(self.choices):
            raise ValueError(f"choices is {self.choices} but must name different widths.")
        for bits in self.choices:
            one_of("choices", bits, self.quantizer.widths)
        self.choices = tuple(sorted(self.choices))
        in_range("rank", self.rank, 1, 65536)
        in_range("alpha", self.alpha, 0.0, 1e6)
        if isinstance(self.bits, dict):
            for name, bits in self.bits.items():
                one_of(f"quantizer.bits[{name!r}]", bits, (*self.choices, KEPT))
        else:
            one_of("quantizer.bits", self.bits, self.choices)

    def layers(self, model: nn.Module) -> dict[str, tuple[nn.Linear, int]]:
        found, skipped = {}, []
        for name, (linear, bits) in super().layers(model).items():
            problems = filter(None, (misfit(linear.in_features, b, self.group_size) for b in self.choices))
            problem = next(problems, "")
            if problem and self.on_unsupported != "skip":
                raise ValueError(f'{name}: {problem} Leave it out, or set on_unsupported="skip".')
            if problem:
                skipped.append(name)
            else:
                found[name] = (linear, bits)
        self.quantizer.skipped_modules = [*(self.quantizer.skipped_modules or ()), *skipped] or None
        self._follow()
        return found

    def empty_layer(self, linear: nn.Linear, bits: int) -> OFALinear:
        weight = linear.weight
        sizes = linear.in_features, linear.out_features, self.choices, bits, self.group_size, self.rank, self.alpha
        types = weight.dtype, getattr(torch, self.scale_dtype)
        return OFALinear(*sizes, linear.bias is not None, *types, device=weight.device)

    def at_width(self, bits: int) -> WeightConfig:
        """The quantiser at one width."""
        return dataclasses.replace(self.quantizer, bits=bits)

    def quantize_into(self, layer: OFALinear, weight: Tensor, bias: Tensor | None, name: str) -> None:
        linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        for bits in self.choices:
            config = self.at_width(bits)
            single = config.empty_layer(linear, bits)
            config.quantize_into(single, weight, None, name)
            layer.take(single, self.adapter_seed, name)
        if bias is not None:
            layer.bias.data.copy_(bias)

    def quantize_block(self, block: Block) -> None:
        """Quantise a block at each width as if there were no other; the widths that run stay."""
        made = {
            name: self.empty_layer(linear, bits).train(linear.training)
            for name, (linear, bits) in block.layers.items()
        }
        for bits in self.choices:
            singles, errors = _at_width(self.at_width(bits), block, bits)
            for name, layer in made.items():
                layer.take(singles[name], self.adapter_seed, f"{block.name}.{name}")
                if layer.bits == bits and name in errors:
                    block.errors[name] = errors[name]
        for name, layer in made.items():
            bias = block.layers[name][0].bias
            if bias is not None:
                layer.bias.data.copy_(bias)
            block.put(name, layer)


def _at_width(config: Any, block: Block, bits: int) -> tuple[dict[str, QuantLinear], dict[str, float]]:
    """The layers of a block at one width, and their errors; the block is then as it was."""
    inner = copy.copy(block)
    inner.config, inner.undo, inner.errors = config, [], {}
    inner.layers = {name: (linear, bits) for name, (linear, _) in block.layers.items()}

    def keep(parameter: nn.Parameter) -> None:
        raise ValueError(
            f"The quantiser of a supernet must leave everything but its layers as it is, and {config.method} tunes "
            "norms or biases, which all widths share: set train_norm=False and train_bias=False."
        )

    inner.keep = keep
    try:
        config.quantize_block(inner)
        return {name: inner.module.get_submodule(name) for name in inner.layers}, inner.errors
    finally:
        for undo in reversed(inner.undo):
            undo()


def ofa_layers(model: nn.Module) -> dict[str, OFALinear]:
    """The layers of a supernet, by name; `ValueError` when there are none."""
    layers = {name: layer for name, layer in quantized_layers(model).items() if isinstance(layer, OFALinear)}
    if not layers:
        raise ValueError("The model is no supernet: quantise it with OFAConfig first.")
    return layers


def sizes_of(layers: Mapping[str, OFALinear]) -> Tensor:
    """Weights of each layer, int64 [layers]."""
    return torch.tensor([layer.in_features * layer.out_features for layer in layers.values()])


def get_subnet(model: nn.Module) -> dict[str, int]:
    """The widths that run, by layer."""
    return {name: layer.bits for name, layer in ofa_layers(model).items()}


def average_bits(model: nn.Module) -> float:
    """Mean bits of a weight at the widths that run, without grids and adapters."""
    layers = ofa_layers(model)
    return float(mean_of(torch.tensor([layer.bits for layer in layers.values()]), sizes_of(layers)))


def set_subnet(
    model: nn.Module, bits: int | Mapping[str, int] | None = None, average_bits: float | None = None, seed: int = 0
) -> dict[str, int]:
    """Set the widths that run, and that are saved as those that run.

    Args:
        model (`PreTrainedModel`): A supernet.
        bits (`int` or `Mapping[str, int]`, *optional*): One width for all layers, or one for each by name.
        average_bits (`float`, *optional*): Instead: a random configuration with at most this mean, and at most 0.1
            below it where there is one. [`search_subnet`] finds a good one.
        seed (`int`, *optional*, defaults to 0): Of this configuration.

    Returns:
        `dict[str, int]`: The widths by layer.

    Raises:
        ValueError: A width that is no choice, a layer that is missing or unknown, or a mean out of reach.
    """
    if (bits is None) == (average_bits is None):
        raise ValueError("Give either bits or average_bits.")
    layers = ofa_layers(model)
    choices = next(iter(layers.values())).choices
    if average_bits is not None:
        in_range("average_bits", average_bits, min(choices), max(choices))
        generator = torch.Generator().manual_seed(seed)
        low, sizes = max(min(choices), average_bits - 0.1), sizes_of(layers)
        drawn = draw_between(sizes, choices, low, average_bits + 1e-9, generator)
        if float(mean_of(drawn, sizes)) > average_bits + 1e-9:  # few layers: no mean lies so near
            drawn = torch.full_like(drawn, max(b for b in choices if b <= average_bits))
        bits = dict(zip(layers, drawn.tolist(), strict=True))
    chosen = dict.fromkeys(layers, bits) if isinstance(bits, int) else dict(bits)
    wrong = sorted(chosen.keys() ^ layers.keys())
    if wrong:
        raise ValueError(f"bits {'names no' if wrong[0] in layers else 'names the unknown'} layer {wrong[0]!r}.")
    for name, width in chosen.items():
        one_of(f"bits[{name!r}]", width, choices)
    _run_at(layers, chosen)
    _remember(model, chosen)
    return chosen


def _run_at(layers: Mapping[str, OFALinear], bits: Mapping[str, int]) -> None:
    for name, layer in layers.items():
        layer.bits = bits[name]


def _remember(model: nn.Module, chosen: Mapping[str, int]) -> None:
    config = model.hf_quantizer.quantization_config
    config.quantizer.bits = _bits_option(config, chosen)
    config._follow()


def _bits_option(config: OFAConfig, chosen: Mapping[str, int]) -> int | dict[str, int]:
    """Widths by layer as the option `bits`, which also names layers that are kept or skipped."""
    old = config.quantizer.bits
    if isinstance(old, int) and len(set(chosen.values())) == 1:
        return next(iter(chosen.values()))
    others = dict.fromkeys(config.skipped_modules or (), min(config.choices))
    return {**others, **(old if isinstance(old, dict) else {}), **chosen}


def train_subnets(model: nn.Module) -> int:
    """Make the adapters of all widths the trainable parameters of a model, in place; returns how many numbers."""
    layers = ofa_layers(model)
    model.requires_grad_(False)
    model.hf_quantizer.trained = True
    chosen = [layer.of(key, b) for layer in layers.values() for b in layer.choices for key in ("down", "up")]
    for parameter in chosen:
        parameter.requires_grad_(True)
    return sum(parameter.numel() for parameter in chosen)


class OFACallback(TrainerCallback):
    """Draws a configuration for every training step, and sets the former one again after it.

    The draw depends on `seed` and the number of the step alone, so a run that is resumed draws as if it had not
    stopped. All rows of a step, accumulated ones too, have the same configuration.

    Args:
        sampler (`str`, *optional*, defaults to "balanced"): "balanced" makes means uniform, "uniform" widths.
        seed (`int`, *optional*, defaults to 0): Of the draws.
        buckets (`int`, *optional*, defaults to 10): Intervals of the mean of the balanced sampler.
    """

    def __init__(self, sampler: Literal["balanced", "uniform"] = "balanced", seed: int = 0, buckets: int = 10):
        one_of("sampler", sampler, ("balanced", "uniform"))
        in_range("buckets", buckets, 1, 1000)
        self.sampler, self.seed, self.buckets = sampler, seed, buckets

    def draw(self, model: nn.Module, step: int) -> dict[str, int]:
        """The widths of a step, by layer."""
        layers = ofa_layers(model)
        choices = next(iter(layers.values())).choices
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed}/{step}".encode()))
        if self.sampler == "uniform" or len(choices) == 1:
            drawn = draw_uniform(sizes_of(layers), choices, generator)
        else:
            drawn = draw_balanced(sizes_of(layers), choices, self.buckets, generator)
        return dict(zip(layers, drawn.tolist(), strict=True))

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.before = get_subnet(model)
        _run_at(ofa_layers(model), self.draw(model, state.global_step))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        _run_at(ofa_layers(model), self.before)


@torch.no_grad()
def search_subnet(
    model: nn.Module,
    evaluate: Callable[[nn.Module], float],
    average_bits: float,
    candidates: int = 100,
    seed: int = 0,
) -> Found:
    """Search the best configuration of a budget and set it.

    Args:
        model (`PreTrainedModel`): A supernet.
        evaluate (`Callable`): Gives the validation loss of a model: `lambda m: float(m(ids, labels=ids).loss)`.
        average_bits (`float`): Most mean bits of a weight.
        candidates (`int`, *optional*, defaults to 100): Configurations that are measured: half of them random, half
            changed from the best so far.
        seed (`int`, *optional*, defaults to 0): Of the search.

    Returns:
        `Found`: `bits`, `average_bits`, `loss`, and `tried` with mean and loss of every candidate.
    """
    layers = ofa_layers(model)
    choices = next(iter(layers.values())).choices
    in_range("average_bits", average_bits, min(choices), max(choices))
    in_range("candidates", candidates, 1, 10**6)
    before, training = get_subnet(model), model.training

    def loss_of(bits: dict[str, int]) -> float:
        _run_at(layers, bits)
        return float(evaluate(model))

    model.eval()
    try:
        found = search(list(layers), sizes_of(layers), choices, average_bits, loss_of, candidates, seed=seed)
    finally:
        _run_at(layers, before)
        model.train(training)
    set_subnet(model, found.bits)
    return found


def export_subnet(model: PreTrainedModel, bits: int | Mapping[str, int] | None = None) -> Any:
    """The widths that run, or those of `bits`, as an ordinary quantised model under an ordinary LoRA adapter.

    The supernet stays as it is. `save_pretrained` of the result writes the adapter, that of its
    `get_base_model()` the quantised model.

    Returns:
        `peft.PeftModel`: Gives the same logits as the supernet does.
    """
    from peft import LoraConfig, get_peft_model

    layers, before = ofa_layers(model), get_subnet(model)
    config: OFAConfig = model.hf_quantizer.quantization_config
    chosen = before if bits is None else dict.fromkeys(layers, bits) if isinstance(bits, int) else dict(bits)
    if chosen.keys() != layers.keys():
        raise ValueError("bits must name every layer of the supernet, and no other.")
    for name, width in chosen.items():
        one_of(f"bits[{name!r}]", width, config.choices)
    try:
        _run_at(layers, chosen)
        singles = {name: layer.single() for name, layer in layers.items()}
    finally:
        _run_at(layers, before)
    base = copy.deepcopy(model, {id(layer): singles[name] for name, layer in layers.items()})
    adopt_weights(base, dataclasses.replace(config.quantizer, bits=_bits_option(config, chosen)))
    task = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=list(layers),
        task_type=task if model.can_generate() else None,
    )
    with torch.random.fork_rng(devices=[]):
        exported = get_peft_model(base, lora)
    for name, layer in layers.items():
        adapter = exported.get_base_model().get_submodule(name)
        adapter.lora_A["default"].weight.data.copy_(layer.of("down", chosen[name]))
        adapter.lora_B["default"].weight.data.copy_(layer.of("up", chosen[name]))
    return exported.eval()


METHOD = Method(
    name="ofa",
    family="quantization",
    title="One QuantLLM for ALL: Fine-tuning Quantized LLMs Once for Efficient Deployments",
    authors="Yi et al.",
    arxiv="2405.20202",
    year=2024,
    status="abstract-only",
    difference="From the abstract: decoupled weights and adapters for each width are the paper's. How the balanced "
    "sampler makes the mean width uniform, the search by mutation, ranks and learning rates are ours; blocks are "
    "calibrated on what the configured widths give.",
    target="hfext.quantization.ofa:OFAConfig",
    config=None,
    usage="from_pretrained(path, quantization_config=OFAConfig(quantizer=GPTQConfig(group_size=128, dataset=texts)))",
    summary="Trains one model whose layers run at 2, 3 or 4 bits with adapters of their own, and exports any mix.",
    claim="Models of many sizes from one training run are on a par with those trained for each size, at a fraction of "
    "the time.",
    recipe="quantization/ofa-llama-arithmetic.yaml",
    notes="`train_subnets(model)` chooses the adapters for the Trainer, `OFACallback()` draws a configuration for "
    "each step. Every width is held: 9 bits a weight for 2, 3 and 4, beside grids and adapters.",
)
