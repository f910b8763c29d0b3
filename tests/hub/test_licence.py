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


GATED = "---\nextra_gated_prompt: Be kind.\nextra_gated_heading: Agree first\n---\n# Base\n"


@pytest.mark.parametrize("given", ["mit", {"license": "mit"}])
def test_a_licence_of_ones_own_does_not_take_back_the_terms_of_the_base(server, folder, given):
    (folder / "hfext.json").unlink()
    server.add("org/base", {"README.md": BASE}, gated="manual")
    hfext.push_to_hub(folder, "user/thing", methods=["bisam"], base_model="org/base", license=given)
    data = card_of(server).data.to_dict()
    assert data["license"] == "mit" and "license_name" not in data and "license_link" not in data
    assert data["extra_gated_prompt"].startswith("Be kind.") and data["extra_gated_heading"] == "Agree first"
    assert "granted on request by its owner" in card_of(server).text and "> Be kind." in card_of(server).text
    licence = json.loads(server.files("user/thing")["hfext.json"])["license"]
    assert licence["gated"] == "manual" and licence["license_source"] == "its owner"


def test_nor_does_that_of_a_record(server, folder):
    hub.save_record(folder, ["bisam"], "org/base", "finetune", license={"license": "mit"})
    server.add("org/base", {"README.md": BASE}, gated="manual")
    hfext.push_to_hub(folder, "user/thing")
    assert card_of(server).data.to_dict()["extra_gated_heading"] == "Agree first"
    assert "granted on request by its owner" in card_of(server).text


def test_a_licence_of_ones_own_helps_when_the_hub_does_not_answer(server, folder):
    (folder / "hfext.json").unlink()
    server.fail("GET", "/api/models/org/base", "500", times=99)
    hfext.push_to_hub(folder, "user/thing", methods=["bisam"], base_model="org/base", license="mit")
    assert card_of(server).data.license == "mit"


@pytest.mark.parametrize("gated", ["manual", None])
def test_terms_stay_where_no_licence_can_be_read(server, folder, gated):
    server.add("org/base", {"README.md": GATED}, **({"gated": gated} if gated else {}))
    hfext.push_to_hub(folder, "user/thing")
    data = card_of(server).data.to_dict()
    assert data["license"] == "unknown" and data["extra_gated_prompt"] == "Be kind."
    assert ("granted on request" in card_of(server).text) == (gated is not None)


def test_terms_of_a_card_beside_the_base_stay(tmp_path):
    (tmp_path / "README.md").write_text(GATED)
    expected = {"license": "unknown", "extra_gated_prompt": "Be kind.", "extra_gated_heading": "Agree first"}
    assert hub.licence_of(None, base_folder=tmp_path) == expected


@pytest.mark.parametrize("now, expected", [("license: apache-2.0\n", "apache-2.0"), ("tags: [a]\n", "unknown")])
def test_what_the_hub_says_goes_before_an_old_card_in_the_cache(server, folder, now, expected):
    server.add("org/base", {"README.md": "---\nlicense: mit\n---\n"})
    snapshot_download("org/base")
    server.add("org/base", {"README.md": f"---\n{now}---\n"})
    assert hub.licence_of("org/base")["license"] == expected
    hfext.push_to_hub(folder, "user/thing")
    assert card_of(server).data.license == expected


def test_another_licence_without_a_name_is_called_unknown(server, folder):
    server.add("org/base", {"README.md": "---\nlicense: other\n---\n"})
    hfext.push_to_hub(folder, "user/thing")
    assert card_of(server).data.to_dict()["license_name"] == "unknown"
    assert hub.problems_of(card_of(server)) == []
