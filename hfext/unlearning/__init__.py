"""Objectives of `UnlearningTrainer`, exact unlearning, and edits of trained models."""

from ..registry import collect
from . import (
    code_eraser,
    dpo,
    grad_ascent,
    grad_diff,
    idk,
    kl_min,
    l1_sparse,
    loss_norm,
    ngdiff,
    npo,
    prompt_decouple,
    rmu,
    simnpo,
)
from ._config import UnlearningConfig
from ._objective import Objective, TwoGradientObjective
from ._terms import Term, rows, tokens
from ._trainer import UnlearningTrainer
from .prune_then_unlearn import prune_then_unlearn

METHODS = collect(__name__)
