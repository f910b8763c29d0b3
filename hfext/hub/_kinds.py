"""What a folder holds, told from its files: how it is loaded, and what must be right before it is published."""

import ast
import json
import re
from pathlib import Path
from typing import Any

from ..decoding._ngram_files import STORE_MANIFEST
from ..kv_cache._calibration import SIDECAR
from ..kv_cache._kv_prediction_files import RECORD as PREDICTOR
from ._files import Refused

GENERATE = "custom_generate/generate.py"
EDITION = 5  # of kernel folders
COMPILED = (".so", ".o", ".a", ".cubin", ".fatbin", ".ptx", ".pyd", ".dll", ".dylib", ".pyc", ".whl")

# What a config of a model says by itself: keys and model types of hfext, and the methods that wrote them.
CONFIG_METHODS = {"hfext_mup": "mup", "hfext_gr_kan": "flashkat", "hfext_spark_ffn": "spark_ffn"}
MODEL_TYPES = {"hfext_tokenformer": "tokenformer"}

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


def kind_of(folder: str | Path) -> str:
    """`kernel`, `adapter`, `model`, `kv_predictor`, `kv_cache`, `ngram_store`, `custom_generate` or `folder`."""
    files = {
        "kernel": "build.toml",
        "adapter": "adapter_config.json",
        "model": "config.json",
        "kv_predictor": PREDICTOR,
        "kv_cache": SIDECAR,
        "ngram_store": STORE_MANIFEST,
        "custom_generate": GENERATE,
    }
    return next((kind for kind, name in files.items() if (Path(folder) / name).is_file()), "folder")


def check_kind(folder: str | Path) -> None:
    """`Refused` for a kernel or a `custom_generate` folder that could not be loaded from the Hub."""
    if (Path(folder) / "build.toml").is_file():
        read_kernel(folder)
    if (Path(folder) / "custom_generate").is_dir():
        _check_generate(Path(folder))


def loading(folder: str | Path, name: str) -> dict[str, Any]:
    """How a reader loads the artifact `name`: `kind`, `lines` of Python and whether they import hfext, whether it has
    a generation loop, and the task."""
    folder = Path(folder)
    kind = kind_of(folder)
    found: dict[str, Any] = {"kind": kind, "lines": [], "own_import": False, "loop": (folder / GENERATE).is_file()}
    if kind == "adapter":
        loader = _ADAPTERS.get(_json(folder / "adapter_config.json").get("task_type"), "AutoPeftModel")
        found["lines"] = [f"from peft import {loader}", "", f'model = {loader}.from_pretrained("{name}")']
    elif kind == "model":
        config = _json(folder / "config.json")
        loader = ([*(config.get("architectures") or []), "AutoModel"])[0]
        if config.get("model_type") in MODEL_TYPES:  # the class is not one of transformers
            loader = "AutoModelForCausalLM" if loader.endswith("ForCausalLM") else "AutoModel"
        found["lines"] = [f"from transformers import {loader}", "", f'model = {loader}.from_pretrained("{name}")']
    elif kind == "kernel":
        package = read_kernel(folder)["package"]
        path = [f'sys.path.append(snapshot_download("{name}") + "/torch-ext")', f"import {package}"]
        source = ["import sys", "from huggingface_hub import snapshot_download", "", *path]
        built = ["from kernels import get_kernel", "", f'{package} = get_kernel("{name}")']
        found["lines"] = built if (folder / "build").is_dir() else source
    elif kind == "custom_generate":
        call = f'model.generate(**inputs, custom_generate="{name}", trust_remote_code=True)'
        found["lines"] = [f"outputs = {call}  # of any model that generates text"]
    elif kind != "folder":
        fetch = f'hfext.hub.fetch("{name}")'
        found["own_import"] = True
        found["lines"] = ["import hfext", ""] + {
            "kv_predictor": [f"predictor = hfext.kv_cache.KVPredictor.from_pretrained({fetch}, base=model)"],
            "kv_cache": [
                f"config = hfext.kv_cache.KVCacheConfig.from_pretrained({fetch})",
                "hfext.kv_cache.apply(model, config)  # of the model it was calibrated for",
            ],
            "ngram_store": [f"store = hfext.decoding.NGramStore.load({fetch})"],
        }[kind]
    if kind in ("adapter", "model"):
        tags = [tag for ending, tag in _PIPELINES.items() if loader.endswith(ending)]
        found |= {"pipeline_tag": tags[0]} if tags else {}
    return found


