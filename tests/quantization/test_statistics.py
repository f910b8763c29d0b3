"""Tuning of statistics and biases: what is matched, where it is folded in, and that it can be undone."""

import copy

import pytest
import torch
from quantization_cases import MODELS, data, llama
from torch import nn

from hfext.quantization import RTNConfig, quantize, quantized_layers
from hfext.quantization._statistics import batch_loss, channel_statistics, gain_offset, tune_biases, tune_statistics

IDS = data(rows=4, tokens=30)


def pair(kind="biases", bits=2):
    make = MODELS[kind]
    # Float offsets leave a larger error to correct.
    return quantize(make(), RTNConfig(bits=bits, group_size=16, zero_point="float")), make()


@torch.no_grad()
def outputs(model, names):
    seen, hooks = {}, []
    for name in names:
        note = lambda m, args, out, name=name: seen.__setitem__(name, out.flatten(0, -2).double())  # noqa: E731
        hooks.append(model.get_submodule(name).register_forward_hook(note))
    model(IDS)
    for hook in hooks:
        hook.remove()
    return seen


def settings(**more):
    return dict(sequence_length=30, batch_size=4, **more)


@pytest.mark.parametrize("kind", ["biases", "opt"])
def test_bias_correction_leaves_no_mean_error(kind):
    model, plain = pair(kind)
    names = list(quantized_layers(model))
    before, want = outputs(model, names), outputs(plain, names)
    far = max((before[n].mean(0) - want[n].mean(0)).abs().max() for n in names)
    tuning = tune_statistics(model, plain, IDS, **settings())
    after = outputs(model, names)
    worst = max((after[n].mean(0) - want[n].mean(0)).abs().max() for n in names)
    assert far > 1e-3 and worst < 1e-6
    rows = {row["name"]: row for row in tuning.report}
    assert all(rows[n]["by"] == "bias" and rows[n]["means after"] < 1e-12 for n in names)


def test_deviations_are_folded_into_scales():
    model, plain = pair()
    names = list(quantized_layers(model))
    want = outputs(plain, names)
    codes = {n: layer.codes for n, layer in quantized_layers(model).items()}
    tuning = tune_statistics(model, plain, IDS, std=True, **settings())
    after = outputs(model, names)
    for n in names:
        assert (after[n].mean(0) - want[n].mean(0)).abs().max() < 1e-6
        # Scales are stored in half precision.
        torch.testing.assert_close(after[n].std(0, correction=0), want[n].std(0, correction=0), rtol=4e-3, atol=0)
        assert torch.equal(codes[n], model.get_submodule(n).codes)
    assert {row["by"] for row in tuning.report if row["name"] in names} == {"bias and scales"}


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_without_biases_the_gain_of_norms_matches_deviations(kind):
    model, plain = pair(kind)
    tuning = tune_statistics(model, plain, IDS, **settings())
    names = [row["name"] for row in tuning.report]
    norms = [n for n, m in model.named_modules() if "norm" in type(m).__name__.lower()]
    assert sorted(names) == sorted(norms) and {row["by"] for row in tuning.report} == {"norm gain"}
    after, want = outputs(model, names), outputs(plain, names)
    for n in names:
        torch.testing.assert_close(after[n].std(0, correction=0), want[n].std(0, correction=0), rtol=1e-4, atol=1e-6)
    assert sum(row["stds after"] for row in tuning.report) < 1e-6 * sum(row["stds before"] for row in tuning.report)


def test_norms_of_layers_with_biases_are_left_to_the_biases():
    model, plain = pair("biases")
    names = {row["name"] for row in tune_statistics(model, plain, IDS, **settings()).report}
    assert not any("layernorm" in n for n in names) and "model.norm" in names
    model, plain = pair("llama")
    report = tune_statistics(model, plain, IDS, norms=False, **settings()).report
    assert report == [{"block": f"model.layers.{i}", "name": "", "by": "nothing"} for i in range(2)]


@pytest.mark.parametrize("tune", [tune_statistics, tune_biases])
def test_everything_can_be_undone(tune):
    model, plain = pair()
    before = copy.deepcopy(model.state_dict())
    wanted = [p.requires_grad for p in model.parameters()]
    tuning = tune(model, plain, IDS, **settings())
    changed = [key for key, x in model.state_dict().items() if not torch.equal(x, before[key])]
    assert changed and all(key.endswith((".bias", "norm.weight")) for key in changed)
    assert [p.requires_grad for p in model.parameters()] == wanted
    tuning.undo()
    assert all(torch.equal(x, before[key]) for key, x in model.state_dict().items())


