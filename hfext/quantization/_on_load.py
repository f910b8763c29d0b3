"""Quantising weights while they are read, for methods that need no data: no more than one plain weight is in memory.

Before reading, quantised layers stand where the plain ones were, with a placeholder called `weight` that the key of
the checkpoint finds. What is read for it goes through the method and comes out as codes and grid.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps

from ._config import WeightConfig
from ._linear import QuantLinear
from ._modules import put


def prepare(model: nn.Module, config: WeightConfig) -> None:
    """Put empty quantised layers with placeholders into a model on the meta device."""
    for name, (linear, bits) in config.layers(model).items():
        layer = config.empty_layer(linear, bits)
        layer._parameters["weight"] = linear.weight
        put(model, name, layer)


def awaits_weight(model: nn.Module, name: str) -> bool:
    """Whether the parameter is the placeholder of a quantised layer."""
    owner, _, key = name.rpartition(".")
    if key != "weight":
        return False
    layer = model.get_submodule(owner)
    return isinstance(layer, QuantLinear) and "weight" in layer._parameters


def finish(model: nn.Module) -> None:
    """Drop the placeholders."""
    for layer in model.modules():
        if isinstance(layer, QuantLinear):
            layer._parameters.pop("weight", None)


class QuantizeOnLoad(ConversionOps):
    """One weight as codes and grid. Errors are kept in `problems`: what is raised here, transformers only logs."""

    def __init__(self, config: WeightConfig, problems: list[Exception]):
        self.config, self.problems = config, problems

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        model: nn.Module | None = None,
        full_layer_name: str | None = None,
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        (weight,) = input_dict.values()
        weight = weight[0] if isinstance(weight, list) else weight
        name = full_layer_name.removesuffix(".weight")
        empty = model.get_submodule(name)
        plain = nn.Linear(empty.in_features, empty.out_features, bias=False, device="meta")
        plain.weight = nn.Parameter(weight, requires_grad=False)
        layer = self.config.empty_layer(plain, empty.bits)
        try:
            self.config.quantize_into(layer, weight, None, name)
        except ValueError as error:
            self.problems.append(error)
        made = {f"{name}.{key}": x.data for key, x in layer.state_dict().items()}
        for key in (full_layer_name, *made):
            missing_keys.discard(key)
        return made
