import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hfext import _fields, experiments, recipe

EXPERIMENT = """
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy


@dataclass(kw_only=True)
class Config:
    rate: float = 0.1
    steps: int = 3
    optim: Literal["sgd", "adamw"] = "sgd"
    widths: tuple[int, ...] = (8, 16)
    folder: Path | None = None
    fail: bool = False
    options: dict[str, float] = field(default_factory=dict)

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps} but must be at least 1.")


def run(config, out):
    (out / "note.txt").write_text("x")
    if config.fail:
        raise RuntimeError("stopped")
    return {"tables": {"t": [{"rate": numpy.float64(config.rate)}]}, "bad": float("nan"), "artifacts": ["note.txt"]}
"""


@pytest.fixture
def sample(tmp_path, monkeypatch):
    """A recipe file of an experiment that exists for this test alone."""
    folder = tmp_path / "modules"
    folder.mkdir()
    name = f"sample_{tmp_path.name}"
    (folder / f"{name}.py").write_text(EXPERIMENT)
    monkeypatch.setattr(experiments, "__path__", [*experiments.__path__, str(folder)])
    path = tmp_path / "sample.yaml"
    path.write_text(f"# a comment\nexperiment: {name}\nrate: 1e-3\n")
    return path


def test_load_merges_defaults_file_and_overrides(sample):
    module, config = recipe.load(sample, {"optim": "adamw", "widths": [4], "folder": "data"})
    assert config == module.Config(rate=0.001, optim="adamw", widths=(4,), folder=Path("data"))


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"rte": 1}, "no field 'rte'. Did you mean 'rate'"),
        ({"rate": "high"}, "rate is 'high' but must be float"),
        ({"steps": 1.5}, "steps is 1.5 but must be int"),
        ({"steps": True}, "steps is True but must be int"),
        ({"steps": 0}, "steps is 0 but must be at least 1"),
        ({"optim": "adam"}, "optim is 'adam' but must be one of 'sgd', 'adamw'"),
        ({"widths": ["a"]}, "widths is 'a' but must be int"),
        ({"folder": 3}, "folder is 3 but must be Path or null"),
        ({"options": [1]}, "options is"),
        ({"experiment": "other"}, "cannot be overridden"),
    ],
)
def test_bad_values_name_the_field(sample, overrides, message):
    with pytest.raises(ValueError, match=message):
        recipe.load(sample, overrides)


@pytest.mark.parametrize(
    "text, message",
    [
        ("rate: [1, 2", "is not YAML"),
        ("- a\n- b\n", "a recipe is a mapping"),
        ("rate: 1\n", "the key `experiment`"),
        ("", "a recipe is a mapping"),
        ("experiment: 3\n", "the key `experiment`"),
        ("experiment: import_tim\n", "Did you mean 'import_time'"),
        ("experiment: _plots\n", "no experiment '_plots'"),
        ("experiment: ../recipe\n", "no experiment"),
        ("experiment: import_time\nrepeats: 1\nrepeats: 2\n", "'repeats' stands twice"),
        ("experiment: !!python/object/apply:os.system ['true']\n", "is not YAML"),
    ],
)
def test_broken_files_are_refused(tmp_path, text, message):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        recipe.load(path)


def test_a_file_that_is_no_text_is_refused(tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is not YAML"):
        recipe.load(path)


def test_shipped_recipes_are_found_by_name_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = {recipe.find(name) for name in ("bench/import", "bench/import.yaml", "recipes/bench/import.yaml")}
    assert found == {recipe.recipes_dir() / "bench" / "import.yaml"}
    with pytest.raises(FileNotFoundError, match="Did you mean 'bench/import'"):
        recipe.find("bench/imprt")


def test_execute_writes_result_and_a_config_that_repeats_the_run(sample, tmp_path):
    out = tmp_path / "out"
    record = recipe.execute(sample, {"steps": 7}, out)
    assert json.loads((out / "result.json").read_text()) == record
    assert record["tables"] == {"t": [{"rate": 0.001}]} and record["bad"] is None
    assert record["config"]["steps"] == 7 and record["config"]["widths"] == [8, 16]
    assert record["versions"]["torch"] == torch.__version__ and {"hfext", "python"} <= set(record["versions"])
    assert record["machine"]["cores"] >= 1 and record["seconds"] >= 0
    assert recipe.load(out / "config.yaml")[1] == recipe.load(sample, {"steps": 7})[1]
    assert sorted(path.name for path in out.iterdir()) == ["config.yaml", "note.txt", "result.json"]


def test_a_failed_run_leaves_its_config_and_no_result_of_an_earlier_run(sample, tmp_path):
    out = tmp_path / "out"
    recipe.execute(sample, {}, out)
    with pytest.raises(RuntimeError, match="stopped"):
        recipe.execute(sample, {"fail": True}, out)
    assert not (out / "result.json").exists()
    assert yaml.safe_load((out / "config.yaml").read_text())["fail"] is True


def test_write_json_keeps_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    recipe.write_json(path, {"a": 1})

    def full(*args):
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="no space"):
        recipe.write_json(path, {"a": 2})
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"] and json.loads(path.read_text()) == {"a": 1}


def test_read_result_of_a_method_without_one_is_none():
    assert recipe.read_result("no_such_method") is None


def test_plain_takes_tensors_arrays_paths_and_sets():
    value = {
        "t": torch.ones(2),
        "s": torch.tensor(0.5),
        "a": np.float32(2),
        "p": Path("a/b"),
        "set": {2, 1},
        3: (),
    }
    expected = {"t": [1.0, 1.0], "s": 0.5, "a": 2.0, "p": "a/b", "set": [1, 2], "3": []}
    assert _fields.plain(value) == expected


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_float_survives_yaml(value):
    """Python writes 1e-05, which PyYAML alone reads as a string."""
    assert _fields.parse(repr(value)) == value
    assert _fields.parse(yaml.safe_dump({"x": value}))["x"] == value


@given(st.from_regex(r"[a-z][a-z0-9]*", fullmatch=True).filter(lambda text: yaml.safe_load(text) == text))
def test_words_stay_words(text):
    assert _fields.parse(text) == text


@pytest.mark.parametrize(
    "hint, value, expected",
    [
        (float, 3, 3.0),
        (float | None, None, None),
        (list[float], [1, 2.5], [1.0, 2.5]),
        (tuple[int, str], [1, "a"], (1, "a")),
        (tuple, [1, 2], (1, 2)),
        (list[Literal["a", "b"]], ["a"], ["a"]),
        (Any, "x", "x"),
        (int | str, "x", "x"),
    ],
)
def test_coerce(hint, value, expected):
    result = _fields.coerce("field", hint, value)
    assert result == expected and type(result) is type(expected)


@pytest.mark.parametrize(
    "hint, value", [(tuple[int, str], [1]), (str, 3), (bool, 1), (float, True), (list[int], "ab")]
)
def test_coerce_refuses(hint, value):
    with pytest.raises(ValueError, match="^field is "):
        _fields.coerce("field", hint, value)
