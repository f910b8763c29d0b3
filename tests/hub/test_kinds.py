"""Every kind of artifact goes up whole and comes back equal in a new process that only imported hfext."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import hfext
from hfext import hub

BUILD = """
[general]
name = "hfext-scale"
version = 1
edition = 5
license = "apache-2.0"
backends = ["cuda"]

[general.hub]
repo-id = "user/hfext-scale"

[torch-noarch]
pyext = ["py", "json"]
"""
CODE = '''"""Scales."""

from ._ops import scale

__all__ = ["scale"]
'''
IDS = torch.arange(3, 9)[None]


@pytest.fixture
def kernel(tmp_path):
    """A folder in the layout of the `kernels` package."""
    made = tmp_path / "hfext-scale"
    package = made / "torch-ext" / "hfext_scale"
    package.mkdir(parents=True)
    (made / "build.toml").write_text(BUILD)
    (package / "__init__.py").write_text(CODE)
    (package / "_ops.py").write_text("def scale(x):\n    return 2 * x\n")
    (made / "CARD.md").write_text("---\nlicense: mit\n---\n# hfext-scale\n\nIt scales.\n")
    (made / "tests").mkdir()
    (made / "tests" / "test_scale.py").write_text("def test_scale(): pass\n")
    return made


def test_a_kernel_goes_up_whole_with_its_own_card(server, kernel, tmp_path):
    hfext.push_to_hub(kernel, "user/hfext-scale")
    files = server.files("user/hfext-scale")
    assert set(files) == {str(p.relative_to(kernel)) for p in kernel.rglob("*") if p.is_file()} | {"README.md"}
    card = ModelCard(files["README.md"].decode())
    assert card.data.license == "apache-2.0" and card.data.library_name == "kernels" and "kernel" in card.data.tags
    assert "It scales." in card.text and "`scale`" in card.text and "need no build" in card.text
    (lines,) = re.findall(r"```python\n(.*?)```", card.text, re.S)
    done = in_new_process(server, lines + "print(hfext_scale.scale(21), 'hfext' in sys.modules)", tmp_path)
    assert done.stdout.split() == ["42", "False"], done.stderr
    assert "# hfext-scale" in card.text and card.text.count("# hfext-scale") == 1 and not hub.problems_of(card)
    back = hub.fetch("user/hfext-scale")
    for name, data in files.items():
        assert (back / name).read_bytes() == data
    (kernel / "build" / "torch-universal" / "hfext_scale").mkdir(parents=True)
    (kernel / "build" / "torch-universal" / "hfext_scale" / "__init__.py").write_text(CODE)
    hfext.push_to_hub(kernel, "user/hfext-scale", methods=["superposed"])
    assert b'hfext_scale = get_kernel("user/hfext-scale")' in server.files("user/hfext-scale")["README.md"]
    assert json.loads(server.files("user/hfext-scale")["hfext.json"])["methods"] == ["superposed"]


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda k: (k / "build.toml").write_text("["), "no TOML"),
        (lambda k: (k / "build.toml").write_text("a = 1"), r"no table \[general\]"),
        (lambda k: (k / "build.toml").write_text(BUILD.replace("hfext-scale", "Scale_It")), "name is 'Scale_It'"),
        (lambda k: (k / "build.toml").write_text(BUILD.replace("edition = 5", "edition = 4")), "edition is 4"),
        (lambda k: (k / "build.toml").write_text(BUILD.replace('["cuda"]', "1")), "backends is 1"),
        (lambda k: shutil.rmtree(k / "torch-ext"), "torch-ext/hfext_scale/__init__.py"),
        (lambda k: (k / "torch-ext" / "hfext_scale" / "_c.so").write_bytes(b"\x7fELF"), "_c.so is compiled"),
        (lambda k: (k / "torch-ext" / "hfext_scale" / "w.pkl").write_bytes(b"\x80\x04."), "w.pkl is a pickle"),
        (lambda k: (k / "torch-ext" / "hfext_scale" / "__init__.py").write_text("def"), "no Python"),
    ],
    ids=["toml", "general", "name", "edition", "backends", "package", "compiled", "pickle", "syntax"],
)
def test_a_kernel_that_could_not_be_loaded_is_refused(server, kernel, spoil, message):
    spoil(kernel)
    with pytest.raises(hub.Refused, match=message):
        hfext.push_to_hub(kernel, "user/hfext-scale")
    assert server.repos == {}


@pytest.fixture
def loop(tmp_path):
    hfext.decoding.export_superposed(tmp_path / "loop")
    return tmp_path / "loop"


def test_a_loop_without_a_card_gets_one(server, loop):
    hfext.push_to_hub(loop, "user/loop")
    assert server.files("user/loop")["README.md"] == (loop / "README.md").read_bytes()  # its own
    (loop / "README.md").unlink()
    hfext.push_to_hub(loop, "user/loop", methods=["superposed"], license="apache-2.0")
    card = ModelCard(server.files("user/loop")["README.md"].decode())
    assert {"custom_generate", "superposed", "arxiv:2405.18400"} <= set(card.data.tags)
    assert card.data.library_name == "transformers" and "import hfext" not in card.text
    assert 'custom_generate="user/loop", trust_remote_code=True' in card.text and not hub.problems_of(card)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda f: (f / "custom_generate" / "generate.py").unlink(), "without generate.py"),
        (lambda f: (f / "custom_generate" / "generate.py").write_text("x = 1"), "no function generate"),
        (lambda f: (f / "custom_generate" / "generate.py").write_text("x ="), "no Python"),
        (lambda f: (f / "custom_generate" / "requirements.txt").write_text("== torch"), "no requirement"),
    ],
    ids=["missing", "function", "syntax", "requirement"],
)
def test_a_loop_that_transformers_could_not_run_is_refused(server, loop, spoil, message):
    spoil(loop)
    with pytest.raises(hub.Refused, match=message):
        hfext.push_to_hub(loop, "user/loop")
    assert server.repos == {}


LOADS = """
import torch
import hfext
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM
ids, greedy = torch.arange(3, 9)[None], dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
load, fetch = AutoModelForCausalLM.from_pretrained, hfext.hub.fetch
base = load("user/base")
found = {"base": base(ids).logits, "adapter": AutoPeftModelForCausalLM.from_pretrained("user/adapter")(ids).logits}
found["forgot"] = load("user/forgot")(ids).logits
found["quantised"] = load("user/quantised")(ids).logits
found["cached"] = load("user/cached").generate(ids, **greedy)
torch.manual_seed(0)
found["sampled"] = load("user/sampled").generate(ids, max_new_tokens=6, do_sample=True, pad_token_id=0)
config = hfext.kv_cache.KVCacheConfig.from_pretrained(fetch("user/calibration"))
hfext.kv_cache.apply(base, config)
found["calibration"] = base.generate(ids, **greedy)
base = load("user/base")
predictor = hfext.kv_cache.KVPredictor.from_pretrained(fetch("user/predictor"), base)
found["predictor"] = predictor(input_ids=ids, labels=ids).logits
store = hfext.decoding.NGramStore.load(fetch("user/store"))
found["store"] = torch.tensor(store.orders)
found["loop"] = base.generate(ids, custom_generate="user/loop", trust_remote_code=True, num_drafts=2, max_new_tokens=4)
torch.save({name: x.detach() for name, x in found.items()}, PATH)
"""


def test_every_kind_comes_back_equal_in_a_new_process(server, tiny_llama, tmp_path, loop):
    from peft import LoraConfig, get_peft_model

    saved, greedy = {}, dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
    text = torch.randint(3, 100, (64,))
    with torch.no_grad():
        hfext.push_to_hub(tiny_llama(), "user/base", methods=["bisam"])
        saved["base"] = tiny_llama()(IDS).logits
        adapter = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        adapter.peft_config["default"].base_model_name_or_path = "user/base"
        adapter.peft_config["default"].task_type = "CAUSAL_LM"
        hfext.push_to_hub(adapter, "user/adapter", methods=["mezo"])
        saved["adapter"] = adapter(IDS).logits
        forgot = tiny_llama(seed=3)
        hfext.push_to_hub(forgot, "user/forgot", methods=["npo"], base_model="user/base", relation="finetune")
        saved["forgot"] = forgot(IDS).logits
        quantised = hfext.quantization.quantize(tiny_llama(), hfext.quantization.HQQConfig(bits=4, group_size=16))
        hfext.push_to_hub(quantised, "user/quantised")
        saved["quantised"] = quantised(IDS).logits
        config = hfext.RotateKVConfig(bits=4, residual_length=0).calibrate(tiny_llama(), text)
        cached = tiny_llama(seed=1)
        hfext.kv_cache.apply(cached, hfext.RotateKVConfig(bits=4, residual_length=0).calibrate(cached, text))
        hfext.push_to_hub(cached, "user/cached")
        saved["cached"] = cached.generate(IDS, **greedy)
        sampled = hfext.decoding.enable(tiny_llama(seed=2))
        sampled.generation_config.top_h_alpha = 0.3
        hfext.push_to_hub(sampled, "user/sampled", methods=["top_h"])
        torch.manual_seed(0)
        saved["sampled"] = sampled.generate(IDS, max_new_tokens=6, do_sample=True, pad_token_id=0)
        hfext.push_to_hub(config, "user/calibration")
        model = tiny_llama()
        hfext.kv_cache.apply(model, config)
        saved["calibration"] = model.generate(IDS, **greedy)
        predictor = hfext.kv_cache.KVPredictor(tiny_llama(seed=1, num_hidden_layers=1), tiny_llama())
        hfext.push_to_hub(predictor, "user/predictor")
        saved["predictor"] = predictor(input_ids=IDS, labels=IDS).logits
        store = hfext.decoding.NGramStore.build([[1, 2, 3, 1, 2, 3]], vocab_size=8)
        hfext.push_to_hub(store, "user/store")
        saved["store"] = torch.tensor(store.orders)
        hfext.push_to_hub(loop, "user/loop")
        saved["loop"] = tiny_llama().generate(
            IDS, custom_generate=hfext.superposed_generate, num_drafts=2, max_new_tokens=4
        )
    path = str(tmp_path / "found.pt")
    done = in_new_process(server, LOADS.replace("PATH", repr(path)), tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(path)
    assert set(found) == set(saved)
    assert [name for name in saved if not torch.equal(found[name], saved[name])] == []


def in_new_process(server, code, tmp_path):
    home = {
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_ENDPOINT": server.url,
    }
    return subprocess.run([sys.executable, "-c", code], env={**os.environ, **home}, capture_output=True, text=True)


ALONE = """
import torch
from transformers import AutoModelForCausalLM
for name in ("quantised", "cached", "sampled"):
    print("==", name, flush=True)
    model = AutoModelForCausalLM.from_pretrained(FOLDER + "/" + name)
    model.generate(torch.arange(3, 9)[None], max_new_tokens=2, do_sample=True, pad_token_id=0)
