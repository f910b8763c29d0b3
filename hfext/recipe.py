"""Recipes: a flat YAML file names an experiment and the fields that differ from the experiment's defaults.

`recipes/optim/sam-mlp-digits.yaml` holds `experiment: noisy_digits` and, for example, `epochs: 30`. The experiment is
the module `hfext.experiments.noisy_digits`: a dataclass `Config` and a function `run(config, out) -> dict`. A key that
is no field is refused with the nearest name, values are checked against the field's type, and overrides win.

`execute` saves `config.yaml`, the resolved config, which is itself a recipe, and `result.json`, what `run` returned
with the versions, the machine and the time. Files appear whole or not at all.
"""

import dataclasses
import importlib
import importlib.metadata
import json
import os
import pkgutil
import platform
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

import yaml

from . import registry
from ._fields import coerce, parse, plain

PACKAGES = ("torch", "transformers", "accelerate", "peft", "datasets", "numpy")


def shipped(folder: str) -> Path:
    """`recipes` or `model_cards`: the copy inside the installed package, or else the folder of the checkout."""
    package = Path(__file__).resolve().parent
    installed = package / f"_{folder}"
    return installed if installed.is_dir() else package.parent / folder


def checkout() -> Path | None:
    """The root of the source tree this package is imported from; `None` when it was installed from a wheel."""
    root = Path(__file__).resolve().parent.parent
    return root if (root / "pyproject.toml").is_file() and (root / "recipes").is_dir() else None


def recipes_dir() -> Path:
    return shipped("recipes")


def find(path_or_name: str | Path) -> Path:
    """A file as given, or one of the shipped recipes as `optim/x`, `optim/x.yaml` or `recipes/optim/x.yaml`."""
    given = Path(path_or_name)
    inside = given.relative_to("recipes") if given.parts[:1] == ("recipes",) else given
    for candidate in (given, recipes_dir() / inside, recipes_dir() / f"{inside}.yaml"):
        if candidate.is_file():
            return candidate
    known = (path.relative_to(recipes_dir()).with_suffix("").as_posix() for path in recipes_dir().rglob("*.yaml"))
    raise FileNotFoundError(f"There is no recipe {str(path_or_name)!r}. {registry.suggest(str(inside), known)}")


def load(path_or_name: str | Path, overrides: Mapping[str, Any] | None = None) -> tuple[ModuleType, Any]:
    """The experiment module of a recipe and its `Config`, with `overrides` on top of the file."""
    path = find(path_or_name)
    try:
        values = parse(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, dict) or not isinstance(values.get("experiment"), str):
        raise ValueError(f"{path}: a recipe is a mapping with the key `experiment`, the name of its experiment.")
    if "experiment" in (overrides or {}):
        raise ValueError("`experiment` belongs to the recipe and cannot be overridden.")
    module = _experiment(values.pop("experiment"))
    try:
        return module, _config(module.Config, {**values, **(overrides or {})})
    except (ValueError, TypeError) as error:
        raise type(error)(f"{path}: {error}") from error


def execute(
    path_or_name: str | Path, overrides: Mapping[str, Any] | None = None, out: str | Path | None = None
) -> dict[str, Any]:
    """Run a recipe into the folder `out` (`out/<recipe>` by default) and return what `result.json` holds."""
    path = find(path_or_name)
    module, config = load(path, overrides)
    out = Path("out") / path.stem if out is None else Path(out)
    out.mkdir(parents=True, exist_ok=True)
    # A result of an earlier run must not stand beside the config of this one.
    (out / "result.json").unlink(missing_ok=True)
    experiment = module.__name__.rpartition(".")[2]
    resolved = plain(dataclasses.asdict(config))
    write_text(out / "config.yaml", yaml.safe_dump({"experiment": experiment, **resolved}, sort_keys=False))
    start, cpu = time.perf_counter(), time.process_time()
    returned = module.run(config, out)
    record = {
        "name": path.stem,
        "experiment": experiment,
        "config": resolved,
        "versions": versions(),
        "machine": machine(),
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        **plain(returned),
    }
    write_json(out / "result.json", record)
    return record


def read_result(name: str) -> dict[str, Any] | None:
    """The committed result `recipes/results/<name>.json`, or `None` when there is none."""
    path = recipes_dir() / "results" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def versions() -> dict[str, str]:
    """Of hfext, Python and the libraries below it that are installed."""
    from . import __version__

    found = {"hfext": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """What a time was measured on: processor, cores this process may use, memory, and the GPU if there is one."""
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = {"cpu": _processor(), "cores": cores, "memory_gib": memory and round(memory / 2**30)}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def write_text(path: Path, text: str) -> None:
    """Replace `path` in one step, so that a reader or a crash never sees half a file."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, record: Any) -> None:
    write_text(path, json.dumps(plain(record), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _experiment(name: str) -> ModuleType:
    from . import experiments

    known = [module.name for module in pkgutil.iter_modules(experiments.__path__) if not module.name.startswith("_")]
    if name not in known:
        raise ValueError(f"There is no experiment {name!r}. {registry.suggest(name, known)}")
    return importlib.import_module(f"{experiments.__name__}.{name}")


def _config(kind: type, values: Mapping[str, Any]) -> Any:
    hints = get_type_hints(kind)
    fields = [field.name for field in dataclasses.fields(kind)]
    for name in values:
        if name not in fields:
            raise ValueError(f"there is no field {name!r}. {registry.suggest(str(name), fields)}")
    return kind(**{name: coerce(name, hints[name], value) for name, value in values.items()})


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
