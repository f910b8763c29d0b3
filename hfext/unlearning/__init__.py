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
| baselines of papers | `grad_ascent` `grad_diff` `kl_min` `loss_norm` `dmm` `l1_sparse` `task_vector` | in earnest |
| fewer weights first, then any objective | `prune_then_unlearn` | the model is to keep its size |
| a concept's own directions out | `concept_vectors` | rows are to be forgotten, not a concept |
| to try whether it holds | `relearning`, `ununlearning`, `worst_case` | |
| proof that a row left no trace | `s3t`, or `dp2` within epsilon | training has already happened |

Read forgetting, utility, privacy (`evaluate`) and relearning (`relearning`) together, never one alone.
"""

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
from ._data import collate, tokenize
from ._edit import Edit
from ._evaluate import StopWhenForgotten, evaluate
from ._objective import Objective, TwoGradientObjective
from ._terms import Term, rows, tokens
from ._trainer import UnlearningTrainer
from .antidote import antidote
from .concept_vectors import concept_vector_report, concept_vectors, find_concept_vectors, needle_training
from .dmm import DMM, estimate_datamodel, predicted_oracle
from .dp2 import DPConfig, DPTrainer, unlearn_from_dp_base
from .prune_then_unlearn import prune_then_unlearn
from .rece import rece
from .relearning import relearning
from .rocr import rocr
from .s3t import S3TConfig, S3TTrainer
from .ssd import importance, ssd
from .task_vector import task_vector
from .ununlearning import ununlearning
from .worst_case import worst_case_forget_set

METHODS = collect(__name__)
