"""N-gram counts of a corpus on disk: what superposed decoding asks of every draft at every step.

    p(v | history) = sum_n lambda_n c_n(last n-1 tokens, v) / c_n(last n-1 tokens),   0 for an unseen context

A folder holds one safetensors file an order: contexts sorted by a 64-bit hash, beside their exact ids, so that two
contexts of one hash are told apart; and for each its next tokens in ascending order (CSR). Files are memory-mapped: a
lookup is a binary search that reads a few pages, and all rows of a batch are searched at once.

The store of Superposed Decoding, arXiv 2405.18400, whose authors pickle a dictionary an order.
"""

import hashlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ._ngram_count import context_hashes, count_ngrams

STORE_FORMAT = 1
STORE_MANIFEST = "ngram_store.json"
# Alignment decides the order: 8-byte types first.
_FIELDS = {
    "hashes": np.dtype(np.uint64),
    "offsets": np.dtype(np.int64),
    "contexts": np.dtype(np.int32),
    "next_ids": np.dtype(np.int32),
    "counts": np.dtype(np.uint32),
    "totals": np.dtype(np.uint32),
}
_CODES = {np.uint64: "U64", np.int64: "I64", np.int32: "I32", np.uint32: "U32"}


def vocabulary_hash(tokenizer: Any) -> str:
    """SHA-256 of the pairs (token, id): two tokenizers with the same hash give every id the same meaning."""
    pairs = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=True)
    return hashlib.sha256(pairs.encode()).hexdigest()


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


