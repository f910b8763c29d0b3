"""Facts planted in long texts, to be asked for after the text was compressed."""

import random
from typing import Any

import torch

from ._kv_protocol import Question

CONTEXT = 700  # tokens
FILLER = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
CITIES = ("Lisbon Oslo Cairo Lima Quito Delhi Kyoto Turin Bergen Havana Dakar Perth Sofia Riga Hanoi Nairobi").split()


def passkey_questions(tokenizer: Any, count: int, seed: int) -> list[Question]:
    """A 5-digit key in filler sentences, at depths (i + 0.5) / count."""
    rng = random.Random(seed)
    found = []
    for i in range(count):
        key = f"{rng.randrange(10_000, 100_000)}"
        needle = f" The pass key is {key}. Remember it. {key} is the pass key."
        asked = (" What is the pass key? The pass key is", f" {key}")
        found.append(_planted(tokenizer, [FILLER] * CONTEXT, needle, (i + 0.5) / count, *asked))
    return found


def needle_questions(tokenizer: Any, text: str, count: int, seed: int) -> list[Question]:
    """One sentence with a number for a city in running text."""
    rng = random.Random(seed + 1)
    sentences = [part + " ." for part in text[: count * CONTEXT * 12].split(" .") if part.strip()]
    found, first = [], 0
    for i in range(count):
        city, number = rng.choice(CITIES), f"{rng.randrange(1000, 10_000)}"
        needle = f" The secret number of {city} is {number} ."
        question = _planted(
            tokenizer,
            sentences[first:],
            needle,
            (i + 0.5) / count,
            f" The secret number of {city} is",
            f" {number}",
        )
        found.append(question)
        first = (first + 30) % max(1, len(sentences) - 200)
    return found


def _planted(tokenizer: Any, pieces: list[str], needle: str, depth: float, question: str, answer: str) -> Question:
    """`pieces` cut to 700 tokens with the needle between two of them, at `depth`."""

    def ids(piece: str) -> list[int]:
        return tokenizer(piece, add_special_tokens=False).input_ids

    inside = ids(needle)
    room = CONTEXT - len(inside)
    before: list[int] = []
    rest: list[int] = []
    for piece in pieces:
        part = ids(piece)
        if not rest and len(before) + len(part) <= depth * room:
            before += part
        else:
            rest += part
        if len(before) + len(rest) >= room:
            break
    context = before + inside + rest[: room - len(before)]
    return Question(*(torch.tensor([x]) for x in (context, ids(question), ids(answer))))
