"""Gradient ascent: loss = -mean over the forget tokens of -log p(token).

It keeps nothing and has no lower bound: run it for a few updates, or take a bounded objective. The first baseline of
"TOFU: A Task of Fictitious Unlearning for LLMs", arXiv 2401.06121.
"""

from dataclasses import dataclass

from ..registry import Method
from ._objective import Objective, finite
from ._terms import tokens


@dataclass(frozen=True, kw_only=True)
class GradAscentConfig:
    """Options of [`GradAscent`].

    Args:
        gamma: Weight of the forget loss, >= 0.
    """

    gamma: float = 1.0

    def __post_init__(self):
        finite(self, "gamma")


class GradAscent(Objective):
    """Ascent on the forget rows: `UnlearningConfig(objective="grad_ascent")`."""

    Config = GradAscentConfig
    needs = ("forget",)

    def terms(self, now, reference):
        return {"forget": tokens("forget", now["forget"].token_nll, -self.config.gamma)}


METHOD = Method(
    name="grad_ascent",
    family="unlearning",
    title="TOFU: A Task of Fictitious Unlearning for LLMs",
    authors="Maini et al.",
    arxiv="2401.06121",
    year=2024,
    repo="locuslab/tofu",
    status="faithful",
    target="hfext.unlearning.grad_ascent:GradAscent",
    config=GradAscentConfig,
    usage='UnlearningTrainer(model, UnlearningConfig("out", objective="grad_ascent"), rows)',
    summary="Raises the loss of the forget rows and holds nothing else.",
    notes="A baseline: compared in recipes/unlearning/ngdiff-llama-tofu.yaml. The loss has no bound.",
)
