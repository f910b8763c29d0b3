"""Every method's card, with and without weights, is in order without a line; what would not be is found."""

import json
import re

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from typer.testing import CliRunner

import hfext
from hfext import hub, recipe, registry
from hfext.cli import app
from hfext.hub._record import results_of

METHODS = registry.methods()
FACTS = {"metric": "exact match", "value": 0.75, "dataset": "facts", "setting": "seed 0", "machine": "two cores"}


def texts(method):
    result = recipe.read_result(method.name) or {}
    return str(method.to_dict()) + json.dumps(result.get("evidence") or {})


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_the_card_of_every_method_is_in_order(method, tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    hub.save_record(
        tmp_path, [method.name], "org/base", "finetune", {"alpha": 1}, [FACTS], license={"license": "apache-2.0"}
    )
    for card in (hub.model_card(method.name, "user/name"), hub.model_card(tmp_path, "user/name")):
        assert hub.problems_of(card) == []
        data = yaml.safe_load(card.content.split("---")[1])
        assert {"hfext", method.name} <= set(data["tags"]) and data["license"] == "apache-2.0"
        assert method.arxiv is None or f"arxiv:{method.arxiv}" in data["tags"]
        assert "null" not in card.content.split("---")[1]
        # "None" stands only where the record itself says it.
        assert len(re.findall(r"\bNone\b", card.text)) == 0 or "None" in texts(method)
        assert not re.search(r"\{\{|\{%|%\}", card.text)
        for section in ("## Licence", "## Limits", "## Citation", "```bibtex"):
            assert section in card.text
        for plot in hub.plots_of([method.name]):
            assert f"]({plot})" in card.text
    assert data["base_model"] == "org/base" and data["base_model_relation"] == "finetune"
    assert data["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.75
    assert "## How to load" in card.text and "two cores" in card.text and "hfext 0" in card.text
    needs = method.family not in ("optim", "schedule", "unlearning", "training", "metrics") or method.after_load
    needs = needs and method.name not in ("uncurl", "wta_crs")  # experts that went, and a backward pass: plain weights
    assert ("import hfext  # registers" in card.text) == bool(needs)


@pytest.mark.parametrize("family", sorted({m.family for m in METHODS} | {"attention", "modules"}))
def test_every_family_has_a_block(family):
    assert (recipe.shipped("model_cards") / "families" / f"{family}.md.jinja").is_file()


def test_numbers_have_a_setting_and_a_machine():
    text = hub.model_card("bisam").text
    assert "5 seeds" in text and "Measured on AMD EPYC, 2 cores with hfext" in text


def test_plots_are_published_with_the_card(server):
    hfext.push_to_hub("npo", "user/npo")
    files = server.files("user/npo")
    assert {"npo.json", "README.md", "plots/npo-utility.png", "plots/npo-relearning.png"} == set(files)
    assert b"![npo-utility](plots/npo-utility.png)" in files["README.md"]
    assert files["plots/npo-utility.png"].startswith(b"\x89PNG")


def test_what_evaluate_found_becomes_results_without_its_rows(server, tiny_llama):
    rows = [{"input_ids": list(range(3, 11)), "labels": list(range(3, 11))} for _ in range(2)]
    found = hfext.unlearning.evaluate(tiny_llama(), forget=rows, retain=rows)
    hfext.push_to_hub(tiny_llama(), "user/forgot", methods=["npo"], results={**found, "dataset": "TOFU forget10"})
    files = server.files("user/forgot")
    assert set(files) >= {"evaluation.json", "hfext.json", "plots/npo-utility.png"}
    kept = json.loads(files["evaluation.json"])
    assert "rows" not in kept and kept["missing"]["verbmem"] == "needs passages"
    results = ModelCard(files["README.md"].decode()).data.eval_results
    values = {result.metric_name: result.metric_value for result in results}
    assert values["forget probability"] == pytest.approx(found["forget_probability"])
    assert {result.dataset_name for result in results} == {"TOFU forget10"}
    assert all(isinstance(value, float | int) for value in values.values()) and len(values) == 4


def test_numbers_of_an_evaluation_say_their_rows_and_what_was_before(server, tiny_llama):
    rows = [{"input_ids": list(range(n, n + 8)), "labels": list(range(n, n + 8))} for n in (3, 20, 40)]
    before = hfext.unlearning.evaluate(tiny_llama(seed=1), forget=rows[:2], retain=rows[2:])
    found = hfext.unlearning.evaluate(tiny_llama(), forget=rows[:2], retain=rows[2:])
    hfext.push_to_hub(tiny_llama(), "user/forgot", methods=["npo"], results={**found, "before": before})
    files = server.files("user/forgot")
    lines = files["README.md"].decode().splitlines()
    for name, data, count in (
        ("extraction_strength", "rows to forget", 2),
        ("exact_memorization", "rows to forget", 2),
        ("forget_probability", "rows to forget", 2),
        ("retain_probability", "rows to keep", 1),
    ):
        value = f"{found[name]:.4g}"
        setting = f"{count} row{'s' * (count > 1)}, {before[name]:.4g} before"
        assert f"| {data} | {name.replace('_', ' ')} | {value} | {setting} |" in lines
    assert "rows" not in json.loads(files["evaluation.json"]) and b"before" in files["hfext.json"]
    # Without the numbers from before only the rows are said.
    assert {entry["setting"] for entry in results_of(found)} == {"2 rows", "1 row"}


def test_hfext_card_writes_a_card_and_its_pictures(tmp_path):
    run = CliRunner()
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    hub.save_record(tmp_path, ["npo"], "org/base", "finetune")
    assert run.invoke(app, ["card", str(tmp_path)]).exit_code == 0
    assert (tmp_path / "plots" / "npo-utility.png").is_file()
    assert run.invoke(app, ["card", "--check", str(tmp_path)]).exit_code == 0
    (tmp_path / "plots" / "npo-utility.png").unlink()
    done = run.invoke(app, ["card", "--check", str(tmp_path)])
    assert done.exit_code == 1 and "plots/npo-utility.png is missing" in done.output


@pytest.mark.parametrize(
    "change, problem",
    [
        (lambda s: s.replace("library_name: hfext\n", ""), "library_name is None"),
        (lambda s: s.replace("license: unknown", "license: My Own!"), "is no id"),
        (lambda s: s.replace("license: unknown", "license: other"), "needs license_name"),
        (lambda s: s.replace("license: unknown", "license: null"), "license is None"),
        (lambda s: s.replace("base_model_relation: finetune", "base_model_relation: child"), "relation is 'child'"),
        (lambda s: s.replace("tags:\n- hfext", "tags:\n- hfext\n- 3"), "the tag 3 is no string"),
        (lambda s: s.replace("# name", "# {{ name }}"), "left of the template"),
        (lambda s: s.replace("  results:", "  outcomes:"), "`model_index` in metadata cannot be parsed"),
        (lambda s: s[4:], "library_name is None"),
    ],
)
def test_a_card_that_is_not_in_order_is_found(tmp_path, change, problem):
    folder = tmp_path / "name"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    hub.save_record(folder, ["sam"], "org/base", "finetune", results=[FACTS])
    text = hub.model_card(folder).content
    assert hub.problems_of(ModelCard(text)) == []
    (folder / "README.md").write_text(change(text))
    assert change(text) != text
    done = CliRunner().invoke(app, ["card", "--check", str(folder)])
    assert done.exit_code == (2 if "model_index" in problem else 1) and problem in done.output


def loaded_by(card, **names):
    """What the lines of "How to load" leave behind when they are run."""
    code = card.text.partition("## How to load")[2].partition("```python\n")[2].partition("```")[0]
    exec(compile(code, "card", "exec"), names)
    return names["model"], code


def test_the_card_of_a_tokenformer_loads_it_by_the_auto_class(server):
    config = hfext.modules.TokenFormerConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_qkv_tokens=8, num_proj_tokens=8, num_ffn_tokens=8,
    )  # fmt: skip
    model = hfext.modules.TokenFormerForCausalLM(config).eval()
    hfext.push_to_hub(model, "user/tokens", license="mit")  # its model type names the method
    card = ModelCard(server.files("user/tokens")["README.md"].decode())
    assert "were replaced" not in card.text and "does not recognize this architecture" in card.text
    again, code = loaded_by(card)
    assert "from transformers import AutoModelForCausalLM" in code and "import hfext" in code
    ids = torch.arange(3, 11)[None]
    assert torch.equal(again(ids).logits, model(ids).logits) and card.data.pipeline_tag == "text-generation"


@pytest.mark.parametrize("where", ["hub", "folder"])
def test_the_card_of_replaced_mlps_restores_them(server, tiny_llama, tmp_path, monkeypatch, where):
    model = tiny_llama()
    hfext.modules.replace_mlp(model, hfext.modules.GRKAN(groups=4))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("tor_bias"):
                p.add_(0.1)
    if where == "hub":
        hfext.push_to_hub(model, "user/kan")
        card = ModelCard(server.files("user/kan")["README.md"].decode())
    else:
        model.save_pretrained(tmp_path / "kan")
        hub.save_record(tmp_path / "kan", ["flashkat"])
        card = hub.model_card(tmp_path / "kan")
        monkeypatch.chdir(tmp_path)
    again, code = loaded_by(card)
    assert ('folder = hfext.hub.fetch("user/kan")' if where == "hub" else 'folder = "kan"') in code
    ids = torch.arange(3, 11)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert "shown below" in card.text.partition("## How to load")[0]


@pytest.mark.parametrize("license", [None, "mit", {"license": "other"}])
@pytest.mark.parametrize("base", [None, "org/base"])
def test_headings_stand_after_a_blank_line(tmp_path, license, base):
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    hub.save_record(tmp_path, ["sam"], base, config={"rho": 0.05}, results=[FACTS])
    license = {"license": license} if isinstance(license, str) else license
    lines = hub.model_card(tmp_path, "user/name", license).text.splitlines()
    headings = [i for i, line in enumerate(lines) if line.startswith("#") and i]
    assert len(headings) >= 6 and all(lines[i - 1] == lines[i + 1] == "" for i in headings)
