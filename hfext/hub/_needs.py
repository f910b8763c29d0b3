"""What an artifact needs, whether it can be served here, and what plain transformers would ignore of it."""

import dataclasses
import importlib.metadata
import json
import re
from pathlib import Path
from typing import Any

from .. import compression, decoding, registry
from .._fields import VERSION, newer
from ..decoding._generation_fields import FIELDS
from ._card import loads_alone
from ._fetch import download
from ._files import INDEX, Refused, check_safetensors, shards_of
from ._kinds import CONFIG_METHODS, MODEL_TYPES, kind_of, read_kernel, requirements_of
from ._record import RECORD, read_record

# All that is asked is in these; weights and vocabularies stay where they are.
LIGHT = ("*.json", "*.py", "*.toml", "*.md", "custom_generate/requirements.txt")
# What plain transformers makes of the keys that methods leave in a config.
_KEYS = {
    "hfext_mup": "the parametrisation of mup: the outputs are wrong without the line above.",
    "hfext_gr_kan": "the coefficients of GR-KAN (hfext_gr_kan): it lists them as UNEXPECTED and then runs with the "
    "plain activations.",
    "hfext_spark_ffn": "the layers of Spark FFN (hfext_spark_ffn): it lists them as UNEXPECTED, and the MLPs in their "
    "place have random weights.",
    "spark_attention": "spark_attention without a word and attends to every key, unless attn_implementation names "
    "hfext_spark or hfext_topk after `import hfext`.",
    "stickbreaking_attention": "stickbreaking_attention without a word and runs softmax attention, unless "
    "attn_implementation names hfext_stickbreaking after `import hfext`.",
}
_HEAVY = ("tokenizer.json", "vocab.json", "*.index.json", "added_tokens.json", "special_tokens_map.json")


@dataclasses.dataclass
class Needs:
    """`rows` for a table, what plain transformers `ignored` or is `refused` for, and `problems`, for which it cannot
    be served here."""

    kind: str
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    ignored: list[str] = dataclasses.field(default_factory=list)
    refused: list[str] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)

    def need(self, package: str, why: str, at_least: str | None = None, optional: bool = False) -> None:
        """One package, with the version that is here; a missing one is a problem unless it is `optional`."""
        here = _version(package)
        if any(row["needs"] == package and row["for"] == why for row in self.rows):
            return  # the record and the config say the same
        self.rows.append({"needs": package, "made with": at_least, "here": here or "not installed", "for": why})
        if here is None and not optional:
            self.problems.append(f"{package} is not installed: `pip install {package}`.")


def fetch_light(repo_id: str, revision: str | None = None, token: str | bool | None = None) -> Path:
    """A repository's JSON, Python and text files, checked as `fetch` checks them."""
    return download(repo_id, revision, token, allow_patterns=LIGHT, ignore_patterns=_HEAVY)


def needs_of(folder: str | Path) -> Needs:
    """Look at a folder, of which only the small files must be there."""
    folder = Path(folder)
    found = Needs(kind_of(folder))
    versions: dict[str, str] = {}
    try:
        versions = _of_record(folder, found)
        for path, read in (
            ("config.json", _of_config),
            ("generation_config.json", _of_generation),
            ("adapter_config.json", _of_adapter),
        ):
            if (folder / path).is_file():
                read(_json(folder / path), found, versions)
        if found.kind in ("kv_cache", "kv_predictor", "ngram_store"):
            found.need("hfext", {"kv_cache": "the cache", "kv_predictor": "its loop"}.get(found.kind, "the store"))
        if found.kind == "kv_predictor":
            _written_by(_json(folder / "kv_prediction.json").get(VERSION), found)
        if found.kind == "kernel":
            _of_kernel(folder, found)
        if (folder / "custom_generate").is_dir():
            _of_generate(folder, found)
    except (OSError, ValueError, TypeError, KeyError) as error:
        found.problems.append(str(error.args[0] if isinstance(error, KeyError) else error))
    return found


