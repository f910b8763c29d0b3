"""The model card of an artifact, made from its record and the records of its methods.

The card says of a method only what its record and its committed result say, so a card is never written by hand.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from .. import recipe, registry
from ._record import read_record

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

# Methods of these families only shape the training: what they leave behind loads without hfext.
TRAINING_ONLY = ("optim", "schedule", "unlearning", "training", "losses")

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
