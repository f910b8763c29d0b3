"""`push_to_hub`: any artifact as one commit, with its record and its card."""

import contextlib
import io
import itertools
import json
import re
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.utils import PushToHubMixin, logging

from .. import recipe, registry
from .._fields import plain
from ..compat import hub_failures
from ..decoding.ngram_store import NGramStore
from ..kv_cache._config import KVCacheConfig
from ..kv_cache.kv_prediction import KVPredictor
from ._card import is_folder, model_card, plots_of
from ._fetch import delay_after, hash_of, patient, reason
from ._files import files_of, json_of
from ._kinds import CONFIG_METHODS, MODEL_TYPES, base_of, check_kind, kind_of
from ._licence import is_on_hub, licence_of
from ._licence_ids import warn_of_licence
from ._record import HUB_ID, RECORD, is_evaluation, read_record, save_record, without_texts
from ._settings import refuse_tokens

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, HfApi

logger = logging.get_logger(__name__)

LARGEST = 1 << 30  # bytes of JSON that are looked into


def push_to_hub(
    artifact: Any,
    repo_id: str,
    *,
    methods: str | Sequence[str] = (),
    tokenizer: Any = None,
    base_model: str | None = None,
    relation: str | None = None,
    config: Any = None,
    results: Sequence[Mapping[str, Any]] | Mapping[str, Any] | None = None,
    license: str | Mapping[str, Any] | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
    commit_message: str | None = None,
    ignore_patterns: Sequence[str] = (),
) -> "CommitInfo":
    """Publish an artifact as one commit: either all of it is there afterwards, or nothing.

    Files of a folder that have arrived once are not sent again, so a push that broke off is called again.

    Args:
        artifact: A model, a PEFT model, a folder, a cache config with its calibration, an `NGramStore`, a
            `KVPredictor`, or the name of a method, whose result and card are published. A folder may be that of a
            saved model or adapter, of a kernel (with `build.toml`), or one with `custom_generate/generate.py`.
        repo_id (`str`): `user/name`; made if it is not there.
        methods (`str` or `Sequence[str]`, *optional*): What made it, for `hfext.json` and the card, where neither the
            folder's record nor the config of the model says so.
        tokenizer (*optional*): Saved beside a model.
        base_model, relation, config, results (*optional*): As in [`save_record`]. A model that came from the Hub and
            an adapter say themselves what they were made from. Of what [`hfext.unlearning.evaluate`] returned the
            rows are not published: they hold what was to be forgotten.
        license (`str` or `Mapping`, *optional*): A licence's id, or the fields `license`, `license_name` and
            `license_link`; by default that of the base as its card says it, and else `unknown`.
        private (`bool`, *optional*): Of a new repository.
        revision (`str`, *optional*): Branch, made if it is not there; `main` by default.
        create_pr (`bool`, *optional*): Open a pull request in place of a commit to the branch.
        token (`str` or `bool`, *optional*): By default the one that `hf auth login` or `HF_TOKEN` gave.
        commit_message (`str`, *optional*): Says by default what was published.
        ignore_patterns (`Sequence[str]`, *optional*): Files of a folder to leave out; a training's state always is.

    Raises:
        `Refused`: A pickle, a link, damaged safetensors, or a kernel that could not be loaded.
        `ValueError`: Nothing says which methods made the artifact, or something in the record looks like a token.
        `OSError`: The Hub could not be reached, or did not take it. The repository is as it was.
    """
    if not re.fullmatch(r"[^/\s]+/[^/\s]+", str(repo_id)):
        raise ValueError(f"repo_id is {repo_id!r} but must be 'user/name'.")
    about = {"base_model": base_model, "relation": relation, "config": config, "results": results}
    methods = [methods] if isinstance(methods, str) else methods
    warn_of_licence(license)
    with _staged(artifact, repo_id, tokenizer, methods, about, license, token) as (folder, added):
        what = folder.resolve().name if isinstance(artifact, str | Path) else type(artifact).__name__
        message = commit_message or f"Upload {what} with hfext"
        return publish(folder, added, repo_id, message, private, revision, create_pr, token, ignore_patterns)


def publish(
    folder: Path,
    added: Mapping[str, str | Path],
    repo_id: str,
    message: str,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
    ignore_patterns: Sequence[str] = (),
) -> "CommitInfo":
    """One commit of what may be published of a folder, and of files that were made for it, as text or as paths."""
    from huggingface_hub import CommitOperationAdd, HfApi

    whole = {**files_of(folder, ignore_patterns), **added}
    operations = [CommitOperationAdd(name, _content_of(name, made)) for name, made in whole.items()]
    return _commit(HfApi(token=token), repo_id, operations, message, private, revision, create_pr)


