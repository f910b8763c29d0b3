"""Trainer mixins, and what watches a run. Mixins add to any Trainer and compose with `optim=` names of `hfext.optim`.

How to choose (cost: of a step, in plain steps, on a small MLP):

| you want | take | cost | not when |
|---|---|---|---|
| flatter minima for no time | `SAFMixin` | 1.0 | logits are per token, or the data is a stream |
| the same for any model with logits | `MESAMixin` | 1.3 | memory for a second copy of the trained weights is short |
| a quantised model that answers like the original | `TopKLDMixin` | 1.3 | no teacher fits, and none was cached |
| to know how near a run is to instability | `PrecisionEmulator`, `LogitSharpnessCallback` | 2, 1 | you want speed |
| to see in a small run what breaks a large one | `ProxyDiagnostics` | 1.0 | `torch.compile` is on |
| output logits that stay log probabilities | `ZLossMixin` | 1.1 | the loss keeps its logits to itself |
"""

from ..registry import collect
from ._teacher_top_k import teacher_top_k
from .logit_sharpness import LogitSharpnessCallback, logit_sharpness
from .mesa import MESAConfig, MESAMixin, MESATrainer
from .proxy_diagnostics import ProxyDiagnostics
from .reduced_precision import PrecisionEmulator, quantize_to_format
from .saf import SAFConfig, SAFMixin, SAFTrainer
from .topkld import TopKLDConfig, TopKLDMixin, TopKLDTrainer, topkld_loss
from .z_loss import ZLossConfig, ZLossMixin, ZLossTrainer, z_loss

__all__ = [
    "LogitSharpnessCallback",
    "MESAConfig",
    "MESAMixin",
    "MESATrainer",
    "PrecisionEmulator",
    "ProxyDiagnostics",
    "SAFConfig",
    "SAFMixin",
    "SAFTrainer",
    "TopKLDConfig",
    "TopKLDMixin",
    "TopKLDTrainer",
    "ZLossConfig",
    "ZLossMixin",
    "ZLossTrainer",
    "logit_sharpness",
    "quantize_to_format",
    "teacher_top_k",
    "topkld_loss",
    "z_loss",
]
METHODS = collect(__name__)
