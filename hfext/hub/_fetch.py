"""`fetch`: a repository on this machine, each byte compared with what the Hub says it has."""

import hashlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from ..compat import hub_failures
from ._files import PICKLES, Refused, check_file

BLOCK = 1 << 20


def fetch(repo_id: str, revision: str | None = None, token: str | bool | None = None) -> Path:
    """Download a repository into the cache of `huggingface_hub` and check it; returns its folder.

    `huggingface_hub` compares the sizes of files with what was announced; this compares their hashes too, and refuses
    names that lead out of the folder, pickles, and safetensors that are not whole. A damaged file is taken out of the
    cache, so that the next call fetches it again. Pickles are not downloaded at all.

    Raises:
        `Refused`: What is there must not be used.
        `OSError`: The Hub could not be reached; nothing damaged stays in the cache.
    """
    from huggingface_hub import HfApi, snapshot_download

    api = HfApi(token=token)
    info = _reached(repo_id, lambda: api.repo_info(repo_id, revision=revision, files_metadata=True))
    names = [sibling.rfilename for sibling in info.siblings]
    for name in names:
        parts = PurePosixPath(name).parts
        if name.startswith("/") or "\\" in name or ".." in parts or not parts:
            raise Refused(f"{repo_id} has a file called {name!r}, which leads out of its folder.")
    pickles = [name for name in names if name.lower().endswith(PICKLES)]
    download = {"revision": revision, "token": token, "ignore_patterns": pickles or None}
    folder = Path(_reached(repo_id, lambda: snapshot_download(repo_id, **download)))
    if folder.name != info.sha:  # somebody published in between
        info = _reached(repo_id, lambda: api.repo_info(repo_id, revision=folder.name, files_metadata=True))
    for sibling in info.siblings:
        path = folder / sibling.rfilename
        if sibling.rfilename in pickles:
            continue
        with open(path, "rb") as file:
            same = hash_of(file, path.stat().st_size, sibling.lfs is None) == (
                sibling.blob_id if sibling.lfs is None else sibling.lfs.sha256
            )
        if not same:
            _remove(path)
            raise Refused(
                f"{sibling.rfilename} of {repo_id} arrived damaged (its hash is not the Hub's) and was taken out of "
                "the cache: call again."
            )
        try:
            check_file(path)
        except Refused:
            _remove(path)
            raise
    return folder


def _reached(repo_id: str, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except hub_failures() as error:
        raise OSError(
            f"{repo_id} could not be fetched: {reason(error)} Nothing damaged stays in the cache."
        ) from error


def reason(error: BaseException) -> str:
    """What went wrong, in a sentence: the innermost cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else 'no reason given'}".rstrip(".") + "."


def hash_of(file: BinaryIO, size: int, git: bool) -> str:
    """sha256 of a file of `size` bytes, or git's name of it."""
    found = hashlib.sha1(b"blob %d\0" % size) if git else hashlib.sha256()
    while block := file.read(BLOCK):
        found.update(block)
    return found.hexdigest()


def _remove(path: Path) -> None:
    """The name in the snapshot and the blob behind it."""
    blob = path.resolve()
    path.unlink()
    blob.unlink(missing_ok=True)
