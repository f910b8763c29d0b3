"""Membership scores on Shakespeare: pieces without overlap, a table of every score, and settings that are refused."""

import pytest

from hfext.experiments._data import shared_data
from hfext.experiments.membership import Config, passages, run, scores


def test_passages_are_different_pieces_and_depend_on_the_seed():
    text = "".join(chr(i) for i in range(33, 1000))
    config = Config(passages=20, length=16)
    one = passages(text, config, 0)
    assert len(set("".join(one))) == 20 * 16 and all(len(t) == 16 for t in one)
    assert passages(text, config, 0) == one != passages(text, config, 1)
    with pytest.raises(ValueError, match="passages is 20 but the text has only 6"):
        passages(text[:100], config, 0)


def test_settings_are_checked():
    with pytest.raises(ValueError, match="passages even"):
        Config(passages=9)
    with pytest.raises(ValueError, match=r"epochs is \[3, 2\]"):
        Config(epochs=[3, 2])


@pytest.mark.parametrize("method, name", [("min_k", "Min-20%"), ("renyi", "MaxRenyi-100%, order 0.5")])
def test_a_small_run_fills_the_table(method, name, tmp_path):
    if shared_data("tinyshakespeare") is None:
        pytest.skip("tinyshakespeare is not there")
    found = run(Config(method=method, seeds=2, passages=16, length=24, epochs=[1, 25]), tmp_path)
    table, fit = found["tables"].values()
    assert [row["score"] for row in table] == list(scores(0.2))
    assert all(0 <= row["AUC, 25 epochs"] <= 1 for row in table)
    assert fit[0]["epochs"] == 0 and fit[-1]["loss of members"] < fit[-1]["loss of others"]
    assert found["evidence"]["method"] == name and found["evidence"]["n"] == 2
    assert next(row for row in table if row["score"] == "loss")["AUC, 25 epochs"] > 0.6
