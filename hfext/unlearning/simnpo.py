"""SimNPO: NPO without a reference, with the likelihood of an answer over its length.

    loss = gamma * -(2 / beta) mean_i log sigma(beta (s_i / |y_i| - delta)) + alpha * nll on retain rows

With delta = 0 it is NPO on mean likelihoods against a reference that is certain of every answer.

Simplicity Prevails: Rethinking Negative Preference Optimization for LLM Unlearning, arXiv 2410.07163.
"""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid

from ..registry import Method
from ._objective import Objective, check, finite
from ._terms import keeping, rows


@dataclass(frozen=True, kw_only=True)
class SimNPOConfig:
    """Options of [`SimNPO`]. Defaults are those for TOFU's forget05.

    Args:
        beta: Inverse temperature, > 0.
        delta: Reward margin, finite.
        gamma, alpha: Weights of the forget and the retain loss, >= 0.
    """

    beta: float = 2.5
    delta: float = 0.0
    gamma: float = 0.1375
    alpha: float = 1.0

    def __post_init__(self):
        check(self, "beta", 0 < self.beta < float("inf"), "finite and > 0")
        check(self, "delta", abs(self.delta) < float("inf"), "finite")
        finite(self, "gamma", "alpha")


def simnpo_rows(mean_nll: Tensor, beta: float, delta: float) -> Tensor:
    """-(2 / beta) log sigma(beta (s / |y| - delta)) [rows], from mean nll [rows]."""
    return -2 / beta * logsigmoid(beta * (mean_nll - delta))


class SimNPO(Objective):
    """NPO without a reference: `UnlearningConfig(objective="simnpo")`."""

    Config = SimNPOConfig

    def terms(self, now, reference):
        c = self.config
        forget = simnpo_rows(now["forget"].mean_nll, c.beta, c.delta)
        return {"forget": rows("forget", forget, c.gamma), **keeping(now, reference, "nll", c.alpha)}


METHOD = Method(
    name="simnpo",
    family="unlearning",
    title="Simplicity Prevails: Rethinking Negative Preference Optimization for LLM Unlearning",
    authors="Fan et al.",
    arxiv="2410.07163",
    year=2024,
    repo="OPTML-Group/Unlearn-Simple",
    status="faithful",
    target="hfext.unlearning.simnpo:SimNPO",
    config=SimNPOConfig,
    usage='UnlearningTrainer(model, UnlearningConfig("out", objective="simnpo"), f, r)',
    summary="NPO by the mean likelihood of an answer, without a reference model.",
    notes="Compared in recipes/unlearning/ngdiff-llama-tofu.yaml.",
)
