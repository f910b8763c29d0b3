"""Publishing and fetching against the Hub on 127.0.0.1, with the real client and with faults at every request."""

import json
import os
import shutil
from pathlib import Path

import huggingface_hub.constants as constants
import pytest
import torch
from huggingface_hub import HfApi, snapshot_download
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import hfext
from hfext import hub as api
from hfext import recipe


def test_one_commit_holds_everything_and_a_card(server, folder):
    done = hfext.push_to_hub(folder, "user/thing", private=True)
    files = server.files("user/thing")
    assert server.commits("user/thing") == 1 and server.repos["user/thing"]["private"]
    assert set(files) == {"model.safetensors", "config.json", "hfext.json", "README.md"}
    assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert b"arxiv:2407.12993" in files["README.md"] and b"base_model_relation: finetune" in files["README.md"]
    assert done.oid == server.find("user/thing", "main")["id"]
    assert not (folder / "README.md").exists()  # a user's folder is not written to
    assert server.find("user/thing", "main")["message"] == "Upload thing with hfext"  # and no path of the machine


def test_the_card_of_a_model_names_its_repository(server, tiny_llama):
    hfext.push_to_hub(tiny_llama(), "user/shakespeare", methods=["sam"])
    card = server.files("user/shakespeare")["README.md"].decode()
    assert "# shakespeare" in card and 'from_pretrained("user/shakespeare")' in card
    assert server.find("user/shakespeare", "main")["message"] == "Upload LlamaForCausalLM with hfext"


def test_a_second_push_sends_no_file_twice_and_keeps_a_card_of_ones_own(server, folder):
    hfext.push_to_hub(folder, "user/thing")
    (folder / "README.md").write_text("Mine.")
    server.log.clear()
    hfext.push_to_hub(folder, "user/thing")
    assert not [1 for method, *_ in server.log if method == "PUT"]
    assert server.files("user/thing")["README.md"] == b"Mine." and server.commits("user/thing") == 2


def test_branches_and_pull_requests_leave_main_alone(server, folder):
    hfext.push_to_hub(folder, "user/thing", revision="two-bits")
    assert server.files("user/thing") == {} and "model.safetensors" in server.files("user/thing", "two-bits")
    done = hfext.push_to_hub(folder, "user/thing", create_pr=True, commit_message="Better")
    assert server.files("user/thing") == {} and "config.json" in server.files("user/thing", "refs/pr/1")
    assert done.pr_url.endswith("/discussions/1")


def test_a_repository_is_not_half_made(server, folder):
    server.fail("POST", "/api/repos/create", "403")
    with pytest.raises(OSError, match="was not changed"):
        hfext.push_to_hub(folder, "user/thing")
    assert server.repos == {}


def test_when_nobody_can_say_what_happened_this_is_said(server, folder):
    hfext.push_to_hub(folder, "user/thing")
    (folder / "note.txt").write_text("new")
    server.fail("POST", "/commit/", "drop_after")
    server.fail("GET", "/api/models/user/thing", "403", times=9, after=1)
    with pytest.raises(OSError, match="may have been changed"):
        hfext.push_to_hub(folder, "user/thing")
    assert server.files("user/thing")["note.txt"] == b"new"


def test_what_had_arrived_is_not_sent_again_after_a_failure(server, folder):
    save_file({"other": torch.ones(50)}, folder / "other.safetensors")
    server.fail("POST", "/commit/", "403")
    with pytest.raises(OSError, match="user/thing was not changed"):
        hfext.push_to_hub(folder, "user/thing")
    assert server.files("user/thing") == {} and len(server.blobs) == 2
    server.log.clear()
    hfext.push_to_hub(folder, "user/thing")
    assert not [1 for method, *_ in server.log if method == "PUT"]


def test_a_commit_of_somebody_else_in_between_is_not_overwritten(server, folder, monkeypatch):
    hfext.push_to_hub(folder, "user/thing")
    original = HfApi.create_commit

    def overtaken(self, *args, **kwargs):
        server.repos["user/thing"]["refs"]["main"].append({"id": "f" * 40, "files": {"theirs.txt": b"1"}})
        return original(self, *args, **kwargs)

    monkeypatch.setattr(HfApi, "create_commit", overtaken)
    with pytest.raises(OSError, match="was not changed"):
        hfext.push_to_hub(folder, "user/thing")
    assert server.files("user/thing") == {"theirs.txt": b"1"}


def test_offline_is_said(server, folder, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="HF_HUB_OFFLINE is set"):
        hfext.push_to_hub(folder, "user/thing")


# ---- kinds of artifacts -----------------------------------------------------------------------------------------


