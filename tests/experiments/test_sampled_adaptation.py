"""The experiment of WTA-CRS with small settings, and its own arithmetic."""

import pytest
import torch

from hfext.experiments import sampled_adaptation as experiment
from hfext.experiments._data import shared_data
from hfext.modules import WTACRSConfig
from hfext.modules.wta_crs import probabilities, tails


def test_the_closed_form_of_the_variance_by_hand():
    """Two rows, one draw: the estimate is x_i g_i / p_i with probability p_i."""
    x, g = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [1.0]])
    p = probabilities(torch.tensor([3.0, 1.0]))
    exact = 5.0
    by_hand = sum(q * (value / q - exact) ** 2 for q, value in zip(p.tolist(), (3.0, 2.0), strict=True)) / exact**2
    assert experiment.variance(x, g, p, 1, 0) == pytest.approx(by_hand, rel=1e-9)
    assert tails(p)[1].item() == pytest.approx(0.25, rel=1e-6)


def test_the_layers_keep_the_part_that_is_asked_for(tiny_llama):
    model, batch = tiny_llama(), torch.randint(3, 128, (8, 32))
    kept = experiment.memory(model, {"input_ids": batch, "labels": batch}, WTACRSConfig(ratio=0.25))
    exact, sampled = kept["linear layers"]
    # Of a layer: the two normed inputs, the heads' outputs, and the inner activations.
    assert exact == 2 * 256 * (3 * 32 + 64) * 4
    assert sampled == 2 * 64 * ((3 * 32 + 64) * 4 + 4 * 8)  # and indices and scales
    assert 0 < kept["whole model"][0] - kept["whole model"][1] <= exact - sampled


@pytest.mark.skipif(
    shared_data("tinyshakespeare") is None or shared_data("banking77") is None,
    reason="tinyshakespeare or banking77 is not there",
)
def test_it_runs(tmp_path):
    small = dict(hidden=32, layers=1, length=16, base_steps=3, windows=16, epochs=2, seeds=1, texts=8)
    small |= dict(intent_epochs=1, intent_seeds=1, questions=40)
    found = experiment.run(experiment.Config(others=((0.5, "activation", "paper"),), **small), tmp_path)
    losses = {
        row["adapted"]: row["held-out loss"]
        for row in found["tables"]["Characters of Tiny Shakespeare: held-out loss, nats"]
    }
    assert list(losses) == ["before", "exact", "WTA-CRS 0.3, cache", "WTA-CRS 0.5, activation"]
    assert losses["exact"] < losses["before"]


def test_bad_fields_are_named():
    with pytest.raises(ValueError, match="windows is 0"):
        experiment.Config(windows=0)
    with pytest.raises(ValueError, match="ratio is 2.0"):
        experiment.Config(others=((2.0, "cache", "paper"),))
