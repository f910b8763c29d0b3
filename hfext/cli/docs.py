"""`hfext docs`: the generated parts of the README, and the site, from the method records and the recorded results."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import recipe, registry
from ._output import place, spread, table, user_errors
from ._site import build

# Longer tables stay in the JSON file, so that the README remains short.
MOST_ROWS = 10
SITE = Path("build", "docs")


def docs(
    context: typer.Context,
    check: Annotated[bool, typer.Option(help="Write nothing; exit status 1 when the README is stale.")] = False,
    site: Annotated[bool, typer.Option("--site", help="Write the whole documentation as a static site.")] = False,
    folder: Annotated[Path | None, typer.Argument(help="Where the site goes; build/docs by default.")] = None,
) -> None:
    """Regenerate the method table and the results of the README, or write the site."""
    with user_errors(ImportError, ValueError, OSError):
        if site and check:
            raise ValueError("--check looks at the README and --site writes the site: take one of them.")
        if folder is not None and not site:
            raise ValueError(f"{folder} is named but only --site writes to a folder.")
        if site:
            folder = folder or SITE
            typer.echo(f"{build(folder, context.find_root().command)} pages: open {folder / 'index.html'}.")
            return
    root = recipe.checkout()
    if root is None:
        typer.echo("hfext: the README is generated in a checkout; this is an installed package.", err=True)
        raise typer.Exit(2)
    path = root / "README.md"
    old = path.read_text(encoding="utf-8")
    new = render(old, root / "recipes" / "results")
    if new == old:
        typer.echo("README.md is up to date.")
    elif check:
        typer.echo("hfext: README.md is stale; run `hfext docs`.", err=True)
        raise typer.Exit(1)
    else:
        recipe.write_text(path, new)
        typer.echo("README.md was rewritten.")


def render(text: str, results: Path) -> str:
    """`text` with everything between the markers `<!-- NAME:begin -->` and `<!-- NAME:end -->` made anew."""
    parts: dict[str, Callable[[Path], str]] = {
        "methods": _methods,
        "results": _results,
        "unlearning": _unlearning,
    }
    for name, part in parts.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
            raise ValueError(f"README.md needs {begin} and, after it, {end}, once each.")
        before, _, rest = text.partition(begin)
        after = rest.partition(end)[2]
        text = f"{before}{begin}\n{part(results)}\n{end}{after}"
    return text


def _methods(results: Path) -> str:
    rows = []
    for method in registry.methods():
        evidence = _read(results / f"{method.name}.json").get("evidence")
        link = f"[{method.arxiv}](https://arxiv.org/abs/{method.arxiv})" if method.arxiv else "-"
        rows.append(
            {
                "method": f"`{method.name}`",
                "family": method.family,
                "paper": link,
                "what it does": method.summary,
                "status": method.status,
                "reproduced": evidence["reproduced"] if evidence else "not run",
            }
        )
    return table(rows, markdown=True) if rows else "No method yet."


def _results(results: Path) -> str:
    names = [method.name for method in registry.methods()]
    others = [path.stem for path in sorted(results.glob("*.json")) if path.stem not in names]
    records = [(name, _read(results / f"{name}.json")) for name in [*names, *others]]
    # A benchmark's evidence repeats what the check of a method says.
    rows = [_evidence(name, r) for name, r in records if r.get("evidence") and not name.startswith("bench-")]
    blocks = [table(rows, markdown=True)] if rows else []
    for record in (record for name, record in records if name in others):
        blocks += [_folded(title, rows) for title, rows in record.get("tables", {}).items() if len(rows) <= MOST_ROWS]
    places = dict.fromkeys(place(r["machine"]) for r in (r for _, r in records) if "machine" in r)
    if places:
        blocks.append(f"Measured on {'; '.join(places)}. Versions, seeds and times are in `recipes/results/`.")
    return "\n\n".join(blocks) or "No results yet."


def _unlearning(results: Path) -> str:
    """The comparison of objectives: its first table, forgetting, utility, privacy and relearning together."""
    tables = _read(results / "ngdiff.json").get("tables", {})
    return next((table(rows, markdown=True) for rows in tables.values()), "Not run yet.")


def _evidence(name: str, record: dict[str, Any]) -> dict[str, Any]:
    evidence = record["evidence"]
    return {
        "check": f"`{name}`",
        "claim checked": evidence["claim"],
        "paper": evidence["paper"],
        "here": f"{evidence['metric']}, {evidence['setting']}",
        "ours": spread(evidence["ours"], evidence.get("ours_sd")),
        "baseline": f"{evidence['baseline_name']} {spread(evidence['baseline'], evidence.get('baseline_sd'))}",
        "reproduced": evidence["reproduced"],
    }


def _folded(title: str, rows: list[dict[str, Any]]) -> str:
    return f"<details><summary>{title}</summary>\n\n{table(rows, markdown=True)}\n\n</details>"


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
