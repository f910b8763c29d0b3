"""Which stage of S3T owns which layer, what cannot be owned, and global random states that come back."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from peft import LoraConfig, PeftModel
from torch import nn

from .._fields import divides

KEEPS_STATISTICS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def layer_of(name: str) -> tuple[str, int] | None:
    """The stack a parameter lies in and its layer there, or `None`: `model.layers.3.mlp.w` is (`model.layers`, 3)."""
    parts = name.split(".")
    where = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return None if where is None else (".".join(parts[:where]), int(parts[where]))


def layer_groups(names: Sequence[str], slices: int) -> list[list[int]]:
    """Layers of each stage, from the top; `ValueError` where the adapters cannot be told apart by layers."""
    found = {name: layer_of(name) for name in names}
    outside = [name for name, place in found.items() if place is None]
    if outside:
        raise ValueError(f"{outside[0]} lies outside of the layers, so no stage can own it: leave it out of the LoRA.")
    if len({place[0] for place in found.values()}) > 1:
        raise NotImplementedError("S3T needs one stack of layers: encoder-decoder models have two.")
    layers = sorted({place[1] for place in found.values()}, reverse=True)
    divides("slices", slices, len(layers), "layers with adapters")
    size = len(layers) // slices
    return [layers[i : i + size] for i in range(0, len(layers), size)]


@contextmanager
def own_randomness() -> Iterator[None]:
    """The global generators afterwards are what they were before."""
    kept = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])


def check_exact(model: nn.Module, config: LoraConfig) -> None:
    """Refuse what would keep traces of rows outside of a stage."""
    if isinstance(model, PeftModel):
        raise ValueError("model has adapters already: merge or unload them first, S3T makes its own.")
    if not isinstance(config, LoraConfig) or config.bias != "none" or config.trainable_token_indices:
        raise ValueError("peft_config must be a LoraConfig with bias='none' and no trainable_token_indices.")
    if config.init_lora_weights not in (True, "gaussian"):
        raise ValueError(
            f"peft_config: init_lora_weights is {config.init_lora_weights!r} but must be True or 'gaussian': a "
            "layer whose stage was deleted is to be the base's."
        )
    for name, module in model.named_modules():
        if isinstance(module, KEEPS_STATISTICS) and module.track_running_stats:
            raise NotImplementedError(f"{name} keeps statistics of all rows it sees, which no deletion undoes.")


def paper_lora() -> LoraConfig:
    """The adapter of the paper's language models."""
    return LoraConfig(r=32, lora_alpha=64, lora_dropout=0.05, use_rslora=True, target_modules="all-linear")
