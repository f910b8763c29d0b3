"""The coordinate check as a user's tool: their config at any width, a verdict for each layer, bad input."""

import json

import pytest
import torch
from transformers import AutoConfig, LlamaConfig, Qwen3Config

from hfext import recipe
from hfext.experiments import coordinate_check
from hfext.experiments.coordinate_check import Config, config_of, measure, outputs

SMALL = {"num_hidden_layers": 1, "vocab_size": 32}
GPT2 = {"n_embd": 32, "n_head": 2, "n_layer": 1, "vocab_size": 32, "n_positions": 16}


@pytest.fixture
def saved(tmp_path):
    """A folder with the config.json of a Qwen3 with grouped queries, 64 wide."""
    config = Qwen3Config(
        hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, head_dim=16, vocab_size=99
    )
    config.save_pretrained(tmp_path / "mine")
    return tmp_path / "mine"


def test_every_growing_field_is_in_proportion(saved):
    for model in (str(saved), str(saved / "config.json")):
        config = Config(model=model, widths=(32, 128), base_width=64, config_fields=SMALL)
        wide = config_of(config, 128)
        assert (wide.hidden_size, wide.intermediate_size, wide.num_attention_heads) == (128, 192, 8)
        assert (wide.num_key_value_heads, wide.head_dim, wide.vocab_size, wide.num_hidden_layers) == (4, 16, 32, 1)
    heads = ("hidden_size", "intermediate_size", "head_dim")
    wide = config_of(Config(model=str(saved), growing=heads, widths=(32, 128), base_width=64), 128)
    assert (wide.num_attention_heads, wide.head_dim) == (4, 32)
    gpt2 = config_of(Config(model="gpt2", config_fields=GPT2, widths=(32, 64), base_width=32), 64)
    assert (gpt2.n_embd, gpt2.n_head, gpt2.resid_pdrop) == (64, 4, 0.0)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"model": "lama"}, "Did you mean 'llama'"),
        ({"config_fields": {"hidden": 3}, "model": "llama"}, "config_fields has 'hidden'.*Did you mean"),
        ({"growing": ("hiden_size",), "model": "llama"}, "growing has 'hiden_size'.*Did you mean 'hidden_size'"),
        ({"model": "llama", "widths": (64, 100)}, "at width 64, .* would be"),
        ({"growing": ("hidden_size",)}, "give `model` too"),
        ({"model": "llama", "optimizers": ()}, "optimizers is empty"),
        ({"bar": 0.0}, "bar is 0.0"),
        ({"widths": (64,)}, "two or more multiples"),
    ],
)
def test_bad_values_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        Config(**fields)


def test_a_missing_file_is_told_as_such():
    with pytest.raises(FileNotFoundError, match="no/such/config.json"):
        Config(model="no/such/config.json")


@pytest.mark.parametrize("model, fields, task", [("gpt2", GPT2, "causal-lm"), (None, None, "masked-lm")])
def test_a_users_model_is_measured_in_every_layer(model, fields, task, tmp_path):
    if model is None:
        AutoConfig.for_model("bert", hidden_size=32, num_attention_heads=2, intermediate_size=64).save_pretrained(
            tmp_path / "own"
        )
        model, fields = str(tmp_path / "own"), {"num_hidden_layers": 1, "vocab_size": 32}
    config = Config(
        model=model,
        config_fields=fields,
        task=task,
        widths=(32, 64, 128),
        base_width=32,
        seeds=2,
        optimizers=("adam",),
    )
    result = coordinate_check.run(config, tmp_path / "out")
    rows = next(iter(result["tables"].values()))
    assert len(rows) >= 5 and {row["layer"].split(".")[-1] for row in rows} >= (
        {"c_attn", "c_fc", "lm_head"} if task == "causal-lm" else {"query", "dense", "decoder"}
    )
    assert all(row["met"] == (abs(row["muP"]) <= 0.1) for row in rows)
    assert max(row["standard"] for row in rows) > 0.4 > max(abs(row["muP"]) for row in rows)
    assert all((tmp_path / "out" / name).stat().st_size > 5000 for name in result["artifacts"])


def test_a_verdict_can_fail(tmp_path):
    """A learning rate for which no width is right: nothing is called met."""
    config = Config(model="gpt2", config_fields=GPT2, widths=(32, 64), base_width=32, seeds=1, bar=1e-9)
    result = coordinate_check.run(config, tmp_path)
    assert not any(row["met"] for row in next(iter(result["tables"].values())))
    assert result["evidence"]["reproduced"] is False
    assert result["evidence"]["setting"].endswith("; rows x tokens 1 x 6, untied readout begins at 0")


def test_movement_that_shrinks_with_the_width_is_no_success(tmp_path, monkeypatch):
    values = {"muP": [1.0, 0.5], "standard": [1.0, 4.0]}
    monkeypatch.setattr(coordinate_check, "cases", lambda config: [("a model", None, None, "sgd", 0.1)])
    monkeypatch.setattr(coordinate_check, "measure", lambda *args: {"layer": values[args[-1]]})
    result = coordinate_check.run(Config(widths=(64, 128)), tmp_path)
    assert result["evidence"]["ours"] == pytest.approx(1.0) and result["evidence"]["reproduced"] is False


@pytest.mark.parametrize(
    "tied, widths",
    [
        (False, (128, 256, 512)),
        pytest.param(False, (64, 128, 256, 512, 1024), marks=pytest.mark.slow),
        pytest.param(True, (64, 128, 256, 512, 1024), marks=pytest.mark.slow),
    ],
)
def test_a_llama_with_sgd_moves_alike_at_every_width(tied, widths):
    config = Config(widths=widths, seeds=4)
    found = {
        name: (make, loss, kind, lr)
        for name, make, loss, kind, lr in coordinate_check.cases(config)
        if name == f"Llama {'tied' if tied else 'untied'}, SGD"
    }
    ((make, loss, kind, lr),) = found.values()
    for method in coordinate_check.METHODS:
        slopes = {
            name: coordinate_check.slope(config.widths, values)
            for name, values in measure(make, loss, kind, lr, config, method).items()
        }
        assert (max(map(abs, slopes.values())) <= 0.1) == (method == "muP"), slopes


def test_the_readout_begins_at_zero_where_it_is_no_embedding():
    for tied in (False, True):
        make, _ = coordinate_check.case_of_user(
            Config(model="llama", config_fields=LLAMA | {"tie_word_embeddings": tied}, widths=(32, 64), base_width=32)
        )
        model = make(32, 0)
        assert (model.lm_head.weight.abs().max() == 0) == (not tied)
        assert set(outputs(model, lambda m: m(torch.tensor([[3, 4]])).logits)) >= {"lm_head", "model.embed_tokens"}


LLAMA = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2} | SMALL


def test_the_shipped_recipe_is_of_a_users_model():
    module, config = recipe.load("optim/coord_check")
    assert module is coordinate_check and config.model == "llama" and config.optimizers == ("adam", "sgd")
    assert min(config.widths) == 64 and max(config.widths) == 1024
    assert isinstance(config_of(config, 1024), LlamaConfig)
    assert json.dumps(config_of(config, 1024).num_attention_heads) == "64"
