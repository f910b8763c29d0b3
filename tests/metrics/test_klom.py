"""KLoM: margins against logits, histograms by hand and by numpy, and models that are told apart or not."""

import math

import numpy as np
import pytest
import torch

from hfext.metrics.klom import compute, klom, margin, summary


def test_the_margin_is_the_logit_of_the_right_class():
    logits, y = torch.randn(5, 7, dtype=torch.float64), torch.randint(0, 7, (5,))
    p = logits.softmax(-1).gather(-1, y[:, None])[:, 0]
    torch.testing.assert_close(margin(logits, y), torch.log(p / (1 - p)))
    assert margin(torch.tensor([[90.0, 0.0, 0.0]]), torch.tensor([0])).item() == pytest.approx(90 - math.log(2))
    assert margin(torch.randn(2, 3, 4).bfloat16(), torch.zeros(2, 3, dtype=torch.long)).dtype == torch.float64


def test_two_bins_by_hand():
    oracle, unlearned = np.array([[0.0], [0.0], [0.0], [1.0]]), np.array([[0.0], [1.0], [1.0], [1.0]])
    expected = 0.75 * math.log(3) + 0.25 * math.log(1 / 3)
    assert klom(unlearned, oracle, bins=2, smoothing=1e-12).item() == pytest.approx(expected)


def test_histograms_are_those_of_numpy():
    g = np.random.default_rng(0)
    ours, theirs = g.normal(size=(40, 9)), g.normal(size=(30, 9)) * 2 + 1
    for i, value in enumerate(klom(ours, theirs)):
        both = np.concatenate([ours[:, i], theirs[:, i]])
        edges = np.linspace(both.min(), both.max(), 21)
        q, p = (np.histogram(x[:, i], edges)[0] / len(x) + 1e-5 for x in (ours, theirs))
        p, q = p / p.sum(), q / q.sum()
        assert value == pytest.approx((p * np.log(p / q)).sum(), rel=1e-9)


def test_equal_is_0_disjoint_is_the_largest_and_order_does_not_count():
    g = np.random.default_rng(1)
    x = g.normal(size=(50, 4))
    np.testing.assert_allclose(klom(x, x), 0, atol=1e-12)
    np.testing.assert_allclose(klom(np.ones((3, 2)), np.ones((5, 2))), 0, atol=1e-12)
    far = klom(x + 1e3, x, clip=1e4, bins=2)
    np.testing.assert_allclose(far, math.log(1e5), rtol=1e-2)
    y = g.normal(size=(50, 4))
    np.testing.assert_allclose(klom(y[::-1], x), klom(y, x[::-1]))
    assert (klom(y, x) >= 0).all() and not np.allclose(klom(y, x), klom(x, y))


def test_the_clip_bounds_margins():
    x, y = np.array([[1.0], [500.0]]), np.array([[1.0], [90.0]])
    assert klom(x, y, clip=90).item() == pytest.approx(0, abs=1e-12)
    assert klom(x, y, clip=1000).item() > 1


def test_retrained_models_are_near_the_floor_and_untouched_ones_far():
    """Logistic regressions on noisy samples: 60 that saw the forget points, 2 x 60 that did not."""
    g = np.random.default_rng(0)
    forget = g.normal(size=(6, 8))
    labels = np.arange(6) % 2

    def margins(sees):
        x = g.normal(size=(40, 8))
        y = (x[:, 0] + g.normal(size=40) > 0).astype(float)
        if sees:
            x, y = np.r_[x, np.repeat(forget, 5, 0)], np.r_[y, np.repeat(labels, 5)]
        w = np.zeros(8)
        for _ in range(200):
            w -= 0.5 * x.T @ (1 / (1 + np.exp(-x @ w)) - y) / len(y)
        return (forget @ w) * (2 * labels - 1)

    untouched, first, second = (np.stack([margins(sees) for _ in range(60)]) for sees in (True, False, False))
    floor, far = klom(first, second, bins=5).mean(), klom(untouched, second, bins=5).mean()
    assert far > 4 * floor


def test_summaries_and_arrays():
    g = np.random.default_rng(0)
    x, y = torch.tensor(g.normal(size=(20, 5))), g.normal(size=(20, 5))
    values = klom(x, y)
    found = summary(x, y, {"forget": [0, 1], "retain": range(2, 5)})
    assert found["forget"]["mean"] == pytest.approx(values[:2].mean())
    assert found["retain"]["median"] == pytest.approx(np.median(values[2:]))
    assert summary(x, y)["all"]["q95"] == pytest.approx(np.quantile(values, 0.95))
    by_rows = compute(x.T.tolist(), y.T.tolist())
    assert by_rows["scores"] == pytest.approx(values.tolist()) and by_rows["klom"] == pytest.approx(values.mean())


def test_bad_input_is_named():
    x = np.zeros((2, 3))
    for options, message in [
        ({"bins": 0}, "bins is 0"),
        ({"clip": 0}, "clip is 0"),
        ({"smoothing": 0}, "smoothing is 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            klom(x, x, **options)
    with pytest.raises(ValueError, match="unlearned has 3 points and oracle 2"):
        klom(x, x[:, :2])
    with pytest.raises(ValueError, match="oracle has the shape"):
        klom(x, x[0])
    with pytest.raises(ValueError, match="without NaN"):
        klom(x * math.nan, x)
    with pytest.raises(ValueError, match="set 'forget' has no points"):
        summary(x, x, {"forget": []})
    with pytest.raises(ValueError, match="the same models at every point"):
        compute([[1.0], [1.0, 2.0]], [[1.0], [1.0]])
