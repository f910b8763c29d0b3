"""`hfext doctor` on folders and repositories: what is needed, what would be ignored, and the exit status."""

import json
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

import hfext
from hfext.cli import app

RUN = CliRunner()


def doctor(artifact, *options):
    done = RUN.invoke(app, ["doctor", str(artifact), *options])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, " ".join(done.output.split())


def test_a_repository_is_looked_at_without_its_weights(server, tiny_llama):
    model = hfext.quantization.quantize(tiny_llama(), hfext.quantization.RTNConfig(bits=4, group_size=16))
    hfext.decoding.enable(model).generation_config.top_h_alpha = 0.4
    model.generation_config.typical_sauce = 3
    hfext.push_to_hub(model, "user/quantised")
    hfext.push_to_hub(tiny_llama(), "user/quantised", methods=["sam"], revision="plain")
    server.log.clear()
    code, said = doctor("user/quantised")
    assert code == 0 and "can serve it" in said and "RTNConfig" in said and "top_h_alpha = 0.4" in said
    assert "transformers alone ignores the quantiser: it warns, and then runs with random weights" in said
    assert "transformers alone ignores top_h_alpha" in said and "typical_sauce = 3" in said
    assert not [path for _, path, _ in server.log if path.endswith(".safetensors")]
    code, said = doctor("user/quantised", "--revision", "plain")
    assert code == 0 and "ignores" not in said
    code, said = doctor("user/absent")
    assert code == 2 and "There is no folder user/absent here, and no such repository on the Hub" in said
    assert "Error" not in said


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "llama9"}, "no model type 'llama9'"),
        (
            {"quantization_config": {"quant_method": "hfext", "weights": {"quant_method": "hfext", "method": "rnt"}}},
            "rtn",
        ),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantiser"),
        (
            {"quantization_config": {"quant_method": "hfext", "hfext_version": "99.0.0", "spin": 1}},
            "written by hfext 99.0.0, and here is",
        ),
    ],
)
def test_a_model_that_cannot_be_served(tiny_llama, tmp_path, change, message):
    tiny_llama().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    code, said = doctor(tmp_path)
    assert code == 1 and message in said and "cannot serve it" in said


def test_an_adapter_names_peft_and_its_base(tiny_llama, tmp_path, monkeypatch):
    from peft import LoraConfig, get_peft_model

    adapter = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    adapter.peft_config["default"].base_model_name_or_path = "org/base"
    adapter.save_pretrained(tmp_path)
    code, said = doctor(tmp_path)
    assert code == 0 and "LORA" in said and "org/base" in said and "peft" in said
    monkeypatch.setattr("hfext.hub._needs._version", lambda name: None if name == "peft" else "1.0")
    code, said = doctor(tmp_path)
    assert code == 1 and "peft is not installed: `pip install peft`" in said


def test_a_kernel_needs_triton_and_a_device(tmp_path, monkeypatch):
    package = tmp_path / "torch-ext" / "hfext_scale"
    package.mkdir(parents=True)
    (tmp_path / "build.toml").write_text('[general]\nname = "hfext-scale"\nedition = 5\nbackends = ["cuda"]\n')
    (package / "__init__.py").write_text("import triton\n\n__all__ = []\n")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, said = doctor(tmp_path)
    assert code == 1 and "it is for cuda, and torch sees no such device here" in said and "kernels" in said
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("hfext.hub._needs._version", lambda name: None if name == "triton" else "1.0")
    code, said = doctor(tmp_path)
    assert code == 1 and "triton is not installed" in said
    monkeypatch.setattr("hfext.hub._needs._version", lambda name: "1.0")
    assert doctor(tmp_path)[0] == 0


def test_a_loop_needs_what_its_requirements_say(tmp_path):
    hfext.decoding.export_superposed(tmp_path)
    code, said = doctor(tmp_path)
    assert code == 0 and "trust_remote_code=True" in said and "torch>=2.5" in said
    (tmp_path / "custom_generate" / "requirements.txt").write_text("torch>=99\nno-such-package-of-anybody\n")
    code, said = doctor(tmp_path)
    assert (
        code == 1 and "needs torch>=99, and here is" in said and "no-such-package-of-anybody, and here is none" in said
    )