def damage_of(folder: str | Path) -> list[str]:
    """What is broken of the files of a whole folder: weights, their index, and what our kinds are described by."""
    found = []
    for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
        try:
            if path.suffix.lower() == ".safetensors":
                check_safetensors(path)
            if path.name.endswith(INDEX):
                missing = [shard for shard in shards_of(path) if not (path.parent / shard).is_file()]
                found += [f"{path} names {shard}, which is not there." for shard in missing[:1]]
            if path.name in ("ngram_store.json", "kv_prediction.json"):
                _json(path)
        except (OSError, ValueError) as error:
            found.append(str(error))
    return found


def _of_record(folder: Path, found: Needs) -> dict[str, str]:
    if not (folder / RECORD).is_file():
        return {}
    record = read_record(folder)
    versions = record["versions"]
    _written_by(versions.get("hfext"), found)
    known = {method.name: method for method in registry.methods()}
    for name in record["methods"]:
        method = known.get(name)
        if method is None:
            found.problems.append(f"hfext here has no method {name!r}. {registry.suggest(name, known)}")
        elif method.after_load:
            found.need("hfext", f"{name}: run {method.after_load} after loading", versions.get("hfext"))
            what = "modules" if method.family == "modules" else "parametrisation"
            found.ignored.append(f"the {what} of {name}: the outputs are wrong without the line above.")
        elif not loads_alone(method):
            found.need("hfext", name, versions.get("hfext"))
            if method.family == "attention":
                found.ignored.append(f"the attention of {name}, unless attn_implementation names it.")
    return versions


def _written_by(version: Any, found: Needs) -> None:
    note = newer(version)
    if note:
        found.rows.append(
            {"needs": "hfext", "made with": version, "here": _version("hfext"), "for": "a later version"}
        )
        found.ignored.append(f"{note} What was added since then is not read here.")


def _of_config(config: dict[str, Any], found: Needs, versions: dict[str, str]) -> None:
    from transformers import CONFIG_MAPPING

    found.need("transformers", config.get("model_type") or "the model", config.get("transformers_version"))
    kind = config.get("model_type")
    if kind and kind not in CONFIG_MAPPING and not config.get("auto_map"):
        found.problems.append(f"transformers here has no model type {kind!r}: update transformers.")
    if config.get("auto_map"):
        found.rows.append({"needs": "trust_remote_code=True", "made with": None, "here": "", "for": "code of its own"})
    _of_own(config, found, versions)
    about = config.get("quantization_config")
    if isinstance(about, dict):
        _of_quantiser(about, found)


def _of_own(config: dict[str, Any], found: Needs, versions: dict[str, str]) -> None:
    """What methods wrote into a config, also into that of a part of the model."""
    made_with = versions.get("hfext")
    kind = config.get("model_type")
    if kind in MODEL_TYPES:
        found.need("hfext", MODEL_TYPES[kind], made_with)
        found.refused.append(
            f'its model type {kind!r}, which only `import hfext` registers: ValueError, "does not recognize this '
            'architecture".'
        )
    for key, text in _KEYS.items():
        if not config.get(key):
            continue
        if key in CONFIG_METHODS:
            name = CONFIG_METHODS[key]
            found.need("hfext", f"{name}: run {registry.get(name).after_load} after loading", made_with)
        else:
            found.need("hfext", f"{key}: name attn_implementation when loading", made_with)
        if text not in found.ignored:
            found.ignored.append(text)
    for key in ("attn_implementation", "_attn_implementation"):
        name = config.get(key)
        if isinstance(name, str) and name.startswith("hfext_"):
            found.need("hfext", f"{key} = {name!r}", made_with)
            found.refused.append(f'{name!r}, which only `import hfext` registers: ValueError, "is not supported".')
    for part, value in config.items():
        if isinstance(value, dict) and part != "quantization_config":
            _of_own(value, found, versions)


