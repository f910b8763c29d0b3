"""Values of dataclass fields: from YAML text to the type a field declares, and back to plain JSON types."""

import contextlib
import importlib.metadata
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from packaging.version import InvalidVersion, Version

VERSION = "hfext_version"  # in what is saved: which version wrote it


class _Loader(yaml.SafeLoader):
    """YAML as people write it: `1e-3` is a number (PyYAML wants `1.0e-3`), and a repeated key is an error."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def parse(text: str) -> Any:
    """YAML to Python; `yaml.YAMLError` when it is not."""
    return yaml.load(text, Loader=_Loader)


def coerce(name: str, hint: Any, value: Any) -> Any:
    """`value` as the type `hint` says, or a `ValueError` that names the field. Only lossless changes are made."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, UnionType):
        return _first(name, hint, value, args)
    if origin is Literal:
        if value in args:
            return value
    elif origin in (list, tuple) and isinstance(value, list | tuple):
        fixed = origin is tuple and args[-1] is not Ellipsis
        if not fixed or len(args) == len(value):
            kinds = args if fixed else args[:1] * len(value)
            return origin(coerce(name, kind, item) for kind, item in zip(kinds, value, strict=True))
    elif isinstance(origin or hint, type):
        kind = origin or hint
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if kind is Path and isinstance(value, str):
            return Path(value)
        if kind is tuple and isinstance(value, list):
            return tuple(value)
        # bool is a subclass of int: `steps: true` is a mistake.
        if isinstance(value, kind) and not (isinstance(value, bool) and kind in (int, float)):
            return value
    wanted = f"one of {', '.join(map(repr, args))}" if origin is Literal else _spell(hint)
    raise ValueError(f"{name} is {value!r} but must be {wanted}.")


def _first(name: str, hint: Any, value: Any, kinds: tuple) -> Any:
    for kind in kinds:
        try:
            return coerce(name, kind, value)
        except ValueError:
            continue
    raise ValueError(f"{name} is {value!r} but must be {_spell(hint)}.")


def _spell(hint: Any) -> str:
    if hint is NoneType:
        return "null"
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(_spell(kind) for kind in get_args(hint))
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)


def plain(value: Any) -> Any:
    """JSON types for what experiments return; a number that is not finite becomes `None`."""
    if hasattr(value, "tolist"):  # tensors, arrays and their scalars
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in (sorted(value) if isinstance(value, set | frozenset) else value)]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)


def in_range(name: str, value: float, low: float, high: float, low_open: bool = False) -> None:
    """Raise unless low <= value <= high (low < value with `low_open`)."""
    if not (low < value if low_open else low <= value) or not value <= high:
        raise ValueError(f"{name} is {value} but must be in {'(' if low_open else '['}{low}, {high}].")


def one_of(name: str, value: Any, allowed: Iterable[Any]) -> None:
    """Raise unless the value is one of those allowed."""
    allowed = list(allowed)
    if value not in allowed:
        raise ValueError(f"{name} is {value!r} but must be one of {', '.join(map(str, allowed))}.")


def divides(name: str, value: int, whole: int, what: str) -> None:
    """Raise unless `value` divides `whole`."""
    if value < 1 or whole % value:
        fitting = [n for n in range(1, whole + 1) if whole % n == 0]
        raise ValueError(
            f"{name} is {value} but must divide the {whole} {what}: one of {', '.join(map(str, fitting))}."
        )


def newer(written: Any) -> str:
    """What to do about something that hfext `written` has written; empty where that is no later version than this."""
    here = importlib.metadata.version("hfext")
    try:
        later = isinstance(written, str) and Version(written) > Version(here)
    except InvalidVersion:
        later = False
    if not later:
        return ""
    return f"It was written by hfext {written}, and here is {here}: update with `pip install --upgrade hfext`."


@contextlib.contextmanager
def explained(written: Any) -> Iterator[None]:
    """Says of what cannot be read that a later version wrote it, if one did; what can be read is only warned about."""
    from transformers.utils import logging

    note = newer(written)
    try:
        yield
    except (ValueError, TypeError) as error:
        if note and note not in str(error):
            raise ValueError(f"{note} What this version cannot read: {error}") from error
        raise
    if note:
        logging.get_logger(__name__).warning_once(note)
