"""`replace_mlp`: put another module where an MLP is, with the same weights under the same names, and undo it."""

import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2CLS
from transformers.core_model_loading import revert_weight_conversion

from ._replace import LINEAR, DropIn, Replacement

_CLASSES = {entry[0] if isinstance(entry, tuple) else entry for entry in ACT2CLS.values()}
ACTIVATIONS = tuple(kind for kind in _CLASSES if isinstance(kind, type)) + (nn.GELU, nn.SiLU, nn.ReLU, nn.Tanh)


@dataclass
class MLPReplacement(Replacement):
    """What `replace_mlp` did; `undo()` puts the MLPs back with the layers and weights they have now."""

    def undo(self) -> None:
        for parent, child, dense in self.places:
            now = parent.get_submodule(child)
            for name in dense._modules.keys() - {activation_of(dense)}:
                dense._modules[name] = now._modules[name]
        super().undo()


def activation_of(module: nn.Module) -> str | None:
    """Name of the only activation among the children, or `None`."""
    found = [name for name, child in module.named_children() if isinstance(child, ACTIVATIONS)]
    return found[0] if len(found) == 1 else None


def linear_of(module: nn.Module) -> list[nn.Module]:
    """Linear layers among the children, or what adapters put around them."""
    return [child for child in module.children() if isinstance(child, (*LINEAR, BaseTunerLayer))]


def is_mlp(module: nn.Module, name: str = "") -> bool:
    """Whether a module is an activation between linear layers and takes one tensor.

    Its children are linear layers, one activation and dropouts; a single linear layer will do where the module is
    called `intermediate`, as in BERT, whose second layer stands beside it.
    """
    linear = linear_of(module)
    others = [c for c in module.children() if c not in linear and not isinstance(c, (nn.Dropout, *ACTIVATIONS))]
    if activation_of(module) is None or not linear or any(sum(1 for _ in c.parameters()) for c in others):
        return False
    taken = [
        p
        for p in list(inspect.signature(type(module).forward).parameters.values())[1:]
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    return len(taken) == 1 and (len(linear) > 1 or name.rpartition(".")[2] == "intermediate")


def replace_mlp(
    model: nn.Module,
    template: DropIn,
    target_modules: str | Sequence[str] = "all-mlp",
    exclude_modules: str | Sequence[str] | None = None,
) -> Replacement:
    """Replace the MLPs of a model, in place: `replace_mlp(model, GRKAN())`. The linear layers stay what they are.

    MLPs that compute their activation inside the decoder layer (OPT, BART) are not found: there is no module to
    exchange.

    Args:
        model (`nn.Module`): Any model, wrapped by PEFT or to be wrapped later.
        template (`DropIn`): What to put there, made with options alone.
        target_modules (`str` or sequence, *optional*, defaults to `"all-mlp"`): All MLPs; ends of names
            (`["layer.0.mlp"]`); or one regular expression that must match the whole name.
        exclude_modules (`str` or sequence, *optional*): In the same form, what to leave out.
    """
    if not isinstance(template, DropIn):
        raise TypeError(f"template is a {type(template).__name__} but must be a module such as GRKAN().")
    mlps = {name: module for name, module in model.named_modules() if name and is_mlp(module, name)}
    chosen = _chosen(mlps, target_modules)
    excluded = [] if exclude_modules is None else _chosen(mlps, exclude_modules)
    chosen = [name for name in chosen if name not in excluded]
    if not chosen:
        raise ValueError(
            f"target_modules is {target_modules!r} but no MLP matches. Found: {', '.join(mlps) or 'none'} (an MLP is "
            f"a module of linear layers with one activation module between them).{already(model)}"
        )
    done = MLPReplacement({name: template.from_dense(mlps[name], name) for name in chosen}, model)
    for name, module in done.modules.items():
        parent, _, child = name.rpartition(".")
        parent = model.get_submodule(parent)
        done.places.append((parent, child, mlps[name]))
        setattr(parent, child, module)
    done.handles = template.begin(model, done.modules)
    return done


def already(model: nn.Module) -> str:
    """The end of a message: how many MLPs of a model were replaced before."""
    kinds = [type(m).__name__ for m in model.modules() if isinstance(m, DropIn) and not type(m).replaces]
    if not kinds:
        return ""
    return f" {len(kinds)} MLPs are already replaced, by {kinds[0]}: call undo() of what replace_mlp returned first."


def _chosen(mlps: dict[str, nn.Module], targets: str | Sequence[str]) -> list[str]:
    if targets == "all-mlp":
        return list(mlps)
    if isinstance(targets, str):
        return [name for name in mlps if re.fullmatch(targets, name)]
    return [name for name in mlps if any(f".{name}".endswith(f".{target}") for target in targets)]


@dataclass
class Recorded:
    """A record in the config of a model, so that `save_pretrained` writes it down; `remove()` takes it out."""

    config: Any
    key: str

    def remove(self) -> None:
        vars(self.config).pop(self.key, None)


def record(model: nn.Module, modules: dict[str, nn.Module], key: str, options: dict[str, Any]) -> list[Recorded]:
    """Write options and names (seen from the pretrained model inside `model`) into its config, if it has one."""
    inner = next(((n, m) for n, m in model.named_modules() if isinstance(m, PreTrainedModel)), None)
    if inner is None:
        return []
    prefix = f"{inner[0]}." if inner[0] else ""
    names = [name.removeprefix(prefix) for name in modules if name.startswith(prefix)]
    setattr(inner[1].config, key, {"options": options, "modules": names})
    return [Recorded(inner[1].config, key)]


def saved_tensors(model: PreTrainedModel, folder: str | Path, names: Sequence[str], what: str) -> dict[str, Tensor]:
    """Tensors that a model of this class calls `names`, from the safetensors files of a folder, sharded ones too.

    `save_pretrained` writes some architectures under other names than those of their modules (a ViT as
    `encoder.layer.0`); the renaming is that of transformers.
    """
    wanted = {name: {name, *revert_weight_conversion(model, {name: torch.empty(0)})} for name in names}
    owner = {key: name for name, keys in wanted.items() for key in keys}
    found: dict[str, Tensor] = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {owner[key]: file.get_tensor(key) for key in file.keys() if key in owner}  # noqa: SIM118
    missing = [name for name in names if name not in found]
    if missing:
        others = sorted(wanted[missing[0]] - {missing[0]})
        also = f", saved as {others[0]}" if others else ""
        raise FileNotFoundError(
            f"{folder} has no {what} for {missing[0]}{also} ({len(missing)} of {len(names)} tensors are missing; "
            "safetensors files are read)."
        )
    return found
