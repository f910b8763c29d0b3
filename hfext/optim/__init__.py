"""Sharpness-aware optimizers, by name in `TrainingArguments(optim=...)`.

How to choose (cost: gradient evaluations an update):

| you want | take | cost | not when |
|---|---|---|---|
| flatter minima, one number to tune | `sam` | 2 | time is short |
"""

from ..registry import collect
from . import asam, bisam, ignite, mup, mup_sam, sam, sam_on, sampa
from ._install import install, portable_training_args
from ._sam_step import sam_step
from ._driver import SharpnessAwareMixin
from .asam import ASAM
from .bisam import BiSAM
from .ignite import IGNITE
from .sam import SharpnessAware
from .sam_on import SAMON
from .sampa import SAMPa

METHODS = collect(__name__)
install(METHODS)
