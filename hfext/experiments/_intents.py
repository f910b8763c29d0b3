"""BANKING77, customers' questions of 77 intents, by words, and small BERTs that classify them."""

import csv
import re
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import BertConfig, BertForSequenceClassification

from ._data import shared_data

CLS, PAD, UNKNOWN = 1, 0, 2
Rows = list[dict[str, Tensor]]


def read_intents(data_dir: str | None = None, words: int = 16, most: int | None = None) -> tuple[Rows, Rows, int, int]:
    """Rows of the training and the test part, the size of the vocabulary and the number of intents.

    A row is [CLS] and the first `words` words; those that the training part has once are one unknown word.
    """
    folder = shared_data("banking77", data_dir)
    if folder is None:
        raise FileNotFoundError("banking77 (train.csv, test.csv) was not found: set data_dir or HFEXT_DATA.")
    parts = [_read(folder / f"{part}.csv") for part in ("train", "test")]
    counts = Counter(word for text, _ in parts[0] for word in text)
    vocab = {word: i + 3 for i, word in enumerate(sorted(word for word, n in counts.items() if n > 1))}
    intents = {name: i for i, name in enumerate(sorted({intent for _, intent in parts[0]}))}
    rows = []
    for part in parts:
        # Sorted by intent in the file: take every so-manieth.
        chosen = part if most is None else part[:: max(1, len(part) // most)][:most]
        ids = [torch.tensor([CLS, *(vocab.get(word, UNKNOWN) for word in text[:words])]) for text, _ in chosen]
        rows.append([{"input_ids": x, "labels": intents[y]} for x, (_, y) in zip(ids, chosen, strict=True)])
    return rows[0], rows[1], len(vocab) + 3, len(intents)


def _read(path: Path) -> list[tuple[list[str], str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return [(re.findall(r"[a-z']+", row["text"].lower()), row["category"]) for row in csv.DictReader(file)]


def padded(rows: Rows) -> dict[str, Tensor]:
    """A batch, padded on the right."""
    ids = pad_sequence([row["input_ids"] for row in rows], batch_first=True, padding_value=PAD)
    labels = torch.tensor([row["labels"] for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "labels": labels}


def make_bert(seed: int, vocab: int, intents: int, hidden: int, layers: int, length: int):
    """A BERT with heads of 32 and dropout 0.1."""
    config = BertConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 32),
        max_position_embeddings=length,
        pad_token_id=PAD,
        num_labels=intents,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BertForSequenceClassification(config)


@torch.no_grad()
def accuracy(model: torch.nn.Module, rows: Rows) -> float:
    """In per cent."""
    model.eval()
    right = 0
    for i in range(0, len(rows), 256):
        batch = padded(rows[i : i + 256])
        labels = batch.pop("labels")
        right += (model(**batch).logits.argmax(-1) == labels).sum().item()
    return 100 * right / len(rows)
