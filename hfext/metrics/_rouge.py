"""ROUGE-L and ROUGE-1 of two texts: the longest common subsequence, or the common words, of their words.

Words are runs of a-z and 0-9 of the text in lower case; the stemmer, where asked for, stems those of more than three
letters. recall = common / words of the reference, precision = common / words of the prediction, F1 their harmonic
mean; all are 0 where either text has no words.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ._porter import stem


@dataclass(frozen=True)
class Rouge:
    """Recall, precision and their harmonic mean."""

    recall: float
    precision: float
    f1: float


def words(text: str, stemmer: bool = False) -> list[str]:
    found = re.findall("[a-z0-9]+", text.lower())
    return [stem(word) if len(word) > 3 else word for word in found] if stemmer else found


def common_subsequence(a: Sequence, b: Sequence) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for x in a:
        before = 0
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], before + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]


def _rouge(common: int, prediction: int, reference: int) -> Rouge:
    recall, precision = common / max(reference, 1), common / max(prediction, 1)
    return Rouge(recall, precision, 2 * recall * precision / (recall + precision) if common else 0.0)


def rouge_l(prediction: str, reference: str, stemmer: bool = False) -> Rouge:
    """By the longest common subsequence."""
    a, b = words(prediction, stemmer), words(reference, stemmer)
    return _rouge(common_subsequence(a, b), len(a), len(b))


def rouge_1(prediction: str, reference: str, stemmer: bool = False) -> Rouge:
    """By the common words, each as often as it stands in both."""
    a, b = words(prediction, stemmer), words(reference, stemmer)
    return _rouge(sum((Counter(a) & Counter(b)).values()), len(a), len(b))


def check_pairs(predictions: Sequence[str], references: Sequence[str]) -> None:
    """Raise unless both have the same number >= 1 of strings."""
    if len(predictions) != len(references) or not len(predictions):
        raise ValueError(f"{len(predictions)} predictions and {len(references)} references: need as many, and >= 1.")
    for name, texts in (("predictions", predictions), ("references", references)):
        wrong = next((i for i, text in enumerate(texts) if not isinstance(text, str)), None)
        if wrong is not None:
            raise TypeError(f"{name}[{wrong}] is a {type(texts[wrong]).__name__} but must be a string.")
