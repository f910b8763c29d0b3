"""What the metrics of bit allocation measure with: the loss of a model on rows of tokens, other weights for a while.

Everything runs in float32 (or the model's float64), in eval mode, and leaves the model as it was found.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..compat import attention_implementation
from ._affine import Quantized
from ._config import KEPT, WeightConfig
from ._linear import misfit
from .rtn import RTNConfig


class Layer(NamedTuple):
    """One weight: the names of all modules that hold it, the first one's module, and its number of elements."""

    names: tuple[str, ...]
    module: nn.Linear
    size: int

    @property
    def name(self) -> str:
        return self.names[0]


def layers_of(modules: Mapping[str, nn.Linear]) -> list[Layer]:
    """Modules that share a weight are one layer."""
    by_weight: dict[int, list[str]] = {}
    for name, module in modules.items():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
            raise ValueError(f"{name} holds no float weight: bits are allocated before a model is quantised.")
        if weight.is_meta:
            raise ValueError(f"The weight of {name} is on the meta device: load the model first.")
        if not torch.isfinite(weight.detach()).all():
            raise ValueError(f"The weight of {name} holds NaN or infinity.")
        by_weight.setdefault(id(weight), []).append(name)
    if not by_weight:
        raise ValueError("The model has no linear layer to which bits could be given.")
    return [Layer(tuple(n), modules[n[0]], modules[n[0]].weight.numel()) for n in by_weight.values()]


def targets_in(batches: Iterable[Tensor]) -> int:
    """Tokens that are predicted in batches [rows, tokens]."""
    total = sum(batch.shape[0] * (batch.shape[1] - 1) for batch in batches)
    if total < 1:
        raise ValueError("The data holds no token to predict: a row needs two tokens or more.")
    return total


def logits_of(model: nn.Module, batch: Tensor, **kwargs: Any) -> Any:
    """The model's output on ids [rows, tokens]."""
    if model.config.is_encoder_decoder or model.get_output_embeddings() is None:
        raise NotImplementedError(f"{type(model).__name__} is no causal language model: give bits= by name yourself.")
    return model(input_ids=batch.to(model.get_input_embeddings().weight.device), use_cache=False, **kwargs)


def summed_loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Negative log-likelihood in nats of the tokens of a batch [rows, tokens] but each row's first, summed."""
    logits = logits_of(model, batch).logits[:, :-1].flatten(0, 1)
    return nn.functional.cross_entropy(logits, batch[:, 1:].flatten().to(logits.device), reduction="sum")


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Sequence[Tensor]) -> float:
    """Negative log-likelihood of a token in nats."""
    loss = sum(summed_loss(model, batch).item() for batch in batches) / targets_in(batches)
    if loss != loss:
        raise ValueError("The loss is NaN: a weight or an activation of the model is NaN.")
    return loss


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """Eval mode, half-precision parameters and buffers raised to float32, and an attention that can be differentiated
    twice; all of it undone afterwards."""
    modes = {part: part.training for part in model.modules()}
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.dtype in (torch.float16, torch.bfloat16)]
    kept = [t.data for t in tensors]
    attention = attention_implementation(model)
    other = attention not in ("eager", "sdpa")
    try:
        model.eval()
        for t in tensors:
            t.data = t.data.float()
        if other:
            model.set_attn_implementation("eager")
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for t, data in zip(tensors, kept, strict=True):
            t.data = data
        for part, training in modes.items():
            part.training = training
        if other:
            model.set_attn_implementation(attention)


@contextmanager
def replaced(values: Iterable[tuple[Layer, Tensor]]) -> Iterator[None]:
    """Other weights in the layers for a while; their own storage is put back untouched."""
    kept = []
    try:
        for layer, value in values:
            weight = layer.module.weight
            kept.append((weight, weight.data))
            weight.data = value.to(weight)
        yield
    finally:
        for weight, data in reversed(kept):
            weight.data = data


def quantizer(quantize: Any, group_size: int) -> Callable[[Layer, int], Tensor]:
    """`of(layer, bits)`: the layer's weight [rows, columns] in float32 after quantising and back; 16 bits keep it.

    Args:
        quantize: `None` for the defaults of `RTNConfig`, a function `(weight, bits, group_size)` that returns a
            `Quantized`, or a config of the family that needs no data.
        group_size (`int`): Columns of a group; -1 is a whole row.
    """
    if isinstance(quantize, WeightConfig) and quantize.group_size != group_size:
        raise ValueError(f"group_size is {group_size} but {quantize.group_size} in the config: give the same twice.")
    if quantize is None:
        quantize = RTNConfig(group_size=group_size)
    method = quantize.quantize_weight if isinstance(quantize, WeightConfig) else quantize
    if not callable(method):
        raise TypeError(f"quantize is {type(quantize).__name__} but must be a function or a config of the family.")

    def of(layer: Layer, bits: int) -> Tensor:
        weight = layer.module.weight.detach()
        if bits == KEPT:
            return weight
        problem = misfit(weight.shape[-1], bits, group_size)
        if problem:
            raise ValueError(f"{layer.name}: {problem} Choose another group_size or leave the layer out.")
        found = method(weight, bits, group_size)
        return found.dequantize() if isinstance(found, Quantized) else found

    return of
