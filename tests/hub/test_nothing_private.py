"""What must stay at home: tokens, paths of the machine, texts that were to be forgotten."""

import dataclasses
import json
import pickle
from pathlib import Path

import pytest
from huggingface_hub import snapshot_download
from transformers import TrainingArguments

import hfext
from hfext import hub as api
from hfext.cli._site_method import page
from hfext.hub import _fetch, _push
from hfext.unlearning import UnlearningConfig

SECRET = "hf_AbCdEfGhIjKlMnOpQrStUvWxYz012345"


def published(server, name="user/thing"):
    return b"".join(server.files(name).values())


@pytest.fixture
def bare(folder):
    (folder / "hfext.json").unlink()
    return folder


@dataclasses.dataclass
class Inner:
    rho: float = 0.05
    hub_token: str = SECRET


@dataclasses.dataclass
class Outer:
    inner: Inner
    steps: int = 3


@pytest.mark.parametrize("form", ["arguments", "mapping", "unlearning", "inside"])
def test_of_training_arguments_the_settings_alone_are_published(server, bare, tmp_path, form):
    kind = UnlearningConfig if form == "unlearning" else TrainingArguments
    config = kind(output_dir=str(tmp_path / "private"), hub_token=SECRET, learning_rate=3e-4, report_to=[])
    config = {"mapping": vars(config), "inside": {"run": config}}.get(form, config)
    hfext.push_to_hub(bare, "user/thing", methods=["bisam"], config=config)
    found = json.loads(server.files("user/thing")["hfext.json"])["config"]
    found = found["run"] if form == "inside" else found
    assert found["learning_rate"] == 3e-4 and "output_dir" not in found
    everything = published(server)
    assert SECRET.encode() not in everything and str(tmp_path).encode() not in everything
    assert b"hub_token" not in everything


KEYS = ["hub_token", "token", "HF_TOKEN", "api_key", "apiKey", "password", "db_passwd", "client_secret", "accessToken"]


@pytest.mark.parametrize("key", KEYS)
def test_names_of_secrets_are_left_out_at_any_depth(bare, key):
    config = {key: "xyzzy", "deep": [{"more": {key: "xyzzy"}}], "eos_token": "</s>", "max_tokens": 5, "key": "k"}
    path = api.save_record(bare, ["bisam"], config=config)
    expected = {"deep": [{"more": {}}], "eos_token": "</s>", "max_tokens": 5, "key": "k"}
    assert json.loads(path.read_text())["config"] == expected and "xyzzy" not in str(api.model_card(bare))


def test_a_dataclass_inside_a_dataclass(bare, tmp_path):
    path = api.save_record(bare, ["bisam"], config=Outer(Inner()))
    assert json.loads(path.read_text())["config"] == {"inner": {"rho": 0.05}, "steps": 3}
    path = api.save_record(bare, ["bisam"], config={"data": str(tmp_path), "also": tmp_path, "lr": 1})
    assert json.loads(path.read_text())["config"] == {"lr": 1}


@pytest.mark.parametrize(
    "given",
    [
        {"config": {"note": f"ran with {SECRET}"}},
        {"config": {"a": [{"b": SECRET}]}},
        {"config": {SECRET: 1}},
        {"results": [{"metric": "loss", "value": 1.0, "dataset": "x", "setting": f"token {SECRET}"}]},
    ],
)
def test_what_looks_like_a_token_is_refused_and_not_repeated(server, bare, given):
    with pytest.raises(ValueError, match="looks like a token") as caught:
        hfext.push_to_hub(bare, "user/thing", methods=["bisam"], **given)
    assert SECRET not in str(caught.value) and server.repos == {}


def test_a_record_that_holds_a_token_already_is_not_published(server, folder):
    record = json.loads((folder / "hfext.json").read_text())
    (folder / "hfext.json").write_text(json.dumps({**record, "config": {"note": SECRET}}))
    with pytest.raises(ValueError, match="looks like a token"):
        hfext.push_to_hub(folder, "user/thing")
    assert server.repos == {}


# ---- texts that were to be forgotten ----------------------------------------------------------------------------

EVALUATION = {
    "forget_loss": 3.5,
    "rows": [{"question": "Who is it?", "answer": "Forgotten Name"}],
    "samples": ["Forgotten Name"],
    "more": {"completion": "Forgotten Name"},
    "curve": [1.0, 2.0],
    "missing": {"gold": "needs gold"},
}


