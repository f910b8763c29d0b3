"""Files: shards, devices, other processes, damage, two quantisers at once."""

import json
import subprocess
import sys

import peft
import pytest
import torch
import transformers
from quantization_cases import MODELS, data, llama, tiny
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, QuantoConfig, Trainer, TrainingArguments
from typer.testing import CliRunner

import hfext
from hfext.cli import app
from hfext.quantization import CalibratedConfig, GPTQConfig, HQQConfig, RTNConfig, dequantize, quantize
from hfext.quantization._quantizer import quantized_layers

IDS = data(rows=2, tokens=24, seed=1)


@torch.no_grad()
def logits(model):
    return model(IDS).logits.float()


@pytest.fixture
def folder(tmp_path):
    quantize(llama(), RTNConfig(bits=3, group_size=16)).save_pretrained(tmp_path / "packed")
    return tmp_path / "packed"


@pytest.fixture
def plain(tmp_path):
    llama().save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


WANT = logits(quantize(llama(), RTNConfig(bits=3, group_size=16)))


def test_another_process_loads_it_with_import_hfext_alone(folder, tmp_path):
    script = f"""
import torch, hfext
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(folder)!r})
torch.save(model(torch.tensor({IDS.tolist()})).logits.detach(), {str(tmp_path / "logits.pt")!r})
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), WANT)


def test_grids_ask_for_no_gradient_until_they_are_trained(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert not any(p.requires_grad for layer in quantized_layers(model).values() for p in layer.parameters())
    assert model.model.norm.weight.requires_grad


def test_shards(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "shards", max_shard_size="8KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "shards")), WANT)


@pytest.mark.parametrize(
    "device_map",
    [
        "cpu",
        "auto",
        {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
         "model.rotary_emb": "cpu", "lm_head": "cpu"},
    ],
    ids=["cpu", "auto", "disk"],
)  # fmt: skip
def test_device_maps(folder, tmp_path, device_map):
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path / "offload")
    assert torch.equal(logits(model), WANT)


def test_quantising_what_is_on_the_disk_is_refused(plain, tmp_path):
    where = {"model": "cpu", "lm_head": "disk"}
    with pytest.raises(ValueError, match="device_map puts layers on the disk"):
        AutoModelForCausalLM.from_pretrained(
            plain, device_map=where, offload_folder=tmp_path, quantization_config=RTNConfig(group_size=16)
        )


def test_a_base_model_loads_from_a_head_and_the_other_way_round(folder, tmp_path):
    base = transformers.AutoModel.from_pretrained(folder)
    assert len(quantized_layers(base)) == 14
    base.save_pretrained(tmp_path / "base")
    again = transformers.AutoModel.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        assert torch.equal(again(IDS).last_hidden_state, base(IDS).last_hidden_state)


def test_options_that_name_layers_fit_the_base_model_too(tmp_path):
    model = llama(intermediate_size=40)
    names = [name for name, m in model.model.layers.named_modules() if isinstance(m, nn.Linear)]
    bits = {f"model.layers.{name}": (2, 3, 4)[i % 3] for i, name in enumerate(names)}
    left_out = ["model.layers.0.mlp.up_proj"]
    del bits[left_out[0]]
    config = RTNConfig(bits=bits, group_size=16, on_unsupported="skip", modules_to_not_convert=left_out)
    quantize(model, config)
    model.save_pretrained(tmp_path / "head")
    base = transformers.AutoModel.from_pretrained(tmp_path / "head")
    with torch.no_grad():
        want = model.model(IDS).last_hidden_state
        assert torch.equal(base(IDS).last_hidden_state, want)
        base.save_pretrained(tmp_path / "base")
        again = transformers.AutoModel.from_pretrained(tmp_path / "base")
        assert torch.equal(again(IDS).last_hidden_state, want)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_a_failed_run_puts_stacked_experts_back(kind, monkeypatch):
    model = MODELS[kind]()
    before = {name: p for name, p in model.named_parameters()}
    settings = [m.config._experts_implementation for m in model.modules() if type(m).__name__.endswith("Experts")]
    calls = []

    def failing(self, weight, bits, group_size):
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return whole(self, weight, bits, group_size)

    whole = RTNConfig.quantize_weight
    monkeypatch.setattr(RTNConfig, "quantize_weight", failing)
    with pytest.raises(KeyboardInterrupt):
        quantize(model, RTNConfig(group_size=16))
    after = {name: p for name, p in model.named_parameters()}
    assert before.keys() == after.keys() and all(before[name] is p and p.requires_grad for name, p in after.items())
    monkeypatch.undo()
    quantize(model, RTNConfig(group_size=16)).dequantize()
    assert all(p.requires_grad for p in model.parameters())
    now = [m.config._experts_implementation for m in model.modules() if type(m).__name__.endswith("Experts")]
    assert now == settings


@pytest.mark.parametrize("name", ["input_layernorm.weight", "self_attn.q_proj.bias"])
@pytest.mark.parametrize("config", [RTNConfig, GPTQConfig])
def test_nan_beside_the_weights_is_named(config, name):
    model = llama(attention_bias=True)
    model.get_parameter(f"model.layers.1.{name}").data[3] = torch.nan
    options = {"dataset": data()} if config is GPTQConfig else {}
    with pytest.raises(ValueError, match=f"model.layers.1.{name} holds NaN"):
        quantize(model, config(group_size=16, **options))
    assert not quantized_layers(model)


@pytest.mark.parametrize(
    ("factor", "hint"), [(1e-5, "too small for a grid in float16"), (1e7, "too large for float16")]
)
def test_weights_whose_grid_half_precision_cannot_hold_are_named(factor, hint):
    model = llama()
    model.model.layers[1].mlp.up_proj.weight.data.mul_(factor)
    with pytest.raises(ValueError, match=rf"model\.layers\.1\.mlp\.up_proj: .*{hint}"):
        quantize(model, RTNConfig(bits=8, group_size=16))
    quantize(model, RTNConfig(bits=8, group_size=16, scale_dtype="float32"))


def test_adapters_reach_experts(tmp_path):
    model = quantize(MODELS["mixtral"](), RTNConfig(group_size=16))
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    )
    assert any("of_expert" in name for name, p in adapted.named_parameters() if p.requires_grad)
    want = logits(adapted)
    dequantize(adapted)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits(merged), want, atol=1e-5, rtol=0)
    dequantize(merged).save_pretrained(tmp_path)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), want, atol=1e-5, rtol=0)


def test_a_model_with_adapters_is_refused():
    adapted = peft.get_peft_model(llama(), peft.LoraConfig(r=16, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="adapters of PEFT"):
        quantize(adapted, RTNConfig(group_size=16))


@pytest.mark.parametrize(
    "adapter",
    [
        peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False),
        peft.OFTConfig(oft_block_size=8, target_modules=["q_proj"], init_weights=False),
        peft.DeloraConfig(r=4, target_modules=["q_proj"]),
        peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[], init_ia3_weights=False),
    ],
    ids=lambda config: type(config).__name__,
)
def test_no_adapter_is_lost_in_a_merge_and_all_come_off(adapter):
    model = quantize(llama(), RTNConfig(bits=4, group_size=16))
    want = logits(model)
    adapted = peft.get_peft_model(model, adapter)
    with_adapter = logits(adapted)
    with pytest.raises(NotImplementedError, match="dequantize"):
        adapted.merge_adapter()
    assert torch.equal(logits(adapted), with_adapter)
    assert torch.equal(logits(adapted.unload()), want)


def test_no_plain_weight_stays_while_it_is_quantised_on_load(plain, monkeypatch):
    """Each plain weight is gone before the next is read."""
    alive, most = [], []
    whole = RTNConfig.quantize_weight

    def watched(self, weight, bits, group_size):
        import weakref

        alive.append(weakref.ref(weight))
        most.append(sum(ref() is not None for ref in alive))
        return whole(self, weight, bits, group_size)

    monkeypatch.setattr(RTNConfig, "quantize_weight", watched)
    model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=RTNConfig(bits=3, group_size=16))
    assert len(most) == 14 and max(most) <= 2
    assert torch.equal(logits(model), WANT)
    assert all("weight" not in layer._parameters for layer in quantized_layers(model).values())


def test_nan_in_a_weight_that_is_quantised_on_load_is_named(plain):
    state = load_file(plain / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(state, plain / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj: its weight holds NaN"):
        AutoModelForCausalLM.from_pretrained(plain, quantization_config=HQQConfig(group_size=16))


def change_config(folder, **options):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["weights"] |= options
    path.write_text(json.dumps(config))


def change_state(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


NAME = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-400]), "damaged"),
        (lambda f: change_config(f, bits=2), r"qweight is U8 \[\d+, 12\] in the checkpoint, but .* \[\d+, 8\]"),
        (lambda f: change_config(f, group_size=8), r"scales is F16 \[\d+, 2\] in the checkpoint, but .*\[\d+, 4\]"),
        (lambda f: change_config(f, modules_to_not_convert=["up_proj"]), "up_proj.qweight, which its config does not"),
        (lambda f: change_config(f, method="rnt"), "Did you mean 'rtn'"),
        (lambda f: change_state(f, lambda s: s.pop(f"{NAME}.zeros")), f"has no {NAME}.zeros"),
        (lambda f: change_state(f, lambda s: s[f"{NAME}.scales"].fill_(torch.nan)), f"{NAME}.scales holds NaN"),
        (lambda f: change_state(f, lambda s: s.update({f"{NAME}.qweight": s[f"{NAME}.qweight"].short()})), "is I16"),
    ],
    ids=["truncated", "bits", "group", "left out", "method", "missing", "nan", "type"],
)
def test_damaged_checkpoints_are_refused(folder, damage, message):
    damage(folder)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)
    assert CliRunner().invoke(app, ["doctor", str(folder)]).exit_code == 1


def test_doctor_tells_what_a_folder_needs(folder):
    shown = CliRunner().invoke(app, ["doctor", str(folder)])
    assert shown.exit_code == 0
    assert "RTNConfig(bits=3, group_size=16)" in shown.output
    assert "import hfext" in shown.output


def test_two_quantisers_at_once_are_refused(folder, plain):
    model = AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ValueError, match="quantised already"):
        quantize(model, HQQConfig(group_size=16))
    with pytest.raises(ValueError, match="CompressionConfig but you are passing a QuantoConfig"):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=QuantoConfig(weights="int8"))
    with pytest.raises(TypeError, match="must be a config of hfext.quantization"):
        quantize(AutoModelForCausalLM.from_pretrained(plain), QuantoConfig(weights="int8"))
    with pytest.raises(ValueError, match="no layers that hfext has quantised"):
        dequantize(AutoModelForCausalLM.from_pretrained(plain))


def test_a_cache_joins_and_leaves_quantised_weights(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    hfext.kv_cache.apply(model, hfext.kv_cache.KIVIConfig(group_size=4))
    model.save_pretrained(tmp_path / "both")
    both = AutoModelForCausalLM.from_pretrained(tmp_path / "both")
    assert torch.equal(logits(both), WANT)
    about = AutoConfig.from_pretrained(tmp_path / "both").quantization_config
    assert about["weights"]["method"] == "rtn" and about["kv_cache"]["method"] == "kivi"
    both.dequantize()
    both.save_pretrained(tmp_path / "cache")
    about = AutoConfig.from_pretrained(tmp_path / "cache").quantization_config
    assert about["weights"] is None and about["kv_cache"]["method"] == "kivi"
    hfext.kv_cache.remove(model)
    model.save_pretrained(tmp_path / "weights")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "weights")), WANT)


def test_the_trainer_tunes_grids_and_norms_and_keeps_codes(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(model, TrainingArguments(tmp_path / "out", report_to=[], use_cpu=True))
    hfext.quantization.train_grids(model)
    codes = {name: layer.qweight.clone() for name, layer in quantized_layers(model).items()}
    rows = [{"input_ids": row, "labels": row} for row in data(rows=8, tokens=16)]
    args = TrainingArguments(
        tmp_path / "out", max_steps=4, learning_rate=1e-2, per_device_train_batch_size=4, report_to=[],
        save_strategy="no", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(name.endswith(("scales", "zeros")) or "norm" in name for name in trained)
    trainer = Trainer(model, args, train_dataset=rows)
    trainer.train()
    assert all(torch.equal(codes[name], layer.qweight) for name, layer in quantized_layers(model).items())
    assert not torch.equal(logits(model), WANT)
    model.save_pretrained(tmp_path / "tuned")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    assert torch.equal(logits(again), logits(model))


def test_layers_in_a_form_that_is_not_known_are_named():
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=4))
    with pytest.raises(NotImplementedError, match=r"transformer\.h\.0\.attn\.c_attn is a Conv1D"):
        quantize(gpt2, RTNConfig(group_size=16))
    llama4 = tiny(
        transformers.Llama4ForCausalLM, transformers.Llama4TextConfig, num_local_experts=2, intermediate_size_mlp=64,
        head_dim=8, num_experts_per_tok=1,
    )  # fmt: skip
    with pytest.raises(NotImplementedError, match="Llama4TextExperts"):
        quantize(llama4, RTNConfig(group_size=16))
    quantize(llama4, RTNConfig(group_size=16, modules_to_not_convert=[r".*feed_forward\.experts"]))
    assert quantized_layers(llama4)
    with pytest.raises(ValueError, match="fits no module"):
        quantize(llama(), RTNConfig(group_size=16, modules_to_not_convert=["q_porj"]))
    with pytest.raises(ValueError, match="no list of blocks"):
        quantize(nn.Linear(4, 4), RTNConfig())


def test_bits_that_do_not_name_the_layers_are_refused():
    with pytest.raises(ValueError, match=r"names no bits for 'model\.layers\.0\.mlp\.down_proj'"):
        quantize(llama(), RTNConfig(group_size=16, bits={f"model.layers.{i}.self_attn.q_proj": 4 for i in range(2)}))
    with pytest.raises(ValueError, match=r"bits\['x'\] is 5 but must be one of"):
        RTNConfig(bits={"x": 5})


def test_not_one_chain_of_blocks_is_refused_for_calibration(tiny_t5):
    with pytest.raises(NotImplementedError, match=r"encoder\.block and decoder\.block"):
        quantize(tiny_t5(), GPTQConfig(group_size=16, dataset=data(), modules_to_not_convert=[]))
    model = quantize(tiny_t5(), HQQConfig(group_size=16))
    assert len(quantized_layers(model)) == 2 * 6 + 2 * 10
    assert issubclass(GPTQConfig, CalibratedConfig)


def test_the_model_class_by_name_loads_too(folder):
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(folder)), WANT)
