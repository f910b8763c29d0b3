"""OFA: several widths in one model, one adapter for each, configurations drawn, searched and exported."""

import copy
import itertools
import json

import peft
import pytest
import torch
from quantization_cases import data, llama
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hfext.quantization import DecoupleQConfig, GPTQConfig, RTNConfig, SketchTuneConfig, quantize
from hfext.quantization._ofa_linear import OFALinear
from hfext.quantization._quantizer import quantized_layers
from hfext.quantization._subnets import draw_uniform, max_entropy, mean_of, search
from hfext.quantization.ofa import (
    OFACallback,
    OFAConfig,
    average_bits,
    export_subnet,
    get_subnet,
    search_subnet,
    set_subnet,
    train_subnets,
)

IDS = data(rows=2, tokens=24, seed=1)


def rtn(bits=4, **options):
    return OFAConfig(quantizer=RTNConfig(bits=bits, group_size=16), **{"rank": 4, **options})


def calibrated(kind=GPTQConfig, **options):
    return kind(**{"bits": 3, "group_size": 16, "dataset": data(), "sequence_length": 40, **options})


def mixed(model):
    return {name: (2, 3, 4)[i % 3] for i, name in enumerate(quantized_layers(model))}


def learned(model, seed=5):
    """A supernet whose adapters do something."""
    generator = torch.Generator().manual_seed(seed)
    for layer in quantized_layers(model).values():
        for b in layer.choices:
            layer.of("up", b).data.copy_(0.3 * torch.randn(layer.out_features, layer.rank, generator=generator))
    return model


@torch.no_grad()
def logits(model):
    return model(IDS).logits.float()


def arguments(folder, **options):
    settings = dict(
        max_steps=6, learning_rate=1e-2, per_device_train_batch_size=4, report_to=[], save_strategy="no",
        disable_tqdm=True, use_cpu=True, logging_steps=1,
    )  # fmt: skip
    return TrainingArguments(folder, **{**settings, **options})


ROWS = [{"input_ids": row, "labels": row} for row in data(rows=24, tokens=16)]

# -- the layer


