"""When a kernel runs, how often each one ran, and with which launch parameters. The same file in every package."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from functools import cache, lru_cache
from pathlib import Path

import torch

launches: Counter[str] = Counter()
CONFIGS = Path(__file__).parent / "configs"


def interpreted() -> bool:
    """Whether Triton runs kernels as Python on any device: it must be set before triton is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def runs_kernel(x: torch.Tensor) -> bool:
    """Whether an operation on `x` launches a kernel; otherwise it takes the plain torch path of this package."""
    return x.is_cuda or interpreted()


def launch(kernel, grid: tuple[int, ...], *args, **options) -> None:
    """Run `kernel[grid](*args, **options)` on the device of its first tensor and count it under the kernel's name."""
    launches[kernel.fn.__name__] += 1
    tensor = next(arg for arg in args if isinstance(arg, torch.Tensor))
    if tensor.is_cuda:
        with torch.cuda.device(tensor.device):
            kernel[grid](*args, **options)
    else:
        kernel[grid](*args, **options)


@cache
def _rows(device: str) -> dict[str, list[dict]]:
    rows = json.loads((CONFIGS / "default.json").read_text())
    tuned = CONFIGS / f"device_name={device}.json"
    if tuned.is_file():
        rows = {**rows, **json.loads(tuned.read_text())}
    return rows


def config(op: str, x: torch.Tensor, **key) -> dict[str, int]:
    """Launch parameters of `op`: the row whose words are those of `key` and whose numbers are nearest in log2.

    Rows are read from `configs/default.json`; `configs/device_name=<name>.json`, which `tune.py` writes, replaces all
    rows of an operation on that device. A word that a row leaves out fits every key.
    """
    device = torch.cuda.get_device_name(x.device).replace(" ", "_") if x.is_cuda else "cpu"
    return _nearest(op, device, tuple(sorted(key.items())))


@lru_cache(maxsize=1024)
def _nearest(op: str, device: str, key: tuple) -> dict[str, int]:
    wanted = dict(key)
    best, least = None, math.inf
    for row in _rows(device)[op]:
        distance = 0.0
        for name, value in row["key"].items():
            if isinstance(value, str):
                distance += 0.0 if wanted[name] == value else math.inf
            else:
                distance += abs(math.log2(max(wanted[name], 1)) - math.log2(max(value, 1)))
        if distance < least:
            best, least = row["config"], distance
    if best is None:
        raise LookupError(f"No launch parameters of {op} fit {wanted}.")
    return best
