"""Diversity of a set of texts, given as lists of words or token ids."""

import math
from collections import Counter
from collections.abc import Hashable, Sequence

Text = Sequence[Hashable]
_EPSILON = 0.1


def distinct_n(texts: Sequence[Text], n: int) -> float:
    """Different n-grams over all n-grams of the set, in (0, 1]; `nan` when no text has n tokens."""
    if n < 1:
        raise ValueError(f"n is {n} but must be >= 1.")
    counts = sum((ngrams(text, n) for text in texts), Counter())
    return len(counts) / counts.total() if counts else math.nan


def self_bleu(texts: Sequence[Text], max_n: int = 4) -> float:
    """Mean BLEU of each text against all others as its references: 1 for equal texts, near 0 for unlike ones."""
    if len(texts) < 2:
        raise ValueError(f"texts holds {len(texts)} but Self-BLEU compares at least 2.")
    scores = [bleu(text, [*texts[:i], *texts[i + 1 :]], max_n) for i, text in enumerate(texts)]
    return sum(scores) / len(scores)


def bleu(text: Text, references: Sequence[Text], max_n: int = 4) -> float:
    """BLEU of one sentence with equal weights and smoothing method 1: a precision without a match counts 0.1 matches.

    A text without any word of the references has 0.
    """
    if not text:
        return 0.0
    logs = 0.0
    for n in range(1, max_n + 1):
        own = ngrams(text, n)
        known = Counter()
        for reference in references:
            known |= ngrams(reference, n)
        matches = (own & known).total()
        if n == 1 and not matches:
            return 0.0
        logs += math.log((matches or _EPSILON) / max(own.total(), 1))
    nearest = min((len(reference) for reference in references), key=lambda size: (abs(size - len(text)), size))
    brevity = 1.0 if len(text) > nearest else math.exp(1 - nearest / len(text))
    return brevity * math.exp(logs / max_n)


def ngrams(text: Text, n: int) -> Counter:
    return Counter(tuple(text[i : i + n]) for i in range(len(text) - n + 1))
