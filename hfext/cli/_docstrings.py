"""Docstrings read for the site: tables of "How to choose", options with their meaning, and text as Markdown."""

import dataclasses
import importlib
import inspect
import itertools
import re
from collections.abc import Iterator
from typing import Any

from .. import registry

_SECTION = re.compile(r"^[A-Z]\w*:$", re.MULTILINE)
_ITEM = re.compile(r"^ {4}(?P<names>\*{0,2}\w+(?:, \*{0,2}\w+)*)(?: \(.*?\))?:(?=\s)", re.MULTILINE)


def module_of(method: registry.Method) -> Any:
    return importlib.import_module(method.target.partition(":")[0])


def target_of(method: registry.Method) -> Any:
    return getattr(module_of(method), method.target.partition(":")[2])


def markdown(text: str) -> str:
    """The text of a docstring as Markdown: what is indented or set in columns stays as it stands, and nothing else is
    markup by accident."""
    lines: list[str] = []
    for kind, group in itertools.groupby(text.splitlines(), _layout):
        block = list(group)
        if kind == "set":
            room = "" if all(line.startswith("    ") for line in block) else "    "
            block = ["", *(room + line for line in block), ""]
        lines += block if kind else [escaped(line) for line in block]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")


def _layout(line: str) -> str:
    """`set` for a line whose spaces mean something, `table`, or nothing for prose."""
    if line.startswith("|"):
        return "table"
    return "set" if line.startswith("    ") or re.search(r"\S {3,}\S", line) else ""


def escaped(text: str) -> str:
    """One line or cell of prose; what stands in backticks stays."""
    text = re.sub(r"\[(`[^`]+`)\](?!\()", r"\1", text)  # a reference to a name, as doc-builder writes it
    parts = re.split(r"(`+[^`]+`+)", text)
    parts[::2] = [re.sub(r"([\\*_\[\]#])", r"\\\1", part.replace("<", "&lt;")) for part in parts[::2]]
    return "".join(parts)


def choices(family: str) -> list[dict[str, str]]:
    """The rows of a family's table "How to choose"; empty where its docstring has none."""
    text = inspect.getdoc(importlib.import_module(f"hfext.{family}")) or ""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    if len(lines) < 3:
        return []
    header, _, *rows = ([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines)
    return [dict(zip(header, row, strict=True)) for row in rows]


def chosen(method: registry.Method) -> list[dict[str, str]]:
    """The rows that name a method: by its name, or by a class or function of its file."""
    return [row for row in choices(method.family) if method.name in map(str, named_in(row, method.family))]


def named_in(row: dict[str, str], family: str) -> Iterator[str]:
    """The methods that a row of the table names."""
    for word in re.findall(r"`([^`]+)`", row["take"]):
        for method in registry.methods(family):
            own = vars(module_of(method)).get(word)
            if word == method.name or getattr(own, "__module__", None) == module_of(method).__name__:
                yield method.name


def arguments(text: str | None) -> dict[str, str]:
    """{name: meaning} of the section `Args:` of a docstring."""
    text = inspect.cleandoc(text or "")
    _, found, rest = text.partition("Args:\n")
    if not found:
        return {}
    end = _SECTION.search(rest)
    rest = rest[: end.start()] if end else rest
    items, meanings = list(_ITEM.finditer(rest)), {}
    for item, stop in zip(items, [*(item.start() for item in items[1:]), len(rest)], strict=False):
        meaning = " ".join(rest[item.end() : stop].split())
        meanings |= {name.strip("* "): meaning for name in item["names"].split(",")}
    return meanings


def options(method: registry.Method) -> list[dict[str, str]]:
    """Name, default and meaning of what can be set: fields of the config, or else the parameters of the target."""
    target = method.config or target_of(method)
    kinds = reversed(inspect.getmro(target)) if inspect.isclass(target) else [target]
    kinds = [kind for kind in kinds if kind.__module__.startswith("hfext")]
    meanings = {name: text for kind in kinds for name, text in arguments(kind.__doc__).items()}
    if dataclasses.is_dataclass(target):
        # What is not shown when a config is printed is no setting.
        found = {field.name: _default_of(field) for field in dataclasses.fields(target) if field.init and field.repr}
    else:
        empty, star = inspect.Parameter.empty, (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        parameters = inspect.signature(target).parameters.values()
        found = {
            p.name: "required" if p.default is empty else _shown(p.default) for p in parameters if p.kind not in star
        }
    return [
        {"option": f"`{name}`", "default": f"`{default}`", "meaning": escaped(meanings.get(name, ""))}
        for name, default in found.items()
    ]


def _default_of(field: dataclasses.Field) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return _shown(field.default_factory())
    return "required" if field.default is dataclasses.MISSING else _shown(field.default)


def _shown(value: Any) -> str:
    """As one types it; an object is named by its class, since its address says nothing."""
    if callable(value):
        return getattr(value, "__name__", type(value).__name__)
    text = "unset" if value is None else repr(value)
    return f"{type(value).__name__}(…)" if " object at 0x" in text else text
