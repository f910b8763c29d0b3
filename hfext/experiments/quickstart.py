"""What the library does, on one small machine in minutes: `make demo`.

The run is a list of stages, each a function `stage(state)` in its own file and a line in `STAGES`. It adds tables and
artifacts to the state and may leave a model for the stages after it:

- `teach`: LoRA with `optim="bisam"` teaches SmolLM2-135M facts about authors who do not exist. It is asked before and
  after, in the wording that was taught and in another one. The adapter is saved with its model card.
- `forget`: NGDiff makes the taught adapter forget two of the authors. What it lost, what it kept, and what a little
  training brings back stand beside an adapter that was never taught them.
- `noise`: a small ViT learns digits of which 40 % have a wrong label, with adamw, sam and bisam.
- `decode`: SmolLM2-135M answers at T = 1.5 with and without top-H, and writes three superposed drafts.
- `cache`: it finds a pass key in a long prompt with a plain cache, with compressed ones, and with one that forgets.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import registry
from ._facts import Fact, make_facts
from ._publishing import check_repo_id, publish
from ._stage_cache import cache
from ._stage_decode import decode
from ._stage_forget import forget
from ._stage_noise import noise
from ._stage_teach import check_model, teach
from ._stage_weights import weights


@dataclass(kw_only=True)
class Config:
    """
    Args:
        stages: What runs, in this order.
        model: `smollm2`, or the folder of a causal language model whose tokenizer has a chat template.
        seed: Of facts, weights, wrong labels and batches.
        threads: Of torch during the run; by default all cores this process may use, or one if that is faster now.
        authors, fields: How many authors are made up, and how many facts of each.
        shown: How many answers the table shows.
        lora_rank: Of the adapter, on all linear layers of the upper part of the network.
        lora_from: Where that part begins, as a share of the depth; what lies below needs no backward pass.
        teach_epochs, teach_batch_size, teach_learning_rate, teach_rho: Of the training with BiSAM around AdamW.
        forget_authors: How many of them `forget` makes the model forget.
        forget_epochs, forget_batch_size, forget_learning_rate: Of that training; most passes over their facts.
        noise: Share of the digits' training labels that are wrong.
        noise_rho: Radius of sam and bisam; `noise_methods` all have AdamW as their base.
        noise_methods: `adamw`, or names of two-pass optimizers of the library.
        noise_hidden, noise_layers: Of the ViT.
        noise_epochs, noise_batch_size, noise_learning_rate: Of its training.
        decode_prompt, decode_temperature, decode_tokens: The question that all samplers answer, and the length.
        decode_prefix, decode_draft_tokens: What the superposed drafts continue, and by how much.
        cache_tokens: Length of the answers behind the long prompt.
        weights_rows, weights_windows: Rows of 256 tokens to calibrate the quantised weights on, and to judge them by.
        weights_tokens: Length of the answer of the quantised model.
        publish_to: User or organisation to push the artifacts to, each with its card to a private repository of the
            Hub that HF_ENDPOINT names; by default nothing is sent.
    """

    stages: list[str] = field(default_factory=lambda: ["teach", "forget", "noise", "decode", "cache", "weights"])
    model: str = "smollm2"
    seed: int = 0
    threads: int | None = None

    authors: int = 4
    fields: int = 5
    shown: int = 5
    lora_rank: int = 16
    lora_from: float = 0.5
    teach_epochs: int = 12
    teach_batch_size: int = 5
    teach_learning_rate: float = 3e-3
    teach_rho: float = 0.05

    forget_authors: int = 2
    forget_epochs: int = 6
    forget_batch_size: int = 1
    forget_learning_rate: float = 4e-4

    noise: float = 0.4
    noise_methods: list[str] = field(default_factory=lambda: ["adamw", "sam", "bisam"])
    noise_rho: float = 0.05
    noise_hidden: int = 64
    noise_layers: int = 2
    noise_epochs: int = 40
    noise_batch_size: int = 64
    noise_learning_rate: float = 2e-3

    decode_prompt: str = "Write a short story about a lighthouse keeper who finds a letter from the sea."
    decode_temperature: float = 1.5
    decode_tokens: int = 40
    decode_prefix: str = "The best way to learn a new language is to"
    decode_draft_tokens: int = 10

    cache_tokens: int = 16

    weights_rows: int = 8
    weights_windows: int = 8
    weights_tokens: int = 24

    publish_to: str | None = None

    def __post_init__(self):
        for name, values, known in (
            ("stages", self.stages, list(STAGES)),
            ("noise_methods", self.noise_methods, ["adamw", *(m.name for m in registry.methods("optim"))]),
        ):
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} is {values} but must hold at least one name, each once.")
            for value in values:
                if value not in known:
                    raise ValueError(f"{name}: there is no {value!r}. {registry.suggest(value, known)}")
        check_model(self.model)
        if self.publish_to is not None:
            check_repo_id("publish_to, with a name behind it,", f"{self.publish_to}/name")
        positive = ["shown", "lora_rank", "teach_epochs", "teach_batch_size", "teach_learning_rate", "noise_layers"]
        positive += ["forget_epochs", "forget_batch_size", "forget_learning_rate"]
        positive += ["noise_epochs", "noise_batch_size", "noise_learning_rate"]
        positive += ["decode_temperature", "decode_tokens", "decode_draft_tokens", "cache_tokens"]
        positive += ["weights_rows", "weights_windows", "weights_tokens"]
        for name in positive:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)} but must be above 0.")
        for name in ("teach_rho", "noise_rho"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)} but must be >= 0.")
        for name in ("lora_from", "noise"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)} but must be in [0, 1).")
        if self.noise_hidden < 4 or self.noise_hidden % 4:
            raise ValueError(f"noise_hidden is {self.noise_hidden} but must be a multiple of the 4 heads.")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads is {self.threads} but must be at least 1.")
        make_facts(self.authors, self.fields)  # checks both
        if "forget" in self.stages:
            if "teach" not in self.stages[: self.stages.index("forget")]:
                raise ValueError(f"stages is {self.stages} but forget needs teach before it.")
            if not 0 < self.forget_authors < self.authors:
                raise ValueError(f"forget_authors is {self.forget_authors} but must be 1 to {self.authors - 1}.")
            if self.forget_authors * self.fields < 2:
                raise ValueError(f"fields is {self.fields} but one fact is too few to forget: relearning needs two.")


@dataclass
class State:
    """What stages hand on: results to `run`, and the taught model with its facts to the stages after `teach`."""

    config: Config
    out: Path
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    artifacts: list[str] = field(default_factory=list)
    model: PreTrainedModel | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    facts: list[Fact] = field(default_factory=list)


STAGES: dict[str, Callable[[State], None]] = {
    "teach": teach,
    "forget": forget,
    "noise": noise,
    "decode": decode,
    "cache": cache,
    "weights": weights,
}


def run(config: Config, out: Path) -> dict[str, Any]:
    state = State(config, out)
    with threads(config.threads):
        for name in config.stages:
            STAGES[name](state)
        used = torch.get_num_threads()
    if config.publish_to is not None:
        made = [name for name in state.artifacts if (out / name).is_dir()]
        pushed = [publish(out / name, f"{config.publish_to}/{name}", private=True) for name in made]
        state.tables["publish: one commit an artifact"] = pushed
    return {"tables": state.tables, "artifacts": state.artifacts, "threads": used}


@contextmanager
def threads(wanted: int | None) -> Iterator[None]:
    """torch's threads for a while; by default all cores, or one where others keep the cores busy."""
    before = torch.get_num_threads()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        # Threads wait for the slowest of them: on a busy machine two can take four times as long as one.
        torch.set_num_threads(wanted or min((cores, 1), key=_seconds))
        yield
    finally:
        torch.set_num_threads(before)


def _seconds(count: int) -> float:
    """Of matrix products like those of the language model, with so many threads."""
    torch.set_num_threads(count)
    x, w = torch.ones(150, 576), torch.ones(576, 1536)
    x @ w  # starts the threads
    start = time.perf_counter()
    for _ in range(100):
        x @ w
    return time.perf_counter() - start