def test_a_layer_is_its_formula_at_every_width():
    model = learned(quantize(llama(attention_bias=True), rtn()))
    layer = next(iter(quantized_layers(model).values()))
    layer.bias.data.normal_(generator=torch.Generator().manual_seed(0))
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    plain = llama(attention_bias=True)
    for b in (2, 3, 4):
        layer.bits = b
        alone = quantize(copy.deepcopy(plain), RTNConfig(bits=b, group_size=16))
        weight = next(iter(quantized_layers(alone).values())).weight.data
        weight = weight + 16 / 4 * getattr(layer, f"up_{b}") @ getattr(layer, f"down_{b}")
        want = F.linear(x, weight, layer.bias)
        torch.testing.assert_close(layer(x), want, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(layer.weight.data, weight, atol=1e-5, rtol=0)
        torch.testing.assert_close(layer.to_linear()(x), want, atol=1e-4, rtol=1e-5)


def test_nine_bits_a_weight_and_no_copy_of_it():
    model = quantize(llama(hidden_size=64, intermediate_size=192), OFAConfig(quantizer=RTNConfig(group_size=32)))
    for layer in quantized_layers(model).values():
        kept = {key: x for key, x in layer.state_dict().items() if not key.startswith(("up", "down"))}
        held = sum(x.numel() * x.element_size() for x in kept.values()) * 8
        weights = layer.in_features * layer.out_features
        assert held == weights * (9 + 3 * 32 / 32)
        assert all(x.numel() < weights for x in layer.state_dict().values())
        assert not any(isinstance(x, torch.Tensor) for x in vars(layer).values())


def test_only_adapters_of_the_widths_that_run_get_gradients():
    model = quantize(llama(), rtn())
    count = train_subnets(model)
    layers = quantized_layers(model)
    assert count == sum(3 * 4 * (layer.in_features + layer.out_features) for layer in layers.values())
    chosen = set_subnet(learned(model), mixed(model))
    model(IDS, labels=IDS).loss.backward()
    for name, parameter in model.named_parameters():
        layer, _, key = name.rpartition(".")
        runs = layer in chosen and key in (f"up_{chosen[layer]}", f"down_{chosen[layer]}")
        assert (parameter.grad is not None) == runs, name
        assert not runs or parameter.grad.abs().sum() > 0


def test_adapters_keep_fp32_in_a_model_of_half_precision(tmp_path):
    llama().save_pretrained(tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.bfloat16)
    model = learned(quantize(plain, rtn()))
    set_subnet(model, mixed(model))
    want = logits(model)
    model.save_pretrained(tmp_path / "packed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert again.dtype == torch.bfloat16
    layer = next(iter(quantized_layers(again).values()))
    assert layer.down_2.dtype == torch.float32 and layer.scales_2.dtype == torch.float16
    assert torch.equal(logits(again), want)


# -- quantising


def test_every_width_of_the_first_block_is_what_its_quantiser_alone_gives():
    model = quantize(llama(), OFAConfig(quantizer=calibrated(), rank=2))
    for b in (2, 3, 4):
        alone = quantized_layers(quantize(llama(), calibrated(bits=b)))
        for name, layer in quantized_layers(model).items():
            if "layers.0" in name or b == 3:  # the second block is calibrated on what 3 bits give
                assert torch.equal(layer.of("qweight", b), alone[name].qweight), name
                assert torch.equal(layer.of("scales", b), alone[name].scales)
    assert set(get_subnet(model).values()) == {3}


def test_quantisers_that_tune_more_than_their_layers_are_refused():
    model = llama()
    want = copy.deepcopy(model.state_dict())
    base = calibrated(DecoupleQConfig, block_epochs=1)
    with pytest.raises(ValueError, match="decoupleq tunes norms or biases"):
        quantize(model, OFAConfig(quantizer=base, choices=(3,)))
    assert all(torch.equal(want[key], x) for key, x in model.state_dict().items())
    base.train_norm = False
    layers = quantized_layers(quantize(model, OFAConfig(quantizer=base, choices=(3, 4))))
    alone = quantized_layers(quantize(llama(), calibrated(DecoupleQConfig, block_epochs=1, train_norm=False)))
    assert all(torch.equal(layer.of("scales", 3), alone[name].scales) for name, layer in layers.items())
    with pytest.raises(ValueError, match="quantizer is sketchtune but must be one that holds codes"):
        OFAConfig(quantizer=calibrated(SketchTuneConfig, group_size=-1))
    with pytest.raises(ValueError, match="quantizer is ofa"):
        OFAConfig(quantizer=rtn())


def test_options_are_checked():
    for options, message in (
        ({"choices": (3, 5)}, "choices is 5 but must be one of"),
        ({"choices": (3, 3)}, "must name different widths"),
        ({"choices": (2, 3)}, "quantizer.bits is 4 but must be one of 2, 3"),
        ({"rank": 0}, "rank is 0"),
        ({"alpha": -1.0}, "alpha is -1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            rtn(**options)
    with pytest.raises(ValueError, match=r"quantizer\.bits\['x'\] is 8 but must be one of 2, 3, 4, 16"):
        rtn(bits={"x": 8})
    with pytest.raises(ValueError, match="no supernet"):
        get_subnet(llama())
    for options in ({"sampler": "sweep"}, {"buckets": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            OFACallback(**options)


def test_a_layer_that_only_some_widths_fit_is_named_or_skipped(tmp_path):
    odd = dict(intermediate_size=36, hidden_size=32)
    with pytest.raises(ValueError, match=r"down_proj: 34 inputs of 2 bits do not fill"):
        quantize(llama(intermediate_size=34), OFAConfig(quantizer=RTNConfig(group_size=2)))
    with pytest.raises(ValueError, match=r"down_proj: 36 inputs of 3 bits do not fill"):
        quantize(llama(**odd), OFAConfig(quantizer=RTNConfig(group_size=4)))
    config = OFAConfig(quantizer=RTNConfig(group_size=4, on_unsupported="skip", modules_to_not_convert=["v_proj"]))
    model = quantize(llama(**odd), config)
    assert config.skipped_modules == [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    set_subnet(model, mixed(model))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert get_subnet(again) == get_subnet(model) == mixed(model)
    assert torch.equal(logits(again), logits(model))


# -- configurations


def test_the_chances_of_a_mean_have_the_largest_entropy():
    for mean in (2.0, 2.2, 3.0, 3.7, 4.0):
        p = max_entropy((2, 3, 4), mean)
        assert float(p @ torch.tensor([2.0, 3.0, 4.0]).double()) == pytest.approx(mean, abs=1e-6)
        entropy = -(p * p.clamp(min=1e-300).log()).sum()
        for shift in torch.linspace(-0.3, 0.3, 61):
            other = p + shift * torch.tensor([1.0, -2.0, 1.0])  # the other chances with this mean
            if (other >= 0).all():
                assert -(other * other.clamp(min=1e-300).log()).sum() <= entropy + 1e-9


def test_means_are_uniform_when_balanced_and_normal_when_uniform():
    from scipy.stats import chisquare

    model = quantize(llama(num_hidden_layers=4), rtn())
    sizes = torch.tensor([layer.in_features * layer.out_features for layer in quantized_layers(model).values()])
    draws = {}
    for sampler in ("balanced", "uniform"):
        callback = OFACallback(sampler, seed=3)
        steps = [callback.draw(model, step) for step in range(300)]
        assert steps[7] == OFACallback(sampler, seed=3).draw(model, 7) != OFACallback(sampler, seed=4).draw(model, 7)
        draws[sampler] = mean_of(torch.tensor([list(bits.values()) for bits in steps]), sizes)
    counts = torch.histc(draws["balanced"].float(), bins=10, min=2, max=4)
    assert chisquare(counts.tolist()).pvalue > 0.01
    assert chisquare(torch.histc(draws["uniform"].float(), bins=10, min=2, max=4).tolist()).pvalue < 1e-6
    expected = float((sizes.double() ** 2).sum() / sizes.sum() ** 2) * 2 / 3
    generator = torch.Generator().manual_seed(0)
    many = mean_of(torch.stack([draw_uniform(sizes, (2, 3, 4), generator) for _ in range(2000)]), sizes)
    assert float(many.var()) == pytest.approx(expected, rel=0.1)
    assert float(draws["uniform"].var()) == pytest.approx(expected, rel=0.25)
    assert float(draws["uniform"].mean()) == pytest.approx(3, abs=4 * (expected / 300) ** 0.5)


def test_widths_are_set_by_number_by_name_and_by_mean(tmp_path):
    model = learned(quantize(llama(), rtn()))
    set_subnet(model, 2)
    assert average_bits(model) == 2 and model.config.quantization_config.weights.quantizer.bits == 2
    for mean in (2.0, 2.3, 3.1, 4.0):
        set_subnet(model, average_bits=mean)
        assert mean - 0.1 <= average_bits(model) <= mean + 1e-9
    set_subnet(model, average_bits=2.6, seed=1)
    model.save_pretrained(tmp_path / "1")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "1")
    assert get_subnet(again) == get_subnet(model) and torch.equal(logits(again), logits(model))
    again.save_pretrained(tmp_path / "2")
    twice = AutoModelForCausalLM.from_pretrained(tmp_path / "2")
    for bits in (2, 3, 4):
        set_subnet(model, bits), set_subnet(twice, bits)
        assert torch.equal(logits(twice), logits(model))
    for wrong, message in (
        ({"bits": 8}, "is 8 but must be one of 2, 3, 4"),
        ({"bits": {"x": 2}}, "names no layer 'model.layers.0.mlp.down_proj'"),
        ({"bits": {**mixed(model), "x": 2}}, "names the unknown layer 'x'"),
        ({"average_bits": 4.5}, r"average_bits is 4.5 but must be in \[2, 4\]"),
        ({}, "either bits or average_bits"),
    ):
        with pytest.raises(ValueError, match=message):
            set_subnet(model, **wrong)


def test_the_search_keeps_to_the_budget_and_finds_the_best_of_few_layers():
    sizes, names = torch.tensor([3, 1, 2, 2, 1]), list("abcde")
    gain = dict(zip(names, (1.0, 0.1, 3.0, 0.5, 2.0), strict=True))

    def loss(bits):
        return sum(gain[name] * 4.0 ** -bits[name] for name in names)

    every = [dict(zip(names, bits, strict=True)) for bits in itertools.product((2, 3, 4), repeat=5)]
    for budget in (2.0, 2.5, 3.1):
        fits = [b for b in every if float(mean_of(torch.tensor(list(b.values())), sizes)) <= budget + 1e-9]
        found = search(names, sizes, (2, 3, 4), budget, loss, candidates=60)
        assert found.average_bits <= budget + 1e-9 and found.loss == loss(found.bits)
        assert all(mean <= budget + 1e-9 for mean, _ in found.tried)
        assert len(found.tried) <= 60
        assert found.loss <= sorted(map(loss, fits))[len(fits) // 50]  # of 243, where not all are tried
    assert search(names, sizes, (2, 3, 4), 2.5, loss, seed=1) == search(names, sizes, (2, 3, 4), 2.5, loss, seed=1)


def test_a_searched_configuration_is_set():
    model = learned(quantize(llama(), rtn()))
    want = llama()(IDS).logits.detach()
    found = search_subnet(model, lambda m: float((m(IDS).logits - want).square().mean()), 3.0, candidates=12)
    assert get_subnet(model) == found.bits and average_bits(model) == found.average_bits <= 3
    assert float((logits(model) - want).square().mean()) == found.loss == min(loss for _, loss in found.tried)
    assert len(found.tried) == 12

    def broken(m):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search_subnet(model, broken, 2.5)
    assert get_subnet(model) == found.bits


def test_what_is_exported_gives_the_same_logits(tmp_path):
    model = learned(quantize(llama(), OFAConfig(quantizer=calibrated(), rank=4)))
    chosen = set_subnet(model, mixed(model))
    want, state = logits(model), torch.random.get_rng_state()
    exported = export_subnet(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert isinstance(exported, peft.PeftModel)
    assert torch.equal(logits(exported), want) and torch.equal(logits(model), want)
    base = exported.get_base_model()
    assert {n.replace(".base_layer", ""): x.bits for n, x in quantized_layers(base).items()} == chosen
    assert not any(isinstance(layer, OFALinear) for layer in base.modules())
    exported.save_pretrained(tmp_path / "adapter")
    exported.unload().save_pretrained(tmp_path / "base")
    about = json.loads((tmp_path / "base" / "config.json").read_text())["quantization_config"]["weights"]
    assert about["method"] == "gptq" and about["bits"] == chosen
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    again = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter")
    assert torch.equal(logits(again), want)
    set_subnet(model, 2)
    assert torch.equal(logits(export_subnet(model, 3)), logits(export_subnet(model, dict.fromkeys(chosen, 3))))
    assert set(get_subnet(model).values()) == {2}


# -- training


def test_one_width_trains_like_an_adapter_on_a_quantised_model(tmp_path):
    """Weights and losses of peft's LoRA on the same codes, bit for bit."""
    supernet = quantize(llama(), rtn(choices=(4,)))
    train_subnets(supernet)
    ours = Trainer(
        supernet, arguments(tmp_path, max_grad_norm=0.0), train_dataset=ROWS, callbacks=[OFACallback("uniform")]
    )
    plain = quantize(llama(), RTNConfig(bits=4, group_size=16))
    names = list(quantized_layers(plain))
    adapted = peft.get_peft_model(plain, peft.LoraConfig(r=4, lora_alpha=16, target_modules=names))
    for name, layer in quantized_layers(supernet).items():
        plain.get_submodule(name).lora_A["default"].weight.data.copy_(layer.down_4)
    theirs = Trainer(adapted, arguments(tmp_path, max_grad_norm=0.0), train_dataset=ROWS)
    for trainer in (ours, theirs):
        trainer.train()
    losses = [[row["loss"] for row in t.state.log_history if "loss" in row] for t in (ours, theirs)]
    assert len(losses[0]) == 6 and losses[0] == losses[1]
    for name, layer in quantized_layers(supernet).items():
        adapter = plain.get_submodule(name)
        assert torch.equal(adapter.lora_A["default"].weight, layer.down_4)
        assert torch.equal(adapter.lora_B["default"].weight, layer.up_4) and layer.up_4.abs().sum() > 0


def test_training_goes_on_after_a_stop_as_if_there_had_been_none(tmp_path):
    def trainer(folder, steps):
        model = quantize(llama(), rtn())
        train_subnets(model)
        drawn = []

        class Watched(OFACallback):
            def on_step_end(self, args, state, control, model=None, **kwargs):
                drawn.append(get_subnet(model))
                super().on_step_end(args, state, control, model=model, **kwargs)

        options = dict(save_strategy="steps", save_steps=2, lr_scheduler_type="constant", max_steps=steps)
        made = Trainer(
            model, arguments(folder, **options), train_dataset=ROWS, callbacks=[Watched("balanced", seed=2)]
        )
        return made, drawn

    whole, all_drawn = trainer(tmp_path / "whole", 4)
    whole.train()
    assert len({tuple(bits.values()) for bits in all_drawn}) == 4
    assert set(get_subnet(whole.model).values()) == {4}  # as before the training
    first, _ = trainer(tmp_path / "stopped", 2)
    first.train()
    second, drawn = trainer(tmp_path / "stopped", 4)
    second.train(resume_from_checkpoint=str(tmp_path / "stopped" / "checkpoint-2"))
    assert drawn == all_drawn[2:]
    state = second.model.state_dict()
    assert all(torch.equal(x, state[key]) for key, x in whole.model.state_dict().items())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "checkpoint-4")
    assert torch.equal(logits(again), logits(whole.model))
