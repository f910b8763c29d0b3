"""Every other page: the start, examples, a table of each family, papers, benchmarks, and the commands."""

import importlib
import importlib.metadata
import inspect
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
import yaml

from .. import recipe, registry
from ._docstrings import choices, escaped, markdown, named_in
from ._output import table
from ._site_method import result_tables

_LABELLED = re.compile(r"(?:^|\n\n)((?:[^\n#`|][^\n]*\n)+)\n```python\n(.*?)```", re.DOTALL)
SHARING = "## Share"


def readme() -> str:
    """The README of the checkout, or the copy that an installed package carries as its description."""
    root = recipe.checkout()
    if root is not None:
        return (root / "README.md").read_text(encoding="utf-8")
    return str(importlib.metadata.metadata("hfext").get_payload())


def labelled_blocks(text: str) -> list[tuple[str, str]]:
    """[(the paragraph before a Python block, the block)] in the order of the text."""
    return [(" ".join(match[1].split()), match[2]) for match in _LABELLED.finditer(text)]


def section(text: str, heading: str) -> str:
    """What stands between a heading of the second level and the next one."""
    return re.split(r"^## ", text.partition(f"{heading}\n")[2], maxsplit=1, flags=re.MULTILINE)[0].strip()


def index(text: str) -> str:
    """What it is, how to install it, and the shortest examples."""
    intro = text.partition("\n\n")[2].partition("\n\n")[0]
    methods = registry.methods()
    families = [family for family in registry.FAMILIES if registry.methods(family)]
    ran = [r["evidence"]["reproduced"] for r in (recipe.read_result(m.name) for m in methods) if r]
    rows = [
        {
            "family": f"[{family}](choose/{family}.md)",
            "what it is": registry.FAMILIES[family],
            "methods": len(registry.methods(family)),
        }
        for family in families
    ]
    parts = [
        "# hfext",
        intro,
        f"{len(methods)} methods from {len({m.arxiv for m in methods if m.arxiv})} papers; the claim of {len(ran)} "
        f"was tried here, and held for {sum(ran)}: see the [paper index](papers.md).",
        table(rows, markdown=True),
        "## Install",
        section(text, "## Install").partition("\n\n")[0],
        "## In five lines",
        "Train, forget, compress, and put the result on the Hub. [The examples](examples.md) are longer, and say what "
        "the names stand for.",
    ]
    for label, code in labelled_blocks(section(text, SHARING))[1:6]:
        parts += [f"### {title_of(label)}", f"```python\n{code}```"]
    return "\n\n".join(parts) + "\n"


def examples(text: str) -> str:
    """The Python blocks of the README, all of them run by its tests, and the stories."""
    parts = ["# Examples", "Each block is run by the test suite."]
    for label, code in labelled_blocks(text.partition("\n## ")[0]):
        parts += [f"## {title_of(label)}", label if len(label) > 60 else "", f"```python\n{code}```"]
    parts += ["## To the Hub in five lines"]
    for label, code in labelled_blocks(section(text, SHARING)):
        long = label if len(label) > 60 else ""
        parts += [f"### {title_of(label)}", long, f"```python\n{code}```"]
    parts += ["## Whole stories", "Recipes that run without a network and end with a table and an artifact."]
    for path in sorted((recipe.recipes_dir() / "stories").glob("*.yaml")):
        parts += [f"### {path.stem.replace('_', ' ').replace('-', ' ')}", escaped(" ".join(head_of(path).split()))]
        parts += [f"```bash\nhfext run stories/{path.stem}\n```"]
    return "\n\n".join(part for part in parts if part) + "\n"


def title_of(label: str) -> str:
    return re.split(r"[,:]", label)[0]


