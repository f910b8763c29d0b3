"""The experiments of the schedules with small settings, and their own arithmetic."""

import math

import pytest

from hfext.experiments import rate_transfer, step_law_grids
from hfext.experiments._data import shared_data

needs_text = pytest.mark.skipif(shared_data("tinyshakespeare") is None, reason="tinyshakespeare is not there")
SMALL = dict(hidden=32, layers=1, length=16, texts=8)


def published_file(folder):
    """A made-up grid whose loss is quadratic in the logarithms around rate 0.002 N and 100 rows."""
    path = folder / "steplaw" / step_law_grids.FILE
    path.parent.mkdir()
    lines = ["N,D,lr,bs,smooth loss"]
    for size in (2e8, 4e8, 8e8):
        for tokens in (1e10, 4e10):
            for lr in (0.0005, 0.001, 0.002, 0.004):
                for rows in (50, 100, 200, 400, 800):
                    loss = 2 + 0.1 * math.log(lr / 0.002) ** 2 + 0.1 * math.log(rows / 100) ** 2
                    lines.append(f"{size},{tokens},{lr},{rows},{loss}")
    path.write_text("\n".join(lines) + "\n")
    return path


def test_grids_are_read_and_interpolated(tmp_path):
    grids = step_law_grids.published(published_file(tmp_path))
    assert len(grids) == 6 and all(len(grid) == 20 for grid in grids.values())
    surface = step_law_grids.Surface(grids[2e8, 1e10])
    assert surface.excess(0.002, 100) == pytest.approx(0, abs=1e-12)
    assert surface.excess(0.004, 100) == pytest.approx(100 * 0.1 * math.log(2) ** 2 / 2)
    between = math.sqrt(0.002 * 0.004)
    assert surface.excess(between, 100) == pytest.approx(surface.excess(0.004, 100) / 2)
    assert math.isnan(surface.excess(0.1, 100))
    assert step_law_grids.best_fixed(grids, [surface]) == (0.002, 100)
    assert step_law_grids.refitted(grids, 2e8, 1e10) == pytest.approx((0.002, 100))


@needs_text
def test_the_experiment_on_a_made_up_file(tmp_path):
    published_file(tmp_path)
    (tmp_path / "tinyshakespeare").symlink_to(shared_data("tinyshakespeare").resolve())
    config = step_law_grids.Config(data_dir=str(tmp_path), tokens=128, batches=(2, 4), rates=(0.01, 0.02), **SMALL)
    evidence = step_law_grids.run(config, tmp_path)["evidence"]
    assert evidence["baseline"] == 0 and not evidence["reproduced"] and evidence["n"] == 6


@needs_text
def test_without_the_published_runs_the_tiny_model_is_measured_and_nothing_claimed(tmp_path, monkeypatch):
    monkeypatch.setattr(step_law_grids, "shared_data", lambda *args: None)
    config = step_law_grids.Config(tokens=128, batches=(2, 4), rates=(0.01, 0.02), **SMALL)
    found = step_law_grids.run(config, tmp_path)
    assert "steplaw/dense_lr_bs_loss.csv was not found" in found["partial"]
    assert found["evidence"]["ours"] is None and not found["evidence"]["reproduced"]
    assert len(next(iter(found["tables"].values()))) == 2


def test_regret_is_against_the_best_of_the_same_setting():
    a, b, c = (4, 10), (4, 40), (16, 10)
    found = {("power", 1.0, a): [1.0, 1.2], ("power", 2.0, a): [2.0, 2.0]}
    found |= {("power", 1.0, b): [0.8, 0.9], ("power", 2.0, b): [0.9, 0.9]}
    found |= {("power", 1.0, c): [0.7, 0.7], ("power", 2.0, c): [0.5, 0.6]}
    first, second = rate_transfer.regrets(found, "power", (a, b, c))
    assert first == [0, 0] and second == pytest.approx([0.2, 0.1])


def test_a_best_that_ties_with_the_edge_is_at_the_edge():
    setting = (4, 10)
    found = {("power", a, setting): [2.0, 2.0 + loss] for a, loss in ((0.1, 1.0), (0.2, 0.4), (0.4, 0.4), (0.8, 0.4))}
    assert rate_transfer.ranked(found, "power", setting)[0] == 0.2 and rate_transfer.at_edge(found, "power", setting)
    found["power", 0.8, setting] = [2.4, 2.0]  # the same mean, but another run
    assert not rate_transfer.at_edge(found, "power", setting)
    found["power", 0.1, setting] = [1.0, 1.0]
    assert rate_transfer.at_edge(found, "power", setting)


# Losses over a = 1 ... 4 (power) and peaks 1 ... 4 (cosine) in two settings; power loses nothing, the cosine 1.
CLEAR = {
    ("power", 0): (9, 1, 2, 9), ("power", 1): (9, 1, 1.1, 9), ("cosine", 0): (9, 1, 2, 9), ("cosine", 1): (9, 4, 3, 4)
}  # fmt: skip


@pytest.mark.parametrize(
    "change, reproduced, said",
    [
        ({}, False, "the regrets are 0.1000 and 0.0000"),  # the second best peak loses nothing
        ({("cosine", 1): (9, 4, 5, 3.5)}, False, "At the edge of a grid: cosine at 4 x 40"),
        ({("cosine", 0): (9, 1, 9, 2), ("cosine", 1): (9, 4, 3, 5)}, True, "No best lies at the edge"),
        ({("cosine", 0): (9, 1, 9, 2), ("cosine", 1): (9, 4, 3, 5), ("power", 1): (9, 9, 1, 1)}, False, "edge"),
    ],
)
def test_what_counts_as_reproduced(change, reproduced, said, tmp_path, monkeypatch):
    settings, grid = ((4, 10), (4, 40)), (1.0, 2.0, 3.0, 4.0)
    cells = {
        (name, value, settings[i]): [loss, loss]
        for (name, i), losses in {**CLEAR, **change}.items()
        for value, loss in zip(grid, losses, strict=True)
    }
    monkeypatch.setattr(rate_transfer, "losses", lambda config: cells)
    config = rate_transfer.Config(settings=settings, amplitudes=grid, peaks=grid)
    evidence = rate_transfer.run(config, tmp_path)["evidence"]
    assert evidence["reproduced"] is reproduced and said in evidence["note"]


@needs_text
def test_rate_transfer_runs(tmp_path):
    config = rate_transfer.Config(
        settings=((2, 4), (4, 4)), amplitudes=(0.5, 1.0), peaks=(0.01, 0.02), warmup_steps=1, **SMALL
    )
    found = rate_transfer.run(config, tmp_path)
    assert (tmp_path / "power.png").is_file() and len(found["tables"].popitem()[1]) == 4
    assert found["evidence"]["n"] == 2


@pytest.mark.parametrize(
    "kind, field, value",
    [
        (rate_transfer.Config, "decay", 1.0),
        (rate_transfer.Config, "seeds", 0),
        (rate_transfer.Config, "peaks", (0.1,)),
        (step_law_grids.Config, "tokens", 0),
        (step_law_grids.Config, "warmup", -0.1),
    ],
)
def test_bad_fields_are_named(kind, field, value):
    with pytest.raises(ValueError, match=f"{field} is"):
        kind(**{field: value})
