import json

import pytest
import yaml
from huggingface_hub import ModelCard

from hfext import hub, registry

FACTS = {"metric": "exact match", "value": 0.75, "dataset": "fictional | facts", "split": "paraphrased"}


@pytest.fixture
def method():
    """Any method of the optimizer family."""
    return registry.methods("optim")[0]


@pytest.fixture
def artifact(tmp_path, method):
    folder = tmp_path / "facts-adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"task_type": "CAUSAL_LM"}')
    hub.save_record(folder, [method.name], "org/base", "adapter", {"rho": 0.05}, [FACTS])
    return folder


def test_a_record_is_read_back(artifact, method):
    record = hub.read_record(artifact)
    assert record["methods"] == [method.name] and record["config"] == {"rho": 0.05} and record["results"] == [FACTS]
    assert record["base_model"] == "org/base" and record["relation"] == "adapter"
    assert set(record["versions"]) >= {"hfext", "torch", "transformers"}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"base_model": "/home/me/model"}, "Hub id"),
        ({"base_model": "../model"}, "Hub id"),
        ({"relation": "child"}, "must be one of adapter"),
        ({"base_model": None}, "beside a base_model"),
        ({"methods": []}, "at least one"),
        ({"results": [{**FACTS, "value": float("nan")}]}, "finite number"),
        ({"results": [{**FACTS, "value": "high"}]}, "finite number"),
        ({"results": [{"value": 1.0, "dataset": "d"}]}, "metric is None"),
        ({"results": {"accuracy": 1.0}}, "results is"),
    ],
)
def test_bad_records_are_not_written(tmp_path, method, change, message):
    arguments = dict(methods=[method.name], base_model="org/base", relation="adapter", results=[FACTS])
    with pytest.raises(ValueError, match=message):
        hub.save_record(tmp_path, **{**arguments, **change})
    assert not list(tmp_path.iterdir())


def test_one_method_is_taken_by_its_name(tmp_path, method):
    hub.save_record(tmp_path, method.name)
    assert hub.read_record(tmp_path)["methods"] == [method.name]


def test_unknown_methods_and_missing_folders_are_refused(tmp_path, method):
    with pytest.raises(KeyError, match="No method is called"):
        hub.save_record(tmp_path, ["no_such_method"])
    with pytest.raises(FileNotFoundError, match="save the model first"):
        hub.save_record(tmp_path / "missing", [method.name])


def _damaged(good: bytes):
    record = json.loads(good)
    yield "empty", b""
    yield "no text", b"\xff\xfe\x00\x01"
    yield "a list", b"[]"
    yield "no object", b"null"
    yield "newer", json.dumps({**record, "format": hub.FORMAT + 1}).encode()
    yield "no format", json.dumps({k: v for k, v in record.items() if k != "format"}).encode()
    yield "methods are a string", json.dumps({**record, "methods": "sam"}).encode()
    yield "a method is a number", json.dumps({**record, "methods": [3]}).encode()
    yield "config is a list", json.dumps({**record, "config": []}).encode()
    yield "NaN", json.dumps({**record, "results": [{**FACTS, "value": float("nan")}]}).encode()
    yield "path", json.dumps({**record, "base_model": "../../etc"}).encode()
    for length in range(1, len(good.rstrip()), 97):
        yield f"cut at {length}", good[:length]


def test_damaged_records_are_refused(artifact):
    path = artifact / hub.RECORD
    cases = list(_damaged(path.read_bytes()))
    assert len(cases) > 15
    for name, content in cases:
        path.write_bytes(content)
        with pytest.raises(ValueError, match="hfext.json"):
            hub.read_record(artifact)
            pytest.fail(f"{name} was accepted")


def test_a_folder_without_a_record_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="call hfext.hub.save_record"):
        hub.read_record(tmp_path)


def test_the_card_of_an_artifact(artifact, method):
    card = hub.model_card(artifact)
    data = card.data.to_dict()
    assert data["library_name"] == "hfext" and data["pipeline_tag"] == "text-generation"
    assert data["base_model"] == "org/base" and data["base_model_relation"] == "adapter"
    assert {"hfext", method.name, f"arxiv:{method.arxiv}"} <= set(data["tags"])
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_type) == ("exact_match", 0.75, "fictional-facts")
    assert "AutoPeftModelForCausalLM.from_pretrained" in card.text and "import hfext" not in card.text
    assert "rho: 0.05" in card.text and method.title in card.text
    assert "| fictional \\| facts (paraphrased) | exact match | 0.75 |" in card.text


def test_the_card_names_the_class_that_loads_the_folder(tmp_path, method, tiny_bert_classifier):
    tiny_bert_classifier().save_pretrained(tmp_path)
    hub.save_record(tmp_path, [method.name])
    card = hub.model_card(tmp_path)
    assert card.data.pipeline_tag == "text-classification"
    assert "BertForSequenceClassification.from_pretrained" in card.text


def test_the_card_reads_back_from_its_file(artifact):
    card = hub.model_card(artifact)
    card.save(artifact / "README.md")
    again = ModelCard.load(artifact / "README.md")
    assert again.data.to_dict() == card.data.to_dict()


def test_the_card_of_a_method_alone(method):
    card = hub.model_card(method.name)
    assert yaml.safe_load(card.data.to_yaml())["tags"][:2] == ["hfext", method.name]
    assert "How to load" not in card.text and method.usage in card.text
    with pytest.raises(KeyError, match="No method is called"):
        hub.model_card("no_such_method")


def test_a_method_that_acts_after_training_tells_the_reader_to_import_hfext(tmp_path, monkeypatch, tiny_gpt2):
    record = registry.Method(
        name="sample_weights",
        family="quantization",
        title="A Sample",
        arxiv="2401.00001",
        year=2024,
        status="variant",
        difference="It is smaller.",
        target="hfext.registry:Method",
        usage="Method()",
        summary="Does nothing.",
        notes="Slow on CPU.",
    )
    monkeypatch.setitem(registry._METHODS, record.name, record)
    tiny_gpt2().save_pretrained(tmp_path)
    hub.save_record(tmp_path, [record.name])
    text = hub.model_card(tmp_path).text
    assert "import hfext  # registers" in text and "Without `import hfext` transformers loads" in text
    assert "a variant of the paper's method. It is smaller. Slow on CPU." in text
