"""What a second evaluation of a batch needs: the same noise, and BatchNorm statistics that do not count it again."""

import contextlib
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn


def rng_state() -> dict[str, Any]:
    """State of every generator a forward pass may draw from, in types that a weights-only load accepts."""
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), *rest),
        "cpu": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def set_rng_state(state: dict[str, Any]) -> None:
    version, values, gauss = state["python"]
    random.setstate((version, tuple(values), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["cpu"].cpu())
    if state["device"] is not None:
        torch.cuda.set_rng_state(state["device"].cpu())


@contextlib.contextmanager
def running_statistics_kept(model: nn.Module | None) -> Iterator[None]:
    """BatchNorm normalises by the batch inside, but its running statistics are as before afterwards.

    A copy of the buffers, not `momentum=0`: it is right for `momentum=None` and costs no recompilation.
    """
    norms = [] if model is None else [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    buffers = [b for m in norms for b in m.buffers(recurse=False)]
    saved = [b.clone() for b in buffers]
    try:
        yield
    finally:
        for b, old in zip(buffers, saved, strict=True):
            b.copy_(old)


def plain(x: Any) -> Any:
    """A copy of a batch on the CPU: tensors, numbers, strings and containers of them; other objects as they are."""
    if isinstance(x, torch.Tensor):
        return x.detach().to("cpu", copy=True)
    if isinstance(x, Mapping):
        return {k: plain(v) for k, v in x.items()}
    return type(x)(plain(v) for v in x) if type(x) in (list, tuple) else x


def is_plain(x: Any) -> bool:
    """Whether `plain(x)` holds only what a weights-only load accepts."""
    if type(x) is dict:
        return all(isinstance(k, str) and is_plain(v) for k, v in x.items())
    if type(x) in (list, tuple):
        return all(map(is_plain, x))
    return x is None or isinstance(x, torch.Tensor | int | float | str)


def nbytes(x: Any) -> int:
    """Bytes of all tensors in a plain container."""
    if isinstance(x, torch.Tensor):
        return x.nbytes
    return sum(map(nbytes, x.values() if type(x) is dict else x)) if type(x) in (dict, list, tuple) else 0


class Passes:
    """Abstract: re-evaluates the update's micro-batches. Methods call it inside `finish`.

    Attributes:
        batches: The micro-batches of this update, in order.
        scaled: True when gradients carry a loss scale whose owner decides about overflow.
        grad_scale: That scale.
    """

    batches: list[Any]
    scaled: bool = False
    grad_scale: float = 1.0

    def __call__(self, batches: list[Any] | None = None, objective: Any = None, sync: bool = True) -> torch.Tensor:
        """Clear the gradients, evaluate `batches` (default: this update's) and return the summed loss (scalar).

        `objective` replaces the training loss; `sync=False` leaves the gradients of each process its own.
        """
        raise NotImplementedError

    def keep(self, batch: Any) -> dict[str, Any]:
        """`batch` as plain data on the CPU, to be evaluated again in a later update, perhaps after a resume."""
        raise NotImplementedError

    def revive(self, kept: dict[str, Any]) -> Any:
        """The inverse of `keep`."""
        raise NotImplementedError
