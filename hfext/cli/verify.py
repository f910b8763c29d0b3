"""`hfext verify NAME`: the small reproduction of a paper's claim, with the paper's number beside ours."""

import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import recipe, registry
from ._output import method as find
from ._output import place, spread
from .run import OutputDir, echo_tables, execute


def verify(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="A name from `hfext list`.")],
    output_dir: OutputDir = None,
    save: Annotated[
        bool, typer.Option(help="In a checkout and without other options, write recipes/results/NAME.json.")
    ] = True,
) -> None:
    """Run the reproduction of a method's claim; exit status 1 when it does not reproduce."""
    method = find(name)
    if method.recipe is None:
        typer.echo(f"hfext: {name} has no recipe to verify. {method.notes}".rstrip(), err=True)
        raise typer.Exit(2)
    out = output_dir or Path("out") / "verify" / name
    record = execute(f"recipes/{method.recipe}", context.args, out)
    evidence = record.get("evidence")
    if not evidence:
        typer.echo(f"hfext: the recipe {method.recipe} returned no evidence.", err=True)
        raise typer.Exit(1)
    echo_tables(record)
    typer.echo("")
    for label, text in _lines(method, evidence, record):
        typer.echo(f"{label + ':':<12}{text}")
    if save and (context.args or record.get("partial")):
        typer.echo("not saved:  the committed result is that of the recipe as it stands, with all its data")
    elif save:
        save_result(name, record, out)
    raise typer.Exit(0 if evidence["reproduced"] else 1)


def save_result(name: str, record: dict[str, Any], out: Path) -> None:
    """Keep a record and its plots in `recipes/results/`, where README and cards read them; only in a checkout."""
    root = recipe.checkout()
    if root is None:
        return
    results = root / "recipes" / "results"
    results.mkdir(exist_ok=True)
    for plot in (out / artifact for artifact in record.get("artifacts", []) if artifact.endswith(".png")):
        partial = results / f".{name}-{plot.name}.tmp"
        shutil.copyfile(plot, partial)
        partial.replace(results / f"{name}-{plot.name}")
    recipe.write_json(results / f"{name}.json", record)
    typer.echo(f"saved:      recipes/results/{name}.json")


def _lines(method: registry.Method, evidence: dict[str, Any], record: dict[str, Any]) -> list[tuple[str, str]]:
    repeats = f" (mean ± sd of {evidence['n']})" if evidence.get("n", 1) > 1 else ""
    lines = [
        ("method", f"{method.name}: {method.title}" + (f" (arXiv {method.arxiv})" if method.arxiv else "")),
        ("claim", evidence["claim"]),
        ("paper", evidence["paper"]),
        ("setting", evidence["setting"]),
        ("metric", evidence["metric"]),
        ("ours", spread(evidence["ours"], evidence.get("ours_sd")) + repeats),
        ("baseline", f"{evidence['baseline_name']} {spread(evidence['baseline'], evidence.get('baseline_sd'))}"),
        ("reproduced", "yes" if evidence["reproduced"] else "no"),
        ("note", evidence.get("note", "")),
        ("time", f"{record['seconds']:.0f} s on {place(record['machine'])}"),
    ]
    return [(label, text) for label, text in lines if text]
