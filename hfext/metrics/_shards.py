"""Rows over processes: row i on rank i % world, and every rank has all results in order."""

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist


def _world() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def own_rows(count: int) -> list[int]:
    """Rows of this process. All processes get the same number, so that a sharded model is called equally often by all:
    the last rows of some are repetitions, which `all_rows` drops."""
    rank, world = _world()
    return [(rank + k * world) % count for k in range(-(-count // world))] if count else []


def all_rows(results: Sequence[Any], count: int) -> list[Any]:
    """The results of all rows in order, from those of `own_rows(count)`; on every process. Tensors must be on CPU."""
    _, world = _world()
    if world == 1 or not count:
        return list(results)
    parts: list[Any] = [None] * world
    dist.all_gather_object(parts, list(results))
    return [parts[i % world][i // world] for i in range(count)]
