"""`replace`: put another module where a linear layer is, with the same weights under the same names, and undo it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..registry import suggest

LINEAR = (nn.Linear, Conv1D)


class DropIn(nn.Module):
    """Abstract: a module that takes over the weights of another one.

    An instance is made with its options alone, `WTACRSLinear(ratio=0.3)`, and is a template without weights;
    `from_dense` returns the module for one layer. That module shares the layer's parameters, buffers and hooks under
    their own names, so state dicts, optimizers, ties and devices are what they were. Layers whose `forward` was
    patched, as accelerate does for a device map, are refused.
    """

    replaces: tuple[type, ...] = LINEAR

    def from_dense(self, dense: nn.Module, name: str = "") -> "DropIn":
        """A module of the same options that stands for `dense`, which is called `name` in its model."""
        if type(dense) not in self.replaces:
            kinds = ", ".join(kind.__name__ for kind in self.replaces)
            raise TypeError(f"{name or 'dense'} is a {type(dense).__name__} but must be one of {kinds}.")
        kept = dict(vars(dense))
        if kept.get("forward") == MethodType(type(dense).forward, dense):
            del kept["forward"]  # what is left when a hook of accelerate has been taken off
        if kept.keys() & {"forward", "_hf_hook"}:
            raise NotImplementedError(
                f"{name or 'dense'} has a forward of its own (device_map or offloading by accelerate, or a patched "
                "kernel), which the new layer would run in place of its own. Load the model without device_map, or "
                "call accelerate.hooks.remove_hook_from_module(model, recurse=True), and dispatch or patch it after "
                "`replace`; or leave the layer out by exclude_modules."
            )
        new = type(self).__new__(type(self))
        # Everything that nn.Module keeps, by reference: a parameter that is exchanged later is exchanged in both.
        new.__dict__.update({**kept, **self.own()})
        return new

    def own(self) -> dict[str, Any]:
        """Attributes of the template that a replaced layer gets."""
        raise NotImplementedError

    def begin(self, model: nn.Module, modules: dict[str, "DropIn"]) -> list[Any]:
        """Called once after the exchange; returns handles whose `remove()` ends what it began."""
        return []


@dataclass
class Replacement:
    """What `replace` did to a model. `undo()` takes it back; as a context manager it does so at the end.

    Attributes:
        modules: The new modules, by name.
    """

    modules: dict[str, DropIn]
    model: nn.Module = field(repr=False)
    places: list[tuple[nn.Module, str, nn.Module]] = field(default_factory=list, repr=False)
    handles: list[Any] = field(default_factory=list, repr=False)

    def undo(self) -> None:
        """Put the layers back that were there before, with the weights they have now. A second call does nothing."""
        for handle in self.handles:
            handle.remove()
        for parent, child, dense in self.places:
            dense.training = parent.get_submodule(child).training
            setattr(parent, child, dense)
        self.handles, self.places = [], []

    def __enter__(self) -> "Replacement":
        return self

    def __exit__(self, *exc: Any) -> None:
        self.undo()


def replace(
    model: nn.Module,
    template: DropIn,
    target_modules: str | Sequence[str] = "all-linear",
    exclude_modules: str | Sequence[str] | None = None,
) -> Replacement:
    """Replace linear layers of a model, in place: `replace(model, WTACRSLinear(ratio=0.3))`.

    Wrap a model by PEFT first and replace then: adapters do not know the new modules, but they may hold them.

    Args:
        model (`nn.Module`): Any model, a PEFT-wrapped one too; its adapters' layers are linear layers as well.
        template (`DropIn`): What to put there, with its options.
        target_modules (`str` or sequence, *optional*, defaults to `"all-linear"`): All linear layers but the output
            layer; names as in PEFT (`["q_proj", "v_proj"]`: of a layer or of the adapted module around it); or one
            regular expression that must match the whole name.
        exclude_modules (`str` or sequence, *optional*): In the same form, what to leave out.
    """
    if not isinstance(template, DropIn) or template.__dict__.get("_parameters", {}).get("weight") is not None:
        raise TypeError(f"template is a {type(template).__name__} but must be made with options alone.")
    if not template.replaces:
        kind = type(template).__name__
        raise TypeError(f"{kind} takes the place of an MLP, not of a linear layer: replace_mlp(model, {kind}(...)).")
    linear = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if type(module) in template.replaces and name
    }
    chosen = _chosen(model, linear, target_modules, "target_modules")
    if exclude_modules is not None:
        excluded = _chosen(model, linear, exclude_modules, "exclude_modules")
        chosen = [name for name in chosen if name not in excluded]
    if not chosen:
        known = sorted({name.rpartition(".")[2] for name in linear})
        near = suggest(target_modules, known) if isinstance(target_modules, str) else f"Known: {', '.join(known)}."
        already = [name for name, module in model.named_modules() if isinstance(module, DropIn)]
        also = f" {len(already)} layers were replaced before: undo that first." if already else ""
        raise ValueError(f"target_modules is {target_modules!r} but no linear layer matches. {near}{also}")
    done = Replacement({}, model)
    made: dict[int, DropIn] = {}
    for name in chosen:
        dense = linear[name]
        if id(dense) not in made:
            made[id(dense)] = template.from_dense(dense, name)
        parent, _, child = name.rpartition(".")
        parent = model.get_submodule(parent)
        done.places.append((parent, child, dense))
        done.modules[name] = made[id(dense)]
    for (parent, child, _), module in zip(done.places, done.modules.values(), strict=True):
        setattr(parent, child, module)
    done.handles = template.begin(model, done.modules)
    return done


def _chosen(model: nn.Module, linear: dict[str, nn.Module], targets: str | Sequence[str], field: str) -> list[str]:
    if not isinstance(targets, list | tuple | set | str) or not all(isinstance(target, str) for target in targets):
        raise TypeError(f"{field} is {targets!r} but must be names, or one regular expression.")
    if targets == "all-linear":
        outputs = {id(head) for m in model.modules() if isinstance(m, PreTrainedModel) for head in _heads(m)}
        return [name for name, module in linear.items() if id(module) not in outputs]
    if isinstance(targets, str):
        return [name for name in linear if re.fullmatch(targets, name)]
    return [name for name in linear if any(f".{target}." in f".{name}." for target in targets)]


def _heads(model: PreTrainedModel) -> list[nn.Module]:
    """The output layer, and below an adapter the layer that it adapts."""
    head = model.get_output_embeddings()
    return [] if head is None else list(head.modules())