def _content_of(name: str, made: str | Path) -> Path | io.BytesIO:
    """What is sent of a file: of an evaluation the numbers alone, since its rows hold what was to be forgotten."""
    if isinstance(made, str):
        return io.BytesIO(made.encode())
    if not name.lower().endswith(".json") or made.stat().st_size > LARGEST or b'"rows"' not in made.read_bytes():
        return made
    try:
        found = json_of(made)
    except ValueError:
        return made
    named = name.lower().rpartition("/")[2] == "evaluation.json" and isinstance(found, dict) and "rows" in found
    if not named and not is_evaluation(found):
        return made
    logger.warning(f"{name} is the result of an evaluation: its rows hold texts and are not published.")
    return io.BytesIO((json.dumps(without_texts(found), indent=2) + "\n").encode())


@contextlib.contextmanager
def _staged(
    artifact: Any,
    repo_id: str,
    tokenizer: Any,
    methods: Sequence[str],
    about: Mapping[str, Any],
    license: str | Mapping[str, Any] | None,
    token: str | bool | None,
) -> Iterator[tuple[Path, dict[str, str | Path]]]:
    """The folder of an artifact, and files that are made for it and stand in no folder of the user's."""
    with contextlib.ExitStack() as stack:
        given = is_folder(artifact)
        folder = Path(artifact) if given else Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if isinstance(artifact, str | Path) and not given:
            _check_name(artifact)
            result = recipe.read_result(str(artifact))
            if result is None:
                raise FileNotFoundError(f"{artifact} has no result to publish: run `hfext verify {artifact}` first.")
            folder = folder / str(artifact)
            folder.mkdir()
            recipe.write_json(folder / f"{artifact}.json", result)
            licence = None if license is None else licence_of(None, license)
            yield folder, {"README.md": str(model_card(str(artifact), license=licence)), **plots_of([str(artifact)])}
            return
        if isinstance(artifact, PushToHubMixin | KVCacheConfig | KVPredictor):
            artifact.save_pretrained(folder)
        elif isinstance(artifact, NGramStore):
            folder = folder / "ngram_store"
            artifact.save(folder)
        elif not given:
            raise TypeError(
                f"artifact is a {type(artifact).__name__} but must be a model, a folder, a cache config, an "
                "NGramStore, a KVPredictor or the name of a method."
            )
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        check_kind(folder)
        known = list(methods) or methods_of(folder)
        if not known and isinstance(artifact, KVCacheConfig | NGramStore | KVPredictor):
            known = [{NGramStore: "superposed", KVPredictor: "kv_prediction"}.get(type(artifact)) or artifact.method]
        origin = origin_of(artifact)
        yield folder, made_for(folder, repo_id, known, about, license, origin, token, bool(methods))


def _check_name(artifact: str | Path) -> None:
    """An error for what is neither a folder nor a method; a KeyError names a method that is near."""
    name, known = str(artifact), [method.name for method in registry.methods()]
    if name in known:
        return
    near = registry.suggest(name, known)
    near = f" {near}" if near.startswith("Did you mean") else " `hfext list` shows the methods."
    if isinstance(artifact, Path) or "/" in name or "\\" in name:
        raise FileNotFoundError(f"There is no folder {name}.")
    raise KeyError(f"There is no folder {name!r} here and no method of that name.{near}")


def origin_of(artifact: Any) -> str | None:
    """What a model was loaded from: an id of the Hub, or a folder."""
    model = artifact.get_base_model() if hasattr(artifact, "peft_config") else getattr(artifact, "base", artifact)
    return getattr(getattr(model, "config", None), "_name_or_path", None) or None


