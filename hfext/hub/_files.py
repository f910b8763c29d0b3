"""What of a folder may be published: no links, no pickles, no damaged weights, nothing of a training's state."""

import fnmatch
import json
import math
import re
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ._content import why_not

# What the Trainer leaves beside a model to go on with: not part of the model, and mostly pickles.
STATE = (
    "training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state*.pth",
    "trainer_state.json", "hfext_state_*.pt", "checkpoint-*/*", "runs/*", "events.out.tfevents*",
    ".git/*", ".cache/*", "*.tmp", "*/__pycache__/*", "__pycache__/*",
)  # fmt: skip
ALWAYS_HOME = ("training_args.bin",)  # a pickle with the token in it, which nothing needs to resume
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz")
WEIGHTS = (".bin", ".pt", ".pth", ".ckpt")
FOREIGN = (".h5", ".hdf5", ".keras", ".msgpack", ".onnx", ".onnx_data", ".ot", ".tflite", ".pb")  # other frameworks'
PRIVATE = (
    ".env", ".env.*", ".netrc", "_netrc", "token", "token.txt", "hf_token*", ".hf_token*", "stored_tokens",
    ".git-credentials", ".pypirc", ".npmrc", "id_rsa", "id_ed25519", "id_ecdsa", "*.pem",
)  # fmt: skip
_TOKEN = re.compile(rb"(?<![A-Za-z0-9])hf_[A-Za-z0-9]{30,}")
INDEX = ".safetensors.index.json"
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
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
            if leads_out(name):
                raise Refused(f"{str(path)!r} is a name that leads out of a folder on some system: rename it.")
            _check_private(path)
            check_file(path)
            found[name] = path
    if not found:
        raise Refused(f"{folder} has no file to publish.")
    for name, path in found.items():
        missing = [shard for shard in shards_of(path) if shard not in found] if name.endswith(INDEX) else []
        if missing:
            raise Refused(f"{path} names {missing[0]}, which is not there: the artifact is not whole.")
    return found


def _check_private(path: Path) -> None:
    """`Refused` for files that hold passwords by their name, and for small ones in which a token of the Hub stands."""
    if any(fnmatch.fnmatch(path.name.lower(), name) for name in PRIVATE):
        raise Refused(f"{path} is a file for passwords and tokens: leave it out by ignore_patterns.")
    if path.stat().st_size <= 1 << 20 and _TOKEN.search(path.read_bytes()):
        raise Refused(f"{path} holds what looks like a token of the Hub: take it out, it would be published.")


def check_file(path: Path) -> None:
    """`Refused` for a pickle and what may hold one, whatever it is called, and for safetensors that are not whole."""
    why = (
        "is a pickle, which can run code where it is loaded" if path.name.lower().endswith(PICKLES) else why_not(path)
    )
    if why is not None:
        raise Refused(
            f"{path} {why}. Save tensors as safetensors and settings as JSON, or leave it out by ignore_patterns."
        )
    if path.suffix.lower() == ".safetensors":
        check_safetensors(path)
    if path.name.endswith(INDEX):
        shards_of(path)


def json_of(path: Path) -> Any:
    """The JSON of a file; `ValueError` for everything that is none, also for one nested too deeply to be read."""
    try:
        return json.loads(path.read_bytes())
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply.") from None


def leads_out(name: str) -> bool:
    """Whether a name in a repository is no path below its folder, on any system."""
    parts = name.replace("\\", "/").split("/")
    return not name or "\\" in name or "\0" in name or ".." in parts or name.startswith("/") or ":" in parts[0]


def shards_of(path: Path) -> list[str]:
    """The files that the index of a checkpoint names; `Refused` when one of them leads out of the folder."""
    try:
        shards = sorted(set(json_of(path)["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Refused(f"{path} is damaged: it cannot be read as an index of weights.") from error
    for shard in shards:
        if not isinstance(shard, str) or leads_out(shard):
            raise Refused(f"{path} names {shard!r}, which leads out of its folder.")
    return shards


def check_safetensors(path: Path) -> None:
    """`Refused` unless the header is JSON whose tensors fill the rest of the file, each byte once."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = struct.unpack("<Q", file.read(8))[0] if size >= 8 else HEADER_LIMIT
        if length > min(HEADER_LIMIT, size - 8):
            raise Refused(f"{path} is damaged: it ends before its header does.")
        try:
            header = json.loads(file.read(length))
            spans = sorted(_span(name, about) for name, about in header.items() if name != "__metadata__")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
            detail = str(error) if isinstance(error, _Span) else f"its header cannot be read ({type(error).__name__})"
            raise Refused(f"{path} is damaged: {detail}.") from error
    at = 0
    for begin, end in spans:
        if begin != at or end < begin:
            raise Refused(f"{path} is damaged: its tensors overlap or leave gaps.")
        at = end
    if at != size - 8 - length:
        raise Refused(f"{path} is damaged: {at} bytes of tensors are announced and {size - 8 - length} are there.")


class _Span(ValueError):
    pass


def _span(name: str, about: Any) -> tuple[int, int]:
    """Where a tensor lies; `ValueError` unless that is what its shape and type need."""
    offsets, shape = about["data_offsets"], about["shape"]
    whole = isinstance(offsets, list) and isinstance(shape, list) and len(offsets) == 2
    if not whole or not all(type(x) is int and 0 <= x < 2**63 for x in (*offsets, *shape)):
        raise _Span(f"the place or the shape of {name[:100]!r} is none")
    bits = _BITS.get(about["dtype"]) if isinstance(about["dtype"], str) else None
    if bits is not None and math.prod(shape) * bits != 8 * (offsets[1] - offsets[0]) and offsets[0] <= offsets[1]:
        raise _Span(f"{name[:100]!r} has {offsets[1] - offsets[0]} bytes, which its shape and type do not have")
    return offsets[0], offsets[1]
