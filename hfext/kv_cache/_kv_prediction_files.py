"""The folder of a `KVPredictor`: its maps, its options, what its base must be, and the auxiliary model."""

import importlib.metadata
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from .._fields import VERSION, explained

RECORD, WEIGHTS, AUXILIARY = "kv_prediction.json", "kv_prediction.safetensors", "auxiliary"
FACTS = (
    *("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "rope_parameters"),
)


def facts(model: nn.Module) -> dict[str, Any]:
    """What a model must share with the one for which a predictor was trained, in JSON types."""
    config = model.config.get_text_config(decoder=True).to_dict()
    return json.loads(json.dumps({name: config.get(name) for name in FACTS}))


def save(predictor: nn.Module, folder: Path) -> None:
    """Everything is written beside and then moved, the record last: a folder without a record is incomplete."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".kv_prediction.{os.getpid()}.tmp"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        maps = {name: x for name, x in predictor.state_dict().items() if not name.startswith("aux.")}
        save_file({name: x.detach().contiguous() for name, x in maps.items()}, partial / WEIGHTS)
        predictor.aux.save_pretrained(partial / AUXILIARY)
        record = {
            VERSION: importlib.metadata.version("hfext"),
            "options": asdict(predictor.options),
            "base": facts(predictor.base),
        }
        (partial / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        (folder / RECORD).unlink(missing_ok=True)
        if (folder / AUXILIARY).exists():
            os.replace(folder / AUXILIARY, partial / "old")
        for name in (AUXILIARY, WEIGHTS, RECORD):
            os.replace(partial / name, folder / name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def load(kind: type, folder: Path, base: nn.Module, **kwargs: Any) -> Any:
    """A new `kind(aux, base, **options)`, or `ValueError` for a folder that is damaged or for another base."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        options, wanted = dict(record["options"]), dict(record["base"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} holds no readable {RECORD}: not a KVPredictor, or a damaged one.") from error
    with explained(record.get(VERSION)):
        return _load(kind, folder, base, options, wanted, **kwargs)


def _load(
    kind: type, folder: Path, base: nn.Module, options: dict[str, Any], wanted: dict[str, Any], **kwargs: Any
) -> Any:
    found = facts(base)
    for name in FACTS:
        if found[name] != wanted.get(name):
            raise ValueError(
                f"{folder} predicts the cache of another base: {name} is {wanted.get(name)} there, {found[name]} here."
            )
    try:
        maps = load_file(folder / WEIGHTS)
        aux, report = AutoModelForCausalLM.from_pretrained(folder / AUXILIARY, output_loading_info=True, **kwargs)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{folder} is damaged: {error}") from error
    if report["missing_keys"] or report["mismatched_keys"]:
        raise ValueError(f"{folder / AUXILIARY} is damaged: {report}")
    predictor = kind(aux, base, **options)
    mine = {name: x for name, x in predictor.state_dict().items() if not name.startswith("aux.")}
    wrong = sorted(maps.keys() ^ mine.keys()) or [n for n, x in mine.items() if maps[n].shape != x.shape]
    if wrong:
        raise ValueError(f"{folder / WEIGHTS} does not fit its record: {len(wrong)} tensors differ, as {wrong[0]!r}.")
    predictor.load_state_dict(maps, strict=False)
    return predictor


def _twins(module: nn.Module, prefix: str) -> dict[str, str]:
    """The second and further names of tied parameters, each with the first."""
    first: dict[int, str] = {}
    names = module.named_parameters(remove_duplicate=False)
    return {prefix + n: prefix + first[id(p)] for n, p in names if first.setdefault(id(p), n) != n}


def drop_twins(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
    """Hook of `state_dict`: a tied parameter is named once, as safetensors wants it."""
    for name in _twins(module, prefix):
        state.pop(name, None)


def restore_twins(module: nn.Module, state: dict[str, Tensor], prefix: str, *args: Any) -> None:
    """Hook of `load_state_dict`: the inverse of `drop_twins`."""
    for name, first in _twins(module, prefix).items():
        if first in state:
            state.setdefault(name, state[first])
