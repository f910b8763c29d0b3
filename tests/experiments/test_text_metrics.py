"""Text metrics against values worked out by hand."""

import math

import pytest

from hfext.experiments._text_metrics import bleu, distinct_n, self_bleu


def test_distinct_n_counts_over_the_whole_set():
    assert distinct_n(["a b a".split(), "a c".split()], 1) == 3 / 5
    assert distinct_n(["a b a".split(), "a b".split(), ["a"]], 2) == 2 / 3
    assert math.isnan(distinct_n([["a"]], 2))
    with pytest.raises(ValueError, match="n is 0"):
        distinct_n([["a"]], 0)


def test_bleu_by_hand():
    """Matches 4 of 5, 2 of 4, 1 of 3, 0 of 2 (smoothed to 0.1); equal lengths."""
    text, reference = "a b c x d".split(), "a b c d e".split()
    assert bleu(text, [reference]) == pytest.approx((4 / 5 * 2 / 4 * 1 / 3 * 0.1 / 2) ** 0.25)


def test_bleu_clips_repeated_words_and_takes_the_nearest_length():
    assert bleu("the the the".split(), ["the cat".split(), "the".split()], 1) == pytest.approx(1 / 3)
    assert bleu("a b".split(), ["a b c".split(), "a b c d e".split()], 1) == pytest.approx(math.exp(1 - 3 / 2))
    assert bleu("a b c".split(), ["a b".split(), "a b c d".split()], 1) == pytest.approx(1.0 * 1)
    assert bleu(["a"], [["b"]]) == 0.0 and bleu([], [["b"]]) == 0.0


def test_self_bleu_of_equal_and_of_unlike_texts():
    same = ["a b c d e".split()] * 3
    assert self_bleu(same) == pytest.approx(1.0)
    assert self_bleu(["a b c d".split(), "e f g h".split()]) == 0.0
    mixed = ["a b c d".split(), "a b c e".split()]
    assert self_bleu(mixed) == self_bleu(mixed[::-1]) == pytest.approx((3 / 4 * 2 / 3 * 1 / 2 * 0.1) ** 0.25)
    with pytest.raises(ValueError, match="at least 2"):
        self_bleu([["a"]])
