"""Gradient difference: loss = alpha * mean nll of retain tokens - gamma * mean nll of forget tokens.

With alpha = 0 it is gradient ascent. The larger of the two gradients rules, and which it is changes by orders of
magnitude on the way: NGDiff is the answer to that. A baseline of "TOFU: A Task of Fictitious Unlearning for LLMs",
arXiv 2401.06121.
"""

from dataclasses import dataclass

from ..registry import Method
from ._objective import Objective, finite
from ._terms import keeping, tokens


@dataclass(frozen=True, kw_only=True)
class GradDiffConfig:
    """Options of [`GradDiff`].

    Args:
        gamma: Weight of the forget loss, >= 0.
        alpha: Weight of the retain loss, >= 0.
    """

    gamma: float = 1.0
    alpha: float = 1.0

    def __post_init__(self):
        finite(self, "gamma", "alpha")


class GradDiff(Objective):
    """Ascent on forget rows and descent on retain rows: `UnlearningConfig(objective="grad_diff")`."""

    Config = GradDiffConfig

    def terms(self, now, reference):
        c = self.config
        forget = tokens("forget", now["forget"].token_nll, -c.gamma)
        return {"forget": forget, **keeping(now, reference, "nll", c.alpha)}


METHOD = Method(
    name="grad_diff",
    family="unlearning",
    title="TOFU: A Task of Fictitious Unlearning for LLMs",
    authors="Maini et al.",
    arxiv="2401.06121",
    year=2024,
    repo="locuslab/tofu",
    status="faithful",
    target="hfext.unlearning.grad_diff:GradDiff",
    config=GradDiffConfig,
    usage='UnlearningTrainer(model, UnlearningConfig("out", objective="grad_diff"), f, r)',
    summary="Raises the loss of the forget rows and lowers that of the retain rows, with fixed weights.",
    notes="A baseline: compared in recipes/unlearning/ngdiff-llama-tofu.yaml. The loss has no bound.",
)
