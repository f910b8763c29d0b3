"""The record `hfext.json` beside saved weights: which methods made them, from what, and how good they are."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import recipe, registry
from .._fields import newer, plain
from ._files import json_of
from ._licence import check_licence
from ._settings import published, refuse_tokens

RECORD = "hfext.json"
FORMAT = 1
RELATIONS = ("adapter", "finetune", "merge", "quantized")

HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def save_record(
    folder: str | Path,
    methods: str | Sequence[str],
    base_model: str | None = None,
    relation: str | None = None,
    config: Any = None,
    results: Sequence[Mapping[str, Any]] | Mapping[str, Any] | None = None,
    license: Mapping[str, Any] | None = None,
) -> Path:
    """Write `hfext.json` into the folder of a saved model or adapter.

    Args:
        folder (`str` or `Path`): An existing folder, as `save_pretrained` leaves it.
        methods (`str` or `Sequence[str]`): Names of the methods that made it, the most important first.
        base_model (`str`, *optional*): Hub id of the model it was made from.
        relation (`str`, *optional*): How it relates to `base_model`: one of `RELATIONS`.
        config (*optional*): The settings, as a dataclass or a mapping. Of training arguments those are kept that made
            the weights; what is called a token, a key or a password, and paths of this machine, are left out.
        results (`Sequence[Mapping]`, *optional*): Measured numbers: each has `metric`, `value` and `dataset`, and may
            have `split`, `setting` and `machine`. What [`hfext.unlearning.evaluate`] returned is taken as it is; a key
            `dataset` names its data, and `before` may hold what it returned for the model before it forgot.
        license (`Mapping`, *optional*): As `licence_of` finds it, with `license`, an id of the Hub.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}: save the model first.")
    record = {
        "format": FORMAT,
        "methods": [registry.get(name).name for name in ([methods] if isinstance(methods, str) else methods)],
        "base_model": base_model,
        "relation": relation,
        "config": plain(published(config)),
        "results": plain(results_of(results)),
        "versions": recipe.versions(),
    }
    if license is not None:
        record["license"] = plain(license)
    _check(record)
    refuse_tokens(record)
    recipe.write_json(folder / RECORD, record)
    return folder / RECORD


PARTS = {
    "forget": "rows to forget",
    "retain": "rows to keep",
    "real_authors": "real authors",
    "world_facts": "world facts",
    "holdout": "rows never seen",
}
# Numbers whose names do not begin with the rows that they were measured on.
OF_ROWS = {
    "exact_memorization": "rows to forget",
    "extraction_strength": "rows to forget",
    "privleak": "rows to forget and rows never seen",
    **{f"auc_{name}": "rows to forget and rows never seen" for name in ("loss", "min_k", "min_k_plus_plus", "renyi")},
    "model_utility": "rows to keep, real authors, world facts",
    "verbmem": "passages",
}


def is_evaluation(results: Any) -> bool:
    """Whether this is the dictionary of [`hfext.unlearning.evaluate`]."""
    return isinstance(results, Mapping) and "missing" in results and isinstance(results.get("rows"), Mapping | list)


def without_texts(results: Mapping[str, Any]) -> dict[str, Any]:
    """An evaluation without its rows and whatever else in it is text, but for what it says of itself."""
    return {
        key: value
        for key, value in results.items()
        if key in ("missing", "dataset") or (key != "rows" and not _texts(value))
    }


def _texts(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_texts(x) for x in value.values())
    return any(_texts(x) for x in value) if isinstance(value, list | tuple) else isinstance(value, str)


RESULT = ("metric", "value", "dataset", "split", "setting", "machine")


