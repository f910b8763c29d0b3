"""KL minimisation: loss = alpha * mean KL(p_ref || p) on retain tokens - gamma * mean nll of forget tokens.

The divergence is that of next-token distributions at the scored positions of the retain rows, from the model as it
was. Common code takes the mean over prompt and padding too, which makes the weight depend on padding. A baseline of
"TOFU: A Task of Fictitious Unlearning for LLMs", arXiv 2401.06121.
"""

from dataclasses import dataclass

from ..registry import Method
from ._objective import Objective
from ._terms import keeping, tokens
from .grad_diff import GradDiffConfig


@dataclass(frozen=True, kw_only=True)
class KLMinConfig(GradDiffConfig):
    """Options of [`KLMin`]: those of [`GradDiffConfig`]; alpha weighs the divergence."""


class KLMin(Objective):
    """Ascent on forget rows, held on retain rows by a divergence: `UnlearningConfig(objective="kl_min")`."""

    Config = KLMinConfig
    reference = {"retain": "outputs"}

    def terms(self, now, reference):
        c = self.config
        forget = tokens("forget", now["forget"].token_nll, -c.gamma)
        return {"forget": forget, **keeping(now, reference, "kl", c.alpha)}


METHOD = Method(
    name="kl_min",
    family="unlearning",
    title="TOFU: A Task of Fictitious Unlearning for LLMs",
    authors="Maini et al.",
    arxiv="2401.06121",
    year=2024,
    repo="locuslab/tofu",
    status="faithful",
    target="hfext.unlearning.kl_min:KLMin",
    config=KLMinConfig,
    usage='UnlearningTrainer(model, UnlearningConfig("out", objective="kl_min"), f, r)',
    summary="Raises the loss of the forget rows and holds the distributions on retain rows where they were.",
    notes="A baseline: compared in recipes/unlearning/ngdiff-llama-tofu.yaml. The loss has no bound.",
)
