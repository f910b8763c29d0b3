"""CompressionConfig in `from_pretrained`: both parts, JSON, stock quantisers under it, checkpoints that lie."""

import json
import subprocess
import sys

import pytest
import torch
import transformers
from kv_cache_cases import MODELS, data
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, QuantoConfig

from hfext import CompressionConfig, RotateKVConfig, kv_cache
from hfext.kv_cache import KIVIConfig

KIVI = dict(bits=2, group_size=4, residual_length=8)


def ids(rows=2, tokens=44):
    return torch.randint(3, 128, (rows, tokens), generator=torch.Generator().manual_seed(1))


def greedy(model, prompt, **kwargs):
    return model.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0, **kwargs)


@pytest.fixture
def saved(tmp_path):
    model = MODELS["llama"]()
    model.save_pretrained(tmp_path / "plain")
    return model, tmp_path / "plain"


def rotated(model):
    return RotateKVConfig(bits=2, group_size=8, residual_length=4).calibrate(model, data())


def test_a_saved_model_generates_the_same_tokens_in_another_process(saved, tmp_path):
    model, plain = saved
    config = CompressionConfig(kv_cache=rotated(model))
    model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=config)
    want = greedy(model, ids())
    model.save_pretrained(tmp_path / "small")
    about = json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"]
    assert about["quant_method"] == "hfext" and about["kv_cache"]["calibration"]["tokens"] == data().numel()
    torch.save(ids(), tmp_path / "ids.pt")
    code = (
        "import torch, hfext; from transformers import AutoModelForCausalLM as A; import sys\n"
        "m = A.from_pretrained(sys.argv[1] + '/small'); ids = torch.load(sys.argv[1] + '/ids.pt', weights_only=True)\n"
        "out = m.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0,"
        " return_dict_in_generate=True)\n"
        "print(type(out.past_key_values).__name__, out.sequences.tolist())"
    )
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert run.stdout.strip() == f"CompressedCache {want.tolist()}", run.stderr[-2000:]


def test_second_save_is_the_first(saved, tmp_path):
    model, plain = saved
    model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=rotated(model))
    model.save_pretrained(tmp_path / "a")
    AutoModelForCausalLM.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert sum(key.startswith("kv_cache.") for key in a) == 3
    one, two = (json.loads((tmp_path / name / "config.json").read_text()) for name in "ab")
    assert one["quantization_config"] == two["quantization_config"]


def test_checkpoint_is_sharded(saved, tmp_path):
    model, plain = saved
    config = rotated(model)
    kv_cache.apply(model, config).save_pretrained(tmp_path / "s", max_shard_size="20KB")
    assert len(list((tmp_path / "s").glob("*.safetensors"))) > 2
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "s")
    assert torch.equal(greedy(again, ids()), greedy(model, ids()))


def test_base_model_of_a_checkpoint_has_the_cache_too(saved, tmp_path):
    model, _ = saved
    kv_cache.apply(model, rotated(model)).save_pretrained(tmp_path / "c")
    base = AutoModel.from_pretrained(tmp_path / "c")
    assert isinstance(base(ids(), use_cache=True).past_key_values, kv_cache.CompressedCache)


@pytest.mark.parametrize("kind", ["changed", "removed", "truncated"])
def test_calibration_that_was_tampered_with_is_refused(saved, tmp_path, kind):
    model, _ = saved
    kv_cache.apply(model, rotated(model)).save_pretrained(tmp_path / "c")
    path = tmp_path / "c" / "model.safetensors"
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(Exception, match="(?i)safetensor|incomplete|header|file"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "c")
        return
    tensors = load_file(path)
    if kind == "changed":
        tensors["kv_cache.1.key_order"] = tensors["kv_cache.1.key_order"].flip(0)
    else:
        del tensors["kv_cache.1.key_order"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="calibration in the checkpoint has been changed or is not whole"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "c")


def test_weights_of_a_stock_quantiser_and_our_cache(saved, tmp_path):
    pytest.importorskip("optimum.quanto")
    _, plain = saved
    stock = QuantoConfig(weights="int8")
    alone = AutoModelForCausalLM.from_pretrained(plain, quantization_config=stock)
    config = CompressionConfig(weights=QuantoConfig(weights="int8"), kv_cache=KIVIConfig(**KIVI))
    both = AutoModelForCausalLM.from_pretrained(plain, quantization_config=config)
    prompt = ids()
    with torch.no_grad():
        want, got = (m(prompt, use_cache=False).logits for m in (alone, both))
    assert torch.equal(got, want)
    assert type(both.model.layers[0].mlp.up_proj) is type(alone.model.layers[0].mlp.up_proj) is not torch.nn.Linear
    out = greedy(both, prompt, return_dict_in_generate=True)
    assert isinstance(out.past_key_values, kv_cache.CompressedCache)
    kv_cache.apply(alone, KIVIConfig(**KIVI))
    assert torch.equal(greedy(alone, prompt), out.sequences)
    assert isinstance(alone.config.quantization_config, CompressionConfig)
    assert both.hf_quantizer.is_serializable() == stock_quantizer(plain).is_serializable()
    kv_cache.remove(alone)
    assert isinstance(alone.config.quantization_config, QuantoConfig)
    assert type(alone.hf_quantizer).__name__ == "QuantoHfQuantizer"


