"""The experiments of the zeroth-order optimizers at their smallest."""

import pytest
import torch

from hfext.experiments import zeroth_adaptation, zo2_equality, zo2_memory
from hfext.experiments._data import shared_data
from hfext.experiments._live_bytes import LiveBytes

needs_texts = pytest.mark.skipif(
    shared_data("tinyshakespeare") is None or shared_data("wikitext2") is None,
    reason="needs shared/data/tinyshakespeare and wikitext2",
)


def test_live_bytes_counts_what_lives_at_one_time():
    with LiveBytes() as seen:
        a = torch.zeros(1000)
        del a
        b = torch.zeros(500)
        c = b[10:20]
    assert seen.peak == 4000 and seen.live == 2000 and len(c) == 10


@needs_texts
@pytest.mark.parametrize("method", ["mezo", "justonebyte"])
def test_adaptation_runs_and_counts(method, tmp_path):
    config = zeroth_adaptation.Config(
        method=method, hidden=32, layers=1, length=16, rows=4, pretrain_steps=3, adam_steps=2, adam_lrs=(1e-3,),
        steps=3, lrs=(1e-4,), samples=2, seeds=1, texts=4,
    )  # fmt: skip
    found = zeroth_adaptation.run(config, tmp_path)
    live = {row["in"]: row["bytes"] for row in found["tables"]["most bytes of new tensors at one time"]}
    assert live["mezo"] <= 1.05 * live["forward pass"] < live["justonebyte"] < live["adamw"]
    assert ("2 bytes an update for 2 samples" in found["evidence"]["note"]) == (method == "justonebyte")


@needs_texts
def test_equality_holds_on_small_models(tmp_path):
    config = zo2_equality.Config(layers=3, length=8, rows=2, steps=2, models=("llama", "gpt2"))
    found = zo2_equality.run(config, tmp_path)["evidence"]
    assert found["ours"] == 0 and found["reproduced"] and found["baseline"] > 0


def test_without_a_gpu_memory_is_not_measured(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    table = next(iter(zo2_memory.run(zo2_memory.Config(), tmp_path)["tables"].values()))
    assert table[0]["device GB"] == "not measured"
    with pytest.raises(ValueError, match="hidden % heads"):
        zo2_memory.Config(large=(10, 20, 2, 3))
