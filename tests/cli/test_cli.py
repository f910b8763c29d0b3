import json
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from hfext import experiments, hub, recipe, registry
from hfext.cli import app
from hfext.cli._output import overrides, table

EXPERIMENT = """
from dataclasses import dataclass


@dataclass(kw_only=True)
class Config:
    rate: float = 0.1
    reproduced: bool = True
    evidence: bool = True
    met: bool = True
    data: str = ""


def run(config, out):
    if config.data:
        raise FileNotFoundError(f"data is {config.data!r}, a folder that does not exist.")
    (out / "model").mkdir(exist_ok=True)
    (out / "curve.png").write_bytes(b"a plot")
    evidence = {
        "claim": "sample beats base", "paper": "99.0", "metric": "accuracy", "setting": "digits", "method": "sample",
        "ours": 0.9125, "ours_sd": 0.004, "n": 3, "baseline_name": "adamw", "baseline": 0.9, "baseline_sd": None,
        "reproduced": config.reproduced, "note": "a note",
    }
    tables = {"Speed": [{"what": "a", "measured": 1.23456, "met": config.met}]}
    found = {"tables": tables, "artifacts": ["model", "curve.png"]}
    return {**found, "evidence": evidence} if config.evidence else found
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """`run(*arguments) -> result` of the real command in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def sample(tmp_path, monkeypatch):
    """A checkout of its own with one method, its recipe and a bench."""
    root = tmp_path / "checkout"
    for folder in ("modules", "recipes/optim", "recipes/bench"):
        (root / folder).mkdir(parents=True)
    name = f"sample_{tmp_path.name}"
    (root / "modules" / f"{name}.py").write_text(EXPERIMENT)
    (root / "recipes/optim/sample.yaml").write_text(f"experiment: {name}\n")
    (root / "recipes/bench/sample.yaml").write_text(f"experiment: {name}\nevidence: false\n")
    record = registry.Method(
        name="sample",
        family="optim",
        title="A Sample",
        arxiv="2401.00001",
        year=2024,
        status="faithful",
        target="hfext.optim.sample:Sample",
        usage="Sample()",
        summary="Does nothing.",
        recipe="optim/sample.yaml",
        config=registry.Result,
    )
    monkeypatch.setitem(registry._METHODS, "sample", record)
    monkeypatch.setattr(experiments, "__path__", [*experiments.__path__, str(root / "modules")])
    monkeypatch.setattr(recipe, "recipes_dir", lambda: root / "recipes")
    monkeypatch.setattr(recipe, "checkout", lambda: root)
    return root


def _refused(result, message):
    """Exit status 2 and one line, not a traceback."""
    assert result.exit_code == 2
    assert message in result.stderr and "Traceback" not in result.output
    assert len(result.stderr.strip().splitlines()) == 1


def test_list_shows_every_method_and_its_json_is_the_records(run):
    assert all(method.name in run("list").stdout for method in registry.methods())
    assert json.loads(run("list", "--json").stdout) == json.loads(
        json.dumps([method.to_dict() for method in registry.methods()])
    )


def test_list_filters_by_family_and_paper(run, sample):
    assert "sample" in run("list", "--family", "optim").stdout
    assert run("list", "--family", "merging").stdout == ""
    names = [record["name"] for record in json.loads(run("list", "--arxiv", "2401.00001", "--json").stdout)]
    assert names == ["sample"]


def test_show_prints_the_record_options_and_files(run, sample):
    text = run("show", "sample").stdout
    for expected in (
        "A Sample",
        "arXiv 2401.00001",
        "metric=required",
        "baseline=None",
        "hfext/optim/sample.py",
        "tests/optim/test_sample.py",
        "recipes/optim/sample.yaml",
        "no result recorded",
    ):
        assert expected in text


