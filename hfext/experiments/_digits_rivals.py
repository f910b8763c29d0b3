"""The rivals on noisy digits: what an entry such as `sam(rho=0.1)` is in the Trainer, and what is seen of its run."""

import re
import time
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from .. import registry
from .._fields import parse
from ..training import MESAConfig, MESATrainer, SAFConfig, SAFTrainer
from ._digits import Digits, accuracy

PLAIN = ("sgd", "adamw")
SURROGATES = {"bisam_tanh": "surrogate=tanh", "bisam_log": "surrogate=log"}
MIXINS = {"saf": (SAFTrainer, SAFConfig), "mesa": (MESATrainer, MESAConfig)}


def parse_entry(entry: str) -> tuple[str, dict[str, Any]]:
    """`sam(rho=0.1)` to `("sam", {"rho": 0.1})`."""
    match = re.fullmatch(r"\s*([a-z_0-9]+)\s*(?:\((.*)\))?\s*", entry)
    if match is None:
        raise ValueError(f"methods: {entry!r} is not of the form name or name(option=value, ...).")
    name, text = match.groups()
    two_pass = [m.name for m in registry.methods("optim")]
    known = [*PLAIN, *SURROGATES, *MIXINS, *two_pass]
    if name not in known:
        raise ValueError(f"methods: no method is called {name!r}. {registry.suggest(name, known)}")
    options = {}
    for part in filter(None, (text or "").split(",")):
        key, equals, value = (x.strip() for x in part.partition("="))
        if not equals or key in options:
            raise ValueError(f"methods: {part.strip()!r} in {entry!r} must be option=value, each option once.")
        options[key] = parse(value)
    return name, options


def make_trainer(
    config: Any, entry: str, model: nn.Module, train: Digits, folder: str, seed: int, **kwargs
) -> Trainer:
    """The Trainer of one entry, with the settings of the experiment's `config`; only what the entry is differs."""
    name, options = parse_entry(entry)
    learning_rate = options.pop("lr", config.learning_rate)
    cls, text = Trainer, ""
    base = f"momentum={config.momentum}"
    if name in MIXINS:
        cls, kind = MIXINS[name]
        kwargs[name] = kind(**options)
        optim, text = "sgd", base
    elif name in PLAIN:
        optim, text = ("sgd", base) if name == "sgd" else ("adamw_torch", "")
    else:
        optim = "bisam" if name in SURROGATES else name
        pairs = [f"{k}={v}" for k, v in options.items()]
        text = ",".join(filter(None, [SURROGATES.get(name), *pairs, "base=sgd", f"base.{base}"]))
    args = TrainingArguments(
        folder,
        optim=optim,
        optim_args=text or None,
        learning_rate=learning_rate,
        weight_decay=config.weight_decay,
        lr_scheduler_type=config.schedule,
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.batch_size,
        max_grad_norm=0.0,
        seed=seed,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        use_cpu=True,
    )
    trainer = cls(model, args, train_dataset=train, **kwargs)
    trainer.remove_callback(PrinterCallback)
    return trainer


class Observer(TrainerCallback):
    """CPU seconds and clean test accuracy of each epoch, and weights after some."""

    def __init__(self, test: Digits, keep: list[int]):
        self.test, self.keep = test, keep
        self.seconds, self.accuracy, self.weights = [], [], {}

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.start = time.process_time()

    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        self.seconds.append(time.process_time() - self.start)
        self.accuracy.append(accuracy(model, self.test))
        if len(self.accuracy) in self.keep:
            self.weights[len(self.accuracy)] = {k: v.clone() for k, v in model.state_dict().items()}
