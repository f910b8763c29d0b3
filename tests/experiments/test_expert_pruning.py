"""The experiment of UNCURL, small: what it compares and what it says."""

import functools

import pytest
import torch

from hfext.experiments import expert_pruning
from hfext.experiments._data import shared_data
from hfext.modules._experts import find_blocks


def small(**fields):
    defaults = dict(
        hidden=32, layers=1, intermediate=16, experts=[4], length=16, rows=4, steps=6, calibration=8, draws=2, seeds=2,
        texts=8, reductions=[1.0, 2.0],
    )  # fmt: skip
    return expert_pruning.Config(**{**defaults, **fields})


@pytest.mark.skipif(
    shared_data("tinyshakespeare") is None or shared_data("wikitext2") is None, reason="the two texts are not here"
)
def test_it_runs_and_reports(tmp_path):
    found = expert_pruning.run(small(), tmp_path)
    rows = found["tables"]["4 experts, 2 active: held-out nats a byte, mean of the texts"]
    assert [row["kept"] for row in rows] == [4, 2]
    ways = ("task", "task, merged", "agnostic", "random", "the other task")
    assert len({rows[0][way] for way in ways}) == 1  # all kept: one model
    evidence = found["evidence"]
    assert evidence["n"] == 2 and isinstance(evidence["reproduced"], bool)
    assert evidence["ours"] == pytest.approx(rows[1]["task"], abs=1e-4)
    assert evidence["baseline"] == pytest.approx(rows[1]["agnostic"], abs=1e-4)


def test_random_choices_differ_by_layer_and_repeat_by_seed():
    texts = {"a": (torch.arange(4096) % 97, torch.arange(512) % 97), "b": (torch.arange(4096) % 89, torch.zeros(1))}
    config = small(layers=2, experts=[8])
    chosen = []
    for seed in (0, 0, 1):
        model = expert_pruning.trained(config, 8, 0, texts)
        before = {b.name: b.router.weight.clone() for b in find_blocks(model)}
        expert_pruning.at_random(model, 3, seed, torch.arange(16)[None])
        chosen.append(
            [[(before[b.name] == row).all(-1).nonzero().item() for row in b.router.weight] for b in find_blocks(model)]
        )
    assert chosen[0] == chosen[1] != chosen[2] and chosen[0][0] != chosen[0][1]


def test_half_of_every_batch_is_of_each_text(monkeypatch):
    seen = []
    texts = {"a": (torch.zeros(4096).long(), None), "b": (torch.ones(4096).long(), None)}
    original = expert_pruning.MixtralForCausalLM.forward

    @functools.wraps(original)  # the Trainer reads the signature
    def forward(self, input_ids=None, **kwargs):
        seen.append(input_ids[:, 0].tolist())
        return original(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(expert_pruning.MixtralForCausalLM, "forward", forward)
    expert_pruning.trained(small(), 4, 0, texts)
    assert seen == [[0, 0, 1, 1]] * 6


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rows": 3}, "rows is 3"),
        ({"experts": [1]}, "experts is"),
        ({"about": 3.0}, "reductions is"),
        ({"steps": 0}, "steps is 0"),
        ({"score": "loss"}, "score is 'loss'"),
    ],
)
def test_bad_fields(fields, words):
    with pytest.raises(ValueError, match=words):
        small(**fields)
