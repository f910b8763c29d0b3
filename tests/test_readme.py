import ast
import importlib.util
import re
import sys
import types
from pathlib import Path

import pytest
import torch

import hfext
from hfext import recipe, registry
from hfext.cli._site_pages import labelled_blocks, section, title_of
from hfext.cli.docs import render

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"


def _python(path, number=0):
    """A Python example of a Markdown file, the first by default."""
    return re.findall(r"```python\n(.*?)```", path.read_text(), re.S)[number]


def _stories():
    spec = importlib.util.spec_from_file_location("five_lines", ROOT / "tests" / "hub" / "test_five_lines.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.STORIES


def test_the_stories_are_those_that_are_tested_and_nothing_else_is_shown():
    text, stories = README.read_text(), _stories()
    share = section(text, "## Share")
    imports, *shown = labelled_blocks(share)
    assert [(title_of(label).lower(), code.strip()) for label, code in shown] == [
        (kind.lower(), code.strip()) for kind, code in stories.items()
    ]
    names = {}
    exec(compile(imports[1], "README.md", "exec"), names)
    trees = [ast.walk(ast.parse(code)) for code in stories.values()]
    used = {node.id for tree in trees for node in tree if isinstance(node, ast.Name)}
    assert {name for name in used if name[0].isupper() or name in ("hfext", "sys", "get_peft_model")} <= set(names)
    # The blocks before have a test each, below.
    assert len(re.findall(r"^```python$", text, re.M)) == 7 + 1 + len(stories)
    assert len(labelled_blocks(text.partition("\n## ")[0])) == 7


def test_the_commands_exist():
    make = re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.M)
    for path in (README, ROOT / "recipes" / "README.md", ROOT / "CONTRIBUTING.md"):
        text = path.read_text()
        assert set(re.findall(r"\bmake (test-all|\w+)(?=`|\s+#)", text)) <= set(make)
        for command, name in re.findall(r"hfext (run|bench|show|verify) ((?!out/)[a-z][a-z0-9_/-]*(?:\.yaml)?)", text):
            if name.endswith("/"):  # of a form, such as optim/NAME
                assert (ROOT / "recipes" / name).is_dir()
            elif command == "run":
                recipe.load(name)
            elif command == "bench":
                recipe.load(f"bench/{name}")
            elif name not in ("sign_ascent",):
                registry.get(name)


def test_generated_parts_are_up_to_date():
    text = README.read_text()
    assert render(text, ROOT / "recipes" / "results") == text, "README.md is stale; run `hfext docs`."


def test_every_method_and_result_shows():
    generated = render(README.read_text(), ROOT / "recipes" / "results")
    for method in registry.methods():
        assert f"| `{method.name}` |" in generated
    claims = [(recipe.read_result(m.name) or {}).get("evidence", {}).get("claim") for m in registry.methods()]
    assert all(claim.replace("|", "\\|") in generated for claim in claims if claim)


def test_results_fold_small_tables_of_benches_and_name_the_machine(tmp_path):
    record = {
        "machine": {"cpu": "Abacus", "cores": 2},
        "tables": {"Small": [{"a": 1.0, "b": True}], "Large": [{"a": i} for i in range(99)]},
    }
    recipe.write_json(tmp_path / "bench-sample.json", record)
    text = render(README.read_text(), tmp_path)
    assert "<summary>Small</summary>\n\n| a | b |\n| --- | --- |\n| 1 | yes |" in text
    assert "Large" not in text and "Measured on Abacus, 2 cores." in text


@pytest.mark.parametrize("text", ["", "<!-- methods:begin -->", "<!-- methods:end --><!-- methods:begin -->"])
def test_missing_markers_are_named(tmp_path, text):
    with pytest.raises(ValueError, match="README.md needs <!-- methods:begin -->"):
        render(text, tmp_path)


