"""The MLP down projections of a model's blocks, found by their place and shape.

Blocks are the list of `num_hidden_layers` modules. In a block the down projection is the last linear layer outside
attention that ends in the hidden size. Where that leaves a choice (experts, several lists of blocks) a regex decides.
"""

import re
from dataclasses import dataclass

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class Projection:
    """A linear layer, its full name and the number of its block."""

    layer: int
    name: str
    module: nn.Module

    @property
    def weight(self) -> str:
        """Name of its parameter."""
        return f"{self.name}.weight"

    def matrix(self) -> Tensor:
        """The weight as [out, in], whatever the module stores."""
        return matrix_of(self.module)


def matrix_of(module: nn.Module) -> Tensor:
    """The weight of an `nn.Linear` or `Conv1D` as [out, in], a view."""
    weight = module.weight.detach()
    return weight.T if isinstance(module, Conv1D) else weight


def linear_layers(model: nn.Module, adapters: bool = False) -> dict[str, nn.Module]:
    """Every `nn.Linear` and `Conv1D` by name; those inside PEFT layers only if they are the base (or the adapters)."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    wrappers = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    inside = {
        name: any(name.startswith(f"{w}.") and not f"{name}.".startswith(f"{w}.base_layer.") for w in wrappers)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }
    return {name: model.get_submodule(name) for name, is_adapter in inside.items() if is_adapter == adapters}


def down_projections(model: nn.Module, module: str | None = None) -> list[Projection]:
    """One projection of each block, in order; `module` is a regex, searched in the full names, that chooses another.

    Raises:
        ValueError: There are no blocks, or not exactly one candidate in a block; the message lists them.
    """
    config = model.config.get_text_config(decoder=True)
    linears = linear_layers(model)
    lists = [
        name
        for name, part in model.named_modules()
        if isinstance(part, nn.ModuleList) and len(part) == config.num_hidden_layers
    ]
    lists = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    found = [_choose(name, config.num_hidden_layers, config.hidden_size, linears, module) for name in lists]
    found = [choices for choices in found if all(choices)]
    candidates = [[c for c in choices[0]] for choices in found]
    if len(found) != 1 or any(len(block) != 1 for block in found[0]):
        shown = ", ".join(sorted({name for names in candidates for name in names})) or "none"
        chosen = "by their shape" if module is None else f"by module={module!r}"
        raise ValueError(
            f"Not exactly one MLP down projection per block was found {chosen}. Candidates of the first block: "
            f"{shown}. Give `module`, a regex that matches one linear layer of each block, such as mlp\\.down_proj$."
        )
    return [Projection(i, name, linears[name]) for i, (name,) in enumerate(found[0])]


def _choose(
    blocks: str, count: int, width: int, linears: dict[str, nn.Module], pattern: str | None
) -> list[list[str]]:
    """The candidates of each block."""
    chosen = []
    for i in range(count):
        prefix = f"{blocks}.{i}."
        names = [name for name in linears if name.startswith(prefix)]
        if pattern is not None:
            chosen.append([name for name in names if re.search(pattern, name)])
            continue
        names = [
            name
            for name in names
            if matrix_of(linears[name]).shape[0] == width
            and not re.search(r"attn|attention", name[len(prefix) :], re.I)
        ]
        # Several in one MLP: the last is the way down. In several MLPs (experts) there is a choice.
        one_mlp = len({name.removesuffix(".base_layer").rpartition(".")[0] for name in names}) == 1
        chosen.append(names[-1:] if one_mlp else names)
    return chosen
