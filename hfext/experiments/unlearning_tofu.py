"""Every unlearning objective on ten authors of TOFU: who keeps what is to be kept among those that really forget.

A small Llama learns ten authors by heart, the objectives make it forget two of them, each at several learning rates
and over several seeds, and `hfext.unlearning.evaluate` compares with a model that was trained without the two.

Methods are compared at matched forgetting: a run ends at the first pass over the forget rows after which the forget
quality is at least `least_quality`, as MUSE ends at the first pass that forgets as much as retraining. Of a method's
rates in a seed those that came so far compete, and the one of the highest retain utility counts; in a seed without any
the method did not forget. Without that end methods without a bound run past the retrained model, whose rows are not
less likely than those of a model that never saw them. A relearning attack stands beside it. Utility is that of the
retain rows alone (probability, ROUGE, truth ratio): a model of this size knows nothing of the world.
"""

import copy
import re
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback
from transformers.utils import logging

from .. import registry
from ..unlearning import UnlearningConfig, UnlearningTrainer
from ..unlearning._evaluate import evaluate
from ..unlearning.relearning import relearning
from ._plots import lines
from ._quiet_trainer import Bar
from ._tofu import Sets, target_and_gold, ten_authors, tofu_folder, tokenizer_of
from .kv_quality import kept

logger = logging.get_logger(__name__)

# The method and its two main rivals are tried at three rates, the others at two.
THREE, TWO = (2.5e-4, 5e-4, 1e-3), (5e-4, 1e-3)
# Objective, its options, and learning rates.
ENTRIES: dict[str, tuple[str, dict[str, Any], Sequence[float]]] = {
    "ngdiff": ("ngdiff", {}, THREE),
    "ngdiff, fixed rate": ("ngdiff", {"auto_lr": False}, TWO),
    "loss_norm": ("loss_norm", {}, TWO),
    "grad_ascent": ("grad_ascent", {}, (2.5e-4, 5e-4)),
    "grad_diff": ("grad_diff", {}, THREE),
    "kl_min": ("kl_min", {}, TWO),
    "idk": ("idk", {}, (1e-3, 2e-3)),
    "dpo": ("dpo", {}, (1e-3, 2e-3)),
    "npo": ("npo", {}, THREE),
    "npo, no retain": ("npo", {"retain": "none"}, TWO),
    "simnpo": ("simnpo", {}, TWO),
    # The paper's alpha of 1200 is for states of length 100 and more; here they are of length 10.
    "rmu": ("rmu", {"layer": 1, "c": 6.5, "alpha": 10.0, "parameters": r"layers\.[01]\."}, (1e-3, 4e-3)),
    "l1_sparse": ("l1_sparse", {"gamma": 1e-4}, (2e-3, 4e-3)),
    # Negated when training ends, so that the end is not found on the way.
    "task_vector": ("task_vector", {"alpha": 1.0}, (1e-3, 4e-3)),
}
COLUMNS = {
    "passes": "passes",
    "forget probability": "forget_probability",
    "forget ROUGE": "forget_rouge",
    "forget quality": "forget_quality",
    "retain utility": "retain_utility",
    "PrivLeak": "privleak",
    "extraction strength": "extraction_strength",
}


@dataclass(kw_only=True)
class Config:
    """
    Args:
        methods: Keys of `ENTRIES`.
        method: The record that the run is evidence for, if any; its rows are compared with those of `baseline`.
        ours, baseline: Keys of `ENTRIES`.
        seeds: Models, each with its own training of target and gold.
        epochs: Most passes over the 40 forget rows.
        batch_size: Pairs of an update.
        least_quality: Forget quality at which a run ends, and from which a setting counts as forgetting.
        relearn_steps: Updates of the attack at which it is measured.
        data_dir: Folder that holds `tofu`; the shared data by default.
    """

    methods: list[str] = field(default_factory=lambda: list(ENTRIES))
    method: str | None = None
    ours: str = "ngdiff"
    baseline: str = "grad_diff"
    seeds: int = 5
    epochs: int = 8
    batch_size: int = 8
    least_quality: float = 0.05
    relearn_steps: tuple[int, ...] = (0, 5, 10, 20)
    data_dir: str | None = None

    def __post_init__(self):
        for name in (*self.methods, self.ours, self.baseline):
            if name not in ENTRIES:
                raise ValueError(f"methods: there is no {name!r}. {registry.suggest(name, ENTRIES)}")
        for name in ("seeds", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)} but must be >= 1.")
        if not 0 <= self.least_quality <= 1:
            raise ValueError(f"least_quality is {self.least_quality} but must be in [0, 1].")


