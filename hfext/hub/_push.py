"""`push_to_hub`: any artifact as one commit, with its record and its card."""

import contextlib
import io
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.utils import PushToHubMixin, logging

from .. import recipe, registry
from ..compat import hub_failures
from ..decoding.ngram_store import NGramStore
from ..kv_cache._config import KVCacheConfig
from ..kv_cache.kv_prediction import KVPredictor
from ._card import model_card
from ._fetch import hash_of, reason
from ._files import files_of
from ._record import RECORD, save_record

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, HfApi

logger = logging.get_logger(__name__)


def push_to_hub(
    artifact: Any,
    repo_id: str,
    *,
    methods: Sequence[str] = (),
    tokenizer: Any = None,
    base_model: str | None = None,
    relation: str | None = None,
    config: Any = None,
    results: Sequence[Mapping[str, Any]] | None = None,
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
            `KVPredictor`, or the name of a method, whose result and card are published.
        repo_id (`str`): `user/name`; made if it is not there.
        methods (`Sequence[str]`, *optional*): What made it, for `hfext.json` and the card, where neither the folder's
            record nor the config of the model says so.
        tokenizer (*optional*): Saved beside a model.
        base_model, relation, config, results (*optional*): As in [`save_record`].
        private (`bool`, *optional*): Of a new repository.
        revision (`str`, *optional*): Branch, made if it is not there; `main` by default.
        create_pr (`bool`, *optional*): Open a pull request in place of a commit to the branch.
        token (`str` or `bool`, *optional*): By default the one that `hf auth login` or `HF_TOKEN` gave.
        commit_message (`str`, *optional*): Says by default what was published.
        ignore_patterns (`Sequence[str]`, *optional*): Files of a folder to leave out; a training's state always is.

    Raises:
        `Refused`: A pickle, a link, or damaged safetensors.
        `ValueError`: Nothing says which methods made the artifact.
        `OSError`: The Hub could not be reached, or did not take it. The repository is as it was.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    about = {"base_model": base_model, "relation": relation, "config": config, "results": results}
    with _staged(artifact, repo_id.rpartition("/")[2], tokenizer, methods, about) as (folder, added):
        operations = [CommitOperationAdd(name, path) for name, path in files_of(folder, ignore_patterns).items()]
        operations = [op for op in operations if op.path_in_repo not in added]
        operations += [CommitOperationAdd(name, io.BytesIO(text.encode())) for name, text in added.items()]
        what = folder.resolve().name if isinstance(artifact, str | Path) else type(artifact).__name__
        message = commit_message or f"Upload {what} with hfext"
        return _commit(HfApi(token=token), repo_id, operations, message, private, revision, create_pr)


@contextlib.contextmanager
def _staged(
    artifact: Any, name: str, tokenizer: Any, methods: Sequence[str], about: Mapping[str, Any]
) -> Iterator[tuple[Path, dict[str, str]]]:
    """The folder of an artifact, and files that are made for it and stand in no folder of the user's."""
    with contextlib.ExitStack() as stack:
        given = isinstance(artifact, str | Path) and Path(artifact).is_dir()
        folder = Path(artifact) if given else Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if isinstance(artifact, str | Path) and not given:
            registry.get(str(artifact))  # a KeyError names what is near
            result = recipe.read_result(str(artifact))
            if result is None:
                raise FileNotFoundError(f"{artifact} has no result to publish: run `hfext verify {artifact}` first.")
            folder = folder / str(artifact)
            folder.mkdir()
            recipe.write_json(folder / f"{artifact}.json", result)
            yield folder, {"README.md": str(model_card(str(artifact)))}
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
        yield folder, _made_for(folder, name, artifact, methods, about)


def _made_for(
    folder: Path, name: str, artifact: Any, methods: Sequence[str], about: Mapping[str, Any]
) -> dict[str, str]:
    """Record and card, where the folder has none."""
    if (folder / RECORD).is_file() and (methods or any(value is not None for value in about.values())):
        raise ValueError(f"{folder} has an {RECORD} already: change that, or push without methods and results.")
    if (folder / RECORD).is_file():
        return {} if _own_card(folder) else {"README.md": str(model_card(folder))}
    known = list(methods) or methods_of(folder)
    if not known and isinstance(artifact, KVCacheConfig | NGramStore | KVPredictor):
        known = [{NGramStore: "superposed", KVPredictor: "kv_prediction"}.get(type(artifact)) or artifact.method]
    if not known:
        raise ValueError(
            f"Nothing in {folder} says which methods made it: pass methods=['bisam', ...] (see `hfext list`)."
        )
    with tempfile.TemporaryDirectory() as beside:
        # The card reads the folder of the record; the user's folder is not written to.
        copy = Path(beside) / name
        copy.mkdir()
        for file in ("config.json", "adapter_config.json"):
            if (folder / file).is_file():
                (copy / file).write_bytes((folder / file).read_bytes())
        save_record(copy, known, **about)
        made = {RECORD: (copy / RECORD).read_text(encoding="utf-8")}
        if not _own_card(folder):
            made["README.md"] = str(model_card(copy))
        return made


def _own_card(folder: Path) -> bool:
    """Whether somebody wrote the card: PEFT and the Trainer leave forms to be filled in."""
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return bool(text) and "More Information Needed" not in text and "generated_from_trainer" not in text


def methods_of(folder: str | Path) -> list[str]:
    """Names of the methods that the config of a saved model names: quantised weights, a compressed cache, muP."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        return []
    config = json.loads(path.read_text(encoding="utf-8"))
    about = config.get("quantization_config") or {}
    parts = [about, about.get("weights") or {}, about.get("kv_cache") or {}]
    names = [part.get("method") for part in parts] + ["mup" if config.get("hfext_mup") else None]
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
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision not in (None, "main") and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        before = api.repo_info(repo_id, revision=revision).sha
        return api.create_commit(
            repo_id, operations, commit_message=message, revision=revision, create_pr=create_pr, parent_commit=before
        )
    except HFValidationError:
        raise
    except OfflineModeIsEnabled as error:
        raise OSError(f"{repo_id} was not changed: HF_HUB_OFFLINE is set. Unset it to publish.") from error
    except failures as error:
        state, again = "was not changed", "Call push_to_hub again: files that arrived are not sent twice."
        if before is not None:
            # The line may have broken when the commit was made already.
            try:
                after = api.repo_info(repo_id, revision=revision).sha
                if after != before and _holds(api, repo_id, after, operations):
                    return CommitInfo(f"{api.endpoint}/{repo_id}/commit/{after}", message, "", after)
            except failures:
                state = "may have been changed: this cannot be seen now"
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