class NGramStore:
    """Counts of n-grams, one table an order. Made by [`NGramStore.build`] or [`NGramStore.load`].

    Args:
        tables (`dict[int, dict[str, np.ndarray]]`): For each order the arrays `hashes`, `offsets`, `contexts`,
            `next_ids`, `counts` and `totals`.
        info ([`StoreInfo`]): What they were made from.
    """

    def __init__(self, tables: dict[int, dict[str, np.ndarray]], info: StoreInfo):
        self.tables, self.info = dict(sorted(tables.items())), info

    @property
    def orders(self) -> tuple[int, ...]:
        return tuple(self.tables)

    @property
    def vocab_size(self) -> int:
        return self.info.vocab_size

    @classmethod
    def build(
        cls,
        dataset: Iterable[Any],
        tokenizer: Any = None,
        orders: Sequence[int] = (2, 3, 4, 5, 6),
        min_count: int = 1,
        *,
        vocab_size: int | None = None,
        text_column: str = "text",
        corpus: str = "",
        folder: str | Path | None = None,
    ) -> "NGramStore":
        """Count the n-grams of `dataset`. No n-gram reaches over the end of a document; no BOS or EOS is added.

        Args:
            dataset: Documents: strings, sequences of token ids, or rows with the column `text_column`.
            tokenizer (*optional*): Turns strings into ids and names the vocabulary. Without it give `vocab_size`.
            orders (`Sequence[int]`, *optional*, defaults to (2, 3, 4, 5, 6)): n of the n-grams, each in 2..16.
            min_count (`int`, *optional*, defaults to 1): Continuations seen less often are left out; a context's
                total still counts them, so probabilities do not change.
            vocab_size (`int`, *optional*): Ids are below it; the tokenizer's length by default.
            folder (`str` or `Path`, *optional*): Write there order by order and return the memory-mapped store, for
                a corpus whose tables do not fit in memory. The folder must not exist.
        """
        orders = _check_orders(orders)
        if not isinstance(min_count, int) or min_count < 1:
            raise ValueError(f"min_count is {min_count!r} but must be an integer >= 1.")
        if tokenizer is None and vocab_size is None:
            raise ValueError("NGramStore.build needs a tokenizer, or vocab_size when the documents are token ids.")
        size = len(tokenizer) if vocab_size is None else vocab_size
        tokens, starts = _collect(dataset, tokenizer, text_column, size)
        info = StoreInfo(
            vocab_size=size,
            vocabulary=None if tokenizer is None else vocabulary_hash(tokenizer),
            tokenizer="" if tokenizer is None else Path(str(tokenizer.name_or_path)).name,
            corpus=corpus,
            num_tokens=len(tokens),
            num_documents=len(starts),
            min_count=min_count,
        )
        parts = ((n, count_ngrams(tokens, starts, n, min_count)) for n in orders)
        if folder is not None:
            _write_folder(Path(folder), info, parts)
            return cls.load(folder, tokenizer, verify=False)
        return cls({n: _join(list(blocks), n) for n, blocks in parts}, info)

    def save(self, folder: str | Path) -> None:
        """Write the store; the folder appears whole or not at all and must not exist before."""
        _write_folder(Path(folder), self.info, ((n, iter([table])) for n, table in self.tables.items()))

    @classmethod
    def load(cls, folder: str | Path, tokenizer: Any = None, verify: bool = True) -> "NGramStore":
        """Map a saved store into memory.

        Args:
            folder (`str` or `Path`): What `save` wrote.
            tokenizer (*optional*): The model's: another vocabulary is refused.
            verify (`bool`, *optional*, defaults to `True`): Compare checksums, which reads every byte once. Sizes,
                shapes and types are always checked.
        """
        folder = Path(folder)
        path = folder / STORE_MANIFEST
        if not path.is_file():
            raise FileNotFoundError(f"There is no {STORE_MANIFEST} in {folder}: it is not an n-gram store.")
        try:
            manifest = json.loads(path.read_bytes())
            if not isinstance(manifest, dict) or manifest.get("format") != STORE_FORMAT:
                raise ValueError(f"its format is not {STORE_FORMAT}")
            info = StoreInfo(**manifest["info"])
            files = {int(n): (int(entry["bytes"]), int(entry["crc32"])) for n, entry in manifest["orders"].items()}
            _check_orders(files)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is damaged or of another version: {error}.") from error
        store = cls({n: _read(folder, n, info, *entry, verify) for n, entry in files.items()}, info)
        if tokenizer is not None:
            store.check_tokenizer(tokenizer)
        return store

    def check_tokenizer(self, tokenizer: Any) -> None:
        """`ValueError` when the ids of `tokenizer` do not mean what they mean in this store."""
        if self.info.vocabulary is None:
            raise ValueError("The n-gram store was built from ids without a tokenizer: its vocabulary is not known.")
        if vocabulary_hash(tokenizer) != self.info.vocabulary:
            raise ValueError(
                f"The n-gram store has the vocabulary of {self.info.tokenizer or 'another tokenizer'} "
                f"({self.vocab_size} tokens), which is not that of {tokenizer.name_or_path} ({len(tokenizer)} tokens)."
            )

    def lookup(self, contexts: Any) -> np.ndarray:
        """Rows of the table of order n for contexts [rows, n-1], -1 where unseen: int64 [rows]."""
        contexts = _ids(contexts)
        order = contexts.shape[1] + 1
        if order not in self.tables:
            raise ValueError(f"contexts have {order - 1} tokens, but the store has the orders {self.orders}.")
        return self._rows(order, contexts, context_hashes(contexts.T[::-1])[-1])

    def probabilities(
        self, histories: Any, candidates: Any, lambdas: Sequence[float], lengths: Any | None = None
    ) -> Tensor:
        """Interpolated probabilities of `candidates` after `histories`, float64 [rows, c], on the CPU.

        Args:
            histories: Token ids [rows, length], the newest last.
            candidates: Token ids [rows, c].
            lambdas: Weights of the orders 2, 3, ..., at least up to the highest order of the store.
            lengths (*optional*): How many of a row's last tokens count, [rows]: left padding is no context.
        """
        highest = self.orders[-1]
        if len(lambdas) + 1 < highest:
            raise ValueError(f"lambdas has {len(lambdas)} weights but order {highest} needs {highest - 1}.")
        histories, candidates = _ids(histories), _ids(candidates).astype(np.int32)
        width = histories.shape[1]
        known = np.full(len(histories), width) if lengths is None else np.asarray(lengths)
        hashes = context_hashes(histories.T[::-1][: highest - 1])
        total = np.zeros(candidates.shape)
        for n in self.orders:
            if n - 1 > width or not lambdas[n - 2]:
                continue
            rows = self._rows(n, histories[:, width - n + 1 :], hashes[n - 2])
            seen = np.flatnonzero((rows >= 0) & (known >= n - 1))
            if len(seen):
                total[seen] += lambdas[n - 2] * self._frequencies(n, rows[seen], candidates[seen])
        return torch.from_numpy(total)

    def _rows(self, order: int, contexts: np.ndarray, hashes: np.ndarray) -> np.ndarray:
        """All contexts in one binary search."""
        table = self.tables[order]
        last = len(table["hashes"]) - 1
        if last < 0:
            return np.full(len(contexts), -1, dtype=np.int64)
        at = np.searchsorted(table["hashes"], hashes)
        # Contexts of one hash stand side by side; nearly always there is one, and the loop ends at once.
        while True:
            near = np.minimum(at, last)
            same_hash = (table["hashes"][near] == hashes) & (at <= last)
            same = same_hash & (table["contexts"][near] == contexts).all(axis=1)
            wrong = same_hash & ~same
            if not wrong.any():
                return np.where(same, near, -1)
            at = at + wrong

    def _frequencies(self, order: int, rows: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        """c(context, v) / c(context) in the table's `rows` for candidates [rows, c], int32 as the table's."""
        table = self.tables[order]
        starts, ends = table["offsets"][rows], table["offsets"][rows + 1]
        at = np.empty(candidates.shape, dtype=np.int64)
        for i, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
            at[i] = table["next_ids"][start:end].searchsorted(candidates[i])
        at += starts[:, None]
        near = np.minimum(at, ends[:, None] - 1)
        hit = (at == near) & (table["next_ids"][near] == candidates)
        return np.where(hit, table["counts"][near] / table["totals"][rows][:, None], 0.0)


def _join(blocks: list[dict[str, np.ndarray]], n: int) -> dict[str, np.ndarray]:
    if not blocks:
        empty = {name: np.zeros(0, dtype) for name, dtype in _FIELDS.items()}
        return {**empty, "offsets": np.zeros(1, np.int64), "contexts": np.zeros((0, n - 1), np.int32)}
    table = {name: np.concatenate([block[name] for block in blocks]) for name in _FIELDS if name != "offsets"}
    table["offsets"] = np.concatenate([[0], np.cumsum(np.concatenate([np.diff(b["offsets"]) for b in blocks]))])
    return table


def _write_folder(folder: Path, info: StoreInfo, parts: Iterator[tuple[int, Iterator[dict[str, np.ndarray]]]]) -> None:
    if folder.exists():
        raise FileExistsError(f"{folder} exists: an n-gram store is written into a new folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        entries = {}
        for n, blocks in parts:
            path = partial / _file_name(n)
            _write_order(path, n, info, blocks)
            entries[str(n)] = {"bytes": path.stat().st_size, "crc32": _crc32(path)}
        manifest = {"format": STORE_FORMAT, "info": asdict(info), "orders": entries}
        (partial / STORE_MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        partial.chmod(0o755)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_order(path: Path, n: int, info: StoreInfo, blocks: Iterator[dict[str, np.ndarray]]) -> None:
    """One safetensors file, block by block: the arrays grow in files of their own and are then put in a row."""
    columns = {name: path.with_name(f"{path.name}.{name}") for name in _FIELDS}
    files = {name: column.open("wb") for name, column in columns.items()}
    try:
        files["offsets"].write(np.zeros(1, np.int64).tobytes())
        before = 0
        for block in blocks:
            for name, dtype in _FIELDS.items():
                array = block["offsets"][1:] + before if name == "offsets" else block[name]
                np.ascontiguousarray(array, dtype=dtype).tofile(files[name])
            before += len(block["next_ids"])
    finally:
        for file in files.values():
            file.close()
    strings = {key: str(value) for key, value in asdict(info).items() if value is not None}
    header, at = {"__metadata__": {"n": str(n), **strings}}, 0
    for name, dtype in _FIELDS.items():
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


def _read(folder: Path, n: int, info: StoreInfo, size: int, crc32: int, verify: bool) -> dict[str, np.ndarray]:
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
            table = {name: file.get_tensor(name).numpy() for name in _FIELDS}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}.") from error
    contexts, pairs = len(table["hashes"]), len(table["next_ids"])
    shapes = {name: (contexts,) for name in ("hashes", "totals")} | {"contexts": (contexts, n - 1)}
    shapes |= {"offsets": (contexts + 1,), "next_ids": (pairs,), "counts": (pairs,)}
    for name, dtype in _FIELDS.items():
        if table[name].dtype != dtype or table[name].shape != shapes[name]:
            raise ValueError(f"{path} is damaged: {name} is {table[name].dtype} {table[name].shape}.")
    if table["offsets"][0] != 0 or table["offsets"][-1] != pairs:
        raise ValueError(f"{path} is damaged: its offsets do not cover its next tokens.")
    if metadata.get("n") != str(n) or metadata.get("vocabulary") != info.vocabulary:
        raise ValueError(f"{path} does not belong to this store: order {metadata.get('n')} or another vocabulary.")
    return table


def _file_name(n: int) -> str:
    return f"order-{n}.safetensors"


def _crc32(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _check_orders(orders: Iterable[Any]) -> tuple[int, ...]:
    orders = tuple(orders)
    if not orders or any(not isinstance(n, int) or not 2 <= n <= 16 for n in orders) or len(set(orders)) < len(orders):
        raise ValueError(f"orders is {orders} but must hold distinct integers in 2..16.")
    return orders


def _ids(values: Any) -> np.ndarray:
    """Token ids [rows, columns] as a numpy array."""
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if array.ndim != 2 or array.dtype.kind not in "iu":
        raise TypeError(f"token ids must be an integer array of two dimensions, not {array.dtype} {array.shape}.")
    return array


def _collect(
    dataset: Iterable[Any], tokenizer: Any, text_column: str, vocab_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """All documents in a row as int32 [tokens], and where each starts; empty documents are left out."""
    documents = []
    rows = iter(dataset)
    while batch := list(islice(rows, 256)):
        batch = [row[text_column] if isinstance(row, Mapping) else row for row in batch]
        texts = [row for row in batch if isinstance(row, str)]
        if texts and tokenizer is None:
            raise TypeError("The dataset holds strings: give the tokenizer that turns them into ids.")
        ids = iter(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else [])
        for row in batch:
            document = np.asarray(next(ids) if isinstance(row, str) else row)
            if not document.size:
                continue
            if document.ndim != 1 or document.dtype.kind not in "iu":
                raise TypeError(f"A document must be a string or a sequence of token ids, not {type(row).__name__}.")
            if document.min() < 0 or document.max() >= vocab_size:
                raise ValueError(f"Document {len(documents)} has token ids outside 0..{vocab_size - 1}.")
            documents.append(document.astype(np.int32))
    if not documents:
        raise ValueError("The dataset has no tokens.")
    starts = np.cumsum([0, *(len(document) for document in documents[:-1])])
    return np.concatenate(documents), starts
