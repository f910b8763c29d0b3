"""IDK: teach a refusal as the answer to the forget prompts, and the retain rows as they are.

    parts:   gamma * mean nll of refusal tokens + alpha * mean nll of retain tokens
    tokens:  one mean over the tokens of both, as the paper's code takes it: long answers then outweigh short refusals

A baseline of "TOFU: A Task of Fictitious Unlearning for LLMs", arXiv 2401.06121. Each row keeps its refusal, drawn
from `UnlearningConfig.refusals`, through the training; the paper's code draws anew at every visit.
"""

from dataclasses import dataclass
from typing import Literal

from ..registry import Method
from ._objective import Objective, check, finite
from ._terms import Term, keeping, tokens

BOTH = "refusal and retain tokens"


@dataclass(frozen=True, kw_only=True)
class IdkConfig:
    """Options of [`Idk`].

    Args:
        gamma, alpha: Weights of the refusals and of the retain rows, >= 0.
        pooling: `parts` or `tokens`, see above.
    """

    gamma: float = 1.0
    alpha: float = 1.0
    pooling: Literal["parts", "tokens"] = "tokens"

    def __post_init__(self):
        finite(self, "gamma", "alpha")
        check(self, "pooling", self.pooling in ("parts", "tokens"), "'parts' or 'tokens'")


class Idk(Objective):
    """Refusals in place of the answers: `UnlearningConfig(objective="idk")`."""

    Config = IdkConfig
    needs = ("forget", "retain", "alternate")

    def forward(self, model, batch, **kwargs):
        # The answers themselves are not looked at.
        return super().forward(model, {k: v for k, v in batch.items() if k != "forget"}, **kwargs)

    def counts(self, batch):
        found = super().counts(batch)
        return {**found, BOTH: found["alternate tokens"] + found["retain tokens"]}

    def terms(self, now, reference):
        c = self.config
        if c.pooling == "parts":
            return {
                "refusal": tokens("alternate", now["alternate"].token_nll, c.gamma),
                **keeping(now, {}, "nll", c.alpha),
            }
        return {
            "refusal": Term(now["alternate"].token_nll.sum(), BOTH, c.gamma),
            "retain": Term(now["retain"].token_nll.sum(), BOTH, c.alpha),
        }


METHOD = Method(
    name="idk",
    family="unlearning",
    title="TOFU: A Task of Fictitious Unlearning for LLMs",
    authors="Maini et al.",
    arxiv="2401.06121",
    year=2024,
    repo="locuslab/tofu",
    status="faithful",
    target="hfext.unlearning.idk:Idk",
    config=IdkConfig,
    usage='UnlearningTrainer(model, UnlearningConfig("out", objective="idk"), f, r, processing_class=tokenizer)',
    summary="Teaches refusals as answers to the forget prompts.",
    notes="A baseline: compared in recipes/unlearning/ngdiff-llama-tofu.yaml. The old answer stays as likely as the "
    "refusal leaves it.",
)
