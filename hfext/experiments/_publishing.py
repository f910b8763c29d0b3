"""The end of a story: the card of an artifact, and its push, or the command for it."""

import re
import shutil
from pathlib import Path
from typing import Any

from .. import hub


def check_repo_id(name: str, value: str | None) -> None:
    if value is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", value):
        raise ValueError(f"{name} is {value!r} but must look like 'user/name'.")


def save_card(folder: Path, repo_id: str | None = None) -> None:
    """README.md beside the record of an artifact, with the plots that it shows."""
    card = hub.model_card(folder, repo_id)
    for name, plot in hub.plots_of(hub.read_record(folder)["methods"]).items():
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(plot, folder / name)
    if problems := hub.problems_of(card, folder):
        raise ValueError(f"The card of {folder} is not in order: {'; '.join(problems)}")
    card.save(folder / "README.md")


def publish(folder: Path, repo_id: str | None, private: bool | None = None) -> dict[str, Any]:
    """Push `folder` with its record and card, and say where it is; without `repo_id`, the command that does it."""
    if repo_id is None:
        call = f'import hfext; hfext.push_to_hub("{folder}", "YOUR-NAME/{folder.name}")'
        return {"artifact": folder.name, "to publish it": f"hf auth login && python -c '{call}'"}
    commit = hub.push_to_hub(folder, repo_id, private=private)
    return {"artifact": folder.name, "repository": repo_id, "commit": commit.oid[:12]}
