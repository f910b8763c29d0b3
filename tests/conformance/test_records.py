"""What holds for every registered method, whatever its family. A new method is tested here as soon as it exists."""

import importlib
from pathlib import Path

import pytest
import yaml

from hfext import hub, recipe, registry

ROOT = Path(__file__).resolve().parents[2]
METHODS = registry.methods()

each_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)


def test_there_are_methods():
    """An import that stops registering must not turn the tests below into an empty collection."""
    assert len(METHODS) >= 10


@each_method
def test_the_target_exists_and_lives_in_the_file_of_its_name(method):
    module, _, attribute = method.target.partition(":")
    target = getattr(importlib.import_module(module), attribute)
    assert target.__doc__, f"{method.target} has no docstring"
    assert module == f"hfext.{method.family}.{method.name}"


@each_method
def test_the_record_of_the_file_is_the_registered_one(method):
    assert importlib.import_module(method.target.partition(":")[0]).METHOD is method


@each_method
def test_there_is_a_test_file(method):
    assert (ROOT / "tests" / method.family / f"test_{method.name}.py").is_file()


@each_method
def test_the_usage_is_one_line_of_python(method):
    assert "\n" not in method.usage
    compile(method.usage, method.name, "exec")


@each_method
def test_the_recipe_loads_and_the_claim_is_stated(method):
    if method.recipe is None:
        assert method.notes, f"{method.name}: a method without a recipe says why in `notes`"
        return
    assert method.claim
    path = recipe.recipes_dir() / method.recipe
    assert path.parent.name == method.family and path.stem.startswith(method.name)
    recipe.load(f"recipes/{method.recipe}")
    assert path.read_text().startswith("#"), "a recipe starts with what comes out, how long it takes, and where"


@each_method
def test_the_default_config_is_valid(method):
    if method.config is not None:
        assert method.config.__doc__
        method.config()


@each_method
def test_the_card_renders_and_its_metadata_is_yaml(method):
    card = hub.model_card(method.name)
    data = yaml.safe_load(card.data.to_yaml())
    assert data["library_name"] == "hfext" and method.name in data["tags"]
    assert method.arxiv is None or f"arxiv:{method.arxiv}" in data["tags"]
    for text in (method.title, method.summary, method.usage, method.difference, method.notes):
        assert text in card.text
    assert "{{" not in card.text and "{%" not in card.text


@each_method
def test_the_committed_result_is_of_this_method_and_its_recipe(method):
    result = recipe.read_result(method.name)
    if result is None:
        pytest.skip("no result is committed")
    evidence = result["evidence"]
    assert evidence["claim"] and isinstance(evidence["reproduced"], bool)
    assert isinstance(evidence["ours"], float | int) and isinstance(evidence["baseline"], float | int)
    assert result["name"] == Path(method.recipe).stem
    assert {"versions", "machine", "seconds", "date", "config"} <= set(result)
    assert str(ROOT) not in (recipe.recipes_dir() / "results" / f"{method.name}.json").read_text()
