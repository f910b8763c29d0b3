"""N-gram counts of a corpus on disk: what superposed decoding asks of every draft at every step.

    p(v | history) = sum_n lambda_n c_n(last n-1 tokens, v) / c_n(last n-1 tokens),   0 for an unseen context

A folder holds one safetensors file an order: contexts sorted by a 64-bit hash, beside their exact ids, so that two
contexts of one hash are told apart; and for each its next tokens in ascending order (CSR). Files are memory-mapped: a
lookup is a binary search that reads a few pages, and all rows of a batch are searched at once.

The store of Superposed Decoding, arXiv 2405.18400, whose authors pickle a dictionary an order.
"""

import hashlib
import json
import operator
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._ngram_count import context_hashes, count_ngrams, joined
from ._ngram_files import StoreInfo, check_orders, read_store, refuse_existing, write_store


def vocabulary_hash(tokenizer: Any) -> str:
    """SHA-256 of the pairs (token, id): two tokenizers with the same hash give every id the same meaning."""
    pairs = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=True)
    return hashlib.sha256(pairs.encode()).hexdigest()


class NGramStore:
    """Counts of n-grams, one table an order. Made by [`NGramStore.build`] or [`NGramStore.load`].

    Args:
        tables (`dict[int, dict[str, np.ndarray]]`): For each order the arrays `hashes`, `offsets`, `contexts`,
            `next_ids`, `counts` and `totals`.
        info ([`StoreInfo`]): What they were made from.
    """

    def __init__(self, tables: dict[int, dict[str, np.ndarray]], info: StoreInfo):
        self.tables, self.info = dict(sorted(tables.items())), info

    def __repr__(self) -> str:
        i = self.info
        return f"NGramStore(orders={self.orders}, vocab_size={i.vocab_size}, num_tokens={i.num_tokens})"

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
        orders = check_orders(orders)
        if isinstance(dataset, str | bytes):
            raise TypeError("dataset is one string, whose characters would be documents: pass [text].")
        if isinstance(dataset, Mapping):
            keys = ", ".join(map(repr, dataset))
            raise TypeError(f"dataset is a mapping of {keys}: pass one split of it, as in dataset['train'].")
        if tokenizer is None and vocab_size is None:
            raise ValueError("NGramStore.build needs a tokenizer, or vocab_size when the documents are token ids.")
        min_count = _integer("min_count", min_count)
        size = len(tokenizer) if vocab_size is None else _integer("vocab_size", vocab_size)
        if folder is not None:
            refuse_existing(Path(folder))
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
            write_store(Path(folder), info, parts)
            return cls.load(folder, tokenizer, verify=False)
        return cls({n: joined(list(blocks), n) for n, blocks in parts}, info)

    def save(self, folder: str | Path) -> None:
        """Write the store; the folder appears whole or not at all and must not exist before."""
        write_store(Path(folder), self.info, ((n, iter([table])) for n, table in self.tables.items()))

    @classmethod
    def load(cls, folder: str | Path, tokenizer: Any = None, verify: bool = True) -> "NGramStore":
        """Map a saved store into memory.

        Args:
            folder (`str` or `Path`): What `save` wrote.
            tokenizer (*optional*): The model's: another vocabulary is refused.
            verify (`bool`, *optional*, defaults to `True`): Compare checksums and check that offsets, totals and ids
                have a meaning, which reads every byte once. Sizes, shapes, types and the record of what the store
                was made from are always checked.
        """
        store = cls(*read_store(Path(folder), verify))
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
        histories, candidates = _ids(histories), _ids(candidates)
        # What int32 cannot hold is in no table, and neither is -1.
        candidates = np.where((candidates >= 0) & (candidates < 2**31), candidates, -1).astype(np.int32)
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
        # Inside the table whatever a damaged file says that was opened without being verified.
        last = len(table["next_ids"]) - 1
        starts = np.clip(table["offsets"][rows], 0, last)
        ends = np.clip(table["offsets"][rows + 1], starts + 1, last + 1)
        at = np.empty(candidates.shape, dtype=np.int64)
        for i, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
            at[i] = table["next_ids"][start:end].searchsorted(candidates[i])
        at += starts[:, None]
        near = np.minimum(at, ends[:, None] - 1)
        hit = (at == near) & (table["next_ids"][near] == candidates)
        return np.where(hit, table["counts"][near] / np.maximum(table["totals"][rows], 1)[:, None], 0.0)


def _integer(name: str, value: Any) -> int:
    try:
        whole = operator.index(value)
    except TypeError as error:
        raise TypeError(f"{name} is {value!r} but must be an integer.") from error
    if not 1 <= whole < 2**31:
        raise ValueError(f"{name} is {value!r} but must be an integer >= 1 and < 2^31.")
    return whole


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
