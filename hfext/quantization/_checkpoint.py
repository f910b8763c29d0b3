"""Finished blocks on disk, so that an interrupted calibration goes on where it stopped.

`resume_from` is a folder with one safetensors file for each finished block and `run.json`, which names the run they
belong to: method, options, layers, calibration tokens and the weights' fingerprint.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.utils import logging

if TYPE_CHECKING:
    from ._calibration import Block
    from ._config import CalibratedConfig

logger = logging.get_logger(__name__)
RUN = "run.json"


class Finished:
    """The folder of finished blocks of one run; does nothing without `resume_from`.

    Raises:
        ValueError: The folder belongs to another run, or one of its files is damaged.
    """

    def __init__(self, config: "CalibratedConfig", model: nn.Module, layers: dict[str, Any], rows: list[Tensor]):
        self.config, self.folder = config, None if config.resume_from is None else Path(config.resume_from)
        if self.folder is None:
            return
        run = {
            "config": config.to_dict(),
            "layers": {name: bits for name, (_, bits) in layers.items()},
            "data": fingerprint(rows),
            "weights": fingerprint([part for p in model.parameters() for part in sample(p.detach())]),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / RUN
        if path.is_file():
            known = json.loads(path.read_bytes())
            differs = [key for key in run if known.get(key) != json.loads(json.dumps(run[key]))]
            if differs:
                raise ValueError(
                    f"{self.folder} holds blocks of another run: {', '.join(differs)} differ. Take another folder for "
                    "resume_from, or delete it."
                )
        else:
            write(path, json.dumps(run).encode())

    def path(self, block: "Block") -> Path:
        """The file of a block."""
        return self.folder / f"block-{block.index:04d}.safetensors"

    def read(self, block: "Block") -> bool:
        """Fill a block from its file; False when there is none."""
        if self.folder is None or not self.path(block).is_file():
            return False
        try:
            tensors = load_file(self.path(block))
            with safetensors.safe_open(self.path(block), framework="pt") as file:
                errors = json.loads((file.metadata() or {}).get("errors", "{}"))
        except (safetensors.SafetensorError, ValueError) as error:
            raise ValueError(
                f"{self.path(block)} is damaged ({error}): delete it to quantise the block again."
            ) from error
        for name, (linear, bits) in block.layers.items():
            layer = self.config.empty_layer(linear, bits)
            block.put(name, layer)
        for name, parameter in block.module.named_parameters():
            if name in tensors:
                block.keep(parameter)
        block.module.load_state_dict(tensors, strict=True)
        block.errors = errors
        return True

    def write(self, block: "Block") -> None:
        """Write a finished block."""
        if self.folder is None:
            return
        tensors = {name: x.detach().cpu().contiguous() for name, x in block.module.state_dict().items()}
        partial = self.path(block).with_suffix(".partial")
        save_file(tensors, partial, metadata={"errors": json.dumps(block.errors)})
        os.replace(partial, self.path(block))

    def clear(self) -> None:
        """The run is complete: its blocks are in the model."""
        if self.folder is None:
            return
        for path in [
            *self.folder.glob("block-*.safetensors"),
            *self.folder.glob("block-*.partial"),
            self.folder / RUN,
        ]:
            path.unlink(missing_ok=True)


def write(path: Path, content: bytes) -> None:
    """A whole file or none."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    os.replace(partial, path)


def sample(x: Tensor) -> tuple[Tensor, Tensor]:
    """The first numbers of a tensor, and sums over all of it."""
    return x.flatten()[:4096], torch.stack(
        [x.sum(dtype=torch.float64), torch.linalg.vector_norm(x, dtype=torch.float64)]
    )


def fingerprint(tensors: list[Tensor]) -> str:
    """A hash of tensors."""
    whole = hashlib.sha256()
    for x in tensors:
        whole.update(f"{x.dtype}{list(x.shape)}".encode())
        whole.update(x.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()[:32]