def test_a_model_comes_back_bit_for_bit(server, tiny_llama):
    model = tiny_llama()
    hfext.push_to_hub(model, "user/model", methods=["frugal"], results=[])
    again = AutoModelForCausalLM.from_pretrained(api.fetch("user/model"))
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    assert b"from transformers import LlamaForCausalLM" in server.files("user/model")["README.md"]


def test_quantised_weights_and_a_cache_name_their_methods_themselves(server, tiny_llama):
    model = tiny_llama()
    hfext.quantization.quantize(model, hfext.quantization.RTNConfig(bits=4, group_size=16))
    hfext.push_to_hub(model, "user/model")
    assert json.loads(server.files("user/model")["hfext.json"])["methods"] == ["rtn"]
    again = AutoModelForCausalLM.from_pretrained(api.fetch("user/model"))
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_result_of_a_method_and_a_store_of_ngrams(server):
    hfext.push_to_hub("bisam", "user/bisam-result")
    files = server.files("user/bisam-result")
    assert json.loads(files["bisam.json"]) == recipe.read_result("bisam") and b"bisam" in files["README.md"]
    with pytest.raises(KeyError, match="bisam"):
        hfext.push_to_hub("bisan", "user/x")
    store = hfext.decoding.NGramStore.build([[1, 2, 3, 1, 2, 3]], vocab_size=8)
    hfext.push_to_hub(store, "user/store")
    assert any(name.endswith(".safetensors") for name in server.files("user/store"))
    again = hfext.decoding.NGramStore.load(api.fetch("user/store"))
    assert again.orders == store.orders


def test_a_calibrated_cache_alone(server, tiny_llama):
    config = hfext.RotateKVConfig(bits=4).calibrate(tiny_llama(), torch.randint(3, 100, (64,)))
    hfext.push_to_hub(config, "user/cache")
    assert json.loads(server.files("user/cache")["hfext.json"])["methods"] == ["rotatekv"]
    again = hfext.RotateKVConfig.from_pretrained(api.fetch("user/cache"))
    assert again.to_dict() == config.to_dict()


def test_what_nobody_can_name_is_not_published(server, tiny_llama, folder):
    with pytest.raises(ValueError, match="pass methods="):
        hfext.push_to_hub(tiny_llama(), "user/model")
    with pytest.raises(TypeError, match="artifact is a int"):
        hfext.push_to_hub(3, "user/model")
    with pytest.raises(ValueError, match="has an hfext.json already"):
        hfext.push_to_hub(folder, "user/model", methods=["sam"])
    assert server.repos == {}


def test_one_method_may_be_named_by_itself(server, tiny_llama):
    hfext.push_to_hub(tiny_llama(), "user/model", methods="npo")
    assert json.loads(server.files("user/model")["hfext.json"])["methods"] == ["npo"]


@pytest.mark.parametrize(
    "name, error, words",
    [
        ("final-7b", KeyError, "There is no folder 'final-7b' here and no method of that name. `hfext list` shows"),
        ("nowhere", KeyError, "There is no folder 'nowhere' here and no method of that name."),
        ("bisan", KeyError, "no method of that name. Did you mean 'bisam'"),
        ("out/nothing", FileNotFoundError, "There is no folder out/nothing."),
        (Path("nothing"), FileNotFoundError, "There is no folder nothing."),
    ],
)
def test_what_is_neither_folder_nor_method(server, tmp_path, monkeypatch, name, error, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error) as raised:
        hfext.push_to_hub(name, "user/x")
    assert words in raised.value.args[0] and len(raised.value.args[0]) < 150 and server.repos == {}


@pytest.mark.parametrize(
    "given, words",
    [
        ("apache2", "license is 'apache2', which the Hub does not list. Did you mean 'apache-2.0'?"),
        ({"license": "cc-by-40"}, "Did you mean 'cc-by-4.0'?"),
        ("house-rules", "For one of your own say {'license': 'other'"),
        ("Apache-2.0", None),
        (None, None),
    ],
)
def test_a_licence_that_the_hub_does_not_list_is_warned_of(server, tiny_llama, caplog, given, words):
    import transformers

    transformers.utils.logging.enable_propagation()
    try:
        hfext.push_to_hub(tiny_llama(), "user/model", methods=["npo"], license=given)
    finally:
        transformers.utils.logging.disable_propagation()
    said = "".join(record.getMessage() for record in caplog.records if "license is" in record.getMessage())
    assert (words in said) if words else not said


# ---- what is refused --------------------------------------------------------------------------------------------


