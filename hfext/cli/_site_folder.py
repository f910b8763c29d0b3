"""The folder of a site: which files of it the site wrote, and its replacement as a whole.

`.hfext-docs` lists every file with its hash. A folder is replaced only if it holds these and nothing else, by renaming
a finished copy beside it: whatever fails, the folder is the old site or the new one.
"""

import contextlib
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Written into a folder that this module made, so that no folder of the user's is ever emptied.
MARK = ".hfext-docs"


def check(folder: Path) -> None:
    """`ValueError` unless a site may be written to a folder: it is absent, empty, or holds an earlier site alone."""
    if folder.is_symlink():
        raise ValueError(f"{folder} is a link: name the folder that it points to.")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is no folder.")
    if not folder.is_dir():
        return
    if Path.cwd().is_relative_to(folder.resolve()):
        raise ValueError(f"{folder} is the working directory or holds it, and would be replaced: call from elsewhere.")
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if not _plain_folder(path)}
    mark = files.pop(MARK, None)
    if files and mark is None:
        raise ValueError(f"{folder} holds files that are not of an earlier site: name an empty folder.")
    written = _manifest(folder / MARK) if mark is not None else {}
    for name, path in sorted(files.items()):
        if path.is_symlink() or written.get(name) != _hash(path):
            what = "was changed since the site was written" if name in written else "is not of an earlier site"
            raise ValueError(f"{path} {what}: move it away, or name an empty folder.")


def mark(made: Path) -> None:
    """Write down what belongs to a site."""
    files = sorted(path for path in made.rglob("*") if path.is_file() and path != made / MARK)
    listed = {path.relative_to(made).as_posix(): _hash(path) for path in files}
    (made / MARK).write_text(json.dumps(listed, indent=0) + "\n", encoding="utf-8")


@contextlib.contextmanager
def replaced(folder: Path) -> Iterator[Path]:
    """A folder to build in; afterwards its content is `folder`, and after an error nothing has changed."""
    check(folder)
    absent = [parent for parent in (folder.absolute(), *folder.absolute().parents) if not parent.exists()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    done = False
    try:
        with tempfile.TemporaryDirectory(prefix=".hfext-docs-", dir=folder.parent) as scratch:
            made, old = Path(scratch, "new"), Path(scratch, "old")
            yield made
            mark(made)
            check(folder)  # the build takes a while
            if folder.is_dir():
                shutil.copymode(folder, made)
                folder.rename(old)
            try:
                made.rename(folder)
            except BaseException:
                if old.is_dir():
                    old.rename(folder)
                raise
            done = True
    finally:
        for parent in [] if done else absent[1:]:
            with contextlib.suppress(OSError):
                parent.rmdir()


def _plain_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _manifest(path: Path) -> dict[str, str]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
