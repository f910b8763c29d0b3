"""`fetch`: a repository on this machine, each byte compared with what the Hub says it has."""

import glob
import hashlib
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from ..compat import hub_failures, line_failed
from ._content import may_be_pickle
from ._files import FOREIGN, PICKLES, STATE, WEIGHTS, Refused, check_file, leads_out

BLOCK = 1 << 20
ATTEMPTS = 4
PASSING = (429, 500, 502, 503, 504)  # answers that another attempt may turn
LONGEST = 300  # seconds; who is told to wait for longer is told so
_TOKEN = re.compile(r"hf_\w{4,}|(?<=Bearer )\S+")


def fetch(
    repo_id: str,
    revision: str | None = None,
    token: str | bool | None = None,
    allow_patterns: Sequence[str] | None = None,
    ignore_patterns: Sequence[str] = (),
) -> Path:
    """Download a repository into the cache of `huggingface_hub` and check it; returns its folder.

    `huggingface_hub` compares the sizes of files with what was announced; this compares their hashes too, and refuses
    names that lead out of the folder, pickles, and safetensors that are not whole. A damaged file is taken out of the
    cache, so that the next call fetches it again. Pickles, archives and weights of other frameworks are not
    downloaded at all; where there are no others, this is an error.

    Args:
        repo_id (`str`): `user/name`.
        revision (`str`, *optional*): Branch, tag or commit.
        token (`str` or `bool`, *optional*): By default the one that `hf auth login` or `HF_TOKEN` gave.
        allow_patterns, ignore_patterns (`Sequence[str]`, *optional*): A part of the files, as in `huggingface_hub`.

    Raises:
        `Refused`: What is there must not be used, or a later version of hfext wrote it in a form that is unknown here.
        `OSError`: The Hub could not be reached; nothing damaged stays in the cache.
    """
    from ._record import RECORD, read_record

    folder = download(repo_id, revision, token, allow_patterns, ignore_patterns)
    # The cache is shared: what another program downloaded of this revision lies in the same folder.
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        if path.name.lower().endswith(PICKLES) or may_be_pickle(path):
            raise Refused(
                f"{path} is a pickle, which can run code where it is loaded. An earlier download of another program "
                "left it in the cache: delete it and call again."
            )
    if (folder / RECORD).is_file():
        try:
            read_record(folder)
        except ValueError as error:
            raise Refused(f"{repo_id}: {error}") from error
    return folder


def download(
    repo_id: str,
    revision: str | None = None,
    token: str | bool | None = None,
    allow_patterns: Sequence[str] | None = None,
    ignore_patterns: Sequence[str] = (),
) -> Path:
    """As [`fetch`], without a look at what the record says."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.utils import filter_repo_objects

    api = HfApi(token=token)
    info = _reached(repo_id, lambda: api.repo_info(repo_id, revision=revision, files_metadata=True))
    names = [sibling.rfilename for sibling in info.siblings]
    for name in names:
        if leads_out(name):
            raise Refused(f"{repo_id} has a file called {name!r}, which leads out of its folder.")
    pickles = [name for name in names if name.lower().endswith((*PICKLES, *FOREIGN))]
    asked = {"allow_patterns": allow_patterns, "ignore_patterns": [*ignore_patterns, *STATE]}
    weights = [name for name in filter_repo_objects(pickles, **asked) if name.lower().endswith((*WEIGHTS, *FOREIGN))]
    if weights and not any(name.lower().endswith((".safetensors", ".gguf")) for name in names):
        shown = ", ".join(weights[:3])
        raise Refused(
            f"{repo_id} has its weights only as pickles or in forms that are not read here ({shown}): ask its owner "
            "for safetensors."
        )
    left_out = [*map(glob.escape, pickles), *ignore_patterns]
    wanted = {"revision": revision, "token": token, "allow_patterns": allow_patterns, "ignore_patterns": left_out}
    folder = Path(_reached(repo_id, lambda: snapshot_download(repo_id, **wanted)))
    if folder.name != info.sha:  # somebody published in between
        info = _reached(repo_id, lambda: api.repo_info(repo_id, revision=folder.name, files_metadata=True))
    names = [sibling.rfilename for sibling in info.siblings]
    here = set(filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=left_out))
    damaged = []
    for sibling in (sibling for sibling in info.siblings if sibling.rfilename in here):
        path = folder / sibling.rfilename
        with open(path, "rb") as file:
            found = hash_of(file, path.stat().st_size, sibling.lfs is None)
        if found != (sibling.blob_id if sibling.lfs is None else sibling.lfs.sha256):
            damaged.append(path)
    for path in damaged:
        _remove(path)
    if damaged:
        raise Refused(
            f"{', '.join(path.relative_to(folder).as_posix() for path in damaged)} of {repo_id} arrived damaged (the "
            "hash is not the Hub's) and was taken out of the cache: call again."
        )
    for name in sorted(here):
        try:
            check_file(folder / name)
        except Refused:
            _remove(folder / name)
            raise
    return folder


def _reached(repo_id: str, call: Callable[[], Any]) -> Any:
    try:
        return patient(call)
    except hub_failures() as error:
        raise OSError(
            f"{repo_id} could not be fetched: {reason(error)} Nothing damaged stays in the cache."
        ) from error


def patient(call: Callable[[], Any]) -> Any:
    """`call()`, again after a broken line or an answer that says "later", up to `ATTEMPTS` times in all."""
    for attempt in range(ATTEMPTS):
        try:
            return call()
        except hub_failures() as error:
            delay = delay_after(error, attempt)
            if delay is None:
                raise
            time.sleep(delay)


def delay_after(error: BaseException | None, attempt: int) -> float | None:
    """Seconds to wait before the next attempt, `Retry-After` where the Hub names it; None where none would help."""
    if attempt + 1 >= ATTEMPTS:
        return None
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        response = getattr(error, "response", None)
        if response is not None:
            named = response.headers.get("Retry-After", "")
            delay = float(named) if re.fullmatch("[0-9]{1,9}", named) else 2.0**attempt
            return delay if response.status_code in PASSING and delay <= LONGEST else None
        if line_failed(error):
            return 2.0**attempt
        error = error.__cause__ or error.__context__
    return None


def reason(error: BaseException) -> str:
    """What went wrong, in a sentence: the innermost cause. Tokens that an answer repeats are taken out."""
    _hide_tokens(error)
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else 'no reason given'}".rstrip(".") + "."


def _hide_tokens(error: BaseException | None) -> None:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        error.args = tuple(_TOKEN.sub("[token]", x) if isinstance(x, str) else x for x in error.args)
        for name, value in vars(error).items():
            if isinstance(value, str) and _TOKEN.search(value):
                setattr(error, name, _TOKEN.sub("[token]", value))
        error = error.__cause__ or error.__context__


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
