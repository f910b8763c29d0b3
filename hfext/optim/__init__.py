"""Optimizers by name in stock `TrainingArguments(optim=...)`: of two gradients in each update, of one, of none.

How to choose:

| you want | take | gradients an update | not when |
|---|---|---|---|
| flatter minima with one number to tune | `sam` | 2 | time is short |
| the same, whatever the scale of the layers | `asam` | 2 | weights are near 0 |
| a perturbation that aims at errors, not at the loss | `bisam` | 2 | the loss is a regression or has no logits |
| fewer perturbed weights | `sam_on` | 2, less with `freeze_others` | there are no normalisation layers |
| SAM at the speed of plain training, on pairs of processes | `sampa` | 2 side by side | the model is sharded |
| radius and learning rate that hold at any width | `mup_sam` | 2 | there is no smaller base model |
| learning rates that hold at any width | `mup` | those of its optimizer | there is no smaller base model |
| a surrogate for offline optimisation | `ignite` | 3 | you want a classifier |
| a quarter of AdamW's state at about its loss | `frugal` | 1 | weights are sharded (FSDP) |
| fewer updates to a loss, in large batches | `soap` | 1 | memory is short: factors of each side; FSDP |
| a fine-tuned model whose changes can be pruned or merged | `adamr` | 1 | you train from scratch |
| fine-tuning in the memory of inference | `mezo` | 0, two forward passes | the model was not pretrained |
| the same, on a device that holds three blocks of the model | `zo2` | 0 | the model fits: `mezo` is faster |
| many machines on slow lines: one byte a micro-batch | `justonebyte` | 0 | there is a fast network |

`SharpnessAware(base_optimizer, rho=...)` is plain SAM as an object; in a raw loop, `sam_step` runs its passes. Others
have `step()`, and those without gradients `step(closure)`. `mup` and `step_law` choose learning rates.
"""

from ..registry import collect
from ..schedule import apply_step_law, step_law
from . import adamr, asam, bisam, frugal, ignite, justonebyte, mezo, mup, mup_sam, sam, sam_on, sampa, soap, zo2
from ._driver import SharpnessAwareMixin
from ._install import install, portable_training_args
from ._sam_step import sam_step
from .adamr import AdamR
from .asam import ASAM
from .bisam import BiSAM
from .frugal import FRUGAL
from .ignite import IGNITE
from .justonebyte import JustOneByte
from .mezo import MeZO
from .mup_sam import MuPSAM
from .sam import SharpnessAware
from .sam_on import SAMON
from .sampa import SAMPa
from .soap import SOAP
from .zo2 import ZO2

METHODS = collect(__name__)
install(METHODS)
