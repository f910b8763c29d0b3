"""The experiment of GR-KAN with small settings, and its own arithmetic."""

import pytest
import torch

from hfext.experiments import rational_activation as experiment


def test_it_runs(tmp_path):
    small = dict(
        rows=64, channels=16, repeats=2, width=8, steps=3, samples=16, tuning_seeds=1, seeds=2, lrs=(1e-2, 1e-3)
    )
    found = experiment.run(experiment.Config(**small), tmp_path)
    costs, *fits = found["tables"].values()
    kept = {row["activation"]: row["kept, in inputs"] for row in costs}
    assert kept["analytic backward"] == pytest.approx(1.0, abs=0.1)
    assert kept["autograd of the formula"] > 5
    assert len(fits) == 2 and all({row["network"] for row in rows} == {"GR-KAN", "GELU MLP"} for rows in fits)
    assert found["evidence"]["ours"] > 0 and isinstance(found["evidence"]["reproduced"], bool)


def test_kept_bytes_counts_each_storage_once():
    x = torch.ones(5, 4, requires_grad=True)
    assert experiment.kept_bytes(lambda: x * x) == 80
    assert experiment.kept_bytes(lambda: x.exp()) == 80


def test_both_networks_begin_with_the_same_first_layer_and_as_many_linear_weights():
    pair = []
    for kan in (True, False):
        torch.manual_seed(0)
        pair.append(experiment.Network(2, 16, kan))
    assert torch.equal(pair[0].enter.weight, pair[1].enter.weight)
    sizes = [sum(p.numel() for n, p in m.named_parameters() if not n.endswith("tor_bias")) for m in pair]
    assert sizes[0] == sizes[1]


def test_data():
    generator = torch.Generator().manual_seed(0)
    x, y = experiment.sine(100, 0.0, generator)
    assert torch.allclose(y, torch.sin(5 * x)) and x.abs().max() <= 3
    x, label = experiment.moons(400, 0.0, generator)
    upper = x[label[:, 0] == 0]
    assert torch.allclose(upper.norm(dim=1), torch.ones(len(upper))) and upper[:, 1].min() >= 0
    lower = torch.tensor([1.0, 0.5]) - x[label[:, 0] == 1]
    assert torch.allclose(lower.norm(dim=1), torch.ones(len(lower)), atol=1e-6)


def test_bad_fields_are_named():
    for fields, match in ((dict(width=12), "width is 12"), (dict(seeds=0), "seeds is 0"), (dict(lrs=()), "lrs is")):
        with pytest.raises(ValueError, match=match):
            experiment.Config(**fields)
