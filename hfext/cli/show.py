"""`hfext show NAME`: everything the record, the config and the recorded result say about one method."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from .. import recipe, registry
from ._output import method as find
from ._output import spread


def show(name: Annotated[str, typer.Argument(help="A name from `hfext list`.")]) -> None:
    """Show title, status, usage, options, files, and the paper's number beside ours."""
    method = find(name)
    for label, text in _facts(method):
        typer.echo(f"{label + ':':<13}{text}")


def _facts(method: registry.Method) -> Iterator[tuple[str, str]]:
    yield "method", f"{method.name} ({method.family}: {registry.FAMILIES[method.family]})"
    yield "title", method.title
    yield (
        "paper",
        " ".join(filter(None, [method.authors, f"({method.year})", method.arxiv and f"arXiv {method.arxiv}"])),
    )
    yield "status", f"{method.status}: {method.difference}" if method.difference else method.status
    yield "summary", method.summary
    yield "usage", method.usage
    if method.config is not None:
        yield "options", ", ".join(f"{field.name}={_default(field)}" for field in dataclasses.fields(method.config))
    module = method.target.partition(":")[0]
    path = Path(*module.split(".")).with_suffix(".py")
    yield "file", path.as_posix()
    yield "tests", (Path("tests", *path.parts[1:-1]) / f"test_{path.name}").as_posix()
    yield "recipe", f"recipes/{method.recipe}" if method.recipe else "none"
    if method.claim:
        yield "claim", method.claim
    if method.headline is not None:
        number = method.headline
        against = f" against {number.baseline}" if number.baseline else ""
        yield "paper's", f"{number.metric} {number.value}{against}, {number.setting}"
    yield "ours", _ours(method.name)
    if method.notes:
        yield "notes", method.notes


def _default(field: dataclasses.Field) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return repr(field.default_factory())
    return "required" if field.default is dataclasses.MISSING else repr(field.default)


def _ours(name: str) -> str:
    evidence = (recipe.read_result(name) or {}).get("evidence")
    if not evidence:
        return "no result recorded"
    ours = f"{evidence['metric']} {spread(evidence['ours'], evidence.get('ours_sd'))}"
    baseline = f"{evidence['baseline_name']} {spread(evidence['baseline'], evidence.get('baseline_sd'))}"
    reproduced = "yes" if evidence["reproduced"] else "no"
    return f"{ours} against {baseline}, {evidence['setting']} (reproduced: {reproduced})"
