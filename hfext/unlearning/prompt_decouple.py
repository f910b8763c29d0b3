"""Prompt decouple: forget an answer without learning to refuse its prompt.

    loss = (any objective) + lam * mean nll of the answers to decouple rows

Decouple rows have the prompts of forget rows in a context (an image, or text) where an answer is right. Without them a
model that unlearns "prompt p in context h" refuses p everywhere; the share of such refusals is SARR
(`hfext.metrics.sarr`).

SafeEraser: Enhancing Safety in Multimodal Large Language Models through Multimodal Machine Unlearning, arXiv
2502.12520.
"""

from dataclasses import dataclass, field
from typing import Any

from ..registry import Method, Result
from ._objective import Objective, TwoGradientObjective, finite, objective
from ._terms import tokens


@dataclass(frozen=True, kw_only=True)
class PromptDecoupleConfig:
    """Options of [`PromptDecouple`].

    Args:
        base: Name of the objective to which the term is added, one with a single gradient.
        base_args: Its options.
        lam: Weight of the term, >= 0.
    """

    base: str = "grad_diff"
    base_args: dict[str, Any] = field(default_factory=dict)
    lam: float = 1.0

    def __post_init__(self):
        finite(self, "lam")
        two = isinstance(objective(self.base, self.base_args), TwoGradientObjective)
        if two or self.base in ("rmu", "dmm", "task_vector", "prompt_decouple"):
            raise ValueError(
                f"PromptDecoupleConfig: base is {self.base!r}, to which no likelihood can be added: it "
                "has two gradients, looks at no likelihood, or is negated. Use 'grad_diff'."
            )


class PromptDecouple(Objective):
    """Another objective and the prompts that must still be answered: `UnlearningConfig(objective="prompt_decouple")`,
    `UnlearningTrainer(..., decouple_dataset=rows)`."""

    Config = PromptDecoupleConfig

    def __init__(self, **options):
        super().__init__(**options)
        self.base = objective(self.config.base, self.config.base_args)
        self.needs, self.reference = (*self.base.needs, "decouple"), self.base.reference

    def prepare(self, model, data):
        self.base.prepare(model, data)

    def begin(self, model):
        self.base.begin(model)

    def release(self):
        self.base.release()

    def forward(self, model, batch, **kwargs):
        return self.base.forward(model, batch, **kwargs)

    def with_row_loss(self, now, of_tokens):
        return self.base.with_row_loss(now, of_tokens)

    def counts(self, batch):
        return self.base.counts(batch)

    def finish(self, trainer):
        self.base.finish(trainer)

    def terms(self, now, reference):
        self.base.epoch, self.base.epochs = self.epoch, self.epochs
        own = tokens("decouple", now["decouple"].token_nll, self.config.lam)
        return {**self.base.terms(now, reference), "decouple": own}


METHOD = Method(
    name="prompt_decouple",
    family="unlearning",
    title="SafeEraser: Enhancing Safety in Multimodal Large Language Models through Multimodal Machine Unlearning",
    authors="Chen et al.",
    arxiv="2502.12520",
    year=2025,
    status="abstract-only",
    difference="The form of the loss, the likelihood of normal answers to the same prompts, and its weight of 1 "
    "follow public summaries; text stands in for the images.",
    target="hfext.unlearning.prompt_decouple:PromptDecouple",
    config=PromptDecoupleConfig,
    usage='UnlearningTrainer(model, UnlearningConfig("out", objective="prompt_decouple"), f, r, decouple_dataset=d)',
    summary="Adds prompts like those of the forget rows that must still be answered to any objective.",
    headline=Result(
        metric="safe answer refusal rate", setting="LLaVA, SafeEraser (abstract)", value="79.5 % lower with the loss"
    ),
    notes="No recipe: the benchmark's images are not to be had here; a test shows the effect on a toy task.",
)