def test_the_offset_of_a_gain_is_found():
    for kind, offset in (("llama", 0), ("gemma3", 1)):
        norm = MODELS[kind]().model.norm
        assert gain_offset(norm, torch.randn(3, 32)) == offset
    norm = nn.LayerNorm(8)
    nn.init.normal_(norm.bias)
    assert gain_offset(norm, torch.randn(3, 8)) == 0


def test_channel_statistics_over_several_batches():
    layer = nn.Sequential(nn.Linear(4, 3))
    x = torch.randn(50, 4) + 100
    mean, std, _ = channel_statistics(layer, "0", lambda: [layer(part[None]) for part in x.split(7)])
    y = layer(x).double()
    torch.testing.assert_close(mean, y.mean(0))
    torch.testing.assert_close(std, y.std(0, correction=0))


@pytest.mark.parametrize("loss", ["kl", "ce"])
def test_tuned_biases_lower_the_loss(loss):
    model, plain = pair()
    with torch.no_grad():
        start = float(batch_loss(model, plain, IDS, loss))
    reference, lr = (plain, 3e-4) if loss == "kl" else (None, 3e-3)
    tuning = tune_biases(model, reference, IDS, loss=loss, epochs=6, lr=lr, **settings())
    with torch.no_grad():
        end = float(batch_loss(model, plain, IDS, loss))
    losses = [row["loss"] for row in tuning.report]
    # A divergence near 1e-4 has an error of some 1e-6 in float32.
    close = dict(rel=1e-5, abs=5e-6)
    assert losses[0] == pytest.approx(start, **close) and end == pytest.approx(min(losses), **close)
    assert end < (0.85 if loss == "kl" else 0.995) * start
    assert [row["kept"] for row in tuning.report].count(True) == 1


def test_the_losses_are_those_of_their_formulas():
    model, plain = pair()
    with torch.no_grad():
        p, q = (m(IDS).logits[:, :-1].double().softmax(-1) for m in (plain, model))
        kl = (p * (p / q).log()).sum(-1).mean()
        ce = model(IDS, labels=IDS).loss
        assert float(batch_loss(model, plain, IDS, "kl")) == pytest.approx(float(kl), rel=1e-4)
        assert float(batch_loss(model, None, IDS, "ce")) == pytest.approx(float(ce), rel=1e-5)


def test_a_rate_that_is_too_large_changes_nothing():
    model, plain = pair()
    before = copy.deepcopy(model.state_dict())
    report = tune_biases(model, plain, IDS, lr=1.0, epochs=2, **settings()).report
    assert report[0]["kept"]
    assert all(torch.equal(x, before[key]) for key, x in model.state_dict().items())


def test_half_precision_models_keep_their_types():
    plain = llama(attention_bias=True, mlp_bias=True).to(torch.bfloat16)
    model = quantize(copy.deepcopy(plain), RTNConfig(bits=2, group_size=16))
    kinds = {key: x.dtype for key, x in model.state_dict().items()}
    report = tune_biases(model, plain, IDS, epochs=4, lr=3e-4, **settings()).report
    assert min(row["loss"] for row in report) < 0.9 * report[0]["loss"]
    report = tune_statistics(model, plain, IDS, **settings()).report
    means = [sum(row[f"means {when}"] for row in report) for when in ("before", "after")]
    assert means[1] < means[0]
    assert {key: x.dtype for key, x in model.state_dict().items()} == kinds


def test_models_without_biases_are_tuned_through_their_norms():
    model, plain = pair("llama")
    with pytest.raises(ValueError, match="norms is False but must be True"):
        tune_biases(model, plain, IDS)
    report = tune_biases(model, plain, IDS, norms=True, lr=3e-3, **settings()).report
    assert min(row["loss"] for row in report) < 0.95 * report[0]["loss"]


def test_bad_input_is_named():
    model, plain = pair()
    with pytest.raises(ValueError, match="no layers that hfext has quantised"):
        tune_statistics(plain, plain, IDS)
    with pytest.raises(ValueError, match="reference is quantised"):
        tune_statistics(model, model, IDS)
    with pytest.raises(ValueError, match="other blocks"):
        tune_statistics(model, llama(num_hidden_layers=3), IDS)
    with pytest.raises(ValueError, match="set dataset="):
        tune_statistics(model, plain, None)
    with pytest.raises(ValueError, match="loss is 'mse' but must be one of kl, ce"):
        tune_biases(model, plain, IDS, loss="mse")
    with pytest.raises(ValueError, match="reference is None"):
        tune_biases(model, None, IDS)
    with pytest.raises(ValueError, match="lr is 0"):
        tune_biases(model, plain, IDS, lr=0.0)
