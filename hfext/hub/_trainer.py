"""`Trainer.push_to_hub` of a run with a method of hfext: one commit of the model with our record and our card.

The stock Trainer is told apart from ours by what it trains with: its own class, its optimizer, its schedule, its loss,
its callbacks. Where nothing of hfext takes part it does what it always did, bit for bit. Otherwise that is published
which `hfext.push_to_hub` would publish of the saved folder: no pickles, no state of the training, and so no
`training_args.bin`, which would hold the token. With `hub_strategy="checkpoint"` or `"all_checkpoints"` the checkpoint
is in the same commit, with its state, as was asked for.
"""

import contextlib
import inspect
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils import logging

from .. import registry
from ..compat import hub_failures, patch_method, pushes_of, wait_for_pushes
from ._fetch import reason
from ._files import ALWAYS_HOME, files_of
from ._push import made_for, methods_of, origin_of, own_card, publish
from ._record import RECORD, is_finite
from ._settings import training_settings

logger = logging.get_logger(__name__)

OURS = b"library_name: hfext"
HOME = ("_*", "checkpoint-*/*")  # of the output folder, as the stock Trainer has it
_ROLES = ("optim", "schedule", "unlearning", "training", "losses", "kv_cache")


def methods_of_trainer(trainer: Trainer) -> list[str]:
    """Names of the methods that take part in a run, the one that shapes it most first."""
    args, found = trainer.args, []
    model = trainer.accelerator.unwrap_model(trainer.model)
    parts = [vars(trainer).get("objective"), *type(trainer).__mro__, model, vars(model).get("options")]
    parts += [trainer.compute_loss_func, *trainer.callback_handler.callbacks, *_optimizers(trainer)]
    for part in parts:
        found += _method_of(part)
    for value in (args.optim, args.lr_scheduler_type):
        found += [m.name for m in registry.methods() if m.family in ("optim", "schedule") and m.name == value]
    order = {"unlearning": 0, "kv_cache": 0, "training": 1, "losses": 1}
    names = dict.fromkeys(name for name in found if registry.get(name).family in _ROLES)
    return sorted(names, key=lambda name: order.get(registry.get(name).family, 2))


def _method_of(part: Any) -> list[str]:
    """The method in whose file the class of an object, or a function, is written."""
    if part is None:
        return []
    owner = part if inspect.isclass(part) or inspect.isfunction(part) else type(part)
    method = vars(sys.modules.get(owner.__module__, object)).get("METHOD")
    return [method.name] if isinstance(method, registry.Method) else []


def _optimizers(trainer: Trainer) -> Iterator[Any]:
    """The optimizer, and those it wraps."""
    optimizer, seen = trainer.optimizer, set()
    while optimizer is not None and id(optimizer) not in seen:
        seen.add(id(optimizer))
        yield optimizer
        optimizer = vars(optimizer).get("optimizer") or vars(optimizer).get("base")


def settings_of(trainer: Trainer) -> dict[str, Any]:
    """The arguments that made the weights, as JSON types."""
    return training_settings(trainer.args.to_dict())


def results_of_trainer(trainer: Trainer, dataset: str | None = None, prefix: str = "eval_") -> list[dict[str, Any]]:
    """The numbers of the last evaluation; times and counters are none."""
    from .. import recipe

    logs = trainer.state.log_history
    last = next((x for x in reversed(logs) if any(key.startswith(prefix) for key in x)), {})
    clock = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
    here = recipe.machine()
    machine = ", ".join(x for x in (here.get("gpu"), here.get("cpu"), f"{here['cores']} cores") if x)
    setting = f"step {last.get('step')}, seed {trainer.args.seed}"
    return [
        {
            "metric": key.removeprefix(prefix).replace("_", " "),
            "value": value,
            "dataset": dataset or "evaluation rows of the run",
            "setting": setting,
            "machine": machine,
        }
        for key, value in last.items()
        if key.startswith(prefix)
        and not key.endswith(clock)
        and not isinstance(value, bool)
        and isinstance(value, int | float)
        and is_finite(value)
    ]