def results_of(results: Any) -> Any:
    """The numbers of [`hfext.unlearning.evaluate`] as results, each with the rows it was measured on; other results as
    they are, without texts under other names. Values that are not finite stay out: `evaluate` says in `missing` what
    it could not compute."""
    if not is_evaluation(results):
        found = results or []
        if not isinstance(found, list | tuple) or not all(isinstance(x, Mapping) for x in found):
            return found
        return [{k: v for k, v in x.items() if k in RESULT or not _texts(v)} for x in found]
    whole = results.get("dataset")
    found = []
    for name, value in results.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not is_finite(value):
            continue
        part = next((part for part in PARTS if name.startswith(f"{part}_")), None)
        rows = PARTS[part] if part else OF_ROWS.get(name, "rows to forget and to keep")
        entry = {"metric": name.replace("_", " "), "value": value, "dataset": whole or rows}
        if whole and (part or name in OF_ROWS):
            entry["split"] = rows
        setting = _setting(results, name, rows)
        found.append({**entry, "setting": setting} if setting else entry)
    return found


def _setting(results: Mapping[str, Any], name: str, rows: str) -> str:
    """How many rows a number of an evaluation is from, and what it was before, where `before` says it."""
    part = next((part for part, text in PARTS.items() if text == rows), None)
    losses = results["rows"].get(f"{part}_loss") if isinstance(results["rows"], Mapping) else None
    words = [f"{len(losses)} row{'' if len(losses) == 1 else 's'}"] if isinstance(losses, list) else []
    before = results.get("before")
    value = before.get(name) if isinstance(before, Mapping) else None
    if isinstance(value, int | float) and not isinstance(value, bool) and is_finite(value):
        words.append(f"{value:.4g} before")
    return ", ".join(words)


def read_record(folder: str | Path) -> dict[str, Any]:
    """The content of `hfext.json`; `ValueError` when it is damaged or of a format this version does not know."""
    path = Path(folder) / RECORD
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no {RECORD} in {folder}: call hfext.hub.save_record(folder, [method, ...]) first."
        )
    try:
        record = json_of(path)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    try:
        _check(record)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return record


def _check(record: Any) -> None:
    if not isinstance(record, dict):
        raise ValueError("the record must be a JSON object.")
    if record.get("format") != FORMAT:
        versions = record.get("versions")
        note = newer(versions.get("hfext") if isinstance(versions, dict) else None)
        raise ValueError(
            f"format is {record.get('format')!r}, but this version of hfext reads {FORMAT}. {note or 'Update hfext.'}"
        )
    for field, kind in {"methods": list, "config": dict, "results": list, "versions": dict}.items():
        if not isinstance(record.get(field), kind):
            raise ValueError(f"{field} is {record.get(field)!r} but must be a {kind.__name__}.")
    if not record["methods"] or not all(isinstance(name, str) for name in record["methods"]):
        raise ValueError(f"methods is {record['methods']!r} but must hold at least one method's name.")
    base_model, relation = record.get("base_model"), record.get("relation")
    if base_model is not None and not (isinstance(base_model, str) and HUB_ID.fullmatch(base_model)):
        raise ValueError(f"base_model is {base_model!r} but must be a Hub id such as 'org/name'.")
    if relation is not None and (relation not in RELATIONS or base_model is None):
        raise ValueError(f"relation is {relation!r} but must be one of {', '.join(RELATIONS)}, beside a base_model.")
    for result in record["results"]:
        _check_result(result)
    check_licence(record.get("license"))


def _check_result(result: Any) -> None:
    if not isinstance(result, dict):
        raise ValueError(f"results holds {result!r} but must hold mappings.")
    for field in ("metric", "dataset"):
        if not isinstance(result.get(field), str):
            raise ValueError(f"results: {field} is {result.get(field)!r} but must be a string.")
    value = result.get("value")
    if isinstance(value, bool) or not isinstance(value, int | float) or not is_finite(value):
        raise ValueError(f"results: value is {_short(value)} but must be a finite number.")


def is_finite(value: float) -> bool:
    """Whether a number is one that a float can hold."""
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the floats
        return False


def _short(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**30:
        return "an integer of more than 30 digits"
    return repr(value)