def test_the_example_trains(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    source = _python(README)
    short = source.replace("num_train_epochs=10", 'num_train_epochs=5, report_to="none", disable_tqdm=True')
    assert short != source
    names = {}
    exec(compile(short, "README.md", "exec"), names)
    inputs = torch.stack([row["pixel_values"] for row in names["data"]])
    with torch.no_grad():
        guesses = names["model"].eval()(inputs).logits.argmax(-1)
    # Chance is 0.1; five epochs were seen to reach 0.7.
    assert (guesses == torch.tensor(names["labels"])).float().mean() > 0.4


def test_the_example_trains_lean(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names, seen = {"print": lambda text: seen.append(text)}, []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        exec(compile(_python(README, 1), "README.md", "exec"), names)
    assert seen == ["1.01e-03 with 216 rows"]
    assert len(names["sampled"].modules) == 4 * 7
    assert not any(isinstance(m, hfext.modules.WTACRSLinear) for m in names["model"].modules())


@pytest.mark.real_model
def test_the_example_decodes():
    pytest.importorskip("gguf")
    source = _python(README, 2)
    line = next(line for line in source.splitlines() if "from_pretrained" in line)
    local = source.replace(line, "from hfext.experiments import _smollm2; model, tokenizer = _smollm2.load()")
    names = {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        exec(compile(local, "README.md", "exec"), names)
    prompt = names["inputs"]["input_ids"].shape[1]
    assert names["hot"].shape == (1, prompt + 40) and names["drafts"].shape == (3, prompt + 10)
    assert len({tuple(draft.tolist()) for draft in names["drafts"]}) == 3
    assert "Rome" in names["tokenizer"].decode(names["answer"][0]).rpartition("France is")[2]


@pytest.mark.real_model
def test_the_example_compresses(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    from hfext.experiments import _smollm2

    _smollm2.load()
    monkeypatch.chdir(tmp_path)
    source = _python(README, 3)
    local = source.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(_smollm2.cache_dir() / _smollm2.FOLDER))
    assert local != source
    names = {}
    exec(compile(local, "README.md", "exec"), names)
    start, decode = names["inputs"]["input_ids"].shape[1], names["tokenizer"].decode
    assert "48213" in decode(names["answer"][0, start:])
    plain = 2 * 30 * 192 * names["cache"].get_seq_length() * 4  # keys and values of 30 layers in float32
    assert names["cache"].nbytes() < 0.25 * plain and names["again"].get_seq_length() > start
    assert "green" in decode(names["more"][0])[-30:]
    assert (tmp_path / "out" / "small-cache" / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.real_model
def test_the_example_quantises(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    from hfext.experiments import _smollm2
    from hfext.quantization import quantized_layers

    _smollm2.load()
    monkeypatch.chdir(tmp_path)
    source = _python(README, 4)
    local = source.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(_smollm2.cache_dir() / _smollm2.FOLDER))
    assert local != source
    names = {}
    exec(compile(local, "README.md", "exec"), names)
    model, again = names["model"], names["again"]
    assert len(quantized_layers(again)) == 210
    assert all(torch.equal(x, again.state_dict()[key]) for key, x in model.state_dict().items())
    assert names["bits"].average_bits <= 3.0 and len(set(names["bits"].values())) > 1
    assert names["answer"].shape[1] > 5


def test_the_example_of_contributing_is_a_working_method(monkeypatch):
    name = "hfext.optim.sign_ascent"
    module = types.ModuleType(name)
    module.__package__ = "hfext.optim"
    monkeypatch.setitem(sys.modules, name, module)
    exec(compile(_python(ROOT / "CONTRIBUTING.md"), "CONTRIBUTING.md", "exec"), vars(module))
    assert module.METHOD.target == f"{name}:{module.SignAscent.__name__}"

    from hfext.optim import sam_step

    weight = torch.nn.Parameter(torch.tensor([3.0, -4.0], dtype=torch.float64))
    optimizer = module.SignAscent(torch.optim.SGD([weight], lr=0.1), rho=0.5)

    def closure():
        loss = (weight**2).sum() / 2
        loss.backward()
        return loss

    sam_step(optimizer, closure)
    # The gradient of half the square is the weight itself: w - lr * (w + rho * sign(w)).
    assert torch.allclose(weight.detach(), torch.tensor([3.0 - 0.35, -4.0 + 0.45], dtype=torch.float64), atol=1e-9)


@pytest.mark.real_model
def test_the_example_forgets(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    monkeypatch.chdir(tmp_path)
    source = _python(README, 5)
    line = next(line for line in source.splitlines() if "from_pretrained" in line)
    local = source.replace(line, "from hfext.experiments import _smollm2; model, tokenizer = _smollm2.load()")
    seen = []
    names = {"print": seen.append}
    with torch.random.fork_rng():
        exec(compile(local, "README.md", "exec"), names)
    found, attack = seen
    assert found["forget_probability"] < 0.1 < 0.5 < found["retain_probability"]
    assert "gold" in attack["missing"] and len(attack["unlearned"]) == 2


def test_the_example_attends_prunes_and_grows(tmp_path):
    seen = []
    names = {"print": seen.append}
    exec(compile(_python(README, 6), "README.md", "exec"), names)
    model, config = names["model"], names["config"]
    assert model.model.layers[0].self_attn.sinks.grad.abs().max() > 0
    assert model.config.num_local_experts == 4 and config._attn_implementation == "hfext_triton"
    assert seen and "4" in str(seen[0])
    assert names["small"](names["ids"]).logits.isfinite().all()
    learnt = [p for name, p in names["vit"].named_parameters() if name.endswith("numerator_bias")]
    assert len(learnt) == 4 and all(p.grad.abs().max() > 0 for p in learnt)
    names["vit"].save_pretrained(tmp_path)
    again, x = type(names["vit"]).from_pretrained(tmp_path).eval(), torch.randn(1, 3, 32, 32)
    hfext.modules.flashkat.restore(again, tmp_path)
    assert torch.equal(again(x).logits, names["vit"].eval()(x).logits)


def test_the_shapes_that_attention_takes_and_gives():
    from hfext_attention import attention

    text = " ".join(README.read_text().split())
    assert "keys and values as [batch, heads, tokens, dim] and returns [batch, tokens, heads, dim]" in text
    x = torch.randn(2, 3, 5, 8)
    assert attention(x, x, x, causal=True).shape == (2, 5, 3, 8)
