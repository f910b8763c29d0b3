"""Where the data of others lies, which is neither shipped nor downloaded."""

import os
from pathlib import Path

from .. import recipe


def shared_data(name: str, folder: str | Path | None = None) -> Path | None:
    """`name` in `folder`, else in the environment's `HFEXT_DATA`, else in `shared/data` beside the checkout.

    `None` when it is in none of them; `FileNotFoundError` when a `folder` was given that lacks it.
    """
    root = recipe.checkout()
    places = [folder] if folder is not None else [os.environ.get("HFEXT_DATA"), root and root.parent / "shared/data"]
    found = next((path for place in places if place and (path := Path(place, name)).exists()), None)
    if found is None and folder is not None:
        raise FileNotFoundError(f"data_dir is {folder} but holds no {name}.")
    return found


def wikitext2(folder: str | Path | None = None) -> Path:
    """The folder of WikiText-2, or a `FileNotFoundError` that says what to set."""
    found = shared_data("wikitext2", folder)
    if found is None:
        raise FileNotFoundError("This needs WikiText-2: set data_dir to a folder that holds wikitext2/test.txt.")
    return found
