"""What every quantiser of weights must do, over the list of `quantization_cases.py`."""

import copy
import importlib
import json

import peft
import pytest
import torch
from quantization_cases import CASES, MODELS, SIZES, data, llama
from torch import nn
from transformers import AutoModelForCausalLM

import hfext
from hfext.quantization import CalibratedConfig, QuantLinear, dequantize, quantize
from hfext.quantization._config import WeightConfig
from hfext.quantization._quantizer import quantized_layers

every_case = pytest.mark.parametrize("name", CASES)
CALIBRATED = [name for name in CASES if isinstance(CASES[name](), CalibratedConfig)]
IDS = data(rows=2, tokens=24, seed=1)


@torch.no_grad()
def logits(model, ids=IDS):
    return model(ids).logits.float()


def saved(model, folder):
    model.save_pretrained(folder)
    return folder


def reloaded(folder, **options):
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model


# Every architecture by one method, and every method by two architectures; the rest of the grid is slow.
GRID = [
    pytest.param(name, kind, marks=[] if name == "rtn" or kind in ("llama", "mixtral") else pytest.mark.slow)
    for name in CASES
    for kind in MODELS
]


@pytest.mark.parametrize(("name", "kind"), GRID)
def test_eight_bits_are_nearly_lossless_and_come_back_bit_equal_twice(name, kind, tmp_path):
    model = MODELS[kind]()
    want = logits(model)
    quantize(model, CASES[name](bits=8))
    got = logits(model)
    # By token, as a router may send one to another expert.
    assert ((got - want).norm(dim=-1) / want.norm(dim=-1)).median() <= 0.02
    layers = quantized_layers(model)
    assert len(layers) == len(quantized_layers(reloaded(saved(model, tmp_path / "1"))))
    once = reloaded(tmp_path / "1")
    assert torch.equal(logits(once), got)
    assert torch.equal(logits(reloaded(saved(once, tmp_path / "2"))), got)
    head = model.get_output_embeddings()
    assert head is None or type(head) is nn.Linear


WIDTHS = [
    pytest.param(name, bits, marks=[] if name == "rtn" or bits == 3 else pytest.mark.slow)
    for name in CASES
    for bits in (2, 3, 4, 8)
]


@pytest.mark.parametrize(("name", "bits"), WIDTHS)
def test_packed_weights_have_the_size_they_claim(name, bits, tmp_path):
    model = quantize(llama(hidden_size=64, intermediate_size=192), CASES[name](bits=bits, group_size=32))
    for layer in quantized_layers(model).values():
        held = sum(x.numel() * x.element_size() for x in layer.state_dict().values())
        weights = layer.in_features * layer.out_features
        claimed = SIZES[name](layer) if name in SIZES else bits + 32 / 32
        assert held * 8 / weights == pytest.approx(claimed, abs=0.01)


