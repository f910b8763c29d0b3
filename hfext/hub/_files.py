"""What of a folder may be published: no links, no pickles, no damaged weights, nothing of a training's state."""

import fnmatch
import json
import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path

# What the Trainer leaves beside a model to go on with: not part of the model, and mostly pickles.
STATE = (
    "training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state*.pth",
    "trainer_state.json", "hfext_state_*.pt", "checkpoint-*/*", "runs/*", "events.out.tfevents*",
    ".git/*", ".cache/*", "*.tmp", "*/__pycache__/*", "__pycache__/*",
)  # fmt: skip
ALWAYS_HOME = ("training_args.bin",)  # a pickle with the token in it, which nothing needs to resume
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz")
INDEX = ".safetensors.index.json"
HEADER_LIMIT = 100_000_000  # of safetensors, as the format has it


class Refused(ValueError):
    """A folder holds what must not be published or loaded."""


def files_of(folder: str | Path, ignore_patterns: Sequence[str] = ()) -> dict[str, Path]:
    """{path in the repository: file} of what is published of a folder; `Refused` where a file may not be.

    Args:
        folder (`str` or `Path`): As `save_pretrained` or `save` leaves it.
        ignore_patterns (`Sequence[str]`, *optional*): More names to leave out, as in `huggingface_hub`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}.")
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if any(fnmatch.fnmatch(name, pattern) for pattern in (*STATE, *ignore_patterns)):
            continue
        if path.is_symlink():
            raise Refused(f"{path} is a link: copy the file that it points to.")
        if path.is_file():
            check_file(path)
            found[name] = path
    if not found:
        raise Refused(f"{folder} has no file to publish.")
    for name, path in found.items():
        missing = [shard for shard in shards_of(path) if shard not in found] if name.endswith(INDEX) else []
        if missing:
            raise Refused(f"{path} names {missing[0]}, which is not there: the artifact is not whole.")
    return found


def check_file(path: Path) -> None:
    """`Refused` for a pickle, whatever it is called, and for safetensors that are not whole."""
    with open(path, "rb") as file:
        start = file.read(16)
    pickled = start[:1] == b"\x80" and len(start) > 1 and 2 <= start[1] <= 5
    if path.suffix.lower() in PICKLES or pickled or _holds_pickle(path, start):
        raise Refused(
            f"{path} is a pickle, which can run code where it is loaded. Save tensors as safetensors and settings as "
            "JSON, or leave it out by ignore_patterns."
        )
    if path.suffix == ".safetensors":
        check_safetensors(path)
    if path.name.endswith(INDEX):
        shards_of(path)


def leads_out(name: str) -> bool:
    """Whether a name in a repository is no path below its folder, on any system."""
    parts = name.replace("\\", "/").split("/")
    return not name or "\\" in name or "\0" in name or ".." in parts or name.startswith("/") or ":" in parts[0]


def shards_of(path: Path) -> list[str]:
    """The files that the index of a checkpoint names; `Refused` when one of them leads out of the folder."""
    try:
        shards = sorted(set(json.loads(path.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Refused(f"{path} is damaged: it cannot be read as an index of weights.") from error
    for shard in shards:
        if not isinstance(shard, str) or leads_out(shard):
            raise Refused(f"{path} names {shard!r}, which leads out of its folder.")
    return shards


def _holds_pickle(path: Path, start: bytes) -> bool:
    if not start.startswith(b"PK\x03\x04"):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith((".pkl", ".pickle")) for name in archive.namelist())
    except zipfile.BadZipFile:
        return False


def check_safetensors(path: Path) -> None:
    """`Refused` unless the header is JSON whose tensors fill the rest of the file, each byte once."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = struct.unpack("<Q", file.read(8))[0] if size >= 8 else HEADER_LIMIT
        if length > min(HEADER_LIMIT, size - 8):
            raise Refused(f"{path} is damaged: it ends before its header does.")
        try:
            header = json.loads(file.read(length))
            spans = sorted(tuple(about["data_offsets"]) for name, about in header.items() if name != "__metadata__")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise Refused(f"{path} is damaged: its header cannot be read ({type(error).__name__}).") from error
    at = 0
    for begin, end in spans:
        if begin != at or end < begin:
            raise Refused(f"{path} is damaged: its tensors overlap or leave gaps.")
        at = end
    if at != size - 8 - length:
        raise Refused(f"{path} is damaged: {at} bytes of tensors are announced and {size - 8 - length} are there.")
