import sys

import numpy as np
import pytest

from hfext.experiments._plots import lines

pytest.importorskip("matplotlib")


def test_lines_draws_each_series_without_pyplot(tmp_path):
    """pyplot would choose a backend and keep figures for the whole process."""
    pyplot = "matplotlib.pyplot" in sys.modules
    x = np.array([1.0, 10.0, 100.0])
    series = {
        "plain": ([1, 10, 100], [1, 2, 3], None),
        "width": (x, x, 0.1 * x),
        "pair": (x, 2 * x, (x, 3 * x)),
    }
    path = lines(tmp_path / "new" / "plot.png", series, xlabel="x", ylabel="y", title="t", logx=True, logy=True)
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5_000
    assert ("matplotlib.pyplot" in sys.modules) == pyplot

    empty = lines(tmp_path / "empty.png", {})
    assert empty.read_bytes() != path.read_bytes()


def test_a_band_must_have_one_width_per_point(tmp_path):
    with pytest.raises(ValueError):
        lines(tmp_path / "plot.png", {"a": ([1, 2], [1, 2], [0.1])})