@pytest.mark.parametrize("name", ["evaluation.json", "deep/result.json", "EVAL.JSON"])
def test_the_rows_of_an_evaluation_in_the_folder_are_not_published(server, folder, name):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(EVALUATION))
    hfext.push_to_hub(folder, "user/thing")
    found = json.loads(server.files("user/thing")[name])
    assert found == {key: EVALUATION[key] for key in ("forget_loss", "curve", "missing")}
    assert b"Forgotten" not in published(server)
    assert b"Forgotten" in (folder / name).read_bytes()  # the user's file is as it was


def test_rows_by_name_of_the_measure_and_without_the_rest(server, folder):
    for number, about in enumerate(({"missing": {}}, {})):
        rows = {"rows": {"forget_rouge": [{"answer": "Forgotten Name"}]}, "forget_loss": 1.0, **about}
        (folder / "evaluation.json").write_text(json.dumps(rows))
        hfext.push_to_hub(folder, f"user/thing{number}")
        assert b"Forgotten" not in published(server, f"user/thing{number}")
        assert json.loads(server.files(f"user/thing{number}")["evaluation.json"]) == {"forget_loss": 1.0, **about}


def test_nor_those_of_results_that_are_given(server, bare):
    hfext.push_to_hub(bare, "user/thing", methods=["npo"], results=EVALUATION)
    given = [{"metric": "loss", "value": 1.0, "dataset": "x", "answer": "Forgotten Name", "sd": 0.1}]
    hfext.push_to_hub(bare, "user/other", methods=["npo"], results=given)
    assert b"Forgotten" not in published(server) + published(server, "user/other")
    assert json.loads(server.files("user/other")["hfext.json"])["results"][0]["sd"] == 0.1


def test_other_json_with_rows_stays_as_it_is(server, folder):
    (folder / "table.json").write_text('{"rows": 3,  "missing": []}')
    hfext.push_to_hub(folder, "user/thing")
    assert server.files("user/thing")["table.json"] == b'{"rows": 3,  "missing": []}'


# ---- pickles that are there already -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter_model.bin", "model.h5"])
def test_a_repository_with_pickled_weights_alone_is_said_to_be_one(server, name):
    server.add("user/old", {name: b"\x80\x04.", "config.json": "{}", "training_args.bin": b"\x80\x04."})
    with pytest.raises(api.Refused, match=rf"weights only as pickles.*\({name}\)"):
        api.fetch("user/old")
    assert (api.fetch("user/old", allow_patterns=["*.json"]) / "config.json").is_file()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "notes"])
def test_a_pickle_of_an_earlier_download_is_not_handed_out(server, folder, name):
    hfext.push_to_hub(folder, "user/thing")
    server.add("user/old", {**server.files("user/thing"), name: pickle.dumps([1], 0)})
    found = snapshot_download("user/old")
    with pytest.raises(api.Refused, match=f"{name} is a pickle"):
        api.fetch("user/old", ignore_patterns=["notes"])
    (Path(found) / name).unlink()
    assert not (api.fetch("user/old", ignore_patterns=["notes"]) / name).exists()


# ---- a name of a method is no folder ----------------------------------------------------------------------------


