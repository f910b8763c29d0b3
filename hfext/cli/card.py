"""`hfext card PATH`: write the model card of a saved artifact, and check it as the Hub does, without a line."""

import shutil
from pathlib import Path
from typing import Annotated

import typer

from .. import hub, recipe
from ._output import WRONG_INPUT, user_errors


def card(
    path: Annotated[Path, typer.Argument(help="A folder with an hfext.json, or of a kernel or custom_generate.")],
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; look at the README.md that is there.")
    ] = False,
) -> None:
    """Write README.md into an artifact's folder from its record and the method records; exit status 1 when it or its
    pictures are not in order."""
    from huggingface_hub import ModelCard

    with user_errors(*WRONG_INPUT):
        source = path.is_dir() and hub.kind_of(path) in ("kernel", "custom_generate")
        record = {"methods": []} if source and not (path / hub.RECORD).is_file() else hub.read_record(path)
        made = ModelCard.load(path / "README.md") if check else hub.model_card(path)
    pictures = {} if check else hub.plots_of(record["methods"])
    problems = hub.problems_of(made)
    if not check and not problems:
        for name, plot in pictures.items():
            (path / name).parent.mkdir(exist_ok=True)
            if not (path / name).is_file():
                shutil.copyfile(plot, path / name)
        recipe.write_text(path / "README.md", str(made))
    for problem in problems or hub.problems_of(made, path):
        typer.echo(f"hfext: {path / 'README.md'}: {problem}", err=True)
        raise typer.Exit(1)
    typer.echo(f"{path / 'README.md'}")
