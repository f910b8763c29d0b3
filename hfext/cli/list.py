"""`hfext list`: the methods, by family or by paper."""

import json
from typing import Annotated

import typer

from .. import registry
from ._output import table, user_errors


def list_methods(
    family: Annotated[str | None, typer.Option(help="Only this family.")] = None,
    arxiv: Annotated[str | None, typer.Option(help="Only the paper with this arXiv id.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole records as JSON.")] = False,
) -> None:
    """List the methods with paper and status."""
    with user_errors(KeyError):
        found = registry.methods(family, arxiv)
    if arxiv and not found:
        ids = [method.arxiv for method in registry.methods() if method.arxiv]
        typer.echo(f"hfext: No method is from arXiv {arxiv}. {registry.suggest(arxiv, ids)}", err=True)
        raise typer.Exit(2)
    if as_json:
        typer.echo(json.dumps([method.to_dict() for method in found], indent=2, ensure_ascii=False))
    elif found:
        typer.echo(table([_row(method) for method in found]))


def _row(method: registry.Method) -> dict[str, str]:
    return {
        "method": method.name,
        "family": method.family,
        "arxiv": method.arxiv or "-",
        "status": method.status,
        "what it does": method.summary,
    }
