"""The folder of an n-gram store: a manifest, and one memory-mapped safetensors file an order."""

import importlib.metadata
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from ._ngram_count import TABLE_FIELDS

STORE_FORMAT = 1
STORE_MANIFEST = "ngram_store.json"
_CODES = {np.uint64: "U64", np.int64: "I64", np.int32: "I32", np.uint32: "U32"}


@dataclass(frozen=True, kw_only=True)
class StoreInfo:
    """What a store was made from; `vocabulary` is `None` when it was built from ids without a tokenizer."""

    vocab_size: int
    vocabulary: str | None = None
    tokenizer: str = ""
    corpus: str = ""
    num_tokens: int = 0
    num_documents: int = 0
    min_count: int = 1

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, field.type) or isinstance(value, bool):
                raise TypeError(f"{field.name} is {value!r}")
        for name, least in {"vocab_size": 1, "num_tokens": 0, "num_documents": 0, "min_count": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)} but must be >= {least}")


def check_orders(orders: Iterable[Any]) -> tuple[int, ...]:
    """n of the n-grams, as a tuple; `ValueError` when they are not distinct integers in 2..16."""
    orders = tuple(orders)
    if not orders or any(not isinstance(n, int) or not 2 <= n <= 16 for n in orders) or len(set(orders)) < len(orders):
        raise ValueError(f"orders is {orders} but must hold distinct integers in 2..16.")
    return orders


def refuse_existing(folder: Path) -> None:
    """`FileExistsError` for a folder that a store cannot be written to, a dangling link included."""
    if os.path.lexists(folder):
        raise FileExistsError(f"{folder} exists: an n-gram store is written into a new folder.")


