import json
import subprocess
import sys

import pytest

from hfext import registry
from hfext.registry import FAMILIES, Method, Result

RECORD = dict(
    name="sample",
    family="optim",
    title="A Sample",
    arxiv="2401.00001",
    year=2024,
    status="faithful",
    target="hfext.optim.sample:Sample",
    usage="Sample()",
    summary="Does nothing.",
)


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    monkeypatch.setattr(registry, "_METHODS", {})


def test_register_the_same_record_twice_is_a_no_op_and_another_one_is_refused():
    first = registry.register(Method(**RECORD))
    assert registry.register(Method(**RECORD)) == first
    assert registry.methods() == [first]
    with pytest.raises(ValueError, match="Two methods are called 'sample'"):
        registry.register(Method(**{**RECORD, "year": 2025}))


def test_methods_come_in_family_order_and_filter():
    later = registry.register(Method(**{**RECORD, "name": "a", "family": "training"}))
    second = registry.register(Method(**{**RECORD, "name": "z"}))
    first = registry.register(Method(**{**RECORD, "name": "b", "arxiv": "2401.00002"}))
    assert list(FAMILIES).index("optim") < list(FAMILIES).index("training")
    assert registry.methods() == [first, second, later]
    assert registry.methods("training") == [later]
    assert registry.methods(arxiv="2401.00002") == [first]
    assert registry.methods("optim", "2401.00001") == [second]


def test_unknown_names_suggest_the_nearest():
    registry.register(Method(**RECORD))
    with pytest.raises(KeyError, match="Did you mean 'sample'"):
        registry.get("sampel")
    with pytest.raises(KeyError, match="Did you mean 'optim'"):
        registry.methods("optin")
    with pytest.raises(KeyError, match="Known: sample"):
        registry.get("unlike-anything")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"name": "Sample"}, "lower case"),
        ({"name": "2sample"}, "lower case"),
        ({"family": "optimm"}, "Did you mean 'optim'"),
        ({"status": "done"}, "must be one of"),
        ({"status": "variant"}, "needs `difference`"),
        ({"status": "abstract-only"}, "needs `difference`"),
        ({"arxiv": None}, "gives the reason in `notes`"),
        ({"arxiv": "arXiv:2401.00001"}, "must look like"),
    ],
)
def test_incomplete_records_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Method(**{**RECORD, **change})


def test_to_dict_is_json():
    method = Method(
        **RECORD,
        config=Result,
        headline=Result(metric="accuracy", setting="s", value="1"),
        opt_out=(("resume", "it has no state"),),
    )
    record = json.loads(json.dumps(method.to_dict()))
    assert record["config"] == "hfext.registry:Result"
    assert record["headline"] == {"metric": "accuracy", "setting": "s", "value": "1", "baseline": None}
    assert record["opt_out"] == {"resume": "it has no state"}


def test_collect_takes_the_records_of_one_package_only(monkeypatch):
    for name in ("pack", "pack.one", "package.two"):
        module = type(sys)(name)
        module.METHOD = Method(**{**RECORD, "name": name.replace(".", "_")})
        monkeypatch.setitem(sys.modules, name, module)
    assert [method.name for method in registry.collect("pack")] == ["pack_one"]


def test_the_module_imports_neither_torch_nor_the_package():
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); import registry\n"
        "sys.exit(any(name.split('.')[0] in ('torch', 'transformers', 'hfext') for name in sys.modules))"
    )
    folder = registry.__file__.rpartition("/")[0]
    subprocess.run([sys.executable, "-c", program, folder], check=True)
