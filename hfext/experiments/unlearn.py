"""Unlearning with your own model and rows: any objective, the evaluation before and after, and a saved model with its
card.

Rows are JSON or JSON lines, in any form that `UnlearningTrainer` takes; without files the ten authors of TOFU that the
comparison of methods uses stand in, with the small model that learnt them.
"""

import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback

from .. import hub
from ..unlearning import UnlearningConfig, UnlearningTrainer
from ..unlearning._evaluate import evaluate
from ..unlearning._objective import objective as named
from ._quiet_trainer import Bar
from ._tofu import target_and_gold, ten_authors, tofu_folder, tokenizer_of


@dataclass(kw_only=True)
class Config:
    """
    Args:
        model: Folder or id of a causal language model with its tokenizer, or folder of a LoRA adapter, which is
            trained on; by default the small TOFU model.
        lora: Rank of a new adapter on all linear layers, which is trained in place of the weights; 0 for none.
        gold: The same of a model that never saw the forget rows, for forget quality and PrivLeak.
        forget, retain, holdout: Files of rows.
        objective, objective_args: As in `UnlearningConfig`.
        learning_rate, epochs, batch_size, optim, seed: Of the training.
        data_dir: Folder that holds `tofu`, where no files are given.
    """

    model: str | None = None
    lora: int = 0
    gold: str | None = None
    forget: str | None = None
    retain: str | None = None
    holdout: str | None = None
    objective: str = "ngdiff"
    objective_args: dict[str, Any] = field(default_factory=dict)
    learning_rate: float = 2.5e-4
    epochs: int = 8
    batch_size: int = 8
    optim: str = "adamw_torch"
    seed: int = 0
    data_dir: str | None = None

    def __post_init__(self):
        named(self.objective, self.objective_args)
        if self.lora < 0:
            raise ValueError(f"lora is {self.lora} but must be >= 0.")
        if (
            self.model is not None
            and self.retain is None
            and "retain" in named(self.objective, self.objective_args).needs
        ):
            raise ValueError(f"{self.objective} needs rows to keep: give --retain FILE.")
        if (self.model is None) != (self.forget is None):
            raise ValueError("model and forget go together: give both, or neither for the ten authors of TOFU.")
        for name in ("forget", "retain", "holdout"):
            path = getattr(self, name)
            if path is not None and not Path(path).is_file():
                raise ValueError(f"{name} is {path!r}, which is no file.")


def rows_of(path: str | None) -> list[dict[str, Any]] | None:
    """A JSON array, or one JSON object a line."""
    if path is None:
        return None
    text = Path(path).read_text(encoding="utf-8")
    return (
        json.loads(text) if text.lstrip().startswith("[") else [json.loads(x) for x in text.splitlines() if x.strip()]
    )


def model_of(path: str) -> Any:
    """A model, or one with the adapter of a folder, to be trained."""
    if Path(path, "adapter_config.json").is_file():
        from peft import AutoPeftModelForCausalLM

        return AutoPeftModelForCausalLM.from_pretrained(path, is_trainable=True)
    return AutoModelForCausalLM.from_pretrained(path)


def run(config: Config, out: Path) -> dict[str, Any]:
    if config.model is None:
        torch.set_num_threads(1)
        folder = tofu_folder(config.data_dir)
        tokenizer, sets = tokenizer_of(folder), ten_authors(folder)
        model, gold = target_and_gold(out / "models", tokenizer, sets, config.seed)
        forget, retain, holdout = sets.forget, sets.retain, sets.holdout
    else:
        tokenizer = AutoTokenizer.from_pretrained(config.model)
        model = model_of(config.model)
        gold = None if config.gold is None else AutoModelForCausalLM.from_pretrained(config.gold)
        forget, retain, holdout = rows_of(config.forget), rows_of(config.retain), rows_of(config.holdout)
    if config.lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=config.lora, target_modules="all-linear", task_type="CAUSAL_LM"))
    about = dict(forget=forget, retain=retain, holdout=holdout)
    of_gold = None if gold is None else evaluate(gold, tokenizer, **about)
    before = evaluate(model, tokenizer, gold=of_gold, **about)
    with tempfile.TemporaryDirectory() as folder:
        args = UnlearningConfig(
            folder,
            objective=config.objective,
            objective_args=config.objective_args,
            learning_rate=config.learning_rate,
            lr_scheduler_type="constant",
            num_train_epochs=config.epochs,
            per_device_train_batch_size=config.batch_size,
            optim=config.optim,
            seed=config.seed,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_steps=1,
        )
        trainer = UnlearningTrainer(
            model, args, forget, retain, processing_class=tokenizer, callbacks=[Bar(config.objective)]
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    after = evaluate(model, tokenizer, gold=of_gold, **about)
    saved = out / "unlearned"
    model.save_pretrained(saved)
    tokenizer.save_pretrained(saved)
    names = [name for name, value in after.items() if isinstance(value, int | float)]
    results = [{"metric": name, "value": float(after[name]), "dataset": "forget and retain rows"} for name in names]
    settings = {
        k: getattr(config, k) for k in ("objective", "objective_args", "learning_rate", "epochs", "batch_size")
    }
    hub.save_record(saved, [config.objective], config=settings, results=results)
    hub.model_card(saved).save(saved / "README.md")
    columns = {"before": before, "after": after, **({} if of_gold is None else {"gold": of_gold})}
    table = [{"metric": name, **{column: seen.get(name) for column, seen in columns.items()}} for name in names]
    missing = [{"metric": name, "why": why} for name, why in after["missing"].items()]
    tables = {f"{config.objective}: before and after": table}
    return {"tables": {**tables, **({"not measured": missing} if missing else {})}, "artifacts": ["unlearned"]}