def write_store(folder: Path, info: StoreInfo, parts: Iterator[tuple[int, Iterator[dict[str, np.ndarray]]]]) -> None:
    """Write tables that come order by order and block by block; the folder appears whole or not at all."""
    refuse_existing(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        entries = {}
        for n, blocks in parts:
            path = partial / _file_name(n)
            _write_order(path, n, info, blocks)
            entries[str(n)] = {"bytes": path.stat().st_size, "crc32": _crc32(path)}
        manifest = {"format": STORE_FORMAT, **_writer(), "info": asdict(info), "orders": entries}
        (partial / STORE_MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        partial.chmod(0o755)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _metadata(info: StoreInfo, n: int) -> dict[str, str]:
    return {"n": str(n)} | {key: str(value) for key, value in asdict(info).items() if value is not None}


def _write_order(path: Path, n: int, info: StoreInfo, blocks: Iterator[dict[str, np.ndarray]]) -> None:
    """One safetensors file, block by block: the arrays grow in files of their own and are then put in a row."""
    columns = {name: path.with_name(f"{path.name}.{name}") for name in TABLE_FIELDS}
    files = {name: column.open("wb") for name, column in columns.items()}
    try:
        files["offsets"].write(np.zeros(1, np.int64).tobytes())
        before = 0
        for block in blocks:
            for name, dtype in TABLE_FIELDS.items():
                array = block["offsets"][1:] + before if name == "offsets" else block[name]
                np.ascontiguousarray(array, dtype=dtype).tofile(files[name])
            before += len(block["next_ids"])
    finally:
        for file in files.values():
            file.close()
    header, at = {"__metadata__": _metadata(info, n)}, 0
    for name, dtype in TABLE_FIELDS.items():
        size = columns[name].stat().st_size
        shape = [size // (dtype.itemsize * (n - 1)), n - 1] if name == "contexts" else [size // dtype.itemsize]
        header[name] = {"dtype": _CODES[dtype.type], "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for column in columns.values():
            with column.open("rb") as source:
                shutil.copyfileobj(source, file, 1 << 22)
            column.unlink()
        file.flush()
        os.fsync(file.fileno())


def read_store(folder: Path, verify: bool) -> tuple[dict[int, dict[str, np.ndarray]], StoreInfo]:
    """The mapped tables of a folder and what they were made from; errors name the file that is wrong."""
    path = folder / STORE_MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"There is no {STORE_MANIFEST} in {folder}: it is not an n-gram store.")
    try:
        manifest = json.loads(path.read_bytes())
        if not isinstance(manifest, dict) or manifest.get("format") != STORE_FORMAT:
            raise ValueError(_format_problem(manifest))
        info = StoreInfo(**manifest["info"])
        files = {int(n): (entry["bytes"], entry["crc32"]) for n, entry in manifest["orders"].items()}
        if not all(type(number) is int for entry in files.values() for number in entry):
            raise TypeError("sizes and checksums must be integers")
        check_orders(files)
        left_out = {file.name for file in folder.glob(_file_name("*"))} - set(map(_file_name, files))
        if left_out:
            raise ValueError(f"it does not name {', '.join(sorted(left_out))}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged or of another version: {error}.") from error
    return {n: _read_order(folder, n, info, *entry, verify) for n, entry in files.items()}, info


def _format_problem(manifest: Any) -> str:
    """What is wrong with the format; a higher number is that of a later hfext."""
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if not isinstance(found, int) or found <= STORE_FORMAT:
        return f"its format is not {STORE_FORMAT}"
    writer = f"hfext {manifest['hfext_version']}" if "hfext_version" in manifest else "a later hfext"
    return (
        f"its format is {found}, written by {writer}, and this version reads {STORE_FORMAT}: update with `pip install "
        "--upgrade hfext`"
    )


def _writer() -> dict[str, str]:
    """The version that writes a store, where this is hfext and not its exported file alone."""
    try:
        return {"hfext_version": importlib.metadata.version("hfext")}
    except importlib.metadata.PackageNotFoundError:
        return {}


def _read_order(folder: Path, n: int, info: StoreInfo, size: int, crc32: int, verify: bool) -> dict[str, np.ndarray]:
    path = folder / _file_name(n)
    if not path.is_file():
        raise FileNotFoundError(f"The n-gram store {folder} has no {path.name}.")
    if path.stat().st_size != size:
        raise ValueError(f"{path} is truncated or damaged: it has {path.stat().st_size} bytes instead of {size}.")
    if verify and _crc32(path) != crc32:
        raise ValueError(f"{path} is damaged: its checksum is not the one it was written with.")
    try:
        # As torch tensors, because these are mapped; the numpy form would be read whole.
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            table = {name: file.get_tensor(name).numpy() for name in TABLE_FIELDS}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}.") from error
    expected = _metadata(info, n)
    for key in sorted(expected.keys() | metadata.keys()):
        if metadata.get(key) != expected.get(key):
            raise ValueError(
                f"{path} does not belong to this store: its {key} is {metadata.get(key)} but {STORE_MANIFEST} says "
                f"{expected.get(key)}."
            )
    contexts, pairs = len(table["hashes"]), len(table["next_ids"])
    shapes = {name: (contexts,) for name in ("hashes", "totals")} | {"contexts": (contexts, n - 1)}
    shapes |= {"offsets": (contexts + 1,), "next_ids": (pairs,), "counts": (pairs,)}
    for name, dtype in TABLE_FIELDS.items():
        if table[name].dtype != dtype or table[name].shape != shapes[name]:
            raise ValueError(f"{path} is damaged: {name} is {table[name].dtype} {table[name].shape}.")
    if table["offsets"][0] != 0 or table["offsets"][-1] != pairs:
        raise ValueError(f"{path} is damaged: its offsets do not cover its next tokens.")
    if verify:
        _check_contents(path, table, info.vocab_size)
    return table


def _check_contents(path: Path, table: dict[str, np.ndarray], vocab_size: int) -> None:
    """What a right checksum does not say: the numbers are such as counting gives. Block by block."""

    def holds(test: Any, name: str, overlap: int = 0) -> bool:
        array = table[name]
        return all(test(array[a : a + (1 << 20) + overlap]) for a in range(0, len(array), 1 << 20))

    def inside(ids: np.ndarray) -> bool:
        return not ids.size or bool(ids.min() >= 0 and ids.max() < vocab_size)

    problems = {
        "its offsets do not ascend": holds(lambda x: bool((x[1:] > x[:-1]).all()), "offsets", 1),
        "its hashes do not ascend": holds(lambda x: bool((x[1:] >= x[:-1]).all()), "hashes", 1),
        "it has totals or counts of 0": all(holds(lambda x: bool(x.all()), name) for name in ("totals", "counts")),
        f"it has token ids outside 0..{vocab_size - 1}": all(holds(inside, name) for name in ("next_ids", "contexts")),
    }
    for problem, absent in problems.items():
        if not absent:
            raise ValueError(f"{path} is damaged: {problem}.")


def _file_name(n: int | str) -> str:
    return f"order-{n}.safetensors"


def _crc32(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            checksum = zlib.crc32(block, checksum)
    return checksum