import sys
assert "hfext" not in sys.modules
try:
    AutoModelForCausalLM.from_pretrained(FOLDER + "/sampled", attn_implementation="hfext_triton")
except ValueError as error:
    print(error, file=sys.stderr)
"""


def test_cards_quote_what_transformers_alone_says(server, tiny_llama, tmp_path):
    quantised = hfext.quantization.quantize(tiny_llama(), hfext.quantization.RTNConfig(bits=4, group_size=16))
    cached, sampled = tiny_llama(), hfext.decoding.enable(tiny_llama())
    hfext.kv_cache.apply(cached, hfext.RotateKVConfig(bits=4).calibrate(cached, torch.randint(3, 100, (64,))))
    sampled.generation_config.top_h_alpha = 0.4
    cards = {}
    for name, model, methods in (
        ("quantised", quantised, ["rtn"]),
        ("cached", cached, ["rotatekv"]),
        ("sampled", sampled, ["top_h"]),
    ):
        model.save_pretrained(tmp_path / name)
        hub.save_record(tmp_path / name, methods)
        cards[name] = " ".join(hub.model_card(tmp_path / name).text.split())
    code = ALONE.replace("FOLDER", repr(str(tmp_path)))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    said = " ".join(done.stderr.split())
    for quote in ("Unknown quantization type, got hfext", "Hence, we will skip the quantization"):
        assert said.count(quote) == 2 and quote in cards["quantised"] and quote in cards["cached"]
    quote = "those params were newly initialized because missing from the checkpoint"
    assert quote in said and quote in cards["quantised"] and "UNEXPECTED" in said
    assert 'Specified `attn_implementation="hfext_triton"` is not supported' in said
    hub.save_record(tmp_path / "sampled", ["hfext_triton"])
    text = " ".join(hub.model_card(tmp_path / "sampled", "user/name").text.split())
    assert '("user/name", attn_implementation="hfext_triton")' in text and "[...]` is not supported" in text
    assert "top_h_alpha" not in said and "without a word" in cards["sampled"]
    assert "pip install hfext" in cards["sampled"] and "import hfext  # registers" not in hub.model_card("sam").text


# ---- a later version wrote it -----------------------------------------------------------------------------------


def later(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


NOTE = r"written by hfext 99\.0\.0, and here is 0\.\d+\.\d+: update with `pip install --upgrade hfext`"


def test_configs_of_a_later_version_say_which_wrote_them(tiny_llama, tmp_path, caplog):
    model = tiny_llama()
    hfext.quantization.quantize(model, hfext.quantization.RTNConfig(bits=4, group_size=16))
    hfext.kv_cache.apply(model, hfext.RotateKVConfig(bits=4).calibrate(model, torch.randint(3, 100, (64,))))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["hfext_version"]
    good = (tmp_path / "config.json").read_text()
    for change in (
        lambda q: q["weights"].update(spin=3),
        lambda q: q["weights"].update(method="qtip"),
        lambda q: q["kv_cache"].update(bits="many"),
        lambda q: q.update(activations={}),
    ):
        (tmp_path / "config.json").write_text(good)
        later(
            tmp_path / "config.json",
            lambda c, change=change: (
                c["quantization_config"].update(hfext_version="99.0.0"),
                change(c["quantization_config"]),
            ),
        )
        with pytest.raises(ValueError, match=NOTE):
            AutoModelForCausalLM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(good)
    later(tmp_path / "config.json", lambda c: c["quantization_config"].update(spin=3, hfext_version="0.0.1"))
    with pytest.raises((TypeError, ValueError), match="has no option 'spin'"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_calibration_of_a_later_version(tiny_llama, tmp_path):
    config = hfext.RotateKVConfig(bits=4).calibrate(tiny_llama(), torch.randint(3, 100, (64,)))
    config.save_pretrained(tmp_path)
    path = tmp_path / "kv_cache.safetensors"
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    (key,) = [key for key, value in metadata.items() if "hfext_version" in value]
    about = json.loads(metadata[key])
    target = (
        about
        if "hfext_version" in about
        else next(v for v in about.values() if isinstance(v, dict) and "hfext_version" in v)
    )
    target |= {"hfext_version": "99.0.0", "spin": 3}
    save_file(load_file(path), path, metadata={**metadata, key: json.dumps(about)})
    with pytest.raises(ValueError, match=NOTE):
        hfext.RotateKVConfig.from_pretrained(tmp_path)


def test_a_predictor_of_a_later_version(tiny_llama, tmp_path):
    base = tiny_llama()
    hfext.kv_cache.KVPredictor(tiny_llama(seed=1, num_hidden_layers=1), base).save_pretrained(tmp_path)
    later(tmp_path / "kv_prediction.json", lambda r: (r.update(hfext_version="99.0.0"), r["options"].update(spin=3)))
    with pytest.raises(ValueError, match=NOTE):
        hfext.kv_cache.KVPredictor.from_pretrained(tmp_path, base)


def test_a_store_of_a_later_version(tmp_path):
    hfext.decoding.NGramStore.build([[1, 2, 3, 1, 2, 3]], vocab_size=8).save(tmp_path / "store")
    later(tmp_path / "store" / "ngram_store.json", lambda m: m.update(format=2, hfext_version="99.0.0"))
    with pytest.raises(ValueError, match="written by hfext 99.0.0, and this version reads 1: update with"):
        hfext.decoding.NGramStore.load(tmp_path / "store")


def test_a_record_of_a_later_version(server, tmp_path, tiny_llama):
    hfext.push_to_hub(tiny_llama(), "user/thing", methods=["sam"])
    files = server.files("user/thing")
    record = {**json.loads(files["hfext.json"]), "format": 2}
    record["versions"]["hfext"] = "99.0.0"
    server.add("user/later", {**files, "hfext.json": json.dumps(record)})
    with pytest.raises(hub.Refused, match=NOTE):
        hub.fetch("user/later")
    for name, data in server.files("user/later").items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=NOTE):
        hfext.push_to_hub(tmp_path, "user/again")
    assert "user/again" not in server.repos
    assert isinstance(Path(hub.fetch("user/thing")), Path)


KERNELS = sorted(path.parent for path in (Path(__file__).resolve().parents[2] / "kernels").glob("*/build.toml"))


@pytest.mark.parametrize("folder", KERNELS, ids=lambda path: path.name)
def test_the_kernels_of_this_repository_can_be_published(server, folder):
    hfext.push_to_hub(folder, f"user/{folder.name}", ignore_patterns=[".pytest_cache/*"])
    card = ModelCard(server.files(f"user/{folder.name}")["README.md"].decode())
    assert hub.problems_of(card) == [] and card.data.license != "unknown"
