"""Relearning attack: how fast a little training brings back what was unlearned.

    a copy is fine-tuned on some of the forget rows (or on harmless ones), and measured on forget rows it was not shown
    recovery(t) = (m_t - m_0) / (m_target - m_0)      m the measure, m_0 before the attack, m_target before unlearning

A model that never learnt the rows (gold) relearns them too, more slowly: only the distance between the two curves says
whether something was left.

Language Model Unalignment: Parametric Red-Teaming to Expose Hidden Harms and Biases, arXiv 2310.14303, with made-up
facts in place of harmful text: a measure of robustness.
"""

import copy
import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from ..metrics._membership import loss
from ..metrics._token_scores import score_rows
from ..optim._passes import rng_state, set_rng_state
from ..registry import Method, Result
from ._data import TEMPLATE, collate, token_row
from ._objective import check


@dataclass(frozen=True, kw_only=True)
class RelearningConfig:
    """Options of [`relearning`].

    Args:
        share: Share of the forget rows that the attacker has, in (0, 1).
        steps: Numbers of updates after which the copy is measured, rising from 0.
        learning_rate: Constant, > 0.
        batch_size: Rows of an update, >= 1.
        optim: An optimizer of the Trainer.
        seed: Of the choice of rows and of the batches.
    """

    share: float = 0.2
    steps: tuple[int, ...] = (0, 5, 10, 20, 50)
    learning_rate: float = 1e-4
    batch_size: int = 8
    optim: str = "adamw_torch"
    seed: int = 0

    def __post_init__(self):
        check(self, "share", 0 < self.share < 1, "in (0, 1)")
        rising = list(self.steps) == sorted(set(self.steps)) and self.steps and self.steps[0] == 0
        check(self, "steps", bool(rising), "rising from 0")
        check(self, "learning_rate", self.learning_rate > 0, "> 0")
        check(self, "batch_size", self.batch_size >= 1, ">= 1")


def recovery(values: Sequence[float], target: float) -> list[float]:
    """(m_t - m_0) / (m_target - m_0) of each value; NaN where nothing was lost."""
    lost = target - values[0]
    return [(v - values[0]) / lost if lost else float("nan") for v in values]


def steps_to(share: float, steps: Sequence[int], recovered: Sequence[float]) -> int | None:
    """The first of the steps at which so much is recovered; None if it never is."""
    return next((n for n, r in zip(steps, recovered, strict=True) if r >= share), None)


def mean_probability(model: nn.Module, rows: Sequence[Mapping], batch_size: int = 8) -> float:
    """Mean over rows of exp(-mean token loss)."""
    return float((-loss(score_rows(model, rows, batch_size).log_p)).exp().mean())


def attack(
    model: nn.Module, rows: Sequence[Mapping], config: RelearningConfig, measure: Callable[[nn.Module], float]
) -> list[float]:
    """`measure` of a copy of `model` after each of the steps of fine-tuning it on tokenised rows.

    The model and all random generators are left as they were.
    """
    before = rng_state()
    found: list[float] = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step in config.steps:
                found.append(measure(model))
                model.train()

    try:
        copied = copy.deepcopy(model)
        if not any(p.requires_grad for p in copied.parameters()):
            copied.requires_grad_(True)
        found.append(measure(copied))
        if config.steps[-1] == 0:
            return found
        with tempfile.TemporaryDirectory() as folder:
            args = TrainingArguments(
                folder,
                max_steps=config.steps[-1],
                per_device_train_batch_size=config.batch_size,
                learning_rate=config.learning_rate,
                lr_scheduler_type="constant",
                optim=config.optim,
                seed=config.seed,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                logging_strategy="no",
                use_cpu=next(model.parameters()).device.type == "cpu",
                dataloader_pin_memory=False,
                remove_unused_columns=False,
            )
            trainer = Trainer(copied, args, collate, list(rows), callbacks=[Watch()])
            trainer.remove_callback(PrinterCallback)
            trainer.train()
    finally:
        set_rng_state(before)
    return found


def relearning(
    model: nn.Module,
    forget: Sequence[Mapping[str, Any]],
    processing_class: Any = None,
    *,
    gold: nn.Module | None = None,
    target: nn.Module | None = None,
    attack_rows: Sequence[Mapping[str, Any]] | None = None,
    template: str = TEMPLATE,
    **options: Any,
) -> dict[str, Any]:
    """Attack an unlearned model, and a retrained one in the same way.

    Args:
        model (`PreTrainedModel`): The unlearned model.
        forget: The forget rows, as for [`UnlearningTrainer`]. `share` of them are the attacker's, the rest is
        measured. processing_class (*optional*): Tokenizer for rows of text.
        gold (`PreTrainedModel`, *optional*): A model that never saw the forget rows.
        target (`PreTrainedModel`, *optional*): The model before unlearning, for recovery.
        attack_rows (*optional*): Other rows for the attacker, such as retain rows; all forget rows are measured then.
        **options: Fields of [`RelearningConfig`].

    Returns:
        `dict`: `steps`; `unlearned` and `gold`, the mean probability of an unseen forget answer after each;
        `recovered` and `steps_to_half` with `target`; `missing`, what was not computed and why.
    """
    config = RelearningConfig(**options)
    rows = [token_row(forget[i], processing_class, template) for i in range(len(forget))]
    order = random.Random(config.seed).sample(range(len(rows)), len(rows))
    shown = max(1, round(config.share * len(rows)))
    if attack_rows is None:
        if shown == len(rows):
            raise ValueError(f"share is {config.share}, which leaves none of the {len(rows)} forget rows to measure.")
        mine, unseen = [rows[i] for i in order[:shown]], [rows[i] for i in order[shown:]]
    else:
        mine = [token_row(attack_rows[i], processing_class, template) for i in range(len(attack_rows))]
        unseen = rows
    mine = [{key: row[key] for key in ("input_ids", "labels")} for row in mine]

    def measure(copied: nn.Module) -> float:
        return mean_probability(copied, unseen)

    found: dict[str, Any] = {"steps": list(config.steps), "missing": {}}
    found["unlearned"] = attack(model, mine, config, measure)
    if gold is None:
        found["missing"]["gold"] = "needs gold, without which the curve says little"
    else:
        found["gold"] = attack(gold, mine, config, measure)
    if target is None:
        found["missing"]["recovered"] = "needs target"
    else:
        found["target"] = measure(target)
        found["recovered"] = recovery(found["unlearned"], found["target"])
        found["steps_to_half"] = steps_to(0.5, config.steps, found["recovered"])
    return found


METHOD = Method(
    name="relearning",
    family="unlearning",
    title="Language Model Unalignment: Parametric Red-Teaming to Expose Hidden Harms and Biases",
    authors="Bhardwaj et al.",
    arxiv="2310.14303",
    year=2023,
    repo="declare-lab/red-instruct",
    status="variant",
    difference="An evaluation on made-up facts, against a retrained model; the paper attacks aligned models.",
    target="hfext.unlearning.relearning:relearning",
    config=RelearningConfig,
    usage="hfext.unlearning.relearning(model, forget_rows, tokenizer, gold=gold, target=before)",
    summary="Measures how fast a little fine-tuning brings unlearned rows back, beside a retrained model.",
    headline=Result(
        metric="attack success rate",
        setting="a commercial chat model, 100 examples of fine-tuning (abstract)",
        value="88 %",
    ),
    notes="A measure of other methods: its curves stand in recipes/unlearning/ngdiff-llama-tofu.yaml.",
)
