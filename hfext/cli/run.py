"""`hfext run RECIPE`: run a recipe and say what came out."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .. import recipe
from ._output import MISSING, WRONG_INPUT, overrides, table, user_errors

OutputDir = Annotated[
    Path | None, typer.Option("--output_dir", "--output-dir", help="Where results go; a folder in out/ by default.")
]


def run(
    context: typer.Context,
    path: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A YAML file, or a shipped recipe such as optim/sam-mlp-digits.")
    ],
    output_dir: OutputDir = None,
) -> None:
    """Run a recipe. Any field of its config is a flag: --field value.

    Exit status 1 when a table has a row whose column `met` is false.
    """
    record = execute(path, context.args, output_dir)
    out = output_dir or Path("out") / record["name"]
    echo_tables(record)
    typer.echo(f"\n{record['seconds']:.0f} s. Results and the resolved config are in {out}.")
    for name in record.get("artifacts", []):
        artifact = out / name
        typer.echo(f"  {artifact}")
        if (artifact / "hfext.json").is_file():
            typer.echo(f"  to publish it: hf upload YOUR-NAME/{artifact.name} {artifact}")
    raise typer.Exit(1 if missed(record) else 0)


def missed(record: dict[str, Any]) -> bool:
    """Whether a row of a table says that it did not meet its bar."""
    return any(row.get("met") is False for rows in record.get("tables", {}).values() for row in rows)


def execute(path: str, arguments: list[str], out: Path | None) -> dict[str, Any]:
    """Check the recipe and its flags, then run it; what the user can mend ends with one line and status 2."""
    with user_errors(*WRONG_INPUT):
        values = overrides(arguments)
        recipe.load(path, values)
    with user_errors(*MISSING):
        return recipe.execute(path, values, out)


def echo_tables(record: dict[str, Any]) -> None:
    for title, rows in record.get("tables", {}).items():
        typer.echo(f"\n{title}\n{table(rows)}")