@every_case
def test_from_pretrained_equals_quantize(name, tmp_path):
    model = llama(attention_bias=True)
    folder = saved(model, tmp_path / "plain")
    loaded = AutoModelForCausalLM.from_pretrained(folder, quantization_config=CASES[name](bits=3))
    assert torch.equal(logits(loaded), logits(quantize(model, CASES[name](bits=3))))
    with_cache = hfext.CompressionConfig(weights=CASES[name](bits=3), kv_cache=hfext.kv_cache.KIVIConfig(group_size=4))
    both = AutoModelForCausalLM.from_pretrained(folder, quantization_config=with_cache)
    assert torch.equal(logits(both), logits(loaded))
    again = reloaded(saved(both, tmp_path / "both"))
    assert torch.equal(logits(again), logits(loaded))
    settings = dict(max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert torch.equal(both.generate(IDS, **settings), again.generate(IDS, **settings))


@every_case
def test_the_config_is_plain_json_and_comes_back_equal(name):
    config = CASES[name](bits=3, modules_to_not_convert=["q_proj"])
    written = json.loads(json.dumps(hfext.CompressionConfig(weights=config).to_dict()))
    again = hfext.CompressionConfig.from_dict(written).weights
    assert type(again) is type(config)
    assert again.to_dict() == config.to_dict()
    assert "dataset" not in written["weights"]
    alone = hfext.CompressionConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert alone.weights.to_dict() == config.to_dict()
    with pytest.raises(TypeError, match="Did you mean 'group_size'"):
        type(config)(group_siz=16)
    with pytest.raises(ValueError, match=r"bits is 5 but must be one of"):
        CASES[name](bits=5)
    with pytest.raises(ValueError, match="group_size is 0 but must be in"):
        CASES[name](group_size=0)


@every_case
def test_bits_by_layer(name, tmp_path):
    model = llama()
    linears = [key for key, m in model.model.layers.named_modules() if isinstance(m, nn.Linear)]
    bits = {f"model.layers.{key}": (2, 3, 4, 8, 16)[i % 5] for i, key in enumerate(linears)}
    quantize(model, CASES[name](bits=bits))
    found = {key: layer.bits for key, layer in quantized_layers(model).items()}
    assert found == {key: b for key, b in bits.items() if b != 16}
    again = reloaded(saved(model, tmp_path))
    assert torch.equal(logits(again), logits(model))
    assert {key: layer.bits for key, layer in quantized_layers(again).items()} == found


@every_case
def test_layers_can_be_left_out_or_skipped(name, tmp_path):
    model = llama()
    config = CASES[name](bits=3, modules_to_not_convert=["down_proj", r"model\.layers\.0\."])
    assert all("layers.1" in key and "down" not in key for key in quantized_layers(quantize(model, config)))
    odd = llama(intermediate_size=40)
    with pytest.raises(ValueError, match=r"down_proj: group_size is 16 but must divide the 40 inputs"):
        quantize(odd, CASES[name](bits=4))
    assert not quantized_layers(odd)
    config = CASES[name](bits=4, on_unsupported="skip")
    quantize(odd, config)
    assert config.skipped_modules == [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    assert torch.equal(logits(reloaded(saved(odd, tmp_path))), logits(odd))


@every_case
def test_half_precision_models(name, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(saved(llama(), tmp_path / "plain"), dtype=torch.bfloat16)
    want = logits(llama())
    quantize(model, CASES[name](bits=8))
    assert (logits(model) - want).norm() <= 0.03 * want.norm()
    again = reloaded(saved(model, tmp_path / "packed"))
    assert again.dtype == torch.bfloat16
    assert torch.equal(logits(again), logits(model))
    layer = next(iter(quantized_layers(again).values()))
    before = {key: x.clone() for key, x in layer.state_dict().items() if key != "bias"}
    again.to(torch.float32).to(torch.bfloat16)
    assert all(torch.equal(before[key], x) for key, x in layer.state_dict().items() if key != "bias")


@every_case
def test_dequantising_keeps_the_outputs(name, tmp_path):
    model = quantize(llama(), CASES[name](bits=3))
    got = logits(model)
    assert model.dequantize() is model
    assert not quantized_layers(model) and not hasattr(model.config, "quantization_config")
    torch.testing.assert_close(logits(model), got, atol=1e-5, rtol=0)
    plain = AutoModelForCausalLM.from_pretrained(saved(model, tmp_path))
    assert torch.equal(logits(plain), logits(model))


@every_case
def test_adapters_train_on_top_and_are_never_lost_in_a_merge(name):
    model = quantize(llama(), CASES[name](bits=3))
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, lora)
    adapted(IDS, labels=IDS).loss.backward()
    grads = {key: p.grad for key, p in adapted.named_parameters() if p.requires_grad}
    assert grads and all("lora" in key and g is not None and g.abs().sum() > 0 for key, g in grads.items())
    want = logits(adapted)
    for options in ({}, {"safe_merge": True}):
        with pytest.raises(NotImplementedError, match="dequantize"):
            copy.deepcopy(adapted).merge_and_unload(**options)
    dequantize(adapted)
    torch.testing.assert_close(logits(adapted.merge_and_unload()), want, atol=1e-5, rtol=0)


@every_case
def test_bad_weights_are_named(name):
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = torch.nan
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError,
        match=r"model\.layers\.1\.[\w.]*: its (weight|calibration input|output) holds NaN|"
        r"model\.layers\.1: its output holds NaN",
    ):
        quantize(model, CASES[name](bits=4))
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key].nan_to_num(), after[key].nan_to_num()) for key in before)


@every_case
def test_weights_on_the_grid_stay(name):
    """What was quantised and made plain again is quantised to the same weights by 8 bits on the same groups."""
    model = quantize(llama(), CASES[name](bits=3)).dequantize()
    want = logits(model)
    quantize(model, CASES[name](bits=8))
    torch.testing.assert_close(logits(model), want, atol=0.02 * want.abs().max().item(), rtol=0)


@pytest.mark.parametrize("name", CALIBRATED)
def test_data_is_needed_and_a_failed_run_changes_nothing(name, monkeypatch):
    model = llama()
    want = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="set dataset="):
        quantize(model, CASES[name](dataset=None))
    config = CASES[name](bits=3)
    finish, calls = type(config).finish_block, []

    def failing(self, block):
        finish(self, block)
        calls.append(block)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(type(config), "finish_block", failing)
    with pytest.raises(KeyboardInterrupt):
        quantize(model, config)
    state = model.state_dict()
    assert state.keys() == want.keys() and all(torch.equal(state[key], want[key]) for key in want)


@pytest.mark.parametrize("name", CALIBRATED)
def test_an_interrupted_run_goes_on_where_it_stopped(name, monkeypatch, tmp_path):
    want = logits(quantize(llama(), CASES[name](bits=3)))
    config = CASES[name](bits=3, resume_from=str(tmp_path))
    whole, calls = type(config).quantize_block, []

    def failing(self, block):
        calls.append(block.index)
        if len(calls) == 2:
            raise KeyboardInterrupt
        whole(self, block)

    monkeypatch.setattr(type(config), "quantize_block", failing)
    with pytest.raises(KeyboardInterrupt):
        quantize(llama(), config)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["block-0000.safetensors", "run.json"]
    with pytest.raises(ValueError, match="another run: config"):
        quantize(llama(), CASES[name](bits=4, resume_from=str(tmp_path)))
    model = quantize(llama(), config)
    assert calls == [0, 1, 1]
    assert torch.equal(logits(model), want)
    assert not list(tmp_path.iterdir())


def test_a_case_for_every_method():
    targets = [m.target.partition(":") for m in hfext.quantization.METHODS]
    found = [getattr(importlib.import_module(module), name) for module, _, name in targets]
    configs = {x for x in found if isinstance(x, type) and issubclass(x, WeightConfig)}
    assert configs == {type(CASES[name]()) for name in CASES}
    assert all(
        isinstance(layer, QuantLinear) for layer in quantized_layers(quantize(llama(), CASES["rtn"]())).values()
    )
