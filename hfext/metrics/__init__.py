"""Metrics: functions of tensors, and `compute(...) -> dict` as in `evaluate` (`hfext.metrics.load(name)`).

| you want | take | not when |
|---|---|---|
| whether several answers to a question agree in meaning | `eigenscore` | the model is consistently wrong |
| the same where a decomposition does not fit | `efficient_eigenscore` | below some thousand: the exact one is faster |
| whether a text was in the training data | `min_k`, `min_k_plus_plus`, `renyi` | the others differ in topic or date |
| what a model still knows after unlearning | `tofu`, `muse`, `extraction`, `ort` | alone: a ruined model forgets too |
| whether an unlearned model refuses too much | `sarr` | answers are judged otherwise |
| how far unlearned models are from retrained ones | `klom` | there is one of each |
"""

from ..registry import collect
from . import (
    efficient_eigenscore,
    eigenscore,
    extraction,
    klom,
    min_k,
    min_k_plus_plus,
    muse,
    ort,
    renyi,
    sarr,
    tofu,
)
from ._compute_metrics import answer_metrics
from ._generate import generate_answers
from ._load import load
from ._membership import auc, tpr_at_fpr
from ._token_scores import TokenScores, label_log_probs, score_rows, token_scores
from .eigenscore import answer_embeddings

METHODS = collect(__name__)
