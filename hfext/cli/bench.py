"""`hfext bench NAME`: a measurement of speed, memory or exactness against its bar."""

from pathlib import Path
from typing import Annotated

import typer

from ._output import place
from .run import OutputDir, echo_tables, execute, missed
from .verify import save_result


def bench(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="A recipe of recipes/bench.")],
    output_dir: OutputDir = None,
    save: Annotated[
        bool, typer.Option(help="In a checkout and without other options, write recipes/results/bench-NAME.json.")
    ] = True,
) -> None:
    """Run a benchmark; exit status 1 when a table has a row whose column `met` is false."""
    out = output_dir or Path("out") / "bench" / name
    record = execute(f"recipes/bench/{name}", context.args, out)
    echo_tables(record)
    typer.echo(f"\n{record['seconds']:.0f} s on {place(record['machine'])}")
    if save and context.args:
        typer.echo("not saved:  the committed result is that of the recipe as it stands")
    elif save:
        save_result(f"bench-{name}", record, out)
    raise typer.Exit(1 if missed(record) else 0)
