"""The experiment of Spark with small settings, and its own arithmetic."""

import pytest
import torch

from hfext.experiments import spark_sparsity as experiment
from hfext.experiments._data import shared_data

SMALL = dict(
    hidden=16, heads=2, units=48, keys=3, steps=3, length=16, rows=2, lrs=(1e-2,), seeds=1, texts=4, every=2,
    decode=(32, 64), runs=3, density=0.25,
)  # fmt: skip


@pytest.mark.skipif(shared_data("tinyshakespeare") is None, reason="tinyshakespeare is not there")
def test_it_runs(tmp_path):
    found = experiment.run(experiment.Config(**SMALL), tmp_path)
    rows, times = found["tables"].values()
    assert {row["its parameters"] for row in rows} == {2 * 2 * 16 * 48}
    assert [row["active units"] == "all" for row in rows] == [True, True, False, False]
    assert all(row["ms"] > 0 for row in times) and (tmp_path / found["artifacts"][0]).is_file()
    assert isinstance(found["evidence"]["reproduced"], bool)


def test_kinds_differ_in_what_they_say_alone():
    config = experiment.Config(**SMALL)
    models = {kind: experiment.make(config, kind, 0, 20) for kind in experiment.KINDS}
    states = {kind: model.state_dict() for kind, model in models.items()}
    attention = "model.layers.0.self_attn.q_proj.weight"
    for kind in ("spark", experiment.KINDS[-1]):
        assert torch.equal(states[kind][attention], states["plain"][attention])
    assert models["spark"].config._attn_implementation == "sdpa"
    assert models[experiment.KINDS[-1]].config._attn_implementation == "hfext_spark"


def test_the_active_part_is_counted():
    config = experiment.Config(**SMALL)
    ids = torch.randint(20, (4, 16))
    assert experiment.active_part(experiment.make(config, "plain", 0, 20), ids) is None
    assert experiment.active_part(experiment.make(config, "spark", 0, 20), ids) == pytest.approx(0.25, abs=0.06)


def test_bad_fields_are_named():
    for fields, match in (
        (dict(seeds=0), "seeds is 0"),
        (dict(density=1.0), "density is 1.0"),
        (dict(lrs=()), "lrs is"),
        (dict(decode=(1, 8)), "decode is"),
    ):
        with pytest.raises(ValueError, match=match):
            experiment.Config(**fields)