def spoil(folder, what):
    path = folder / "model.safetensors"
    if what == "pickle":
        torch.save({"a": torch.ones(2)}, folder / "weights.bin")
    elif what == "pickle by another name":
        torch.save({"a": torch.ones(2)}, folder / "weights.data")
    elif what == "old pickle":
        import pickle

        (folder / "settings.json").write_bytes(pickle.dumps({"a": 1}))
    elif what == "link":
        os.symlink("/etc/hostname", folder / "vocab.txt")
    elif what == "linked folder":
        os.symlink(folder.parent, folder / "more")
    elif what == "truncated":
        path.write_bytes(path.read_bytes()[:-10])
    elif what == "header too long":
        path.write_bytes((10**9).to_bytes(8, "little") + path.read_bytes()[8:])
    elif what == "no header":
        path.write_bytes(b"abc")
    elif what == "header is no JSON":
        data = bytearray(path.read_bytes())
        data[8] = ord("x")
        path.write_bytes(bytes(data))
    elif what == "bytes behind":
        path.write_bytes(path.read_bytes() + b"payload")
    elif what == "tensors overlap":
        about = {"dtype": "F32", "shape": [2]}
        spans = {"a": {**about, "data_offsets": [0, 8]}, "b": {**about, "data_offsets": [4, 12]}}
        header = json.dumps(spans).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(12))
    elif what == "index leads out":
        index = {"metadata": {}, "weight_map": {"a": "../../secret.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif what == "shard missing":
        index = {"metadata": {}, "weight_map": {"a": "model-00002-of-00002.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif what == "index damaged":
        (folder / "model.safetensors.index.json").write_text("[]")


SPOILT = [
    "pickle",
    "pickle by another name",
    "old pickle",
    "link",
    "linked folder",
    "truncated",
    "header too long",
    "no header",
    "header is no JSON",
    "bytes behind",
    "tensors overlap",
    "index leads out",
    "shard missing",
    "index damaged",
]


@pytest.mark.parametrize("what", SPOILT)
def test_what_must_not_be_published_is_refused_before_anything_is_sent(server, folder, what):
    spoil(folder, what)
    with pytest.raises(api.Refused, match="pickle|link|damaged|leads out|not whole"):
        hfext.push_to_hub(folder, "user/thing")
    assert server.repos == {}


def test_the_state_of_a_training_stays_at_home(server, folder):
    for name in ("training_args.bin", "optimizer.pt", "rng_state_0.pth", "checkpoint-5/optimizer.pt"):
        (folder / name).parent.mkdir(exist_ok=True)
        torch.save({}, folder / name)
    (folder / "draft.txt").write_text("no")
    hfext.push_to_hub(folder, "user/thing", ignore_patterns=["draft*"])
    assert set(server.files("user/thing")) == {"model.safetensors", "config.json", "hfext.json", "README.md"}


# ---- fetching ---------------------------------------------------------------------------------------------------


def test_damaged_bytes_of_the_right_length_are_found(server, folder):
    hfext.push_to_hub(folder, "user/thing")
    server.fail("GET", "model.safetensors", "garble")
    with pytest.raises(api.Refused, match="model.safetensors of user/thing arrived damaged"):
        api.fetch("user/thing")


def test_pickles_and_names_that_lead_out_are_not_fetched(server, folder):
    hfext.push_to_hub(folder, "user/thing")
    commits = server.repos["user/thing"]["refs"]["main"]

    def publish(name, data):
        commits.append({"id": f"{len(commits):040x}", "files": {**commits[1]["files"], name: data}})

    publish("old.bin", b"\x80\x04.")
    assert not (api.fetch("user/thing") / "old.bin").exists()
    publish("data.json", b"\x80\x04.")
    with pytest.raises(api.Refused, match="data.json is a pickle"):
        api.fetch("user/thing")
    for name in ("../evil.txt", "/etc/evil", "a\\b.txt", "a/../../b.txt", "C:evil.txt", "a\0b"):
        publish(name, b"1")
        with pytest.raises(api.Refused, match="leads out of its folder"):
            api.fetch("user/thing")


def test_the_second_load_needs_no_line(server, folder, monkeypatch):
    hfext.push_to_hub(folder, "user/thing")
    api.fetch("user/thing")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert os.path.isfile(os.path.join(snapshot_download("user/thing"), "model.safetensors"))
    shutil.rmtree(constants.HF_HUB_CACHE)


@pytest.mark.parametrize(
    "what", ["truncated", "header too long", "bytes behind", "tensors overlap", "index leads out"]
)
def test_what_somebody_else_tampered_with_is_not_fetched(server, folder, what):
    """The hash is right, so it is the content that gives it away; the name is said and nothing stays in the cache."""
    hfext.push_to_hub(folder, "user/thing")
    spoil(folder, what)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    server.add("user/tampered", files)
    for _ in range(2):
        with pytest.raises(api.Refused, match=r"model\.safetensors.*(damaged|leads out)"):
            api.fetch("user/tampered")
    left = [
        path.name for path in (Path(constants.HF_HUB_CACHE) / "models--user--tampered").rglob("model.safetensors*")
    ]
    assert "model.safetensors.index.json" not in left if "index" in what else left == []
