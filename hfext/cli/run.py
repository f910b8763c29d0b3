"""`hfext run RECIPE`: run a recipe and say what came out."""

import dataclasses
import inspect
import itertools
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
        str | None,
        typer.Argument(metavar="RECIPE", help="A YAML file, or a shipped recipe such as optim/sam-mlp-digits."),
    ] = None,
    output_dir: OutputDir = None,
    help_: Annotated[
        bool, typer.Option("--help", help="Show this message, or a recipe's purpose and fields.")
    ] = False,
) -> None:
    """Run a recipe. Any field of its config is a flag: --field value; `hfext run RECIPE --help` lists them.

    Exit status 1 when a table has a row whose column `met` is false.
    """
    if path is None:
        typer.echo(context.get_help())
        raise typer.Exit(0 if help_ else 2)
    if help_:
        describe(path)
        return
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


def describe(path: str) -> None:
    """Print the comment at the head of a recipe, and the fields of its config with their values in it."""
    with user_errors(*WRONG_INPUT):
        file = recipe.find(path)
        _, config = recipe.load(path)
    lines = file.read_text(encoding="utf-8").splitlines()
    typer.echo("\n".join(line[1:].strip() for line in itertools.takewhile(lambda x: x.startswith("#"), lines)) + "\n")
    about = inspect.getdoc(type(config)) or ""
    typer.echo(about.partition("Args:")[2].strip("\n") + "\n")
    typer.echo("\n".join(f"--{name} {value}" for name, value in dataclasses.asdict(config).items()))


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
