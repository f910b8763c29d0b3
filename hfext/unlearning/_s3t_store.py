"""The folder of an S3T ensemble: `s3t.json`, `initial.safetensors`, and a file for every trained stage.

    shard1/2-0-1.safetensors     of shard 1: the layers trained third, after slices 2, 0 and 1

A file appears whole (it is written beside and renamed). The record of a deletion is written before files are removed,
and `sweep` removes what an interruption left. Of each row that was not deleted the record has a salted digest.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Mapping, Sized
from pathlib import Path
from typing import Any

from torch import Tensor

from ._s3t_rows import row_digests
from ._s3t_sequences import Slices

STATE, INITIAL = "s3t.json", "initial.safetensors"


def stage_seed(seed: int, shard: int, prefix: Slices) -> int:
    """A function of these alone, so that a stage does not depend on what was trained before it."""
    text = json.dumps([seed, shard, list(prefix)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


def _whole(path: Path, write: Callable[[Path], Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


class StageFolder:
    """Stages of a folder by shard and prefix."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def file(self, shard: int, prefix: Slices) -> Path:
        return self.path / f"shard{shard}" / f"{'-'.join(map(str, prefix))}.safetensors"

    def has(self, shard: int, prefix: Slices) -> bool:
        return self.file(shard, prefix).is_file()

    def write(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        from safetensors.torch import save_file

        kept = {name: x.detach().cpu().contiguous().clone() for name, x in tensors.items()}
        _whole(path, lambda partial: save_file(kept, partial))

    def read(self, path: Path) -> dict[str, Tensor]:
        from safetensors.torch import load_file

        return load_file(path)

    def sweep(self, shard: int, dirty: set[int]) -> list[str]:
        """Remove the stages of a shard that saw a dirty slice, and unfinished files; their names."""
        removed = []
        for path in sorted((self.path / f"shard{shard}").glob("*")):
            unfinished = path.suffix != ".safetensors"
            if unfinished or dirty.intersection(map(int, path.stem.split("-"))):
                path.unlink()
                if not unfinished:
                    removed.append(path.relative_to(self.path).as_posix())
        return removed

    def state(self) -> dict[str, Any] | None:
        path = self.path / STATE
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def write_state(self, state: Mapping[str, Any]) -> None:
        _whole(self.path / STATE, lambda partial: partial.write_text(json.dumps(state), encoding="utf-8"))

    def check(self, state: Mapping[str, Any], asked: Mapping[str, Any], names: Collection[str], rows: Sized | None):
        """Raise where the record, the initial weights or the rows are of another run than this one."""
        for name, value in asked.items():
            if state.get(name) != value:
                raise ValueError(f"{self.path / STATE} has {name} {state.get(name)} but this run {value}.")
        made_of = sum(len(part) for shard in state["rows"] for part in shard)
        if rows is not None and len(rows) != made_of:
            raise ValueError(
                f"{self.path} was made of {made_of} rows, train_dataset has {len(rows)}. Rows keep their "
                "numbers: leave something in the place of a deleted one."
            )
        if rows is not None:
            gone = [i for i, known in enumerate(state["row_digests"]) if known is None]
            now = row_digests(rows, state["salt"], gone)
            wrong = [i for i, (a, b) in enumerate(zip(now, state["row_digests"], strict=True)) if a != b]
            if wrong:
                raise ValueError(
                    f"{self.path} was made of other rows, or of these in another order: {len(wrong)} differ, the "
                    f"first is row {wrong[0]}. Deletion by number would take back the wrong ones."
                )
        if self.read(self.path / INITIAL).keys() != set(names):
            raise ValueError(f"{self.path} holds adapters of other modules than peft_config targets.")

    def copy_to(self, folder: Path, keep: list[Path]) -> None:
        """The initial weights and the files `keep`, then the record, which makes the copy valid."""
        if folder.resolve() == self.path.resolve():
            return
        if (folder / STATE).exists():
            raise ValueError(f"{folder} holds an S3T ensemble already: choose an empty folder.")
        for path in (self.path / INITIAL, *keep, self.path / STATE):
            target = folder / path.relative_to(self.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
