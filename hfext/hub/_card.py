"""The model card of an artifact, made from its record and the records of its methods.

The card says of a method only what its record and its committed result say, so a card is never written by hand.
"""

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from .. import recipe, registry
from ._kinds import loading, read_kernel
from ._licence import TERMS, UNKNOWN, licence_of
from ._record import RECORD, RELATIONS, read_record

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

# Methods of these families only shape the training: what they leave behind loads without hfext.
TRAINING_ONLY = ("optim", "schedule", "unlearning", "training", "losses")
LOADS_ALONE = (*TRAINING_ONLY, "metrics")
PLAIN_MODULES = ("uncurl", "wta_crs")  # modules that leave plain weights under plain names
PLOTS = "plots"

_OWN_LICENCE = "apache-2.0"  # of the results that hfext ships


def loads_alone(method: registry.Method) -> bool:
    """Whether transformers without hfext reads what a method leaves behind."""
    return (method.family in LOADS_ALONE or method.name in PLAIN_MODULES) and not method.after_load


def model_card(
    artifact: str | Path, repo_id: str | None = None, license: Mapping[str, Any] | None = None
) -> "ModelCard":
    """The card of a folder with `hfext.json`, of a kernel or `custom_generate` folder, or of a method by its name.

    Args:
        artifact (`str` or `Path`): The folder, or the name; a folder with the name of a method is `./NAME`.
        repo_id (`str`, *optional*): What the reader is told to load; the folder's name by default.
        license (`Mapping`, *optional*): As `licence_of` finds it; by default that of the record, or of the base where
            the Hub or the cache can tell it.
    """
    from huggingface_hub import ModelCard

    folder = Path(artifact)
    extra: dict[str, Any] = {}
    if is_folder(artifact):
        name = repo_id or folder.resolve().name
        load = loading(folder, name)
        record = _record_of(folder, load["kind"])
        if load["kind"] == "kernel":
            extra = read_kernel(folder)
            path = folder / "CARD.md"
            extra["text"] = _body(path.read_text(encoding="utf-8")) if path.is_file() else ""
            license = license or licence_of(None, extra["license"] or None)
    else:
        registry.get(str(artifact))
        name, load = repo_id or str(artifact), {"kind": "method", "lines": [], "own_import": False, "loop": False}
        record = {"methods": [str(artifact)], "base_model": None, "config": {}, "results": [], "versions": {}}
        license = license or licence_of(None, _OWN_LICENCE)
    license = license or record.get("license") or licence_of(record["base_model"])
    record = {**record, "results": _shown(record["results"]), "config": _shown(record["config"])}
    methods = [registry.get(method) for method in record["methods"]]
    results = {m.name: recipe.read_result(m.name) or {} for m in methods}
    for implementation in (m.name for m in methods if f'attn_implementation="{m.name}"' in m.usage):
        named = f'("{name}", attn_implementation="{implementation}")'
        load["lines"] = [line.replace(f'("{name}")', named) for line in load["lines"]]
    # A kernel and a `custom_generate` folder are source that runs by itself.
    weights = load["kind"] not in ("method", "kernel", "custom_generate")
    after_load = list(dict.fromkeys(m.after_load for m in methods if m.after_load and weights))
    if any(re.search(r"\bfolder\b", line) for line in after_load):
        # What it reads are files: those of a repository are fetched first.
        where = f'hfext.hub.fetch("{name}")' if "/" in name else f'"{name}"'
        lines = [line.replace(f'("{name}"', "(folder") for line in load["lines"]]
        at = next((i for i, line in enumerate(lines) if "(folder" in line), len(lines))
        load["lines"] = [*lines[:at], f"folder = {where}", *lines[at:]]
    body = (
        _templates()
        .get_template("base.md.jinja")
        .render(
            name=name.rpartition("/")[2],
            repo_id=name,
            methods=methods,
            tested=results,
            place={name: _place(result.get("machine") or {}) for name, result in results.items()},
            plots={m.name: sorted(plots_of([m.name])) for m in methods},
            families=list(dict.fromkeys(m.family for m in methods)),
            config=yaml.safe_dump(record["config"], sort_keys=False, allow_unicode=True) if record["config"] else "",
            needs_import=weights and not all(loads_alone(m) for m in methods),
            after_load=after_load,
            load=load,
            record=record,
            license=license,
            terms=[
                (k.removeprefix(TERMS), v) for k, v in license.items() if k.startswith(TERMS) and isinstance(v, str)
            ],
            kernel=extra,
            own_numbers=load["kind"] == "method",
        )
    )
    body = re.sub(r"\n{3,}", "\n\n", body)
    return ModelCard(f"---\n{_metadata(name, methods, record, load, license)}\n---\n\n{body}")


def is_folder(artifact: Any) -> bool:
    """Whether a folder is meant: a bare name of a method is the method, also where a folder is called so."""
    named = isinstance(artifact, str) and artifact in {method.name for method in registry.methods()}
    return isinstance(artifact, str | Path) and not named and Path(artifact).is_dir()