def head_of(path: Path) -> str:
    """The comment at the head of a recipe."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
    return "\n".join(line[1:].strip() for line in lines)


def choose(family: str) -> str:
    """The docstring of a family, its table with links, and all of its methods."""
    text = inspect.getdoc(importlib.import_module(f"hfext.{family}")) or ""
    lines = [line for line in text.splitlines() if not line.startswith("|")]
    heading, _, rest = "\n".join(lines).partition("\n")
    rest = re.sub(r"^How to choose( \((.*)\))?:$", lambda m: m[2] or "", rest, flags=re.MULTILINE)
    rows = [
        {key: _linked(text, row, family) if key == "take" else text for key, text in row.items()}
        for row in choices(family)
    ]
    listed = [
        {
            "method": f"[{m.name}](../methods/{family}/{m.name}.md)",
            "what it does": escaped(m.summary),
            "status": m.status,
            "claim reproduced": reproduced(m.name),
        }
        for m in registry.methods(family)
    ]
    parts = [f"# How to choose: {family}", escaped(heading), _table(rows) if rows else "", markdown(rest).strip()]
    parts += ["## All methods", table(listed, markdown=True)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(rows: list[dict[str, str]]) -> str:
    """Cells are Markdown already, also their escaped bars."""
    return table(rows, markdown=True).replace("\\\\|", "\\|")


def _linked(text: str, row: dict[str, str], family: str) -> str:
    def link(match: re.Match) -> str:
        named = next(named_in({"take": match[0]}, family), "")
        return f"[{match[0]}](../methods/{family}/{named}.md)" if named else match[0]

    return re.sub(r"`[^`]+`", link, text)


def reproduced(name: str) -> str:
    evidence = (recipe.read_result(name) or {}).get("evidence")
    return ("yes" if evidence["reproduced"] else "no") if evidence else "not run"


def papers() -> str:
    """One row a paper, the newest first; methods of one paper share it."""
    found: dict[str, list[registry.Method]] = {}
    for method in registry.methods():
        found.setdefault(method.arxiv or f"- {method.name}", []).append(method)
    rows = []
    for arxiv, methods in sorted(found.items(), key=lambda item: (-item[1][0].year, item[1][0].title.lower())):
        links = [f"[{m.name}](methods/{m.family}/{m.name}.md)" for m in methods]
        rows.append(
            {
                "year": methods[0].year,
                "paper": escaped(methods[0].title),
                "arXiv": f"[{arxiv}](https://arxiv.org/abs/{arxiv})" if methods[0].arxiv else "-",
                "method": ", ".join(links),
                "status": ", ".join(dict.fromkeys(m.status for m in methods)),
                "claim reproduced": ", ".join(dict.fromkeys(reproduced(m.name) for m in methods)),
            }
        )
    intro = (
        "`faithful` follows the paper; of a `variant` and of what is `abstract-only` the method's page says what "
        "differs. A claim is tried in a small setting, with the baseline in the same run: a `no` speaks of "
        "that setting."
    )
    return f"# Paper index\n\n{intro}\n\n{table(rows, markdown=True)}\n"


def benchmarks() -> str:
    """The results that belong to no single method."""
    names = {method.name for method in registry.methods()}
    parts = ["# Benchmarks", "What `hfext bench NAME` wrote, table by table. Machine and versions are in the files."]
    for path in sorted((recipe.recipes_dir() / "results").glob("*.json")):
        if path.stem in names:
            continue
        tables = list(result_tables(yaml.safe_load(path.read_text(encoding="utf-8"))))
        plots = [f"![{plot.stem}](plots/{plot.name})" for plot in sorted(path.parent.glob(f"{path.stem}-*.png"))]
        if tables or plots:
            parts += [f"## {path.stem.removeprefix('bench-')}", *tables, *plots]
    return "\n\n".join(parts) + "\n"


def commands(group: Any) -> str:
    """`hfext COMMAND --help` of every command."""
    parts = ["# Command line", escaped(group.help or "")]
    for name, command in group.commands.items():
        context = typer.Context(command, info_name=name, parent=typer.Context(group, info_name="hfext"))
        names = [argument.metavar or argument.name.upper() for argument in command.params if _is_argument(argument)]
        pieces = " ".join(["[OPTIONS]", *names])
        parts += [f"## hfext {name}", escaped(inspect.cleandoc(command.help or "")), f"    hfext {name} {pieces}"]
        rows = list(_parameters(command, context))
        parts += [table(rows, markdown=True)] if rows else []
    return "\n\n".join(parts) + "\n"


def _parameters(command: Any, context: typer.Context) -> Iterator[dict[str, Any]]:
    for parameter in command.get_params(context):
        names = [parameter.metavar or parameter.name.upper()] if _is_argument(parameter) else parameter.opts
        default = parameter.default
        yield {
            "parameter": ", ".join(f"`{name}`" for name in names),
            "meaning": escaped(parameter.help or ""),
            "default": f"`{default}`" if isinstance(default, str | int | float) and default is not False else "",
        }


def _is_argument(parameter: Any) -> bool:
    return parameter.param_type_name == "argument"
