"""The experiments of FRUGAL and SOAP: bytes against a count by hand, runs kept on disk, a short run of both."""

import json

import pytest
import torch

from hfext import recipe
from hfext.experiments import _optimizer_runs, fewer_tokens, lean_training
from hfext.experiments._data import shared_data
from hfext.experiments._optimizer_runs import Task, kept, tensors

needs_text = pytest.mark.skipif(shared_data("tinyshakespeare") is None, reason="tinyshakespeare is not in shared/data")
TINY = dict(hidden=32, layers=1, length=16, rows=2, texts=4)


def test_tensors_are_found_at_any_depth():
    a, b, c = torch.ones(1), torch.ones(2), torch.ones(3)
    assert [len(x) for x in tensors({"state": {0: {"m": a, "step": 1}, 1: [b, (c,)]}, "name": "x"})] == [1, 2, 3]


@needs_text
def test_bytes_are_those_of_the_moments_and_a_run_is_kept(tmp_path, monkeypatch):
    task = Task(**TINY)
    settings = dict(optim="adamw_torch", optim_args=None, lr=1e-3, steps=4, seed=0)
    first = kept(tmp_path, "a", task, **settings)
    weights = 65 * 32 + 4 * 32 * 32 + 3 * 32 * 96 + 3 * 32
    steps = 4 * (1 + 4 + 3 + 3)  # torch counts updates in a tensor for each parameter
    assert first["peak_bytes"] == first["mean_bytes"] == 8 * weights + steps
    lean = kept(tmp_path, "b", task, **{**settings, "optim": "frugal", "optim_args": "density=0"})
    assert lean["peak_bytes"] == 8 * (65 * 32 + 3 * 32)
    monkeypatch.setattr(_optimizer_runs, "train", lambda *args, **kwargs: {"loss": 7.0})
    assert kept(tmp_path, "a", task, **settings) == first
    assert kept(tmp_path, "a", task, **{**settings, "steps": 5}) == {"loss": 7.0}
    assert json.loads((tmp_path / "a.json").read_text())["settings"]["steps"] == 5


@needs_text
def test_a_short_run_of_lean_training(tmp_path):
    config = lean_training.Config(**TINY, steps=5, update_gap=2, lrs=(1e-3, 1e-2), seeds=1)
    found = lean_training.run(config, tmp_path)
    rows, grid = found["tables"].values()
    assert [r["method"] for r in rows] == [r["method"] for r in grid] == ["AdamW", "FRUGAL", "GaLore", "BAdam"]
    assert rows[0]["peak over AdamW's"] == 1.0 and all(r["peak over AdamW's"] < 0.6 for r in rows[1:])
    for row, losses in zip(rows, grid, strict=True):
        assert row["lr"] == min((1e-3, 1e-2), key=lambda lr: losses[f"lr {lr:g}"])
        assert len(row["each seed"].split()) == 1
    assert found["evidence"]["n"] == 1 and isinstance(found["evidence"]["reproduced"], bool)
    assert len(list((tmp_path / "runs").iterdir())) == 4 * 2


@needs_text
def test_a_short_run_of_fewer_tokens(tmp_path):
    config = fewer_tokens.Config(**TINY, steps=5, shares=(0.4, 0.8), lrs=(1e-3,), seeds=2)
    found = fewer_tokens.run(config, tmp_path)
    rows, grid = found["tables"].values()
    assert [(r["optimizer"], r["updates"]) for r in rows] == [("AdamW", 5), ("SOAP", 2), ("SOAP", 4), ("SOAP", 5)]
    assert len(grid) == 3 and rows[1]["state bytes"] > 2 * rows[0]["state bytes"]
    evidence = found["evidence"]
    assert evidence["n"] == 2 and [len(r["each seed"].split()) for r in rows] == [2, 2, 2, 1]
    assert evidence["ours"] == rows[2]["held-out loss"] and evidence["baseline"] == rows[0]["held-out loss"]
    assert evidence["reproduced"] == (evidence["ours"] <= evidence["baseline"])
    assert "The learning rate of AdamW and SOAP lies at the edge of the grid" in evidence["note"]


def test_the_cost_is_of_the_runs_that_reach_the_loss(tmp_path, monkeypatch):
    """Updates of AdamW take 10 ms, those of SOAP 20 in whole runs and 15 in the run of 80 updates."""

    def made(folder, name, task, *, optim, lr, steps, **options):
        loss = 2.0 + abs(lr - 2e-3) if optim != "soap" else 3.0 - steps / 80
        ms = 10.0 if optim != "soap" else 15.0 if steps == 80 else 20.0
        return {"tuning": loss + abs(lr - 2e-3), "loss": loss, "ms": ms, "peak_bytes": 1}

    monkeypatch.setattr(fewer_tokens, "kept", made)
    config = fewer_tokens.Config(steps=100, shares=(0.4, 0.8), lrs=(1e-3, 2e-3, 4e-3))
    evidence = fewer_tokens.run(config, tmp_path)["evidence"]
    assert evidence["reproduced"] and "takes 1.50 times AdamW's" in evidence["note"]
    assert "the time to that loss is 1.20 of AdamW's" in evidence["note"] and "edge" not in evidence["note"]


def test_the_first_share_below_the_goal():
    assert fewer_tokens.first_share({0.4: 2.0, 0.6: 1.5, 0.8: 1.4}, 1.5) == 0.6
    assert fewer_tokens.first_share({0.4: 2.0}, 1.5) is None


@pytest.mark.parametrize(
    "module, options, message",
    [
        (lean_training, {"steps": 0}, "steps is 0"),
        (lean_training, {"lrs": ()}, "lrs is ()"),
        (lean_training, {"density": 2.0}, "density is 2.0"),
        (fewer_tokens, {"rows": 0}, "rows is 0"),
        (fewer_tokens, {"shares": (0.8, 0.4)}, "shares is (0.8, 0.4) but must hold rising numbers"),
        (fewer_tokens, {"adamw_betas": ()}, "adamw_betas is empty"),
    ],
)
def test_bad_settings_are_named(module, options, message):
    with pytest.raises(ValueError) as error:
        module.Config(**options)
    assert message in str(error.value)


@pytest.mark.parametrize("name, module", [("frugal", lean_training), ("soap", fewer_tokens)])
def test_the_recipes_load(name, module):
    loaded, config = recipe.load(f"optim/{name}-llama-shakespeare")
    assert loaded is module and config.seeds == 2
