"""`hfext card PATH`: write the model card of a saved artifact."""

from pathlib import Path
from typing import Annotated

import typer

from .. import hub, recipe
from ._output import WRONG_INPUT, user_errors


def card(path: Annotated[Path, typer.Argument(help="A folder with an hfext.json.")]) -> None:
    """Write README.md into an artifact's folder from its record and the method records."""
    with user_errors(*WRONG_INPUT):
        hub.read_record(path)
        text = str(hub.model_card(path))
    recipe.write_text(path / "README.md", text)
    typer.echo(f"{path / 'README.md'}")