def _made(trainer: Trainer, folder: Path, methods: list[str], token: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Record and card of the folder of a saved model; what the user gave to `push_to_hub` goes first."""
    model, dataset = trainer.accelerator.unwrap_model(trainer.model), given.get("dataset")
    about = {
        "base_model": given.get("finetuned_from"),
        "relation": "finetune" if given.get("finetuned_from") else None,
        "config": settings_of(trainer),
        "results": results_of_trainer(trainer, dataset if isinstance(dataset, str) else ", ".join(dataset or ())),
    }
    unused = sorted(set(given) - {"finetuned_from", "dataset", "license", "model_name"})
    if unused:
        logger.warning(f"{', '.join(unused)} of push_to_hub: the card of hfext does not say this. Add it to the card.")
    named = list(dict.fromkeys([*methods, *methods_of(folder)]))
    # What an earlier push of this run wrote is made anew; a card that somebody else wrote stays.
    with _hidden(folder / RECORD), _hidden(folder / "README.md", only=OURS):
        origin = origin_of(vars(model).get("base") or model)
        return made_for(folder, trainer.hub_model_id, named, about, given.get("license"), origin, token)


@contextlib.contextmanager
def _hidden(path: Path, only: bytes = b"") -> Iterator[None]:
    """A file of a folder, if it holds `only`, is out of the way inside."""
    content = path.read_bytes() if path.is_file() else None
    content = content if content is not None and only in content else None
    if content is not None:
        path.unlink()
    try:
        yield
    finally:
        if content is not None:
            path.write_bytes(content)


def _push(original: Callable) -> Callable:
    def push_to_hub(
        self, commit_message="End of training", blocking=True, token=None, revision=None, private=None, **kwargs
    ):
        methods = methods_of_trainer(self)
        if not methods:
            return original(self, commit_message, blocking, token, revision, private, **kwargs)
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = self.args.hub_token if token is None else token
        private = self.args.hub_private_repo if private is None else private
        if self.hub_model_id is None:
            try:
                self.init_hf_repo(token=token, private=private)
            except hub_failures() as error:
                raise OSError(f"The repository was not made: {reason(error)} Call push_to_hub again.") from error
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        folder = Path(self.args.output_dir)
        made = _made(self, folder, methods, token, kwargs)
        for name in (RECORD, "README.md"):
            if isinstance(made.get(name), str):
                (folder / name).write_text(made[name], encoding="utf-8")
        wait_for_pushes(self)
        call = (folder, made, self.hub_model_id, commit_message, private, revision or self.args.hub_revision)
        if blocking:
            return publish(*call, token=token, ignore_patterns=HOME)
        return _api().run_as_future(publish, *call, token=token, ignore_patterns=HOME)

    return push_to_hub


def _checkpoint(original: Callable) -> Callable:
    def push_from_checkpoint(self, checkpoint_folder):
        methods = methods_of_trainer(self)
        if not methods:
            return original(self, checkpoint_folder)
        args = self.args
        if not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return None
        busy = not pushes_of(self).is_done()
        if busy and not args.hub_always_push:
            return None
        self.callback_handler.on_push_begin(args, self.state, self.control)
        # The Trainer may delete the checkpoint while it is sent.
        staged = Path(tempfile.mkdtemp(prefix="_hub-", dir=args.output_dir))
        try:
            added = _stage(self, Path(checkpoint_folder), staged, methods)
        except (OSError, ValueError) as error:
            shutil.rmtree(staged, ignore_errors=True)
            logger.warning(f"A checkpoint was not published: {error}")
            return None
        steps = args.save_strategy == SaveStrategy.STEPS
        where = f"step {self.state.global_step}" if steps else f"epoch {int(self.state.epoch)}"
        job = _api().run_as_future(
            _send, staged, added, self.hub_model_id, f"Training in progress, {where}", args.hub_private_repo,
            args.hub_revision, args.hub_token,
        )  # fmt: skip
        pushes_of(self).jobs.append(job)
        return None

    return push_from_checkpoint


def _stage(trainer: Trainer, checkpoint: Path, staged: Path, methods: list[str]) -> dict[str, Any]:
    """The files of the model, hard links where that is possible, and what goes with them into the commit."""
    model = staged / "model"
    model.mkdir()
    for name, path in files_of(checkpoint).items():
        _link(path, model / name)
    if trainer.processing_class is not None:
        trainer.processing_class.save_pretrained(model)
    card = Path(trainer.args.output_dir) / "README.md"
    if card.is_file() and own_card(card.parent) and OURS not in card.read_bytes():
        shutil.copy2(card, model / "README.md")
    added = _made(trainer, model, methods, trainer.args.hub_token, {})
    kept = {HubStrategy.CHECKPOINT: "last-checkpoint", HubStrategy.ALL_CHECKPOINTS: checkpoint.name}
    if trainer.args.hub_strategy in kept:
        for path in sorted(checkpoint.rglob("*")):
            name = path.relative_to(checkpoint).as_posix()
            if path.is_file() and name not in ALWAYS_HOME:
                _link(path, staged / "state" / name)
                added[f"{kept[trainer.args.hub_strategy]}/{name}"] = staged / "state" / name
    return added


def _link(path: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(path, target)
    except OSError:
        shutil.copy2(path, target)


def _send(staged: Path, added: dict, repo_id: str, message: str, private: Any, revision: Any, token: Any) -> Any:
    """In the background: a failure must not end the training, and is said."""
    try:
        return publish(staged / "model", added, repo_id, message, private, revision, token=token)
    except (OSError, ValueError) as error:
        logger.warning(f"A checkpoint was not published: {error}")
        return None
    finally:
        shutil.rmtree(staged, ignore_errors=True)


_HUB: list[Any] = []


def _api() -> Any:
    """One queue for all pushes of this process, so that they arrive in order."""
    from huggingface_hub import HfApi

    if not _HUB:
        _HUB.append(HfApi())
    return _HUB[0]


def install() -> None:
    """Let the Trainer publish runs with our methods; idempotent."""
    patch_method(Trainer, "push_to_hub", _push)
    patch_method(Trainer, "_push_from_checkpoint", _checkpoint)


__all__ = ["install", "methods_of_trainer", "results_of_trainer", "settings_of"]
