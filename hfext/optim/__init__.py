"""Sharpness-aware training: two gradients in each update, by name in stock `TrainingArguments(optim=...)`.

How to choose:

| you want | take | gradients an update | not when |
|---|---|---|---|
| flatter minima with one number to tune | `sam` | 2 | time is short |
| the same, whatever the scale of the layers | `asam` | 2 | weights are near 0 |
| a perturbation that aims at errors, not at the loss | `bisam` | 2 | the loss is a regression or has no logits |
| fewer perturbed weights | `sam_on` | 2, less with `freeze_others` | there are no normalisation layers |
| SAM at the speed of plain training, on pairs of processes | `sampa` | 2 side by side | the model is sharded |
| radius and learning rate that hold at any width | `mup_sam` | 2 | there is no smaller base model |
| a surrogate for offline optimisation | `ignite` | 3 | you want a classifier |

`SharpnessAware(base_optimizer, rho=...)` is plain SAM as an object; `sam_step` runs the passes in a raw loop.
"""

from ..registry import collect
from . import asam, bisam, ignite, mup, mup_sam, sam, sam_on, sampa
from ._driver import SharpnessAwareMixin
from ._install import install, portable_training_args
from ._sam_step import sam_step
from .asam import ASAM
from .bisam import BiSAM
from .ignite import IGNITE
from .mup_sam import MuPSAM
from .sam import SharpnessAware
from .sam_on import SAMON
from .sampa import SAMPa

METHODS = collect(__name__)
install(METHODS)