def base_of(folder: str | Path) -> str | None:
    """What the config of an adapter says it was trained on, as it stands there."""
    path = Path(folder) / "adapter_config.json"
    return _json(path).get("base_model_name_or_path") if path.is_file() else None


def read_kernel(folder: str | Path) -> dict[str, Any]:
    """`name`, `package`, `edition`, `license`, `backends`, `built`, `public` names and `source` files of a kernel
    folder; `Refused` says what is wrong.

    The layout is that of the `kernels` package: `build.toml` and `torch-ext/<name with underscores>/__init__.py`.
    """
    folder = Path(folder)
    general = _toml(folder / "build.toml").get("general")
    if not isinstance(general, dict):
        raise Refused(f"{folder / 'build.toml'} has no table [general].")
    name, edition, backends = general.get("name"), general.get("edition"), general.get("backends", [])
    if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
        raise Refused(f"build.toml: name is {name!r} but must be lower case letters and digits, joined by '-'.")
    if edition != EDITION or isinstance(edition, bool):
        raise Refused(f"build.toml: edition is {edition!r} but must be {EDITION}.")
    if not isinstance(backends, list) or not all(isinstance(backend, str) for backend in backends):
        raise Refused(f"build.toml: backends is {backends!r} but must be a list of names.")
    package = folder / "torch-ext" / name.replace("-", "_") / "__init__.py"
    if not package.is_file():
        raise Refused(f"{folder} has no {package.relative_to(folder).as_posix()}, the package that build.toml names.")
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in COMPILED and "__pycache__" not in path.parts:
            raise Refused(f"{path} is compiled: only source is published, so that it can be read.")
    about = {
        "name": name,
        "package": package.parent.name,
        "edition": edition,
        "license": general.get("license"),
        "backends": backends,
    }
    about["built"] = (folder / "build").is_dir()
    return about | {"public": _public(package), "source": [str(path) for path in sorted(folder.rglob("*.py"))]}


def _public(package: Path) -> list[str]:
    """The names in `__all__`, without running the module."""
    for node in _parsed(package).body:
        if isinstance(node, ast.Assign) and any(ast.unparse(target) == "__all__" for target in node.targets):
            return [x.value for x in getattr(node.value, "elts", []) if isinstance(x, ast.Constant)]
    return []


def _check_generate(folder: Path) -> None:
    path = folder / GENERATE
    if not path.is_file():
        raise Refused(f"{folder} has a folder custom_generate without generate.py, which transformers looks for.")
    if not any(isinstance(node, ast.FunctionDef) and node.name == "generate" for node in _parsed(path).body):
        raise Refused(f"{path} has no function generate(model, ...), which transformers calls.")
    requirements_of(folder)


def requirements_of(folder: str | Path) -> list[Any]:
    """The requirements of a `custom_generate` folder; `Refused` for a line that is none."""
    from packaging.requirements import InvalidRequirement, Requirement

    path = Path(folder) / "custom_generate" / "requirements.txt"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    found = []
    for line in (line.partition("#")[0].strip() for line in lines):
        try:
            found += [Requirement(line)] if line else []
        except InvalidRequirement as error:
            raise Refused(f"{path}: {line!r} is no requirement: {error}") from error
    return found


def _parsed(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError) as error:
        raise Refused(f"{path} is no Python that can be read: {error}") from error


def _toml(path: Path) -> dict[str, Any]:
    try:
        import tomllib
    except ImportError:  # Python 3.10
        import tomli as tomllib
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise Refused(f"{path} is no TOML: {error}") from error


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise Refused(f"{path} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise Refused(f"{path} holds a {type(found).__name__} and not the fields of a config.")
    return found