class UntilForgotten(TrainerCallback):
    """Ends a run at the first evaluation with a forget quality of at least `least`; notes how many there were."""

    def __init__(self, least: float):
        self.least, self.passes = least, 0

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.passes += 1
        if metrics["eval_forget_quality"] >= self.least:
            control.should_training_stop = True


def unlearned(
    target: PreTrainedModel,
    of_gold: Any,
    tokenizer: Any,
    sets: Sets,
    entry: str,
    rate: float,
    config: Config,
    seed: int,
) -> tuple[PreTrainedModel, int]:
    """A copy of the target after one objective at one rate, and the passes that it took."""
    objective, options, _ = ENTRIES[entry]
    until = UntilForgotten(config.least_quality)

    def forgetting(model, processing_class):
        found = evaluate(model, processing_class, forget=sets.forget, gold=of_gold, batch_size=40, generate=False)
        return {"forget_quality": found["forget_quality"]}

    with tempfile.TemporaryDirectory() as folder:
        args = UnlearningConfig(
            folder,
            objective=objective,
            objective_args=options,
            anchor="forget" if objective != "l1_sparse" else None,
            num_train_epochs=config.epochs if objective != "l1_sparse" else config.epochs / 4,
            per_device_train_batch_size=config.batch_size,
            per_device_eval_batch_size=40,
            learning_rate=rate,
            lr_scheduler_type="constant",
            weight_decay=0.01,
            optim="adamw_torch",
            seed=seed,
            logging_strategy="steps",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        trainer = UnlearningTrainer(
            copy.deepcopy(target), args, sets.forget, sets.retain, processing_class=tokenizer,
            callbacks=[Bar(f"{entry} {rate:g}, seed {seed}"), until], evaluators=[forgetting],
        )  # fmt: skip
        # Not by eval_strategy, which would evaluate the loss of retain rows too.
        trainer.add_callback(EvaluateEachPass(trainer))
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return trainer.model.eval(), until.passes


class EvaluateEachPass(TrainerCallback):
    """Asks a Trainer's evaluators at the end of each epoch."""

    def __init__(self, trainer: UnlearningTrainer):
        self.trainer = trainer

    def on_epoch_end(self, args, state, control, **kwargs):
        self.trainer.evaluate()
        return self.trainer.control


def measured(model: PreTrainedModel, tokenizer: Any, sets: Sets, gold: Any) -> dict[str, Any]:
    """What `evaluate` says, without the rows."""
    found = evaluate(
        model, tokenizer, forget=sets.forget, retain=sets.retain, holdout=sets.holdout, gold=gold, batch_size=40
    )
    return {name: value for name, value in found.items() if isinstance(value, int | float)}


def run(config: Config, out: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    folder = tofu_folder(config.data_dir)
    tokenizer, sets = tokenizer_of(folder), ten_authors(folder)
    results: dict[tuple[str, float, int], dict[str, Any]] = {}
    bounds: list[dict[str, dict[str, Any]]] = []
    for seed in range(config.seeds):
        ends, found = of_seed(config, out, tokenizer, sets, seed)
        bounds.append(ends)
        results |= {(entry, rate, seed): result for (entry, rate), result in found.items()}
    tables, chosen = summary(results, bounds, config)
    plots(results, bounds, chosen, config, out)
    found = {"tables": tables, "artifacts": ["utility.png", "relearning.png"]}
    if config.method is not None:
        found["evidence"] = evidence(config, chosen)
    return found


def of_seed(config: Config, out: Path, tokenizer: Any, sets: Sets, seed: int) -> tuple[dict, dict]:
    """What the target and the gold model score, and the result of each setting; finished runs are read again."""
    target, gold = target_and_gold(out / "models", tokenizer, sets, seed)
    settings = {k: v for k, v in asdict(config).items() if k in ("epochs", "batch_size", "least_quality")}
    attacks = {"relearn_steps": list(config.relearn_steps)}

    def of_gold() -> dict[str, Any]:
        about = dict(forget=sets.forget, retain=sets.retain, holdout=sets.holdout, batch_size=40)
        return {**evaluate(gold, tokenizer, **about), "relearning": relearnt(gold, tokenizer, sets, config, seed)}

    never = kept(out / "runs" / f"gold-{seed}.json", attacks, of_gold)
    ends = {"gold": {k: v for k, v in never.items() if isinstance(v, int | float)}}
    ends["gold"] |= {"forget_quality": 1.0, "privleak": 0.0, "relearning": never["relearning"]}
    path = out / "runs" / f"target-{seed}.json"
    ends["target"] = kept(path, {}, lambda: measured(target, tokenizer, sets, never))
    found = {}
    for entry in config.methods:
        for rate in ENTRIES[entry][2]:
            about = {**settings, **attacks, "entry": [ENTRIES[entry][0], ENTRIES[entry][1]], "rate": rate}
            path = out / "runs" / f"{re.sub('[, ]+', '_', entry)}-{rate:g}-{seed}.json"

            def made(entry: str = entry, rate: float = rate) -> dict[str, Any]:
                return one_run(target, never, tokenizer, sets, entry, rate, config, seed)

            found[entry, rate] = kept(path, about, made)
    return ends, found


def one_run(target, of_gold, tokenizer, sets, entry, rate, config, seed) -> dict[str, Any]:
    """Numbers of one setting, with the curve of its relearning; a run that diverged says so."""
    try:
        model, passes = unlearned(target, of_gold, tokenizer, sets, entry, rate, config, seed)
    except RuntimeError as error:
        if "The loss is" not in str(error):
            raise
        return {"diverged": True}
    found = {"passes": passes, **measured(model, tokenizer, sets, of_gold)}
    if found["forget_quality"] < config.least_quality:
        return found  # does not compete, so that its relearning says nothing
    return {**found, "relearning": relearnt(model, tokenizer, sets, config, seed)}


def relearnt(model, tokenizer, sets, config, seed) -> list[float]:
    """The curve of the attack, which is the same for all models of a seed."""
    options = dict(steps=config.relearn_steps, learning_rate=5e-4, seed=seed)
    return relearning(model, sets.forget, tokenizer, **options)["unlearned"]


def competing(results, entry: str, seed: int, config: Config) -> dict[str, Any] | None:
    """The setting of a method that counts in a seed; None where it did not forget."""
    settings = [{**r, "rate": rate} for (e, rate, s), r in results.items() if (e, s) == (entry, seed)]
    forgot = [r for r in settings if r.get("forget_quality", 0) >= config.least_quality]
    return max(forgot, key=lambda r: r["retain_utility"]) if forgot else None


def summary(results, bounds, config: Config) -> tuple[dict[str, list[dict]], dict[str, list[dict | None]]]:
    """The table of methods at matched forgetting, that of every rate, and what was chosen."""

    def row(name: str, runs: Sequence[dict], note: dict[str, Any]) -> dict[str, Any]:
        cells = {"method": name, **note}
        for title, key in COLUMNS.items():
            values = [r[key] for r in runs if key in r]
            cells[title] = mean(values) if values else None
            if key == "retain_utility":
                cells["sd"] = stdev(values) if len(values) > 1 else None
        curves = [r["relearning"][-1] for r in runs if "relearning" in r]
        cells[f"relearnt after {config.relearn_steps[-1]} steps"] = mean(curves) if curves else None
        return cells

    chosen = {e: [competing(results, e, s, config) for s in range(config.seeds)] for e in config.methods}
    first = [
        row("before unlearning", [b["target"] for b in bounds], {"forgot in": None}),
        row("trained without the rows", [b["gold"] for b in bounds], {"forgot in": None}),
    ]
    rows = [
        row(e, [r for r in runs if r], {"forgot in": f"{sum(r is not None for r in runs)} of {config.seeds}"})
        for e, runs in chosen.items()
    ]
    rows.sort(key=lambda r: -(r["retain utility"] or 0))
    every = [
        row(e, [r for (m, x, _), r in results.items() if (m, x) == (e, rate)], {"rate": rate})
        for e in config.methods
        for rate in ENTRIES[e][2]
    ]
    title = f"at the first pass with a forget quality of {config.least_quality}, the rate of highest utility, means"
    return {title: first + rows, "every rate, means of the seeds": every}, chosen


def plots(results, bounds, chosen, config: Config, out: Path) -> None:
    """Forgetting against utility, one point for each method and rate; and the curves of relearning."""
    points = {}
    for e in config.methods:
        runs = [[r for (m, x, _), r in results.items() if (m, x) == (e, rate)] for rate in ENTRIES[e][2]]
        runs = [[r for r in some if "retain_utility" in r] for some in runs]
        x = [mean(r["forget_probability"] for r in some) for some in runs if some]
        points[e] = (x, [mean(r["retain_utility"] for r in some) for some in runs if some], None)
    points["trained without the rows"] = (
        [mean(b["gold"]["forget_probability"] for b in bounds)],
        [mean(b["gold"]["retain_utility"] for b in bounds)],
        None,
    )
    lines(out / "utility.png", points, "probability of a forget answer", "retain utility",
          "one point a learning rate", logx=True)  # fmt: skip
    curves = {}
    steps = list(config.relearn_steps)
    for e, runs in chosen.items():
        found = [r["relearning"] for r in runs if r]
        if found:
            curves[e] = (steps, [mean(values) for values in zip(*found, strict=True)], None)
    gold = [b["gold"]["relearning"] for b in bounds]
    curves["trained without the rows"] = (steps, [mean(values) for values in zip(*gold, strict=True)], None)
    lines(out / "relearning.png", curves, "updates on 8 forget rows", "probability of the other 32 answers",
          "relearning after unlearning")  # fmt: skip


def evidence(config: Config, chosen: dict[str, list[dict | None]]) -> dict[str, Any]:
    """The method's utility at matched forgetting against the baseline's; a seed without forgetting counts as 0."""
    method = registry.get(config.method)
    utility = {e: [0.0 if r is None else r["retain_utility"] for r in runs] for e, runs in chosen.items()}
    ours, theirs = utility[config.ours], utility[config.baseline]
    wins = sum(a > b for a, b in zip(ours, theirs, strict=True))
    forgot = {e: sum(r is not None for r in chosen[e]) for e in chosen}
    best = max((e for e in chosen if e != config.ours), key=lambda e: mean(utility[e]))
    return {
        "claim": method.claim,
        "paper": f"{method.headline.metric}: {method.headline.value} ({method.headline.setting})",
        "metric": "retain utility at matched forgetting (0 where no rate forgot)",
        "setting": f"ten authors of TOFU, Llama of 0.56 M parameters, forget quality >= {config.least_quality}",
        "method": config.ours,
        "ours": mean(ours),
        "ours_sd": stdev(ours) if len(ours) > 1 else None,
        "n": len(ours),
        "baseline_name": config.baseline,
        "baseline": mean(theirs),
        "baseline_sd": stdev(theirs) if len(theirs) > 1 else None,
        "reproduced": wins > len(ours) / 2 and mean(ours) > mean(theirs),
        "note": f"Higher in {wins} of {len(ours)} seeds; forgot in {forgot[config.ours]}, the baseline in "
        f"{forgot[config.baseline]}. The best other method here is {best}.",
    }
