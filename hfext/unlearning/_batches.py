"""Data of post-hoc edits: tokenised rows, a dataset of examples, or batches that a model takes as they are."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from ._data import padded


def pad_rows(rows: list[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Right-padded `input_ids`, `attention_mask` by length, and `labels` (the ids where a row has none).

    Labels that are one number a row, as those of a classifier, are stacked.
    """
    made = []
    whole = [row["labels"] for row in rows if "labels" in row and torch.as_tensor(row["labels"]).ndim == 0]
    if whole and len(whole) < len(rows):
        raise ValueError(f"{len(whole)} of {len(rows)} rows have one label each, and the others one a token or none.")
    for row in rows:
        ids = list(row["input_ids"])
        given = ids if whole else list(row.get("labels", row["input_ids"]))
        if len(given) != len(ids) or not ids:
            raise ValueError(
                f"A row has {len(ids)} input_ids and {len(given)} labels; both must be equally many, and >= 1."
            )
        made.append({"input_ids": ids, "labels": given})
    batch = padded(made)
    return {**batch, "labels": torch.stack([torch.as_tensor(label) for label in whole])} if whole else batch


def is_row(item: Any) -> bool:
    """Whether an item is one example and no batch: token ids of one dimension, or a label of none."""
    if not isinstance(item, Mapping):
        raise TypeError(f"Data hold a {type(item).__name__} but must hold dicts: tokenised rows or batches.")
    if "input_ids" in item:
        return torch.as_tensor(item["input_ids"]).ndim == 1
    return "labels" in item and torch.as_tensor(item["labels"]).ndim == 0


def read_batches(data: Iterable[Any], batch_size: int, model: nn.Module, name: str) -> Iterator[dict[str, Tensor]]:
    """Batches on the model's device. `ValueError` when `data`, called `name`, hold nothing."""
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size} but must be >= 1.")
    device = next(model.parameters()).device
    # A dataset may have lengths and indices alone.
    items = iter(data if isinstance(data, Iterable) else (data[i] for i in range(len(data))))
    first = next(items, None)
    if first is None:
        raise ValueError(f"{name} holds no rows.")
    if isinstance(first, Mapping) and ("question" in first or "prompt" in first or "text" in first):
        raise ValueError(f"{name} holds text: give hfext.unlearning.tokenize(rows, tokenizer).")
    items = chain([first], items)
    for batch in _collate(items, batch_size) if is_row(first) else items:
        yield {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


def _collate(items: Iterator[Mapping[str, Any]], batch_size: int) -> Iterator[dict[str, Tensor]]:
    # The range comes first: when it ends, no item has been taken.
    while rows := [row for _, row in zip(range(batch_size), items, strict=False)]:
        yield pad_rows(rows) if "input_ids" in rows[0] else default_collate(rows)


def single_rows(batch: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows of a batch as batches of one."""
    count = rows_in(batch)
    for i in range(count):
        yield {
            key: value[i : i + 1] if isinstance(value, Tensor) and value.ndim and len(value) == count else value
            for key, value in batch.items()
        }


def rows_in(batch: Mapping[str, Any]) -> int:
    return next(len(value) for value in batch.values() if isinstance(value, Tensor) and value.ndim)
