"""How modules are called, and what attention modules give to their cache, found by running each on one token.

Configs do not say it: some models repeat the heads of keys, have values of other sizes or rotate only some layers.
"""

import functools
import inspect
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

PAST = ("past_key_values", "layer_past")  # what the models call the cache


@functools.cache
def parameters(kind: type[nn.Module]) -> dict[str, inspect.Parameter]:
    """The parameters of the forward of a class of modules, in their order."""
    return dict(list(inspect.signature(kind.forward).parameters.items())[1:])


@functools.cache
def _place(kind: type[nn.Module], name: str) -> int:
    names = list(parameters(kind))
    return names.index(name) if name in names else sys.maxsize


def argument(module: nn.Module, args: tuple, kwargs: dict[str, Any], *names: str) -> Any:
    """The argument of a call of a module that has one of these names, given by name or by place, else `None`."""
    for name in names:
        if name in kwargs:
            return kwargs[name]
        if args:
            place = _place(type(module), name)
            if place < len(args):
                return args[place]
    return None


def with_argument(
    module: nn.Module, args: tuple, kwargs: dict[str, Any], name: str, value: Any
) -> tuple[tuple, dict[str, Any]]:
    """The arguments of a call with another value for one of them."""
    place = _place(type(module), name)
    if name not in kwargs and place < len(args):
        return (*args[:place], value, *args[place + 1 :]), kwargs
    return args, {**kwargs, name: value}


def cache_name(module: nn.Module) -> str:
    """What an attention module calls its cache."""
    for name in PAST:
        if name in parameters(type(module)):
            return name
    raise NotImplementedError(f"{type(module).__name__} takes its cache as none of {', '.join(PAST)}.")


class Reporter(Cache):
    """Looks like a cache to an attention module: tells what it is given and returns it; keeps nothing.

    Args:
        told (`Callable[[int, Tensor, Tensor], None]`): Called with the layer's index, keys and values.
    """

    def __init__(self, told: Callable[[int, Tensor, Tensor], None]):
        super().__init__(layers=[])
        self.told = told

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any):
        self.told(layer_idx, key_states, value_states)
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


@dataclass(frozen=True)
class Given:
    """What an attention module gives to its cache for one token at `PLACES`, and cos and sin there (or what a rotary
    module makes instead)."""

    kv_heads: int
    head_dim: int
    value_dim: int
    keys: Tensor  # float32 [2, kv_heads, 1, head_dim]
    turned: bool  # the position changes the keys
    turned_values: bool
    tables: Any

    def undone_by(self, unrotate: Callable[[Tensor, Tensor, Tensor], Tensor]) -> bool:
        """Whether the keys of the two positions come together by `unrotate`."""
        cos, sin = (x.float() for x in self.tables)
        back = unrotate(self.keys, cos, sin)
        return bool((back[0] - back[1]).norm() < 0.5 * (self.keys[0] - self.keys[1]).norm())


PLACES = (0, 3)
_GIVEN: weakref.WeakKeyDictionary[nn.Module, Given] = weakref.WeakKeyDictionary()


class _Enough(Exception):
    """Ends the run of an attention module once its keys and values are known."""


def given_by(
    modules: dict[int, nn.Module], hidden: int, dtype: torch.dtype, rotary: nn.Module | None, kind: tuple[str, ...]
) -> tuple[dict[int, Given], str | None]:
    """What every layer gives; else nothing, and why it could not be seen. Every module is run once in its life.

    hidden: Channels of the hidden states of type `dtype`. rotary: Makes cos and sin; takes `kind` beside positions.
    """
    found = {}
    for index, module in modules.items():
        if module not in _GIVEN:
            try:
                _GIVEN[module] = _given(module, hidden, dtype, rotary, kind)
            except Exception as error:  # an attention module of another kind, or one whose weights are elsewhere
                return {}, f"what {type(module).__name__} gives to its cache could not be seen ({error})."
        found[index] = _GIVEN[module]
    return found, None


@torch.no_grad()
def _given(
    module: nn.Module, hidden: int, dtype: torch.dtype, rotary: nn.Module | None, kind: tuple[str, ...]
) -> Given:
    here = [x for part in (module, rotary) if part is not None for x in (*part.parameters(), *part.buffers())]
    device = next((x.device for x in here if not x.is_meta), torch.device("cpu"))
    x = torch.randn(1, 1, hidden, generator=torch.Generator().manual_seed(0)).expand(2, -1, -1)
    x = x.to(device, dtype)
    positions = torch.tensor(PLACES, device=device)[:, None]
    tables = None
    if rotary is not None:
        tables = rotary.forward(x, positions, *kind)
        tables = tuple(t.to(device) for t in tables) if isinstance(tables, tuple) else tables.to(device)
    seen: list[Tensor] = []

    def told(index: int, keys: Tensor, values: Tensor) -> None:
        seen.extend((keys, values))
        raise _Enough

    wanted = parameters(type(module))
    known = {"position_embeddings": tables, "position_ids": positions, cache_name(module): Reporter(told)}
    known[next(iter(wanted))] = x
    required = [n for n, p in wanted.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    training = [part for part in module.modules() if part.training]
    try:
        for part in training:  # no dropout, which would draw random numbers
            part.training = False
        module.forward(**{n: known.get(n) for n in wanted if n in known or n in required})
    except _Enough:
        pass
    finally:
        for part in training:
            part.training = True
    if not seen or seen[0].is_meta:
        raise RuntimeError("it gave nothing" if not seen else "its weights are not loaded")
    keys, values = seen
    sizes = (keys.shape[1], keys.shape[3], values.shape[3])
    return Given(*sizes, keys.float(), _differ(*keys.float()), _differ(*values.float()), tables)


def _differ(first: Tensor, second: Tensor) -> bool:
    """Whether more numbers differ than may by rounding."""
    return bool(((first - second).abs() > 0.01 * (first.abs() + second.abs())).float().mean() > 0.02)
