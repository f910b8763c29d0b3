"""The SSD experiment: the attack on membership, and a short run of all of it."""

import pytest
import torch
from torch import nn

pytest.importorskip("sklearn")

from hfext.experiments._digits import Digits  # noqa: E402
from hfext.experiments.ssd_digits import Config, membership, run  # noqa: E402


class Sharpness(nn.Module):
    """Outputs as sure as the picture is bright."""

    def forward(self, pixel_values):
        logits = pixel_values.mean((1, 2, 3))[:, None] * torch.tensor([1.0, 0.0])
        return type("Outputs", (), {"logits": logits})


def rows(low, high, n=60):
    values = torch.linspace(low, high, n)[:, None, None, None].expand(n, 1, 8, 8)
    return Digits(values, torch.zeros(n, dtype=torch.long))


def test_the_attack_takes_sure_outputs_for_members():
    sure, doubtful = rows(5, 6), rows(0, 1)
    assert membership(Sharpness(), sure, sure, doubtful) == 100
    assert membership(Sharpness(), doubtful, sure, doubtful) == 0
    both = Digits(*(torch.cat([getattr(d, n) for d in (sure, doubtful)]) for n in ("pixel_values", "labels")))
    assert membership(Sharpness(), both, sure, doubtful) == 50


def test_a_short_run(tmp_path):
    config = Config(hidden=16, layers=1, epochs=2, rival_epochs=1, ascent_epochs=1, seeds=1, alphas=(1.2, 1e9))
    found = run(config, tmp_path)
    by_class, by_rows = found["tables"].values()
    assert [r["method"] for r in by_class] == [
        "none", "retrain", "finetune", "ascent", "random_labels", "ssd(alpha=1.2)", "ssd(alpha=1e+09)"
    ]  # fmt: skip
    none, same = by_class[0], by_class[-1]
    assert same["selected %"] == 0 and all(same[k] == none[k] for k in none if k.endswith("%") and k != "selected %")
    retrained = by_class[1]
    assert retrained["forget %"] == 0 and retrained["test of the class %"] == 0
    assert by_rows[0]["test of the class %"] is None and by_rows[5]["selected %"] > 0
    assert found["evidence"]["method"] == "ssd(alpha=1.2)" and isinstance(found["evidence"]["reproduced"], bool)


def test_bad_options_are_named():
    for options, message in (
        ({"seeds": 0}, "seeds is 0"),
        ({"alphas": (0.0,)}, "alphas is"),
        ({"importance_batch": 64}, "importance_batch is 64 but must be <= random_rows"),
    ):
        with pytest.raises(ValueError, match=message):
            Config(**options)
