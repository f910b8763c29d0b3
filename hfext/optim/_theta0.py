"""theta_0 for `adamr`: the weights that training began with, where they are and how they are known again.

On resume the Trainer loads the checkpoint's weights before it makes the optimizer, so that a copy made there would be
the wrong one. What the model held before is noted when the load begins.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file, logging

from ..compat import patch_method
from . import _args

logger = logging.get_logger(__name__)

_START = "_hfext_theta0"


def fingerprint(x: Tensor) -> str:
    """A hash of values, dtype and shape."""
    data = x.detach().cpu().contiguous()
    seen = hashlib.sha256(f"{data.dtype} {tuple(data.shape)}".encode())
    seen.update(data.reshape(-1).view(torch.uint8).numpy())
    return seen.hexdigest()[:32]


def cached(source: str, name: str) -> str | None:
    """The path of a model's file, or None when it has none."""
    try:
        return cached_file(source, name)
    except OSError:
        return None


def stored_tensors(source: str) -> dict[str, str]:
    """{key: path of its safetensors file} of a folder or of a model's name."""
    if os.path.isdir(source):
        paths = [os.path.join(source, n) for n in sorted(os.listdir(source)) if n.endswith(".safetensors")]
    elif (index := cached(source, SAFE_WEIGHTS_INDEX_NAME)) is not None:
        with open(index) as file:
            paths = [cached(source, name) for name in sorted(set(json.load(file)["weight_map"].values()))]
    else:
        paths = [cached(source, SAFE_WEIGHTS_NAME)]
    found = {}
    for path in filter(None, paths):
        with safe_open(path, "pt") as file:
            found |= dict.fromkeys(file.keys(), path)
    if not found:
        raise ValueError(f"theta0: no safetensors were found in {source!r}. Use theta0=snapshot.")
    return found


def origins(model: nn.Module, theta0: str, start: Mapping[str, Tensor]) -> dict[Tensor, Any]:
    """Where theta_0 of each trained parameter is: a tensor of `start`, or (file, key); others are not named."""
    if theta0 == "snapshot":
        return {p: start[name] for name, p in model.named_parameters() if name in start}
    named = [m for m in model.modules() if isinstance(m, PreTrainedModel)]
    source = theta0 if theta0 != "reload" else (named[0].config.name_or_path if named else "")
    if not source:
        raise ValueError("theta0='reload' needs a model that was loaded with from_pretrained. Use theta0=snapshot.")
    stored, prefix = stored_tensors(source), f"{named[0].base_model_prefix}." if named else ""
    found: dict[Tensor, Any] = {}
    for name, p in model.named_parameters():
        # A checkpoint of the bare model has no prefix, an adapter's file does not name the adapter.
        spellings = (name, name.replace(".default.", "."), name.removeprefix(prefix), prefix + name)
        key = next((s for s in spellings if s in stored), None)
        if not p.requires_grad:
            continue
        if key is None and theta0 != "reload":
            raise ValueError(f"theta0: {name} is not in {source!r}.")
        if key is None:
            logger.info(f"AdamR: {name} is not in {source!r}; its first values are copied.")
            found |= {p: start[name]} if name in start else {}
            continue
        with safe_open(stored[key], "pt") as file:
            shape = tuple(file.get_slice(key).get_shape())
        if shape != tuple(p.shape):
            raise ValueError(f"theta0: {name} has shape {tuple(p.shape)} but {shape} in {stored[key]!r}.")
        found[p] = (stored[key], key)
    return found


def _uses_adamr(args: TrainingArguments) -> bool:
    return args.optim == "adamr" or (bool(args.optim_args) and _args.split(args.optim_args).get("base") == "adamr")


def _note_start(original):
    """Before a checkpoint replaces the weights, note those that training began with."""

    def load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if self.optimizer is None and _uses_adamr(self.args):
            trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
            vars(self.model)[_START] = {n: p.detach().to("cpu", copy=True) for n, p in trained.items()}
        return original(self, resume_from_checkpoint, model)

    return load_from_checkpoint


def taken_start(model: nn.Module) -> dict[str, Tensor]:
    """What was noted for `model`, once; empty when no checkpoint was loaded."""
    return vars(model).pop(_START, {})


def install() -> None:
    """Patch `Trainer`; idempotent."""
    patch_method(Trainer, "_load_from_checkpoint", _note_start)