def _shown(value: Any) -> Any:
    """Texts that neither end a line of a table nor a block of code, and are no tags of a template."""
    if isinstance(value, Mapping):
        return {_shown(key): _shown(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_shown(item) for item in value]
    if not isinstance(value, str):
        return value
    value = re.sub(r"\s*[\r\n\x0b\x0c\x1c-\x1e\x85\u2028\u2029]+\s*", " ", value).replace("```", "'''")
    return re.sub(r"(?<=\{)(?=[{%#])|(?<=[}%#])(?=\})", " ", value)


def plots_of(methods: Any) -> dict[str, Path]:
    """{path in the repository: file} of the plots of the methods' committed results."""
    folder = recipe.recipes_dir() / "results"
    return {f"{PLOTS}/{path.name}": path for name in methods for path in sorted(folder.glob(f"{name}-*.png"))}


def problems_of(card: "ModelCard", folder: str | Path | None = None) -> list[str]:
    """What the Hub or a reader would stumble over in a card, without a line; empty when it is in order.

    Args:
        card (`ModelCard`): As [`model_card`] makes it, or loaded from a file.
        folder (`str` or `Path`, *optional*): Where the card stands: its pictures must be there.
    """
    from huggingface_hub.repocard_data import model_index_to_eval_results

    found = []
    header = re.match(r"---\r?\n(.*?)\r?\n---\r?\n", str(card), re.DOTALL)
    try:
        data = yaml.safe_load(header[1]) if header else None
    except yaml.YAMLError as error:
        return [f"the YAML cannot be read: {error}"]
    if not isinstance(data, dict):
        return ["there is no YAML block at the top."]
    found += [f"{where} is empty." for where in _empty(data)]
    for field, kind in {"library_name": str, "tags": list, "license": str | list}.items():
        if not isinstance(data.get(field), kind):
            found.append(f"{field} is {data.get(field)!r}.")
    names = data.get("license") if isinstance(data.get("license"), list) else [data.get("license")]
    found += [f"license {n!r} is no id." for n in names if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", str(n))]
    if data.get("license") == "other" and not data.get("license_name"):
        found.append("license is 'other' and needs license_name.")
    found += [f"the tag {tag!r} is no string." for tag in data.get("tags") or [] if not isinstance(tag, str)]
    if "base_model_relation" in data and not (data["base_model_relation"] in RELATIONS and data.get("base_model")):
        found.append(f"base_model_relation is {data['base_model_relation']!r}.")
    if "model-index" in data:
        try:
            model_index_to_eval_results(data["model-index"])
        except (KeyError, TypeError, ValueError) as error:
            found.append(f"model-index cannot be read: {type(error).__name__}: {error}")
    if left := re.search(r"\{\{.*?\}\}|\{%.*?%\}|\{#.*?#\}", card.text):
        found.append(f"{left[0]!r} is left of the template.")
    if folder is not None:
        pictures = [p for p in re.findall(r"!\[[^]]*\]\(([^)\s]+)\)", card.text) if "://" not in p]
        found += [f"the picture {path} is missing." for path in pictures if not (Path(folder) / path).is_file()]
    return found


def _empty(value: Any, where: str = "") -> list[str]:
    if isinstance(value, Mapping):
        return [x for key, item in value.items() for x in _empty(item, f"{where}.{key}".lstrip("."))]
    if isinstance(value, list):
        return [x for i, item in enumerate(value) for x in _empty(item, f"{where}[{i}]")]
    return [where] if value is None or value in ("None", "") else []


def _record_of(folder: Path, kind: str) -> dict[str, Any]:
    """The record of a folder; source that runs by itself needs none."""
    if kind in ("kernel", "custom_generate") and not (folder / RECORD).is_file():
        return {"methods": [], "base_model": None, "config": {}, "results": [], "versions": {}}
    return read_record(folder)


def _metadata(
    name: str, methods: list[registry.Method], record: Mapping[str, Any], load: Mapping[str, Any], license: Mapping
) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    task, kind = load.get("pipeline_tag"), load["kind"]
    results = [
        EvalResult(
            task_type=task or "other",
            dataset_type=_slug(result["dataset"], "-"),
            dataset_name=result["dataset"],
            dataset_split=result.get("split"),
            metric_type=_slug(result["metric"], "_"),
            metric_name=result["metric"],
            metric_value=result["value"],
        )
        for result in record["results"]
    ]
    tags = ["hfext", *(m.name for m in methods), *dict.fromkeys(f"arxiv:{m.arxiv}" for m in methods if m.arxiv)]
    tags += ["kernel"] * (kind == "kernel") + ["custom_generate"] * load["loop"]
    extra = {"base_model_relation": record["relation"]} if record.get("relation") else {}
    extra |= {key: value for key, value in license.items() if key.startswith(TERMS)}
    return ModelCardData(
        library_name={"kernel": "kernels", "custom_generate": "transformers"}.get(kind, "hfext"),
        base_model=record["base_model"],
        license=license.get("license", UNKNOWN),
        license_name=license.get("license_name"),
        license_link=license.get("license_link"),
        tags=list(dict.fromkeys(tags)),
        pipeline_tag=task,
        model_name=name.rpartition("/")[2],
        eval_results=results or None,
        **extra,
    ).to_yaml()


def _slug(text: str, joint: str) -> str:
    return re.sub(r"[^\w.-]+" if joint == "-" else r"\W+", joint, text).strip(joint).lower() or "unnamed"


def _body(text: str) -> str:
    """A card without its own YAML and its own first heading."""
    text = re.sub(r"\A---\r?\n.*?\n---\r?\n", "", text, flags=re.DOTALL).lstrip()
    return re.sub(r"\A# .*\n", "", text).strip()


def _place(machine: Mapping[str, Any]) -> str:
    words = [machine.get("gpu"), machine.get("cpu"), machine.get("cores") and f"{machine['cores']} cores"]
    return ", ".join(word for word in words if word)


@functools.cache
def _templates():
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(recipe.shipped("model_cards"))
    # Markdown, not HTML: nothing is escaped, and a missing value is an error.
    return Environment(
        loader=loader, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
