"""The experiment of AdamR: DARE by its moments, the choice of settings, a short run."""

import copy

import pytest
import torch
from torch import nn

from hfext import recipe
from hfext.experiments import pruned_delta
from hfext.experiments.pruned_delta import Config, choose, dare, size_of_delta


def test_dare_drops_its_share_and_keeps_the_mean():
    torch.manual_seed(0)
    base = nn.Linear(200, 100)
    model = copy.deepcopy(base)
    with torch.no_grad():
        model.weight += 1.0
    pruned = dare(model, base, 0.9, seed=0)
    delta = (pruned.weight - base.weight).detach()
    assert (delta != 0).float().mean() == pytest.approx(0.1, abs=0.01)
    torch.testing.assert_close(delta[delta != 0], torch.full_like(delta[delta != 0], 10.0), rtol=1e-5, atol=0)
    assert delta.mean() == pytest.approx(1.0, abs=0.1) and torch.equal(pruned.bias, base.bias)
    torch.testing.assert_close(dare(model, base, 0.0, seed=0).weight, model.weight)
    assert torch.equal(dare(model, base, 0.9, seed=0).weight, pruned.weight)
    assert not torch.equal(dare(model, base, 0.9, seed=1).weight, pruned.weight)
    assert size_of_delta(model, base) == pytest.approx((20000 / 20100) ** 0.5, rel=1e-5)


def test_the_choice_is_what_survives_among_those_that_are_good():
    found = {
        "strong": {0.0: 0.5, 0.9: 0.5},
        "good": {0.0: 0.97, 0.9: 0.3},
        "best": {0.0: 0.99, 0.9: 0.2},
    }
    assert choose(found, (0.9,), 0.95) == "good" and choose(found, (0.9,), 0.98) == "best"
    assert choose(found, (0.9,), 1.0) == "strong"  # nothing is good enough


def test_a_short_run(tmp_path):
    config = Config(
        seeds=2,
        digits=1,
        hidden=32,
        pretraining=4,
        steps=3,
        batch=4,
        lrs=(1e-3,),
        lambdas=(0.1, 1.0),
        draws=1,
        tests=8,
    )
    found = pruned_delta.run(config, tmp_path)
    rows, tried = found["tables"].values()
    assert [r["optimizer"] for r in rows] == ["Adam", "AdamR", pruned_delta.SAME_RATE] and len(tried) == 3
    assert rows[2]["lr"] == rows[1]["lr"] and rows[2]["lambda"] == 0
    sizes = [r["rms of delta"] for r in tried]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 0
    assert {f"right %, drop {d:g}" for d in (0.0, 0.8, 0.9, 0.95, 0.99)} <= set(rows[0])
    left = [r["right %, drop 0.99"] for r in rows[1::-1]]
    assert f"After dropping 99 %, AdamR has {left[0]} and Adam {left[1]} %" in found["evidence"]["note"]
    assert found["evidence"]["n"] == 2 and isinstance(found["evidence"]["reproduced"], bool)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"seeds": 0}, "seeds is 0"),
        ({"hidden": 48}, "hidden is 48"),
        ({"drops": (1.0,)}, "drops is"),
        ({"shown": 0.5}, "shown is 0.5"),
        ({"lambdas": ()}, "lambdas is"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Config(**options)


def test_the_recipe_loads():
    module, config = recipe.load("optim/adamr-llama-dare")
    assert module is pruned_delta and config.seeds == 5 and config.shown in config.drops
