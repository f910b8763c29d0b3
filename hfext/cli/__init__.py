"""The command `hfext`: one file per command, each reading the method records and the recipes."""

import typer

from .bench import bench
from .card import card
from .docs import docs
from .doctor import doctor
from .list import list_methods
from .run import run
from .show import show
from .verify import verify

app = typer.Typer(
    name="hfext",
    help="Recent research methods for Hugging Face, each checked against its paper.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# `run`, `verify` and `bench` take the fields of the recipe's config as flags, which Typer cannot know beforehand.
_FREE = {"allow_extra_args": True, "ignore_unknown_options": True}

app.command("list")(list_methods)
app.command("show")(show)
app.command("run", context_settings=_FREE, add_help_option=False)(run)
app.command("verify", context_settings=_FREE)(verify)
app.command("bench", context_settings=_FREE)(bench)
app.command("doctor")(doctor)
app.command("card")(card)
app.command("docs")(docs)
