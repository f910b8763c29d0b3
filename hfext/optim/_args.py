"""`optim_args`: a string such as `rho=0.05,base=adamw,base.momentum=0.9` to typed options, or a clear error."""

import difflib
import typing
from dataclasses import fields
from typing import Any

from .._fields import coerce
from .._fields import parse as yaml_value
from ..registry import suggest

# What the Trainer writes into every parameter group.
_BY_TRAINER = {"lr": "learning_rate", "weight_decay": "weight_decay"}
ALIASES = {"adamw": "adamw_torch", "adam": "adamw_torch", "adamw_fused": "adamw_torch_fused"}


def split(text: str | None) -> dict[str, str]:
    """`a=1,b=2` to a dict of strings. Every key once, every entry `key=value`."""
    if text is not None and not isinstance(text, str):
        raise TypeError(f"optim_args is a {type(text).__name__} but must be a string such as 'rho=0.05,base=adamw'.")
    options: dict[str, str] = {}
    for entry in (text or "").split(","):
        if not entry.strip():
            continue
        key, equals, value = (part.strip() for part in entry.partition("="))
        if not equals or not key or not value or "=" in value:
            raise ValueError(
                f"optim_args: {entry.strip()!r} is not of the form key=value (entries are split at commas)."
            )
        if key in options:
            raise ValueError(f"optim_args: {key!r} is given twice.")
        options[key] = value
    return options


def parse(text: str | None, config: type) -> tuple[Any, str, dict[str, str]]:
    """The validated config, the name of the base optimizer and the base's own options (still strings)."""
    own, base, base_options = {}, "adamw", {}
    for key, value in split(text).items():
        if key == "base":
            base = value
        elif key.startswith("base."):
            option = key.removeprefix("base.")
            if option in _BY_TRAINER:
                raise ValueError(f"optim_args: {key} has no effect, the Trainer sets it. Use {_BY_TRAINER[option]}=.")
            base_options[option] = value
        else:
            own[key] = value
    return typed(own, config, ("base", "base.<option of the base optimizer>")), base, base_options


def typed(given: dict[str, str], config: type, others: tuple[str, ...] = ()) -> Any:
    """The validated config from texts by name; `others` are keys that are valid but not of the config."""
    kinds = typing.get_type_hints(config)
    known = [f.name for f in fields(config)]
    options = {}
    for key in given:
        value = given[key]
        key = "lam" if key == "lambda" and "lam" in known else key  # `lambda` is a keyword in Python
        if key in options:
            raise ValueError("optim_args: 'lambda' and 'lam' are the same option.")
        if key in _BY_TRAINER and key not in known:
            raise ValueError(f"optim_args: {key} is set by the Trainer. Use {_BY_TRAINER[key]}=.")
        if key not in known:
            raise ValueError(
                f"optim_args: unknown key {key!r}. {_nearest(key, [*known, *others])}Valid keys: "
                f"{', '.join([*sorted(known), *others]) or 'none'}."
            )
        options[key] = coerce(f"optim_args: {key}", kinds[key], yaml_value(value))
    return config(**options)


def _nearest(key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    return f"Did you mean {near[0]!r}? " if near else ""


def base_name(name: str, known: list[str], own: list[str]) -> str:
    """The stock name of a base optimizer; layer-wise ones and our own are refused."""
    stock = ALIASES.get(name, name)
    if stock in own:
        raise ValueError(
            f"optim_args: base={name!r} has passes of its own and cannot be a base. Use a stock one, such as "
            "base=adamw."
        )
    if stock not in known:
        raise ValueError(f"optim_args: base={name!r} is not an optimizer name. {suggest(name, [*ALIASES, *known])}")
    if stock.endswith("layerwise") or stock in ("lomo", "adalomo"):
        raise ValueError(
            f"optim_args: base={name!r} steps inside the backward pass, so it cannot wait for a second pass. "
            f"Use {stock.removesuffix('_layerwise')!r} or base=adamw."
            if stock.endswith("layerwise")
            else f"optim_args: base={name!r} steps inside the backward pass, so it cannot wait for a second pass. "
            "Use base=adamw or base=sgd."
        )
    return stock
