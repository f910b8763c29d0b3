"""Artifacts: the record `hfext.json` that stands beside saved weights, and the model card made from it.

The card says of a method only what its record and its committed result say, so a card is never written by hand.
"""

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from . import recipe, registry
from ._fields import plain

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

RECORD = "hfext.json"
FORMAT = 1
RELATIONS = ("adapter", "finetune", "merge", "quantized")
# Methods of these families only shape the training: what they leave behind loads without hfext.
TRAINING_ONLY = ("optim", "schedule", "unlearning", "training", "losses")

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_PIPELINES = {
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForImageClassification": "image-classification",
}
_ADAPTERS = {
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "TOKEN_CLS": "AutoPeftModelForTokenClassification",
    "QUESTION_ANS": "AutoPeftModelForQuestionAnswering",
}


def save_record(
    folder: str | Path,
    methods: Sequence[str],
    base_model: str | None = None,
    relation: str | None = None,
    config: Any = None,
    results: Sequence[Mapping[str, Any]] | None = None,
) -> Path:
    """Write `hfext.json` into the folder of a saved model or adapter.

    Args:
        folder (`str` or `Path`): An existing folder, as `save_pretrained` leaves it.
        methods (`Sequence[str]`): Names of the methods that made it, the most important first.
        base_model (`str`, *optional*): Hub id of the model it was made from.
        relation (`str`, *optional*): How it relates to `base_model`: one of `RELATIONS`.
        config (*optional*): The settings, as a dataclass or a mapping.
        results (`Sequence[Mapping]`, *optional*): Measured numbers: each has `metric`, `value` and `dataset`, and may
            have `split` and `setting`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}: save the model first.")
    record = {
        "format": FORMAT,
        "methods": [registry.get(name).name for name in methods],
        "base_model": base_model,
        "relation": relation,
        "config": plain(_settings(config)),
        "results": plain(results or []),
        "versions": recipe.versions(),
    }
    _check(record)
    recipe.write_json(folder / RECORD, record)
    return folder / RECORD


def _settings(config: Any) -> Any:
    """A config as a mapping; ours leave out the data they were calibrated on."""
    from transformers.utils.quantization_config import QuantizationConfigMixin

    if isinstance(config, QuantizationConfigMixin):
        return config.to_dict()
    return dataclasses.asdict(config) if dataclasses.is_dataclass(config) else config or {}


def read_record(folder: str | Path) -> dict[str, Any]:
    """The content of `hfext.json`; `ValueError` when it is damaged or of a format this version does not know."""
    path = Path(folder) / RECORD
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no {RECORD} in {folder}: call hfext.hub.save_record(folder, [method, ...]) first."
        )
    try:
        record = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    try:
        _check(record)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return record


def model_card(artifact: str | Path) -> "ModelCard":
    """The card of a folder with `hfext.json`, or of a method by its name."""
    from huggingface_hub import ModelCard

    folder = Path(artifact)
    if folder.is_dir():
        record = read_record(folder)
        name, load = folder.resolve().name, _loading(folder)
    else:
        registry.get(str(artifact))
        record = {"methods": [str(artifact)], "base_model": None, "config": {}, "results": [], "versions": {}}
        name, load = str(artifact), {}
    methods = [registry.get(method) for method in record["methods"]]
    body = (
        _templates()
        .get_template("base.md.jinja")
        .render(
            name=name,
            methods=methods,
            evidence={m.name: (recipe.read_result(m.name) or {}).get("evidence") for m in methods},
            families=list(dict.fromkeys(m.family for m in methods)),
            config=yaml.safe_dump(record["config"], sort_keys=False, allow_unicode=True) if record["config"] else "",
            needs_import=any(m.family not in TRAINING_ONLY or m.after_load for m in methods),
            after_load=list(dict.fromkeys(m.after_load for m in methods if m.after_load)),
            load=load,
            record=record,
        )
    )
    return ModelCard(f"---\n{_metadata(name, methods, record, load)}\n---\n\n{body}")


def _metadata(name: str, methods: list[registry.Method], record: Mapping[str, Any], load: Mapping[str, str]) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    task = load.get("pipeline_tag")
    results = [
        EvalResult(
            task_type=task or "other",
            dataset_type=re.sub(r"[^\w.-]+", "-", result["dataset"]).strip("-").lower(),
            dataset_name=result["dataset"],
            dataset_split=result.get("split"),
            metric_type=re.sub(r"\W+", "_", result["metric"]).strip("_").lower(),
            metric_name=result["metric"],
            metric_value=result["value"],
        )
        for result in record["results"]
    ]
    extra = {"base_model_relation": record["relation"]} if record.get("relation") else {}
    return ModelCardData(
        library_name="hfext",
        base_model=record["base_model"],
        tags=["hfext", *(m.name for m in methods), *dict.fromkeys(f"arxiv:{m.arxiv}" for m in methods if m.arxiv)],
        pipeline_tag=task,
        model_name=name,
        eval_results=results or None,
        **extra,
    ).to_yaml()


def _loading(folder: Path) -> dict[str, str]:
    """Which class loads the folder, and for which task; empty when nothing in the folder says so."""
    if (folder / "adapter_config.json").is_file():
        kind = json.loads((folder / "adapter_config.json").read_bytes()).get("task_type")
        found = {"library": "peft", "class": _ADAPTERS.get(kind, "AutoPeftModel")}
    elif (folder / "config.json").is_file():
        found = {"library": "transformers", "class": "AutoModel"}
        for architecture in json.loads((folder / "config.json").read_bytes()).get("architectures") or []:
            found["class"] = architecture
    else:
        return {}
    tags = [tag for ending, tag in _PIPELINES.items() if found["class"].endswith(ending)]
    return {**found, "pipeline_tag": tags[0]} if tags else found


def _templates():
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(recipe.shipped("model_cards"))
    # Markdown, not HTML: nothing is escaped, and a missing value is an error.
    return Environment(
        loader=loader, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )


def _check(record: Any) -> None:
    if not isinstance(record, dict):
        raise ValueError("the record must be a JSON object.")
    if record.get("format") != FORMAT:
        raise ValueError(
            f"format is {record.get('format')!r}, but this version of hfext reads {FORMAT}. Update hfext."
        )
    for field, kind in {"methods": list, "config": dict, "results": list, "versions": dict}.items():
        if not isinstance(record.get(field), kind):
            raise ValueError(f"{field} is {record.get(field)!r} but must be a {kind.__name__}.")
    if not record["methods"] or not all(isinstance(name, str) for name in record["methods"]):
        raise ValueError(f"methods is {record['methods']!r} but must hold at least one method's name.")
    base_model, relation = record.get("base_model"), record.get("relation")
    if base_model is not None and not (isinstance(base_model, str) and _HUB_ID.fullmatch(base_model)):
        raise ValueError(f"base_model is {base_model!r} but must be a Hub id such as 'org/name'.")
    if relation is not None and (relation not in RELATIONS or base_model is None):
        raise ValueError(f"relation is {relation!r} but must be one of {', '.join(RELATIONS)}, beside a base_model.")
    for result in record["results"]:
        _check_result(result)


def _check_result(result: Any) -> None:
    if not isinstance(result, dict):
        raise ValueError(f"results holds {result!r} but must hold mappings.")
    for field in ("metric", "dataset"):
        if not isinstance(result.get(field), str):
            raise ValueError(f"results: {field} is {result.get(field)!r} but must be a string.")
    value = result.get("value")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"results: value is {value!r} but must be a finite number.")
