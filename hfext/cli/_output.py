"""What the commands share: errors of the user without a traceback, flags after the recipe, and tables."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import typer
import yaml

from .. import registry
from .._fields import parse

WRONG_INPUT = (KeyError, ValueError, TypeError, OSError, ImportError)
# While an experiment runs, a ValueError can be a bug whose traceback is needed; these are what a user can mend.
MISSING = (FileNotFoundError, ImportError, NotImplementedError)


@contextmanager
def user_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Turn these exceptions into one line on stderr and exit status 2."""
    try:
        yield
    except kinds as error:
        # str() of a KeyError puts quotes around the message.
        text = error.args[0] if isinstance(error, KeyError) else error
        typer.echo(f"hfext: {text}", err=True)
        raise typer.Exit(2) from error


def method(name: str) -> registry.Method:
    """The record of `name`; exit status 2 with the nearest name when there is none."""
    with user_errors(KeyError):
        return registry.get(name)


def overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """`--field value` and `--field=value` to a dict; values are YAML, as in the recipe."""
    values: dict[str, Any] = {}
    rest = iter(arguments)
    for argument in rest:
        if not argument.startswith("--"):
            raise ValueError(f"{argument!r} is in the place of a flag: write --field value after the recipe's name.")
        flag, equals, text = argument[2:].partition("=")
        name = flag.replace("-", "_")
        if name in values:
            raise ValueError(f"--{flag} stands twice.")
        if not equals:
            text = next(rest, None)
            if text is None:
                raise ValueError(f"--{flag} needs a value.")
        try:
            values[name] = parse(text)
        except yaml.YAMLError as error:
            raise ValueError(f"--{flag}: {text!r} is not a YAML value.") from error
    return values


def cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)


def columns(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The keys of all rows in the order in which they first appear."""
    return list(dict.fromkeys(key for row in rows for key in row))


def table(rows: Sequence[Mapping[str, Any]], markdown: bool = False) -> str:
    """Rows as aligned text, or as a Markdown table."""
    names = columns(rows)
    lines = [names, *([cell(row.get(name)) for name in names] for row in rows)]
    if markdown:
        lines = [[text.replace("|", "\\|") for text in line] for line in lines]
        lines.insert(1, ["---"] * len(names))
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def spread(value: float | None, sd: float | None = None) -> str:
    """A mean with its standard deviation, as `0.913 ± 0.004`."""
    return cell(value) if sd is None or value is None else f"{cell(value)} ± {sd:.2g}"


def place(machine: Mapping[str, Any]) -> str:
    """A machine in words."""
    words = [machine.get("gpu"), machine.get("cpu"), f"{machine.get('cores')} cores"]
    return ", ".join(word for word in words if word)