def test_a_folder_with_the_name_of_a_method_does_not_take_its_place(server, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder.rename("bisam")
    hfext.push_to_hub("bisam", "user/result")
    assert "bisam.json" in server.files("user/result") and "config.json" not in server.files("user/result")
    assert "no weights" in api.model_card("bisam").text
    for number, path in enumerate(("./bisam", Path("bisam"))):
        hfext.push_to_hub(path, f"user/folder{number}")
        assert "config.json" in server.files(f"user/folder{number}")
        assert "no weights" not in api.model_card(path).text
    (tmp_path / "npo").mkdir()
    assert "# npo" in page(hfext.registry.get("npo"))


# ---- answers of the Hub -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("named", ["²", "٣", "9" * 400, "-1", "soon", ""])
def test_a_strange_time_to_wait_is_no_crash(server, folder, named):
    class Response:
        status_code = 429
        headers = {"Retry-After": named}

    error = OSError("busy")
    error.response = Response()
    assert _fetch.delay_after(error, 0) == 1.0


def test_a_token_behind_bearer_is_hidden():
    said = _fetch.reason(OSError("refused: Authorization: Bearer abc.def-ghi"))
    assert "abc.def-ghi" not in said and "Bearer [token]" in said


def test_a_publication_in_between_is_compared_with_its_own_hashes(server, folder, monkeypatch):
    hfext.push_to_hub(folder, "user/thing")
    original = _fetch.patient
    calls = []

    def late(call):
        found = original(call)
        calls.append(1)
        if len(calls) == 1:
            (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "new": 1}')
            (folder / "added.txt").write_text("new")
            with monkeypatch.context() as usual:
                usual.setattr(_fetch, "patient", original)
                hfext.push_to_hub(folder, "user/thing")
        return found

    monkeypatch.setattr(_fetch, "patient", late)
    found = api.fetch("user/thing")
    assert json.loads((found / "config.json").read_text())["new"] == 1 and (found / "added.txt").is_file()


def test_another_commit_in_the_meantime_is_not_taken_for_ours(server, folder):
    from huggingface_hub import CommitOperationAdd, HfApi

    hfext.push_to_hub(folder, "user/thing")
    head, hub = server.find("user/thing", "main")["id"], HfApi()
    files = {name: server.files("user/thing")[name] for name in ("config.json", "model.safetensors")}
    assert _push._holds(hub, "user/thing", head, [CommitOperationAdd(n, c) for n, c in files.items()])
    for name, content in files.items():
        changed = {**files, name: content[:-1] + b" "}
        assert not _push._holds(hub, "user/thing", head, [CommitOperationAdd(n, c) for n, c in changed.items()])


def test_results_that_no_float_can_hold_are_refused(bare):
    for value in (10**400, 10**5000, float("nan")):
        with pytest.raises(ValueError, match="finite number"):
            api.save_record(bare, ["npo"], results=[{"metric": "a", "value": value, "dataset": "b"}])
    found = api.save_record(bare, ["npo"], results={"forget_loss": 10**400, "rows": [], "missing": {}})
    assert json.loads(found.read_text())["results"] == []


# ---- names and texts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [".env", ".env.local", ".netrc", "token", "hf_token.txt", "deep/.git-credentials"])
def test_files_for_passwords_are_refused(server, folder, name):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("x")
    with pytest.raises(api.Refused, match="passwords and tokens"):
        hfext.push_to_hub(folder, "user/thing")
    hfext.push_to_hub(folder, "user/thing", ignore_patterns=[name])


def test_a_token_in_a_file_is_refused_and_not_repeated(server, folder):
    (folder / "generation_config.json").write_text(json.dumps({"token": SECRET}))
    with pytest.raises(api.Refused, match=r"generation_config\.json holds what looks like a token") as caught:
        hfext.push_to_hub(folder, "user/thing")
    assert SECRET not in str(caught.value) and server.repos == {}


@pytest.mark.parametrize("name", ["a\\b.txt", "C:evil.txt"])
def test_a_name_that_leads_out_elsewhere_is_not_published(server, folder, name):
    (folder / name).write_text("x")
    with pytest.raises(api.Refused, match="leads out"):
        hfext.push_to_hub(folder, "user/thing")


@pytest.mark.parametrize("name", ["thing", "", "a/b/c", "user/", "/thing"])
def test_a_repository_needs_an_owner(server, folder, name):
    with pytest.raises(ValueError, match="repo_id is .* must be 'user/name'"):
        hfext.push_to_hub(folder, name)
    assert server.log == []


def test_texts_of_a_record_do_not_break_the_card(bare):
    nasty = "a\n```\n# Heading {% raw %} {{ x }} {# y #}\n---\n| b"
    result = {"metric": "loss", "value": 1.0, "dataset": nasty, "setting": nasty}
    api.save_record(bare, ["bisam"], config={"note": nasty, "deep": [{"x": nasty}]}, results=[result])
    card = api.model_card(bare)
    assert api.problems_of(card) == []
    fences = [line for line in card.text.splitlines() if line.startswith("```")]
    assert len(fences) % 2 == 0 and "\n# Heading" not in card.text
    assert len(fences) == len([x for x in plain_card(bare).text.splitlines() if x.startswith("```")]) + 2
    (row,) = [line for line in card.text.splitlines() if line.startswith("| a ")]
    assert row.count("|") - row.count("\\|") == 5 and "'''" in row


def plain_card(bare):
    api.save_record(bare, ["bisam"])
    return api.model_card(bare)


@pytest.mark.parametrize("name", ["config.json", "hfext.json", "adapter_config.json"])
def test_json_that_is_nested_too_deeply_is_an_error_of_ours(server, folder, name):
    (folder / name).write_text('{"a":' * 100_000)
    with pytest.raises(ValueError, match=name):
        hfext.push_to_hub(folder, "user/thing")
    assert server.repos == {}
