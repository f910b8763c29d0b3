"""The rows of an S3T ensemble by their numbers: read, named by a caller, and known again without being kept."""

import hashlib
import json
import operator
import secrets
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import set_seed

from ._data import token_rows
from ._s3t_layers import own_randomness


def new_salt() -> str:
    return secrets.token_hex(16)


def row_digests(rows: Sequence[Any], salt: str, skip: Collection[int] = ()) -> list[str | None]:
    """One of each row, `None` for those of `skip`, which are not read. What a row draws at random is fixed meanwhile.

    Without the salt, which goes with the file, a digest says nothing of its row.
    """
    found: list[str | None] = []
    skip = set(skip)
    with own_randomness():
        for i in range(len(rows)):
            if i in skip:
                found.append(None)
                continue
            set_seed(0)
            digest = hashlib.blake2b(digest_size=16, key=bytes.fromhex(salt))
            _feed(digest, rows[i])
            found.append(digest.hexdigest())
    return found


def readable_rows(rows: Any, gone: Collection[int], processing_class: Any) -> tuple[Any, Any]:
    """The rows, tokenised where they are text, with `None` in the place of those of `gone`; and one that is there."""
    living = sorted(set(range(len(rows))) - set(gone))
    if not living or processing_class is None or "input_ids" in rows[living[0]]:
        return rows, rows[living[0]] if living else {}
    made = token_rows("train_dataset", [rows[i] for i in living], processing_class)
    if len(made) != len(living):
        raise ValueError("train_dataset has rows without a token to score; their numbers would shift: remove them.")
    found: list[Any] = [None] * len(rows)
    for i, row in zip(living, made, strict=True):
        found[i] = row
    return found, made[0]


def row_numbers(indices: Any) -> list[int]:
    """One number or some of any integer type; `TypeError` for bools, floats and others, lest they mean another row."""
    try:
        some = list(indices)
    except TypeError:
        some = [indices]
    found = []
    for i in some:
        try:
            if isinstance(i, bool | np.bool_) or isinstance(i, Tensor) and i.dtype == torch.bool:
                raise TypeError
            found.append(operator.index(i))
        except TypeError:
            raise TypeError(f"indices holds {i!r} but must hold integers.") from None
    return found


def _feed(digest: Any, value: Any) -> None:
    """Numbers count by their values: a list, an array and a tensor of the same ones are the same."""
    if isinstance(value, Mapping):
        for key in sorted(value, key=str):
            digest.update(f"{{{json.dumps(str(key))}:".encode())
            _feed(digest, value[key])
        digest.update(b"}")
        return
    if value is None or isinstance(value, str | bytes):
        digest.update(f"{type(value).__name__}{value!r};".encode())
        return
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = value.double().numpy() if value.is_floating_point() else value.numpy()
    try:
        array = np.asarray(value)
    except ValueError:  # Lists of different lengths.
        array = np.empty(0, dtype=object)
    if array.dtype.kind in "biuf":
        array = array.astype(np.float64 if array.dtype.kind == "f" else np.int64)
        digest.update(f"{array.dtype.kind}{array.shape};".encode())
        digest.update(np.ascontiguousarray(array))
    elif isinstance(value, Sequence):
        digest.update(f"[{len(value)};".encode())
        for item in value:
            _feed(digest, item)
    else:
        raise TypeError(f"A row holds a {type(value).__name__}, which has no value to compare: give numbers or text.")
