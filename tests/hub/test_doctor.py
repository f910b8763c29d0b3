"""`hfext doctor` on folders and repositories: what is needed, what would be ignored, and the exit status."""

import json

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
    assert code == 2 and "could not be fetched" in said


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
