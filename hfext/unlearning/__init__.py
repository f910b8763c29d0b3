"""Objectives of `UnlearningTrainer`, exact unlearning, edits of trained models, and what to measure.

How to choose:

| you want | take | not when |
|---|---|---|
| to forget rows and keep others | `ngdiff` | memory for a second gradient is short |
| the same with a loss that is bounded | `npo`, `simnpo` | rows must really be forgotten |
| refusals in place of answers | `idk`, `dpo` | the old answers must become unlikely |
| marked parts of a text forgotten | `code_eraser` | whole rows are to go |
| a prompt still answered elsewhere | `prompt_decouple` | there is no such prompt |
| a topic out of the inner states | `rmu` | answers must be those of a model that never knew |
| seconds, and no training | `ssd`, `antidote`, `rocr`, `rece` | guarantees are wanted |
| proof that a row left no trace | `s3t`, or `dp2` within epsilon | training has already happened |

Read forgetting, utility, privacy (`evaluate`) and relearning (`relearning`) together, never one alone.
"""

from ..registry import collect
from . import (
    antidote,
    code_eraser,
    concept_vectors,
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
    prune_then_unlearn,
    rece,
    relearning,
    rmu,
    rocr,
    simnpo,
    ssd,
    task_vector,
    ununlearning,
)
from ._config import UnlearningConfig
from ._evaluate import StopWhenForgotten, evaluate
from ._objective import Objective, TwoGradientObjective
from ._terms import Term, rows, tokens
from ._trainer import UnlearningTrainer

METHODS = collect(__name__)
