"""Stacked experts as linear layers.

A mixture of experts keeps the weights of all experts in one parameter [experts, out, in]. `unstack` makes them single
layers, `<name>_of_expert.e0`, `.e1`, ..., and leaves in the parameter's place something that gives, for `[e]`, a
weight that acts: where the model multiplies by it, the layer runs. The model's own forward stays, so each
architecture keeps its gating, and everything that works on linear layers works on experts: hooks, quantised layers,
adapters.
"""

import copy
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.quantizers.quantizers_utils import should_convert_module

SUFFIX = "_of_expert"


class Unstacked(NamedTuple):
    """A stack that was taken apart."""

    module: nn.Module
    key: str
    parameter: nn.Parameter
    config: Any

    def restore(self) -> None:
        """Put the very parameter back."""
        vars(self.module).pop(self.key, None)
        self.module._modules.pop(self.key + SUFFIX, None)
        self.module._parameters[self.key] = self.parameter
        self.module.config = self.config


def unstack(
    model: nn.Module, modules_to_not_convert: Iterable[str] | None = None, done: list[Unstacked] | None = None
) -> None:
    """Turn every stack of expert weights inside the model into linear layers, without a copy.

    Modules that `modules_to_not_convert` names stay as they are. `done` gets what is needed to put the stacks back.

    Raises:
        NotImplementedError: A module called experts holds weights that are no stack of matrices.
    """
    for name, module in list(model.named_modules()):
        stacked = {key: p for key, p in module.named_parameters(recurse=False) if p.dim() == 3}
        if not stacked or "expert" not in type(module).__name__.lower():
            continue
        if not should_convert_module(name, list(modules_to_not_convert or ())):
            continue
        if not hasattr(module, "is_transposed"):
            raise NotImplementedError(
                f"{name} ({type(module).__name__}) holds experts in a form that is not known. Leave it out with "
                "modules_to_not_convert."
            )
        config = module.config
        for key, parameter in stacked.items():
            if done is not None:
                done.append(Unstacked(module, key, parameter, config))
            layers = nn.ModuleDict({f"e{i}": _layer(w, module.is_transposed) for i, w in enumerate(parameter)})
            del module._parameters[key]
            module.add_module(key + SUFFIX, layers)
            vars(module)[key] = Stack(layers, module.is_transposed, config)
        # Only the plain loop over experts asks for one expert at a time.
        module.config = copy.copy(module.config)
        module.config._experts_implementation = "eager"


def stack(model: nn.Module) -> None:
    """The inverse of `unstack`, where the layers are plain again; those with adapters on them stay apart."""
    for module in list(model.modules()):
        for key, found in [(k, v) for k, v in vars(module).items() if isinstance(v, Stack)]:
            if any(type(layer) is not nn.Linear for layer in found.layers.values()):
                continue
            weights = [
                layer.weight.data.mT if found.transposed else layer.weight.data for layer in found.layers.values()
            ]
            del vars(module)[key], module._modules[key + SUFFIX]
            module.register_parameter(key, nn.Parameter(torch.stack(weights).contiguous()))
            module.config = found.config


def _layer(weight: Tensor, transposed: bool) -> nn.Linear:
    weight = weight.detach().mT if transposed else weight.detach()
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    return made


class Stack:
    """What stands where the stacked parameter stood."""

    _is_hf_initialized = True  # transformers is not to fill it with random numbers

    def __init__(self, layers: nn.ModuleDict, transposed: bool, config: Any):
        self.layers, self.transposed, self.config = layers, transposed, config

    def __getitem__(self, expert: Any) -> "ActingWeight":
        return ActingWeight(self.layers[f"e{int(expert)}"], self.transposed)


class ActingWeight:
    """The weight of one expert: `F.linear(x, weight)`, or `x @ weight` of transposed stacks, runs its layer."""

    def __init__(self, layer: nn.Module, transposed: bool):
        self.layer, self.transposed = layer, transposed

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        x, weight = args[:2]
        bias = (kwargs or {}).get("bias", args[2] if len(args) > 2 else None)
        if not isinstance(weight, cls) or (function is F.linear) == weight.transposed:
            return NotImplemented
        if function not in (F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__):
            return NotImplemented
        y = weight.layer(x)
        return y if bias is None else y + bias


def of_expert(name: str) -> bool:
    """Whether a layer's name is that of one expert's part of a stack."""
    return SUFFIX in name and re.fullmatch(r"e\d+", name.rpartition(".")[2]) is not None


def apart(model: nn.Module) -> bool:
    """Whether a model has stacks that were taken apart."""
    return any(isinstance(value, Stack) for module in model.modules() for value in vars(module).values())