def _of_quantiser(about: dict[str, Any], found: Needs) -> None:
    from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig

    method = about.get("quant_method")
    if method == compression.METHOD:
        found.need("hfext", "quantization_config", about.get(VERSION))
        config = compression.CompressionConfig.from_dict(about)
        if config.weights is not None and compression.slot_of(config.weights) == "weights":
            found.ignored.append("the quantiser: it warns, and then runs with random weights in the quantised layers.")
        if config.kv_cache is not None:
            found.ignored.append("the compressed cache: it warns, and then runs with a plain one.")
        about = config.weights.to_dict() if config.weights is not None else {}
        if about.get("quant_method") in (None, compression.METHOD):
            return
    config = AutoQuantizationConfig.from_dict(dict(about))
    try:
        AutoHfQuantizer.from_config(config, pre_quantized=True).validate_environment(device_map=None)
        here = "works"
    except (ImportError, RuntimeError, ValueError) as error:
        here = "does not work"
        found.problems.append(f"the quantiser {config.quant_method}: {str(error).strip().splitlines()[0]}")
    name = getattr(config.quant_method, "value", config.quant_method)
    found.rows.append({"needs": f"quantiser {name}", "made with": None, "here": here, "for": "the weights"})


def _of_generation(config: Any, found: Needs, versions: dict[str, str]) -> None:
    from transformers import GenerationConfig

    fields = decoding.active_fields(config)
    decoding.make_samplers(config)
    if fields:
        found.need("hfext", ", ".join(fields), versions.get("hfext"))
        found.ignored += [
            f"{name} = {value!r} of the generation config, without a word." for name, value in fields.items()
        ]
    stock = {*vars(GenerationConfig()), *FIELDS, "transformers_version"}
    for name in sorted(set(config) - stock):
        if not name.startswith("_") and config[name] is not None:
            found.ignored.append(
                f"{name} = {config[name]!r} of the generation config, and hfext does not know it either."
            )


def _of_adapter(config: dict[str, Any], found: Needs, versions: dict[str, str]) -> None:
    from peft import PeftType

    found.need("peft", str(config.get("peft_type")), config.get("peft_version") or versions.get("peft"))
    if config.get("base_model_name_or_path"):
        base = str(config["base_model_name_or_path"])
        found.rows.append({"needs": base, "made with": config.get("revision"), "here": "", "for": "its base model"})
    if config.get("peft_type") not in {kind.value for kind in PeftType}:
        found.problems.append(f"peft here has no adapter {config.get('peft_type')!r}: update peft.")


def _of_kernel(folder: Path, found: Needs) -> None:
    import torch

    about = read_kernel(folder)
    found.need("kernels", "get_kernel; torch-ext can be put on sys.path instead", optional=not about["built"])
    source = "".join(Path(path).read_text(encoding="utf-8") for path in about["source"] if "torch-ext" in path)
    if re.search(r"^\s*(import|from) triton\b", source, re.MULTILINE):
        found.need("triton", "its programs")
    if about["backends"] and not _has_backend(about["backends"], torch):
        found.problems.append(f"it is for {', '.join(about['backends'])}, and torch sees no such device here.")


def _has_backend(backends: list[str], torch: Any) -> bool:
    hip = torch.version.hip is not None
    have = {"cpu": True, "cuda": torch.cuda.is_available() and not hip, "rocm": torch.cuda.is_available() and hip}
    have |= {"xpu": torch.xpu.is_available(), "metal": torch.backends.mps.is_available()}
    return any(have.get(backend, False) for backend in backends)


def _of_generate(folder: Path, found: Needs) -> None:
    found.rows.append({"needs": "trust_remote_code=True", "made with": None, "here": "", "for": "custom_generate"})
    for requirement in requirements_of(folder):
        here = _version(requirement.name)
        row = {"needs": str(requirement), "made with": None, "here": here or "not installed", "for": "custom_generate"}
        found.rows.append(row)
        if here is None or not requirement.specifier.contains(here, prereleases=True):
            found.problems.append(f"custom_generate needs {requirement}, and here is {here or 'none'}.")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise Refused(f"{path} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise Refused(f"{path}: it holds a {type(found).__name__} and not the fields of a config.")
    return found