def stock_quantizer(plain):
    return AutoModelForCausalLM.from_pretrained(plain, quantization_config=QuantoConfig(weights="int8")).hf_quantizer


def test_weights_alone(saved):
    pytest.importorskip("optimum.quanto")
    _, plain = saved
    model = AutoModelForCausalLM.from_pretrained(
        plain, quantization_config=CompressionConfig(weights=QuantoConfig(weights="int8"))
    )
    assert type(model.model.layers[0].mlp.up_proj) is not torch.nn.Linear
    assert type(greedy(model, ids(), return_dict_in_generate=True).past_key_values).__name__ == "DynamicCache"


def test_json_form_round_trips():
    config = CompressionConfig(weights=QuantoConfig(weights="int4"), kv_cache=RotateKVConfig(bits=3, clip=0.9))
    again = CompressionConfig.from_dict(json.loads(json.dumps(config.to_dict(), default=str)))
    assert again.to_dict() == config.to_dict() and again.kv_cache == config.kv_cache
    assert isinstance(again.weights, QuantoConfig)
    held = AutoConfig.for_model("llama", quantization_config=config)
    assert json.loads(held.to_json_string(use_diff=False))["quantization_config"]["kv_cache"]["bits"] == 3


@pytest.mark.parametrize(
    "call, error, told",
    [
        (lambda: CompressionConfig(), ValueError, "needs weights, kv_cache or both"),
        (lambda: CompressionConfig(kv_cash=RotateKVConfig()), TypeError, "Did you mean 'kv_cache'"),
        (lambda: CompressionConfig(weights=RotateKVConfig()), ValueError, "give it as kv_cache"),
        (lambda: CompressionConfig(weights=CompressionConfig(kv_cache=RotateKVConfig())), ValueError, "kv_cache"),
        (lambda: CompressionConfig(kv_cache=QuantoConfig(weights="int8")), ValueError, "kv_cache is"),
        (lambda: CompressionConfig(kv_cache={"method": "rotatkv"}), ValueError, "Did you mean 'rotatekv'"),
        (lambda: CompressionConfig(kv_cache={"method": "rotatekv", "bitts": 2}), TypeError, "Did you mean 'bits'"),
        (lambda: CompressionConfig(weights=3), ValueError, "weights is 3"),
    ],
)
def test_bad_configs_are_named(call, error, told):
    with pytest.raises(error, match=told):
        call()


def test_trainer_takes_a_model_with_a_cache(saved, tmp_path):
    """`is_quantized` models are refused by the Trainer unless their quantiser can train."""
    model, plain = saved
    model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=KIVIConfig(**KIVI))
    rows = [{"input_ids": row, "labels": row} for row in ids(4)]
    args = transformers.TrainingArguments(tmp_path / "t", max_steps=1, report_to=[], use_cpu=True, save_strategy="no")
    before = model.lm_head.weight.clone()
    transformers.Trainer(model=model, args=args, train_dataset=rows).train()
    assert not torch.equal(before, model.lm_head.weight)


def test_state_dict_given_to_save_pretrained_is_what_is_saved(saved, tmp_path):
    """As FSDP and DeepSpeed save."""
    model, _ = saved
    kv_cache.apply(model, rotated(model))
    given = {name: x + 1 for name, x in model.state_dict().items()}
    model.save_pretrained(tmp_path / "g", state_dict=given)
    held = load_file(tmp_path / "g" / "model.safetensors")
    assert torch.equal(held["model.norm.weight"], given["model.norm.weight"]) and "kv_cache.0.key_order" in held
    model.save_pretrained(tmp_path / "h")
    assert torch.equal(load_file(tmp_path / "h" / "model.safetensors")["model.norm.weight"], model.model.norm.weight)


@pytest.mark.slow
def test_checkpoint_without_hfext_is_a_plain_model(saved, tmp_path):
    """Only a warning and the plain cache, as the documentation says."""
    model, _ = saved
    kv_cache.apply(model, rotated(model)).save_pretrained(tmp_path / "c")
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM as A\n"
        "m = A.from_pretrained(sys.argv[1]); assert 'hfext' not in sys.modules\n"
        "out = m(torch.tensor([[3, 4, 5]])); print(type(out.past_key_values).__name__)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "c")], capture_output=True, text=True, timeout=120
    )
    assert run.stdout.strip() == "DynamicCache", run.stderr[-2000:]
    assert "hfext" in run.stderr
