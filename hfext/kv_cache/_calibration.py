"""What a method learns from text: the tensors, where they came from, how they are stored and how they are checked."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.logging import get_logger, tqdm

from .._fields import VERSION
from ._cache import read_tensors, write_tensors
from ._geometry import decoder, geometry, rotary_module, unwrapped
from ._state import Step

logger = get_logger(__name__)
SIDECAR = "kv_cache.safetensors"
PREFIX = "kv_cache."


@dataclass
class Calibration:
    """Tensors by name, `"<layer>.<name>"` or `"<name>"`, and the facts of the model they belong to.

    `awaited` makes one without its tensors: what a config.json names and a checkpoint holds.
    """

    tensors: dict[str, Tensor]
    facts: dict[str, Any]
    tokens: int
    digest: str = field(default="")

    def __post_init__(self):
        self.digest = self.digest or digest(self.tensors)

    def layer(self, index: int, name: str) -> Tensor:
        return self.tensors[f"{index}.{name}"]

    def about(self) -> dict[str, Any]:
        return {"model": self.facts, "tokens": self.tokens, "digest": self.digest}

    @classmethod
    def awaited(cls, about: dict[str, Any]) -> "Calibration":
        missing = {"model", "tokens", "digest"} - set(about)
        if missing:
            raise ValueError(f"The calibration in the config lacks {', '.join(sorted(missing))}.")
        return cls({}, about["model"], about["tokens"], about["digest"])

    def fits(self, facts: dict[str, Any], shapes: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
        """Refuse a calibration of another model, or one whose tensors are not those the method wants."""
        if not self.tensors:
            raise ValueError(
                "The calibration of this config is named but not loaded: load the model with "
                "`from_pretrained(folder)`, or the config with `KVCacheConfig.from_pretrained(folder)`."
            )
        other = {name: (self.facts.get(name), value) for name, value in facts.items() if self.facts.get(name) != value}
        if other:
            told = "; ".join(f"{name} {old} and not {new}" for name, (old, new) in other.items())
            raise ValueError(
                f"The calibration belongs to another model or other options: {told}. Calibrate with these."
            )
        for name, (shape, dtype) in shapes.items():
            got = self.tensors.get(name)
            if got is None or tuple(got.shape) != shape or got.dtype != dtype:
                had = "nothing" if got is None else f"{got.dtype} {list(got.shape)}"
                raise ValueError(f"The calibration has {had} for {name} but {dtype} {list(shape)} is wanted.")
            if got.is_floating_point() and not bool(torch.isfinite(got).all()):
                raise ValueError(f"The calibration tensor {name} holds a value that is not finite.")
        unknown = sorted(set(self.tensors) - set(shapes))
        if unknown:
            raise ValueError(f"The calibration holds {', '.join(unknown)}, which these options do not use.")

    def filled(self, tensors: dict[str, Tensor], source: str) -> "Calibration":
        """This awaited calibration with tensors that were read from `source`; refuses any that are not the same."""
        got = digest(tensors)
        if got != self.digest:
            raise ValueError(
                f"The calibration in {source} has been changed or is not whole: {got} is not {self.digest}."
            )
        return Calibration(tensors, self.facts, self.tokens, self.digest)

    @staticmethod
    def write(config: Any, folder: str | os.PathLike) -> None:
        tensors = {} if config.calibration is None else config.calibration.tensors
        write_tensors(Path(folder) / SIDECAR, tensors, {VERSION: version("hfext"), **config.to_dict()})

    @staticmethod
    def read(cls: Any, folder: str | os.PathLike) -> Any:
        path = Path(folder) / SIDECAR
        if not path.exists():
            raise ValueError(f"{folder} has no {SIDECAR}.")
        tensors, about = read_tensors(path)
        config = cls.from_dict(about)
        if config.calibration is not None:
            config.calibration = config.calibration.filled(tensors, str(path))
        return config


def digest(tensors: dict[str, Tensor]) -> str:
    """A hash of names, shapes, types and bytes."""
    whole = hashlib.sha256()
    for name in sorted(tensors):
        x = tensors[name].detach().cpu().contiguous()
        whole.update(json.dumps([name, str(x.dtype), list(x.shape)]).encode())
        whole.update(x.reshape(-1).view(torch.uint8).numpy().tobytes())
    return "sha256:" + whole.hexdigest()[:32]


@dataclass
class Observed:
    """What one attention layer saw in one batch. Rows and tokens that are padding are marked in `real`."""

    layer: int
    step: Step
    keys: Tensor  # before the rotary embedding, [batch, kv_heads, tokens, head_dim], float32
    values: Tensor  # [batch, kv_heads, tokens, head_dim]
    real: Tensor  # bool [batch, tokens]


def batches(data: Any, length: int = 512) -> Iterator[tuple[Tensor, Tensor]]:
    """Token ids and masks [batch, tokens] of calibration data.

    `data` is a tensor of ids ([tokens] is cut into rows of `length`, [rows, tokens] is taken row by row), a
    tokenizer's output with `input_ids` and `attention_mask`, a `datasets.Dataset` with these columns, or a list of
    any of them.
    """
    if isinstance(data, Tensor):
        if data.dim() not in (1, 2) or data.numel() == 0 or data.is_floating_point():
            raise ValueError(f"Calibration data is {data.dtype} {list(data.shape)} but must be ids [rows, tokens].")
        whole = data[: len(data) // length * length or None] if data.dim() == 1 else data
        for row in whole.view(-1, min(length, len(data))) if data.dim() == 1 else whole:
            yield row[None], torch.ones_like(row[None])
    elif hasattr(data, "keys") and "input_ids" in data:
        ids = torch.as_tensor(data["input_ids"])
        ids = ids[None] if ids.dim() == 1 else ids
        mask = torch.as_tensor(data["attention_mask"]) if "attention_mask" in data else torch.ones_like(ids)
        for row, row_mask in zip(ids, mask.view(ids.shape), strict=True):
            yield row[None], row_mask[None]
    elif isinstance(data, Iterable) and not isinstance(data, str):
        for item in data:
            yield from batches(torch.tensor(item) if isinstance(item, list) else item, length)
    else:
        raise TypeError(
            f"Calibration data is {type(data).__name__} but must be token ids: a tensor, a tokenizer's output with "
            "`input_ids`, a dataset with that column, or a list of these."
        )


@torch.no_grad()
def watch(model: nn.Module, data: Any, visit: Callable[[Observed], None], length: int = 512) -> int:
    """Run `model` on `data` with its own attention and call `visit` for every compressible layer of every batch.

    Returns the number of real tokens. The model's mode is restored; nothing is left on it.
    """
    from ._install import capture

    model = unwrapped(model)
    shape = geometry(model)
    stack = decoder(model)
    device = next(stack.parameters()).device
    rows = list(batches(data, length))
    if not rows:
        raise ValueError("The calibration data holds no text.")
    tokens, training = 0, model.training
    model.eval()
    try:
        for ids, mask in tqdm(rows, desc="Calibrating the cache", leave=False):
            tokens += int(mask.sum())
            real = mask.bool().to(device)

            def seen(step: Step, index: int, keys: Tensor, values: Tensor, real: Tensor = real) -> None:
                rotary = shape.rotary_of(index)
                before = keys.float() if rotary is None else rotary.unrotate(keys.float(), step.cos, step.sin)
                visit(Observed(index, step, before, values, real))

            with capture(model, shape, seen) as reported:
                stack(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
            silent = sorted(set(shape.layers) - set(reported))
            if silent:
                raise NotImplementedError(
                    f"Layers {silent} of {type(model).__name__} give their keys to no cache, so nothing can be learnt."
                )
    finally:
        model.train(training)
    return tokens


__all__ = ["Calibration", "Observed", "batches", "rotary_module", "watch"]
