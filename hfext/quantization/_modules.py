"""Which layers of a model are quantised: every linear layer inside the repeated blocks, and stacked experts.

The output head, embeddings and what stands between the blocks stay as they are, and so do the gates of routers.
"""

import re
from collections.abc import Iterable

from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

GATES = ("gate", "router", "shared_expert_gate", "wg")


def block_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The outermost lists of blocks of a model by name: one of a language model, two of an encoder-decoder."""
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{other}.") for other in found)
        if isinstance(module, nn.ModuleList) and not inside and any(_layers(module)):
            found[name] = module
    return found


def _layers(module: nn.Module) -> Iterable[nn.Module]:
    return (layer for layer in module.modules() if isinstance(layer, nn.Linear | Conv1D))


def quantizable(model: nn.Module, modules_to_not_convert: Iterable[str] | None = None) -> dict[str, nn.Linear]:
    """Linear layers to be quantised, by name, in the order of the model.

    Args:
        model (`nn.Module`): Any model with blocks in an `nn.ModuleList`.
        modules_to_not_convert (`Iterable[str]`, *optional*): Names, endings or regular expressions of modules to leave
            out, as transformers understands them.

    Raises:
        ValueError: A part of `modules_to_not_convert` fits no module, or the model has no blocks.
        NotImplementedError: A block holds weights in a form that cannot be quantised, and they are not left out.
    """
    left_out = list(modules_to_not_convert or ())
    # What was saved with a head is loaded without one, too.
    own = f"{getattr(model, 'base_model_prefix', '')}."
    shorter = {pattern: pattern.removeprefix(own) for pattern in left_out}
    lists = block_lists(model)
    if not lists:
        raise ValueError(f"{type(model).__name__} has no list of blocks with linear layers, so nothing to quantise.")
    names = [name for name, _ in model.named_modules()]
    for pattern in left_out:
        if all(should_convert_module(name, [pattern, shorter[pattern]]) for name in names):
            raise ValueError(f"modules_to_not_convert has {pattern!r}, which fits no module of the model.")
    left_out += shorter.values()
    found = {}
    for prefix, blocks in lists.items():
        for inner, module in blocks.named_modules():
            name = f"{prefix}.{inner}"
            if not inner or not should_convert_module(name, left_out):
                continue
            if isinstance(module, Conv1D):
                raise NotImplementedError(
                    f"{name} is a Conv1D of transformers, not an nn.Linear. Leave it out with modules_to_not_convert."
                )
            if isinstance(module, nn.Linear) and not is_gate(inner, blocks):
                found[name] = module
    return found


def is_gate(name: str, blocks: nn.Module) -> bool:
    """Whether a linear layer routes tokens to experts."""
    parent, _, last = name.rpartition(".")
    if last not in GATES:
        return False
    return last != "gate" or any(
        re.search("expert", child) for child, _ in blocks.get_submodule(parent).named_children()
    )


def put(root: nn.Module, name: str, module: nn.Module) -> None:
    """Set a submodule by its dotted name."""
    parent, _, last = name.rpartition(".")
    root.get_submodule(parent).add_module(last, module)


def stacked(model: nn.Module) -> bool:
    """Whether the model holds experts in stacks."""
    return any(
        p.dim() == 3 and "expert" in type(module).__name__.lower()
        for module in model.modules()
        for p in module.parameters(recurse=False)
    )