def test_typos_suggest_the_nearest_and_exit_with_2(run, sample):
    _refused(run("show", "sampel"), "Did you mean 'sample'")
    _refused(run("verify", "sampel"), "Did you mean 'sample'")
    _refused(run("list", "--family", "optin"), "Did you mean 'optim'")
    _refused(run("list", "--arxiv", "2401.00002"), "Did you mean")
    _refused(run("run", "optim/sampel"), "Did you mean 'optim/sample'")
    _refused(run("run", "optim/sample", "--rat", "1"), "Did you mean 'rate'")
    _refused(run("bench", "sampel"), "Did you mean 'bench/sample'")
    result = run("lits")
    assert result.exit_code == 2 and "Did you mean 'list'" in result.output


def test_bad_flags_are_refused(run, sample):
    _refused(run("run", "optim/sample", "--rate"), "--rate needs a value")
    _refused(run("run", "optim/sample", "--rate", "fast"), "rate is 'fast' but must be float")
    _refused(run("run", "optim/sample", "--rate", "1", "--rate=2"), "stands twice")
    _refused(run("run", "optim/sample", "1"), "in the place of a flag")
    _refused(run("run", "optim/sample", "--rate", "[1"), "not a YAML value")
    _refused(run("run", "optim/sample", "--data", "nowhere"), "data is 'nowhere'")


def test_run_overrides_the_recipe_and_says_how_to_publish(run, sample, tmp_path, monkeypatch):
    result = run("run", "optim/sample", "--rate", "1e-3", "--output_dir", "here")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "here/result.json").read_text())["config"]["rate"] == 0.001
    assert "Speed\nwhat  measured  met\na     1.235     yes" in result.stdout
    assert "hf upload" not in result.stdout

    hub.save_record(tmp_path / "here/model", ["sample"])
    assert "hf upload YOUR-NAME/model here/model" in run("run", "optim/sample", "--output_dir", "here").stdout


def test_verify_prints_both_numbers_and_saves(run, sample, tmp_path):
    result = run("verify", "sample")
    assert result.exit_code == 0, result.output
    for expected in ("sample beats base", "99.0", "0.9125 ± 0.004 (mean ± sd of 3)", "adamw 0.9", "a note"):
        assert expected in result.stdout
    assert "reproduced: yes" in result.stdout
    saved = json.loads((sample / "recipes/results/sample.json").read_text())
    assert saved == json.loads((tmp_path / "out/verify/sample/result.json").read_text())
    assert (sample / "recipes/results/sample-curve.png").read_bytes() == b"a plot"
    assert sorted(path.name for path in (sample / "recipes/results").iterdir()) == ["sample-curve.png", "sample.json"]
    assert "reproduced: yes" in run("show", "sample").stdout


def test_verify_of_what_does_not_reproduce_exits_with_1(run, sample):
    result = run("verify", "sample", "--no-save", "--reproduced", "false")
    assert result.exit_code == 1 and "reproduced: no" in result.stdout
    assert not (sample / "recipes/results").exists()
    assert run("verify", "sample", "--evidence", "no").exit_code == 1


def test_verify_of_a_method_without_a_recipe_says_so(run, sample, monkeypatch):
    bare = registry.Method(**{**vars(registry.get("sample")), "recipe": None, "notes": "Nothing to run."})
    monkeypatch.setitem(registry._METHODS, "sample", bare)
    _refused(run("verify", "sample"), "sample has no recipe to verify. Nothing to run.")


def test_bench_fails_when_a_bar_is_missed(run, sample):
    assert run("bench", "sample").exit_code == 0
    assert (sample / "recipes/results/bench-sample.json").is_file()
    saved = (sample / "recipes/results/bench-sample.json").read_bytes()
    missed = run("bench", "sample", "--met=false")
    assert missed.exit_code == 1 and "a     1.235     no" in missed.stdout
    assert (sample / "recipes/results/bench-sample.json").read_bytes() == saved and "not saved" in missed.stdout


def test_run_says_what_a_recipe_does_and_exits_with_1_when_a_bar_is_missed(run, sample):
    shown = run("run", "bench/sample", "--help")
    assert shown.exit_code == 0 and "--evidence False" in shown.stdout and "--met True" in shown.stdout
    assert "Usage" in run("run", "--help").stdout and run("run").exit_code == 2
    assert run("run", "bench/sample").exit_code == 0 and run("run", "bench/sample", "--met=false").exit_code == 1


