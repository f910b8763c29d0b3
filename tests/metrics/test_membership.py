"""AUC against scikit-learn and pairs, true positives against all thresholds, and the simple scores."""

import math
import zlib

import numpy as np
import pytest
import torch

from hfext.metrics._membership import auc, loss, reference_score, separation, tpr_at_fpr, zlib_score


@pytest.mark.parametrize("levels", [3, 10**6])
def test_auc_is_that_of_scikit_learn_and_the_share_of_pairs(levels):
    from sklearn.metrics import roc_auc_score

    g = np.random.default_rng(0)
    for _ in range(10):
        a, b = g.integers(0, levels, 23), g.integers(0, levels, 31) + levels // 5
        found = auc(a, b)
        pairs = np.mean([(y > x) + 0.5 * (y == x) for x in a for y in b])
        assert found == pytest.approx(pairs, abs=1e-12)
        target = np.r_[np.zeros(len(a)), np.ones(len(b))]
        assert found == pytest.approx(roc_auc_score(target, np.r_[a, b]), abs=1e-12)
        assert auc(b, a) == pytest.approx(1 - found)


def test_auc_at_its_ends():
    assert auc([1, 2], [3, 4]) == 1 and auc([3, 4], [1, 2]) == 0 and auc([1, 1], [1]) == 0.5


@pytest.mark.parametrize("fpr", [0, 0.05, 0.1, 0.37, 1])
def test_true_positives_are_the_best_of_all_thresholds(fpr):
    g = np.random.default_rng(1)
    for levels in (4, 1000):
        a, b = g.integers(0, levels, 20), g.integers(0, levels, 20)
        thresholds = np.r_[-1, a, b]
        best = max(np.mean(a <= t) for t in thresholds if np.mean(b <= t) <= fpr)
        assert tpr_at_fpr(a, b, fpr) == pytest.approx(best)


def test_simple_scores():
    rows = [torch.tensor([-1.0, -3.0]), [-0.5]]
    assert loss(rows).tolist() == [2.0, 0.5]
    texts = ["a" * 500, "what light through yonder window breaks"]
    sizes = [len(zlib.compress(t.encode())) for t in texts]
    assert sizes[0] < sizes[1]
    assert zlib_score(rows, texts).tolist() == pytest.approx([2 / sizes[0], 0.5 / sizes[1]])
    assert reference_score(rows, [[-1.0], [-1.0]]).tolist() == [1.0, -0.5]


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="no rows"):
        loss([])
    with pytest.raises(ValueError, match=r"log_probs\[1\] has the shape"):
        loss([[1.0], []])
    with pytest.raises(ValueError, match="NaN"):
        loss([[math.nan]])
    with pytest.raises(ValueError, match="1 texts for 2 rows"):
        zlib_score([[1.0], [1.0]], ["a"])
    with pytest.raises(ValueError, match="1 rows of the reference for 2"):
        reference_score([[1.0], [1.0]], [[1.0]])
    with pytest.raises(ValueError, match="others has 0 scores"):
        auc([1.0], [])
    with pytest.raises(ValueError, match="fpr is 2"):
        tpr_at_fpr([1.0], [1.0], 2)
    with pytest.raises(ValueError, match="2 values 0 or 1"):
        separation(torch.ones(2, dtype=torch.float64), [0, 2])
