"""The experiment of TokenFormer with small settings, and its own arithmetic."""

import pytest
import torch

from hfext.experiments import token_growth as experiment
from hfext.experiments._data import shared_data

SMALL = dict(
    hidden=16, heads=2, tokens=(8, 12, 16), steps=3, length=16, rows=2, lrs=(1e-2,), seeds=1, texts=4, every=3
)


@pytest.mark.skipif(shared_data("tinyshakespeare") is None, reason="tinyshakespeare is not there")
def test_it_runs(tmp_path):
    found = experiment.run(experiment.Config(**SMALL), tmp_path)
    (rows,) = found["tables"].values()
    work = {row["model"]: row["work of Pattention"] for row in rows}
    assert work["from scratch"] == 1.0 and work["grown"] == pytest.approx((8 + 12 + 16) / 48, abs=1e-3)
    jumps = {row["model"]: row["largest change at growth"] for row in rows}
    assert jumps["grown"] < 2e-6 < jumps["grown as the authors do"] and jumps["from scratch"] is None
    assert (tmp_path / found["artifacts"][0]).is_file()


def test_all_kinds_see_the_same_batches_and_end_with_as_many_tokens(monkeypatch):
    config = experiment.Config(**SMALL)
    ids = torch.randint(20, (400,), generator=torch.Generator().manual_seed(0))
    seen = {}
    forward = experiment.TokenFormerForCausalLM.forward

    def watched(self, x, labels=None, **kwargs):
        if self.training:
            seen.setdefault(kind, []).append((x.clone(), self.config.num_ffn_tokens))
        return forward(self, x, labels=labels, **kwargs)

    monkeypatch.setattr(experiment.TokenFormerForCausalLM, "forward", watched)
    for kind in experiment.KINDS:
        experiment.train(config, kind, 1e-2, 0, (ids, ids, 20))
    assert [n for _, n in seen["grown"]] == [8] * 3 + [12] * 3 + [16] * 3
    for kind in experiment.KINDS:
        assert all(torch.equal(a, b) for (a, _), (b, _) in zip(seen[kind], seen["grown"], strict=True))


def test_bad_fields_are_named():
    for fields, match in (
        (dict(tokens=(8,)), "tokens is"),
        (dict(tokens=(8, 8)), "growing"),
        (dict(seeds=0), "seeds is 0"),
    ):
        with pytest.raises(ValueError, match=match):
            experiment.Config(**fields)
