"""NPO: the forget answers as the losing side of a preference that has no winner.

    s_i = -log p(answer i), summed over its tokens;   s_ref,i  the same of the model as it was
    loss = gamma * -(2 / beta) mean_i log sigma(beta (s_i - s_ref,i)) + alpha * (nll or KL on retain rows)

The weight of a row, 2 sigma(-beta (s_i - s_ref,i)), is 1 at the start and falls to 0 as the row is forgotten, so that
the loss is bounded where gradient ascent is not; with beta -> 0 it is gradient ascent on sums. Answers are compared by
their likelihood, not by logits over the vocabulary, as two public benchmarks had it.

Negative Preference Optimization: From Catastrophic Collapse to Effective Unlearning, arXiv 2404.05868.
"""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid

from ..registry import Method, Result
from ._objective import Objective, check, finite
from ._terms import Keep, keeping, rows


@dataclass(frozen=True, kw_only=True)
class NPOConfig:
    """Options of [`NPO`].

    Args:
        beta: Inverse temperature, > 0; of sums over tokens, so that long answers are forgotten sooner.
        gamma, alpha: Weights of the forget and the retain loss, >= 0.
        retain: `nll` of the retain rows, `kl` from the reference on them, or `none`.
    """

    beta: float = 0.1
    gamma: float = 1.0
    alpha: float = 1.0
    retain: Keep = "nll"

    def __post_init__(self):
        check(self, "beta", 0 < self.beta < float("inf"), "finite and > 0")
        finite(self, "gamma", "alpha")
        check(self, "retain", self.retain in ("nll", "kl", "none"), "'nll', 'kl' or 'none'")


def npo_rows(nll: Tensor, reference: Tensor, beta: float) -> Tensor:
    """-(2 / beta) log sigma(beta (s - s_ref)) [rows], from sums of nll [rows]."""
    return -2 / beta * logsigmoid(beta * (nll - reference))


class NPO(Objective):
    """Negative preference optimisation: `UnlearningConfig(objective="npo", objective_args={"beta": 0.1})`."""

    Config = NPOConfig

    def __init__(self, **options):
        super().__init__(**options)
        kind = self.config.retain
        self.needs = ("forget",) if kind == "none" else ("forget", "retain")
        self.reference = {"forget": "nll", **({"retain": "outputs"} if kind == "kl" else {})}

    def terms(self, now, reference):
        c = self.config
        forget = npo_rows(now["forget"].nll, reference["forget"].nll, c.beta)
        return {"forget": rows("forget", forget, c.gamma), **keeping(now, reference, c.retain, c.alpha)}


METHOD = Method(
    name="npo",
    family="unlearning",
    title="Negative Preference Optimization: From Catastrophic Collapse to Effective Unlearning",
    authors="Zhang et al.",
    arxiv="2404.05868",
    year=2024,
    repo="licong-lin/negative-preference-optimization",
    status="faithful",
    target="hfext.unlearning.npo:NPO",
    config=NPOConfig,
    usage='UnlearningTrainer(model, UnlearningConfig("out", objective="npo"), f, r)',
    summary="Lowers the likelihood of forget answers below that of the model as it was, each until it is forgotten.",
    claim="NPO collapses more slowly than gradient ascent: it keeps more utility at equal forgetting.",
    headline=Result(
        metric="forget quality / model utility",
        setting="TOFU forget10, Llama-2-7B, open-unlearning's rerun",
        value="0.42 / 0.54",
        baseline="1.8e-229 / 0.58 (GradDiff)",
    ),
    recipe="unlearning/npo-llama-tofu.yaml",
)