def test_card_writes_a_readme(run, sample, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    _refused(run("card", folder), "call hfext.hub.save_record")
    hub.save_record(folder, ["sample"])
    assert run("card", folder).exit_code == 0
    assert (folder / "README.md").read_text() == str(hub.model_card(folder))
    (folder / "hfext.json").write_text("{")
    _refused(run("card", folder), "is damaged")
    _refused(run("card", "sample"), "There is no hfext.json")


def test_doctor_looks_at_the_cache_of_a_saved_model(run, tiny_llama, tmp_path):
    from safetensors.torch import load_file, save_file

    from hfext import RotateKVConfig, kv_cache

    model = tiny_llama()
    config = RotateKVConfig(bits=2, group_size=8).calibrate(model, torch.arange(3, 83).view(2, 40))
    kv_cache.apply(model, config).save_pretrained(tmp_path)
    result = run("doctor", str(tmp_path))
    assert result.exit_code == 0 and "RotateKVConfig(group_size=8)" in result.output
    assert "calibrated on 80 tokens; its 2 tensors are whole" in result.output and "import hfext" in result.output
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["kv_cache.0.key_order"] = tensors["kv_cache.0.key_order"].flip(0)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    result = run("doctor", str(tmp_path))
    assert result.exit_code == 1 and "has been changed" in result.output


def test_doctor_reports_and_fails_on_a_broken_hook(run, monkeypatch):
    from hfext import compat

    result = run("doctor")
    assert result.exit_code == 0, result.output
    assert "torch" in result.stdout and "gpu" in result.stdout
    assert all(name in result.stdout for name, _, _ in compat.CHECKS)

    def moved():
        raise AttributeError("the table is gone")

    monkeypatch.setattr(compat, "CHECKS", [("sample hook", "library 1.0 to 2.0", moved), *compat.CHECKS])
    result = run("doctor")
    assert result.exit_code == 1 and "AttributeError: the table is gone" in result.stdout
    assert all(name in result.stdout for name, _, _ in compat.CHECKS)


def test_docs_checks_and_rewrites(run, sample):
    readme = sample / "README.md"
    parts = ("methods", "unlearning", "results")
    readme.write_text("a\n" + "".join(f"<!-- {n}:begin -->\n<!-- {n}:end -->\n" for n in parts) + "z\n")
    assert run("docs", "--check").exit_code == 1 and "Does nothing." not in readme.read_text()
    assert run("docs").exit_code == 0 and "| `sample` | optim |" in readme.read_text()
    assert run("docs", "--check").exit_code == 0
    assert readme.read_text().startswith("a\n") and readme.read_text().endswith("<!-- results:end -->\nz\n")


def test_docs_needs_a_checkout(run, monkeypatch):
    monkeypatch.setattr(recipe, "checkout", lambda: None)
    _refused(run("docs"), "in a checkout")


def test_overrides_are_yaml():
    arguments = ["--a", "1e-3", "--b-c=[1, 2]", "--d", "-0.5", "--e=x=y", "--f", "null"]
    assert overrides(arguments) == {"a": 0.001, "b_c": [1, 2], "d": -0.5, "e": "x=y", "f": None}


def test_tables_align_and_escape():
    rows = [{"a": "x|y", "b": 0.123456}, {"a": "z", "c": True}]
    assert table(rows) == "a    b       c\nx|y  0.1235\nz            yes"
    assert table(rows, markdown=True).splitlines()[2] == "| x\\|y | 0.1235 |  |"


def test_the_command_itself_starts_and_brings_no_plotting():
    program = (
        "import sys, hfext.cli; hfext.cli.app(['list', '--json'], standalone_mode=False)\n"
        "assert not {'matplotlib', 'sklearn', 'trl'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)) == len(registry.methods())
