"""The licence of what is made from a base is the base's, from wherever it can be read; never an invented one."""

import json

import pytest
from huggingface_hub import ModelCard, snapshot_download

import hfext
from hfext import hub

BASE = """---
license: other
license_name: tiny-terms
license_link: LICENSE
extra_gated_prompt: |
  Be kind.
  Do not {{ harm }}.
extra_gated_heading: Agree first
---
# Base
"""


def card_of(server, name="user/thing", branch="main"):
    return ModelCard(server.files(name, branch)["README.md"].decode())


def test_licence_name_link_and_terms_come_from_the_hub(server, folder):
    server.add("org/base", {"README.md": BASE}, gated="manual")
    hfext.push_to_hub(folder, "user/thing")
    card = card_of(server)
    data = card.data.to_dict()
    assert (data["license"], data["license_name"]) == ("other", "tiny-terms")
    assert data["license_link"] == "https://huggingface.co/org/base/blob/main/LICENSE"
    assert data["extra_gated_prompt"].startswith("Be kind.") and data["extra_gated_heading"] == "Agree first"
    assert "> Be kind.\n> Do not {{ harm }}.\n" in card.text and "granted on request by its owner" in card.text


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "thing"
    made.mkdir()
    (made / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    hub.save_record(made, ["bisam"], "org/base", "finetune")
    return made


@pytest.mark.parametrize("text", [None, "# no metadata", "---\ntags: [a]\n---\n", "---\nlicense: [\n---\n"])
def test_without_one_the_card_says_so(server, folder, text):
    if text is not None:
        server.add("org/base", {"README.md": text if "[\n" not in text else "---\nlicense: {}\n---\n"})
    hfext.push_to_hub(folder, "user/thing")
    card = card_of(server)
    assert card.data.license == "unknown" and "that of org/base could not be found" in card.text


def test_an_artifact_without_a_base_has_the_licence_its_author_states(server, tiny_llama):
    hfext.push_to_hub(tiny_llama(), "user/own", methods=["sam"])
    assert card_of(server, "user/own").data.license == "unknown"
    assert "nobody stated one" in card_of(server, "user/own").text
    hfext.push_to_hub(tiny_llama(), "user/stated", methods=["sam"], license="CC-BY-4.0")
    assert card_of(server, "user/stated").data.license == "cc-by-4.0"
    assert json.loads(server.files("user/stated")["hfext.json"])["license"]["license"] == "cc-by-4.0"
    own = {"license": "other", "license_name": "mine", "license_link": "https://example.org/mine"}
    hfext.push_to_hub(tiny_llama(), "user/other", methods=["sam"], license=own)
    assert "other (mine), see <https://example.org/mine>, as its author states." in card_of(server, "user/other").text


@pytest.mark.parametrize("given", ["Apache License 2.0!", {}, {"license": 3}, {"license": []}])
def test_what_is_no_licence_is_refused(server, tiny_llama, given):
    with pytest.raises(ValueError, match="license is"):
        hfext.push_to_hub(tiny_llama(), "user/thing", methods=["sam"], license=given)
    assert server.repos == {}


def test_the_card_beside_a_base_on_this_machine(server, tmp_path, tiny_llama):
    tiny_llama().save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text("---\nlicense: gemma\n---\n# Base")
    model = type(tiny_llama()).from_pretrained(tmp_path / "base")
    hfext.push_to_hub(model, "user/thing", methods=["sam"])
    card = card_of(server)
    assert card.data.license == "gemma" and "base_model" not in card.data.to_dict()  # a path is no name of the Hub


def test_a_base_in_the_cache_is_read_without_a_line(server, folder, monkeypatch):
    import huggingface_hub.constants as constants

    server.add("org/base", {"README.md": "---\nlicense: mit\n---\n"})
    snapshot_download("org/base")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.model_card(folder).data.license == "mit"
    assert hub.licence_of("org/absent") == {"license": "unknown"}


def test_a_model_from_the_hub_names_its_base(server, tiny_llama):
    server.add("org/base", {"README.md": "---\nlicense: [mit, apache-2.0]\n---\n"})
    for name, base in (("org/base", "org/base"), ("out/gone", None)):
        model = tiny_llama()
        model.config._name_or_path = name
        hfext.push_to_hub(model, f"user/{name[:3]}", methods=["sam"])
        data = card_of(server, f"user/{name[:3]}").data.to_dict()
        assert data.get("base_model") == base
        assert data["license"] == (["mit", "apache-2.0"] if base else "unknown")


def test_a_hub_that_does_not_answer_is_no_unknown_licence(server, folder):
    server.add("org/base", {"README.md": "---\nlicense: mit\n---\n"})
    server.fail("GET", "/api/models/org/base", "500", times=99)
    with pytest.raises(OSError, match="licence of org/base could not be read.*pass license="):
        hfext.push_to_hub(folder, "user/thing")
    assert "user/thing" not in server.repos
    server.faults.clear()
    server.fail("GET", "/api/models/org/base", "drop")
    hfext.push_to_hub(folder, "user/thing")
    assert card_of(server).data.license == "mit"


def test_an_adapter_names_its_base_and_keeps_its_licence(server, tiny_llama):
    from peft import LoraConfig, get_peft_model

    server.add("org/base", {"README.md": "---\nlicense: llama3.2\n---\n"}, gated="auto")
    model = tiny_llama()
    model.config._name_or_path = model.name_or_path = "org/base"
    adapter = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    hfext.push_to_hub(adapter, "user/adapter", methods=["mezo"])
    card = card_of(server, "user/adapter")
    data = card.data.to_dict()
    assert (data["base_model"], data["base_model_relation"], data["license"]) == ("org/base", "adapter", "llama3.2")
    assert "granted on request," in card.text


def test_a_kernel_and_a_result_keep_the_licence_of_their_code():
    assert hub.model_card("bisam").data.license == "apache-2.0"
