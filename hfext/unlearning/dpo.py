"""DPO with a refusal as the preferred answer (IdkDPO).

    m(y) = s_ref(y) - s(y),   s the nll of an answer summed over its tokens;   w the refusal, l the forget answer
    loss = gamma * -(2 / beta) mean_i log sigma(beta (m(w_i) - m(l_i))) + alpha * (nll or KL on retain rows)

The factor 2 / beta makes it NPO where the refusal's term is left out. "Direct Preference Optimization: Your Language
Model is Secretly a Reward Model", arXiv 2305.18290, as a baseline of TOFU, arXiv 2401.06121.
"""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid

from ..registry import Method
from ._objective import Objective
from ._terms import keeping, rows
from .npo import NPOConfig


@dataclass(frozen=True, kw_only=True)
class DPOConfig(NPOConfig):
    """Options of [`DPO`]: those of [`NPOConfig`]."""


def dpo_rows(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """-(2 / beta) log sigma(beta (m_w - m_l)) [rows], from margins s_ref - s [rows] of both answers."""
    return -2 / beta * logsigmoid(beta * (chosen - rejected))


class DPO(Objective):
    """A refusal is preferred to the forget answer: `UnlearningConfig(objective="dpo")`."""

    Config = DPOConfig

    def __init__(self, **options):
        super().__init__(**options)
        kind = self.config.retain
        self.needs = ("forget", "alternate") if kind == "none" else ("forget", "retain", "alternate")
        self.reference = {"forget": "nll", "alternate": "nll", **({"retain": "outputs"} if kind == "kl" else {})}

    def terms(self, now, reference):
        c = self.config
        margins = {part: reference[part].nll - now[part].nll for part in ("alternate", "forget")}
        forget = dpo_rows(margins["alternate"], margins["forget"], c.beta)
        return {"forget": rows("forget", forget, c.gamma), **keeping(now, reference, c.retain, c.alpha)}


METHOD = Method(
    name="dpo",
    family="unlearning",
    title="Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
    authors="Rafailov et al.",
    arxiv="2305.18290",
    year=2023,
    status="variant",
    difference="The loss is multiplied by 2 / beta, as unlearning benchmarks do; the preferred answer is a refusal.",
    target="hfext.unlearning.dpo:DPO",
    config=DPOConfig,
    usage='UnlearningTrainer(model, UnlearningConfig("out", objective="dpo"), f, r, processing_class=tokenizer)',
    summary="Prefers a refusal to the forget answer.",
    notes="A baseline: compared in recipes/unlearning/ngdiff-llama-tofu.yaml.",
)
