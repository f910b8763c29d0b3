"""Calibration text as rows of token ids: from a path, texts, ids, a tensor or a `datasets.Dataset`.

Texts are joined by the end-of-text token of the tokenizer and cut into rows of `sequence_length`; ids that are given
row by row stay rows, and padding that an `attention_mask` names is cut off, so that no padding enters a statistic.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

TEXT_COLUMNS = ("text", "content", "document", "sentence")


def token_rows(
    data: Any,
    model: nn.Module,
    tokenizer: Any = None,
    num_samples: int = 128,
    sequence_length: int = 2048,
    seed: int = 0,
) -> list[Tensor]:
    """Rows of calibration tokens, each an int64 [tokens].

    Args:
        data: A path (`.txt`, `.json`, `.jsonl`, or a folder that `datasets.Dataset.save_to_disk` wrote), a list of
            texts, a list of rows of ids, a tensor [rows, tokens] or [tokens], a tokenizer's output with `input_ids`
            and `attention_mask`, a list of such, or a dataset with a text column or `input_ids`.
        model (`nn.Module`): Names the tokenizer and the range of ids.
        tokenizer (*optional*): A tokenizer or the path of one; that of the model's folder by default.
        num_samples (`int`): At most so many rows; a random choice when there are more.
        sequence_length (`int`): Tokens of a row made from text; longer rows of ids are cut.
        seed (`int`): Of the choice.

    Returns:
        A list of int64 [tokens] tensors on the CPU.

    Raises:
        ValueError: No data, or ids outside the model's vocabulary.
        TypeError: Data of another kind.
    """
    if data is None:
        raise ValueError("No calibration data was given: set dataset= to texts, token ids, a dataset or a path.")
    if isinstance(data, str | Path) and str(data):
        data = _read(Path(data))
    rows, texts = _split(data)
    if texts:
        ids = _tokens(texts, tokenizer if tokenizer is not None else _name(model))
        whole = len(ids) // sequence_length * sequence_length
        rows += list(ids[:whole].view(-1, sequence_length)) if whole else [ids]
    rows = [row[:sequence_length] for row in rows if len(row) > 0]
    if not rows:
        raise ValueError("The calibration data holds no tokens.")
    size = model.get_input_embeddings().weight.shape[0]
    for row in rows:
        wrong = row[(row < 0) | (row >= size)]
        if len(wrong):
            raise ValueError(f"The calibration data holds token {int(wrong[0])}, but the model knows {size} tokens.")
    if len(rows) > num_samples:
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:num_samples]
        rows = [rows[i] for i in order.sort().values]
    return rows


def batches(rows: list[Tensor], size: int) -> list[Tensor]:
    """Rows of equal length together, at most `size` of them: int64 [rows, tokens] each, in the order given."""
    made: list[list[Tensor]] = []
    for row in rows:
        if made and len(made[-1]) < size and len(made[-1][0]) == len(row):
            made[-1].append(row)
        else:
            made.append([row])
    return [torch.stack(group) for group in made]


def _name(model: nn.Module) -> str:
    return model.config.get_text_config().name_or_path or model.config.name_or_path


def _read(path: Path) -> Any:
    if path.is_dir():
        from datasets import load_from_disk

        return load_from_disk(str(path))
    if not path.is_file():
        raise ValueError(f"The calibration data {str(path)!r} is no file or folder. Give a local path, or the data.")
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    return json.loads(text) if path.suffix == ".json" else [text]


def _split(data: Any) -> tuple[list[Tensor], list[str]]:
    """Rows of ids and texts that stand in `data`."""
    if isinstance(data, str):
        return [], [data]
    if isinstance(data, np.ndarray):
        data = torch.as_tensor(data)
    if isinstance(data, Tensor):
        if data.is_floating_point() or data.dtype == torch.bool or data.dim() not in (1, 2):
            raise ValueError(f"Calibration data is {data.dtype} {list(data.shape)} but must be ids [rows, tokens].")
        return list(data.detach().cpu().long().reshape(-1, data.shape[-1])), []
    names = getattr(data, "column_names", None)
    if names is not None:
        if isinstance(names, dict):
            raise TypeError(f"Calibration data has the splits {', '.join(names)}: choose one.")
        column = next((name for name in ("input_ids", *TEXT_COLUMNS) if name in names), None)
        if column is None:
            raise TypeError(f"Calibration data has the columns {', '.join(names)}: none is input_ids or text.")
        data = [{key: row[key] for key in (column, "attention_mask") if key in names} for row in data]
    if isinstance(data, Mapping) or hasattr(data, "input_ids"):
        return _item(data)
    if isinstance(data, Iterable):
        data = list(data)
        if data and isinstance(data[0], int | np.integer):
            return [torch.tensor(data)], []
        rows: list[Tensor] = []
        texts: list[str] = []
        for item in data:
            more_rows, more_texts = _split(item)
            rows += more_rows
            texts += more_texts
        return rows, texts
    raise TypeError(
        f"Calibration data is {type(data).__name__} but must be texts, token ids, a tensor, a dataset or a path."
    )


def _item(item: Any) -> tuple[list[Tensor], list[str]]:
    if "input_ids" not in item:
        column = next((name for name in TEXT_COLUMNS if name in item), None)
        if column is None:
            raise TypeError(f"A calibration row has {', '.join(item)}: none is input_ids or text.")
        return _split(item[column])
    if isinstance(item["input_ids"], list) and item["input_ids"] and isinstance(item["input_ids"][0], list):
        masks = item.get("attention_mask") or [None] * len(item["input_ids"])
        pairs = zip(item["input_ids"], masks, strict=True)
        rows = [{"input_ids": row} | ({} if mask is None else {"attention_mask": mask}) for row, mask in pairs]
        return [part for row in rows for part in _item(row)[0]], []
    ids = torch.as_tensor(item["input_ids"]).long()
    mask = torch.as_tensor(item["attention_mask"]).bool() if "attention_mask" in item else torch.ones_like(ids).bool()
    if mask.shape != ids.shape:
        raise ValueError(f"attention_mask is {list(mask.shape)} but must be {list(ids.shape)}, as input_ids is.")
    return [
        row[real].cpu() for row, real in zip(ids.view(-1, ids.shape[-1]), mask.view(-1, ids.shape[-1]), strict=True)
    ], []


def _tokens(texts: list[str], tokenizer: Any) -> Tensor:
    if isinstance(tokenizer, str):
        from transformers import AutoTokenizer

        if not tokenizer:
            raise ValueError("The model does not say where its tokenizer is: give tokenizer=, or token ids as data.")
        try:
            tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        except (OSError, ValueError) as error:
            raise ValueError(f"No tokenizer was found in {tokenizer!r}: give tokenizer=, or token ids.") from error
    ids: list[int] = []
    for text in texts:
        between = [] if not ids or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        ids += between + tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if not ids:
        raise ValueError("The calibration data holds no text.")
    return torch.tensor(ids)
