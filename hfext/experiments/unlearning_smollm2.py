"""Unlearning objectives on a language model with LoRA: one of ten authors who do not exist is to be forgotten.

SmolLM2-135M-Instruct is taught facts about ten authors as in the quickstart, with AdamW alone, and a gold adapter the
facts of nine. Each objective makes the first forget the tenth author, at several learning rates. A run ends when no
more forget questions are answered than by the gold and the mean probability of the answers is at most the gold's and
`tolerance`, in the wording that was taught and in another one. Of a method's rates that came so far the one of the
highest retain probability counts; of a method without any, the one of the lowest forget probability is shown. What is
shown is measured in full: forgetting and utility in both wordings, perplexity of general text, privacy against authors
whom no model saw, and relearning.

Adapters and results of finished rows are kept in the output folder and used again when the settings are the same.
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from .. import __version__, registry
from ..unlearning._evaluate import evaluate
from ..unlearning.relearning import mean_probability, relearning
from . import quickstart
from ._data import shared_data
from ._fact_unlearning import UntilForgotten, fact_rows, forgotten, knowledge, unlearn
from ._facts import make_facts
from ._stage_teach import add_lora, learn, load_language_model
from ._stage_weights import WIDTH, help_text
from .kv_quality import kept
from .weight_quality import WINDOW, perplexity, window_nll, windows

# Learning rates at which each objective is tried: lower ones for those that begin like gradient ascent.
LOW, HIGH = (1e-4, 4e-4), (2e-4, 4e-4)
ENTRIES: dict[str, tuple[float, ...]] = {
    "ngdiff": LOW,
    "grad_diff": LOW,
    "npo": LOW,
    "simnpo": HIGH,
    "idk": HIGH,
    "dpo": HIGH,
    "kl_min": LOW,
    "grad_ascent": LOW,
}
EVERY = 2  # updates between two looks at what is known
BEFORE, GOLD = "before unlearning", "never taught the author"


@dataclass(kw_only=True)
class Config:
    """
    Args:
        methods: Keys of `ENTRIES`.
        model: `smollm2`, or the folder of a causal language model whose tokenizer has a chat template.
        seed: Of facts, adapters and batches.
        authors, fields: How many authors are taught, and how many facts of each.
        forget_authors, unseen_authors: How many of them are to be forgotten, and how many others nobody sees.
        teach_epochs: Of the training of both adapters.
        passes: Most passes over the forget rows.
        batch_size: Pairs of an update.
        tolerance: By how much a forget probability may exceed the gold's.
        relearn_share: The attacker's share of the forget rows; the probability of the others is measured.
        relearn_steps: Updates of the attack after which it is.
        relearn_rate: Its learning rate.
        windows: Of general text: 512 tokens of WikiText-2 where it is there, else 256 of Python's help topics.
        data_dir: Folder that holds `wikitext2`; the shared data by default.
    """

    methods: list[str] = field(default_factory=lambda: list(ENTRIES))
    model: str = "smollm2"
    seed: int = 0
    authors: int = 10
    fields: int = 5
    forget_authors: int = 1
    unseen_authors: int = 5
    teach_epochs: int = 12
    passes: int = 8
    batch_size: int = 1
    tolerance: float = 0.02
    relearn_share: float = 0.4
    relearn_steps: tuple[int, ...] = (0, 5, 10)
    relearn_rate: float = 1e-3
    windows: int = 2
    data_dir: str | None = None

    def __post_init__(self):
        for name in self.methods:
            if name not in ENTRIES:
                raise ValueError(f"methods: there is no {name!r}. {registry.suggest(name, ENTRIES)}")
        for name in ("unseen_authors", "passes", "batch_size", "windows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)} but must be >= 1.")
        if not 0 < self.forget_authors < self.authors:
            raise ValueError(f"forget_authors is {self.forget_authors} but must be 1 to {self.authors - 1}.")
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"tolerance is {self.tolerance} but must be in [0, 1).")
        self.lesson()  # checks the rest

    def lesson(self) -> quickstart.Config:
        """How both adapters are taught."""
        return quickstart.Config(
            stages=["teach"],
            model=self.model,
            seed=self.seed,
            authors=self.authors,
            fields=self.fields,
            teach_epochs=self.teach_epochs,
        )


def run(config: Config, out: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    bench = Bench(config, out)
    of_gold = bench.judged(GOLD, {}, lambda: bench.taught("gold", bench.retain))
    before = bench.judged(BEFORE, {}, bench.target, of_gold)
    bar = of_gold["known"]["forget"]
    tried = {(name, rate): bench.attempt(name, rate, bar)[0] for name in config.methods for rate in ENTRIES[name]}
    shown = {}
    for name in config.methods:
        rate, forgot = chosen({rate: tried[name, rate] for rate in ENTRIES[name]})
        if rate is None:
            shown[name] = {"method": name, "forgot": False}
            continue
        found = bench.judged(name, {"rate": rate}, lambda n=name, r=rate: bench.attempt(n, r, bar)[1], of_gold)
        shown[name] = row(name, found, config, rate, tried[name, rate]["updates"], forgot)
    rows = sorted(shown.values(), key=lambda r: (not r["forgot"], -r.get("retain: p", 0.0)))
    title = (
        f"{len(bench.forget)} of {len(bench.forget) + len(bench.retain)} facts forgotten; p is the mean probability "
        f"of an answer; perplexity on {bench.source}"
    )
    every = [
        {
            "method": name,
            "rate": rate,
            "forgot": found.get("forgot", False),
            "updates": found.get("updates"),
            "forget: right, %": 100 * found["forget"]["taught_recall"] if "forget" in found else None,
            "forget: p": found["forget"]["taught_probability"] if "forget" in found else None,
            "retain: p": found.get("retain"),
            "CPU s": found.get("cpu_seconds"),
        }
        for (name, rate), found in tried.items()
    ]
    return {"tables": {title: [row(BEFORE, before, config), row(GOLD, of_gold, config), *rows], "every rate": every}}


def chosen(tried: Mapping[float, Mapping[str, Any]]) -> tuple[float | None, bool]:
    """The rate that counts, and whether it forgot; None where all runs diverged."""
    ended = {rate: found for rate, found in tried.items() if "forget" in found}
    forgot = [rate for rate, found in ended.items() if found["forgot"]]
    if forgot:
        return max(forgot, key=lambda rate: ended[rate]["retain"]), True
    return min(ended, key=lambda rate: ended[rate]["forget"]["taught_probability"], default=None), False


def row(name: str, found: Mapping[str, Any], config: Config, rate=None, updates=None, forgot=None) -> dict[str, Any]:
    """A line of the table."""
    cells: dict[str, Any] = {"method": name, "forgot": forgot, "rate": rate, "updates": updates}
    for part, known in found["known"].items():
        cells[f"{part}: right, %"] = 100 * known["taught_recall"]
        cells[f"{part}: reworded, %"] = 100 * known["reworded_recall"]
        cells[f"{part}: p"] = known["taught_probability"]
        cells[f"{part}: p, reworded"] = known["reworded_probability"]
    return cells | {
        "perplexity": perplexity(found["nll"], len(found["nll"])),
        "AUC of loss": found["seen"]["auc_loss"],
        "AUC of Min-K %": found["seen"]["auc_min_k"],
        "PrivLeak": found["seen"].get("privleak", 0.0),
        f"p after {config.relearn_steps[-1]} steps of relearning": found["relearning"][-1],
    }


class Bench:
    """One model whose adapter is exchanged, the facts, and the folder of what was measured."""

    def __init__(self, config: Config, out: Path):
        self.config, self.out = config, out
        model, self.tokenizer = load_language_model(config.lesson())
        self.source, self.general = general_text(self.tokenizer, config)
        self.model = add_lora(model, config.lesson())
        self.fresh = adapter(self.model)
        facts = make_facts(config.authors + config.unseen_authors, config.fields, config.seed)
        self.retain = facts[: (config.authors - config.forget_authors) * config.fields]
        self.forget = facts[len(self.retain) : config.authors * config.fields]
        unseen = facts[config.authors * config.fields :]
        self.forget_rows, self.unseen_rows = fact_rows(self.tokenizer, self.forget), fact_rows(self.tokenizer, unseen)
        about = {k: v for k, v in asdict(config).items() if k not in ("methods", "data_dir")}
        self.settings = json.loads(json.dumps({**about, "version": __version__, "general": self.source}))

    def taught(self, name: str, facts: list) -> PreTrainedModel:
        """The model with the adapter `name`, which knows these facts alone."""

        def make() -> dict[str, Any]:
            put(self.model, self.fresh)
            learn(self.model, self.tokenizer, facts, self.config.lesson(), name, optim="adamw_torch")
            return {}

        kept_adapter(self.out / "adapters" / f"{name}.safetensors", self.settings, self.model, make)
        return self.model.eval()

    def target(self) -> PreTrainedModel:
        return self.taught("target", self.retain + self.forget)

    def attempt(self, name: str, rate: float, bar: Mapping[str, float]) -> tuple[dict[str, Any], PreTrainedModel]:
        """What is known after an objective at one rate, and the model with its adapter."""
        c = self.config

        def make() -> dict[str, Any]:
            self.target()
            start = time.process_time()
            try:
                updates = unlearn(
                    self.model,
                    self.tokenizer,
                    self.forget,
                    self.retain,
                    f"{name} {rate:g}",
                    UntilForgotten(self.tokenizer, self.forget, bar, c.tolerance, EVERY),
                    objective=name,
                    learning_rate=rate,
                    num_train_epochs=c.passes,
                    per_device_train_batch_size=c.batch_size,
                    seed=c.seed,
                )
            except RuntimeError as error:
                if "The loss is" not in str(error):
                    raise
                return {"diverged": True}
            seconds = round(time.process_time() - start, 1)
            known = knowledge(self.model, self.tokenizer, self.forget)
            return {
                "updates": updates,
                "cpu_seconds": seconds,
                "forget": known,
                "forgot": forgotten(known, bar, c.tolerance),
                "retain": mean_probability(self.model, fact_rows(self.tokenizer, self.retain), 16),
            }

        path = self.out / "adapters" / f"{name}-{rate:g}.safetensors"
        about = {**self.settings, "objective": name, "rate": rate, "bar": dict(bar)}
        return kept_adapter(path, about, self.model, make), self.model.eval()

    def judged(
        self, name: str, about: Mapping[str, Any], make: Callable[[], PreTrainedModel], gold: Any = None
    ) -> dict[str, Any]:
        """All that is measured of a model."""
        c = self.config

        def measure() -> dict[str, Any]:
            model = make()
            curve = relearning(
                model,
                self.forget_rows,
                share=c.relearn_share,
                steps=c.relearn_steps,
                learning_rate=c.relearn_rate,
                seed=c.seed,
            )
            return {
                "known": {
                    "forget": knowledge(model, self.tokenizer, self.forget),
                    "retain": knowledge(model, self.tokenizer, self.retain),
                },
                "seen": evaluate(
                    model, forget=self.forget_rows, holdout=self.unseen_rows, gold=gold and gold["seen"], batch_size=16
                ),
                "relearning": curve["unlearned"],
                "nll": window_nll(model, self.general),
            }

        path = self.out / "measured" / f"{name.replace(' ', '-')}.json"
        return kept(path, {**self.settings, **about}, measure)


def general_text(tokenizer: Any, config: Config) -> tuple[str, Tensor]:
    """What it is, and windows of it."""
    folder = shared_data("wikitext2", config.data_dir)
    if folder is None:
        return f"{config.windows} windows of {WIDTH} tokens of Python's help", help_text(tokenizer, config.windows)
    text = windows(tokenizer, folder / "test.txt", config.windows)
    return f"{config.windows} windows of {WINDOW} tokens of WikiText-2", text


def adapter(model: PreTrainedModel) -> dict[str, Tensor]:
    """Copies of the trained parameters by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def put(model: PreTrainedModel, values: Mapping[str, Tensor]) -> None:
    """Overwrite the trained parameters, all of them."""
    mine = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if mine.keys() != values.keys():
        raise ValueError(f"The adapter has {len(values)} tensors, but the model trains {len(mine)}, or others.")
    for name, p in mine.items():
        p.copy_(values[name])


def kept_adapter(
    path: Path, settings: Mapping[str, Any], model: PreTrainedModel, make: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """What `make()` returned, which trains the model; from `path` with the adapter if the settings are the same."""
    if path.is_file():
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["hfext"])
        if about["settings"] == settings:
            put(model, load_file(path))
            return about["found"]
    found = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(adapter(model), partial, metadata={"hfext": json.dumps({"settings": settings, "found": found})})
    partial.replace(path)
    return found