def made_for(
    folder: Path,
    repo_id: str,
    methods: Sequence[str],
    about: Mapping[str, Any],
    license: str | Mapping[str, Any] | None = None,
    origin: str | None = None,
    token: str | bool | None = None,
    named: bool = False,
) -> dict[str, str | Path]:
    """Record, card and plots, where the folder has none of its own."""
    kind = kind_of(folder)
    if (folder / RECORD).is_file():
        if named or license is not None or any(value is not None for value in about.values()):
            raise ValueError(f"{folder} has an {RECORD} already: change that, or push without methods and results.")
        record = read_record(folder)
        refuse_tokens(record, RECORD)
        licence = licence_of(record["base_model"], record.get("license"), token=token)
        return _card_of(folder, repo_id, licence, record["methods"])
    if not methods and kind in ("kernel", "custom_generate"):
        licence = None if license is None else licence_of(None, license)
        return _card_of(folder, repo_id, licence, [])
    if not methods:
        raise ValueError(
            f"Nothing in {folder} says which methods made it: pass methods=['bisam', ...] (see `hfext list`)."
        )
    about = dict(about)
    origin = base_of(folder) or origin
    beside = origin if origin and Path(origin).is_dir() else None
    known = origin and not Path(origin).exists() and HUB_ID.fullmatch(origin)
    if about["base_model"] is None and known and is_on_hub(origin, token):
        about["base_model"] = origin
        about["relation"] = about["relation"] or _relation(kind, methods)
    licence = licence_of(about["base_model"], license, beside, token)
    with tempfile.TemporaryDirectory() as scratch:
        # The card reads the folder of the record; the user's folder is not written to.
        copy = Path(scratch) / folder.resolve().name
        copy.mkdir()
        for path in _told_by(folder):
            (copy / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            (copy / path.relative_to(folder)).write_bytes(path.read_bytes())
        save_record(copy, methods, **about, license=licence)
        made: dict[str, str | Path] = {RECORD: (copy / RECORD).read_text(encoding="utf-8")}
        if is_evaluation(about["results"]):
            made["evaluation.json"] = json.dumps(plain(without_texts(about["results"])), indent=2) + "\n"
        if not own_card(folder):
            made |= {"README.md": str(model_card(copy, repo_id)), **plots_of(methods)}
        return made


def _told_by(folder: Path) -> list[Path]:
    """The files that a card is made from."""
    names = ("config.json", "adapter_config.json", "build.toml", "CARD.md", "ngram_store.json", "kv_prediction.json")
    found = [folder / name for name in (*names, "kv_cache.safetensors", "custom_generate/generate.py")]
    if kind_of(folder) == "kernel":
        found += sorted((folder / "torch-ext").rglob("*.py"))
        found += sorted((folder / "build").rglob("*.py"))[:1]
    return [path for path in found if path.is_file()]


def _card_of(folder: Path, repo_id: str, licence: Any, methods: Sequence[str]) -> dict[str, str | Path]:
    if own_card(folder):
        return {}
    return {"README.md": str(model_card(folder, repo_id, licence)), **plots_of(methods)}


def _relation(kind: str, methods: Sequence[str]) -> str | None:
    """How an artifact relates to what it was loaded from, where there is one word for it."""
    families = {registry.get(name).family for name in methods}
    if kind == "adapter":
        return "adapter"
    if kind != "model":
        return None
    if "quantization" in families:
        return "quantized"
    return "finetune" if families - {"kv_cache", "decoding", "metrics"} else None


def own_card(folder: Path) -> bool:
    """Whether somebody wrote the card: PEFT and the Trainer leave forms to be filled in."""
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return bool(text) and "More Information Needed" not in text and "generated_from_trainer" not in text


def methods_of(folder: str | Path) -> list[str]:
    """Names of the methods that the config of a saved model names: quantised weights, a compressed cache, replaced
    modules, a model class of ours, muP."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        return []
    try:
        config = json_of(path)
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    config = config if isinstance(config, dict) else {}
    about = config.get("quantization_config") or {}
    parts = [about, about.get("weights") or {}, about.get("kv_cache") or {}]
    names = [part.get("method") for part in parts] + [MODEL_TYPES.get(config.get("model_type"))]
    names += [name for key, name in CONFIG_METHODS.items() if config.get(key)]
    known = {method.name for method in registry.methods()}
    return [name for name in dict.fromkeys(names) if name in known]


def _commit(
    api: "HfApi",
    repo_id: str,
    operations: list,
    message: str,
    private: bool | None,
    revision: str | None,
    create_pr: bool,
) -> "CommitInfo":
    from huggingface_hub import CommitInfo
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

    before, failures = None, hub_failures()
    try:
        patient(lambda: api.create_repo(repo_id, private=private, exist_ok=True))
        if revision not in (None, "main") and not create_pr:
            patient(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True))
        before = patient(lambda: api.repo_info(repo_id, revision=revision)).sha
        for attempt in itertools.count():
            try:
                return api.create_commit(
                    repo_id,
                    operations,
                    commit_message=message,
                    revision=revision,
                    create_pr=create_pr,
                    parent_commit=before,
                )
            except failures as error:
                # The line may have broken when the commit was made already.
                delay = None if create_pr else delay_after(error, attempt)
                if delay is None or api.repo_info(repo_id, revision=revision).sha != before:
                    raise
                time.sleep(delay)
    except HFValidationError:
        raise
    except OfflineModeIsEnabled as error:
        raise OSError(f"{repo_id} was not changed: HF_HUB_OFFLINE is set. Unset it to publish.") from error
    except failures as error:
        state, again = "was not changed", "Call push_to_hub again: files that arrived are not sent twice."
        if before is not None:
            try:
                after = patient(lambda: api.repo_info(repo_id, revision=revision)).sha
                if after != before and _holds(api, repo_id, after, operations):
                    return CommitInfo(f"{api.endpoint}/{repo_id}/commit/{after}", message, "", after)
            except failures:
                state = "may have been changed: this cannot be seen now"
            state += ", but a pull request may be open" if create_pr and delay_after(error, 0) is not None else ""
        raise OSError(f"{repo_id} {state}: {reason(error)} {again}") from error


def _holds(api: "HfApi", repo_id: str, revision: str, operations: list) -> bool:
    """Whether a revision has exactly these contents under their names."""
    there = {
        info.path: info
        for info in api.get_paths_info(repo_id, [op.path_in_repo for op in operations], revision=revision)
    }
    for op in operations:
        info = there.get(op.path_in_repo)
        if info is None:
            return False
        with op.as_file() as file:
            found = hash_of(file, op.upload_info.size, git=info.lfs is None)
        if found != (info.blob_id if info.lfs is None else info.lfs.sha256):
            return False
    return True