def test_records_name_what_hfext_must_have(tiny_llama, tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    hfext.hub.save_record(tmp_path, ["mup"])
    code, said = doctor(tmp_path)
    assert code == 0 and "hfext.optim.mup.apply" in said and "the outputs are wrong without the line" in said
    record = json.loads((tmp_path / "hfext.json").read_text())
    record["versions"]["hfext"] = "99.0.0"
    (tmp_path / "hfext.json").write_text(json.dumps({**record, "methods": ["mupp"]}))
    code, said = doctor(tmp_path)
    assert code == 1 and "no method 'mupp'" in said and "written by hfext 99.0.0" in said
    (tmp_path / "hfext.json").write_text("{")
    assert doctor(tmp_path)[0] == 1


@pytest.mark.parametrize(
    "keys, needs, alone",
    [
        ({"hfext_gr_kan": {"options": {}}}, "flashkat: run hfext.modules.flashkat.restore(", "coefficients of GR-KAN"),
        ({"hfext_spark_ffn": {"options": {}}}, "spark_ffn: run hfext.modules.spark_ffn.restore(", "random weights"),
        ({"spark_attention": {"k": 4}}, "spark_attention: name attn_implementation", "attends to every key"),
        ({"stickbreaking_attention": {"remainder": True}}, "name attn_implementation", "runs softmax attention"),
        ({"_attn_implementation": "hfext_triton"}, "'hfext_triton'", "refuses 'hfext_triton'"),
        ({"text_config": {"hfext_gr_kan": {"options": {}}}}, "flashkat: run", "coefficients of GR-KAN"),
        ({"hfext_mup": {"hidden_size": 1}}, "mup: run hfext.optim.mup.apply", "the outputs are wrong"),
    ],
)
def test_a_config_names_what_needs_hfext_without_a_record(tiny_llama, tmp_path, keys, needs, alone):
    tiny_llama().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))
    code, said = doctor(tmp_path)
    assert code == 0 and needs in said and alone in said.partition("transformers alone")[2]


def test_a_tokenformer_needs_hfext_and_plain_transformers_refuses_it(tmp_path):
    sizes = dict(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    counts = dict(num_qkv_tokens=8, num_proj_tokens=8, num_ffn_tokens=8)
    hfext.modules.TokenFormerForCausalLM(hfext.modules.TokenFormerConfig(**sizes, **counts)).save_pretrained(tmp_path)
    code, said = doctor(tmp_path)
    assert code == 0 and "tokenformer" in said and "transformers alone refuses its model type" in said
    load = f"from transformers import AutoConfig; AutoConfig.from_pretrained({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", load], capture_output=True, text=True)
    assert "does not recognize this architecture" in said and "does not recognize this architecture" in done.stderr


def test_record_and_config_say_the_same_once(tiny_llama, tmp_path):
    model = tiny_llama()
    hfext.modules.replace_mlp(model, hfext.modules.GRKAN(groups=4))
    model.save_pretrained(tmp_path)
    hfext.hub.save_record(tmp_path, ["flashkat"])
    code, said = doctor(tmp_path)
    assert code == 0 and said.count("flashkat.restore(") == 1


@pytest.mark.parametrize("path", ["nothing", "out/nothing", "./out/nothing", "out/far/nothing"])
def test_a_path_that_does_not_exist(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, said = doctor(path)
    assert code == 2 and f"There is no folder {path.removeprefix('./')} here" in said
    assert ("could not be fetched" in said) == (path == "out/nothing")


@pytest.mark.parametrize("name", ["uncurl", "wta_crs"])
def test_modules_that_leave_plain_weights_need_no_hfext(tiny_llama, tmp_path, name):
    tiny_llama().save_pretrained(tmp_path)
    hfext.hub.save_record(tmp_path, [name])
    code, said = doctor(tmp_path)
    assert code == 0 and f"hfext {name}" not in said and "ignores" not in said
    text = hfext.hub.model_card(tmp_path).text
    assert "loading it needs no hfext" in text or "loading them needs no hfext" in text
    assert "import hfext" not in text.partition("## Method")[0]


def test_what_loads_alone_needs_no_hfext(tiny_llama, tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    hfext.hub.save_record(tmp_path, ["npo", "bisam"])
    code, said = doctor(tmp_path)
    assert code == 0 and "hfext npo" not in said and "ignores" not in said


def test_other_kinds_and_nothing(tiny_llama, tmp_path):
    hfext.RotateKVConfig(bits=4).calibrate(tiny_llama(), torch.arange(3, 67)).save_pretrained(tmp_path / "cache")
    hfext.decoding.NGramStore.build([[1, 2, 3]], vocab_size=8).save(tmp_path / "store")
    for name, kind in (("cache", "kv cache"), ("store", "ngram store")):
        code, said = doctor(tmp_path / name)
        assert code == 0 and kind in said
    (tmp_path / "empty").mkdir()
    assert doctor(tmp_path / "empty")[0] == 2 and doctor(tmp_path / "absent")[0] == 2
