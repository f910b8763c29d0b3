"""Trainer mixins. Each adds to any Trainer subclass and composes with `optim=` names of `hfext.optim`.

How to choose (cost: of a step, in plain steps, on a small MLP):

| you want | take | cost | not when |
|---|---|---|---|
| flatter minima for no time | `SAFMixin` | 1.0 | logits are per token, or the data is a stream |
| the same for any model with logits | `MESAMixin` | 1.3 | memory for a second copy of the trained weights is short |
"""

from ..registry import collect
from .mesa import MESAConfig, MESAMixin, MESATrainer
from .saf import SAFConfig, SAFMixin, SAFTrainer

__all__ = ["MESAConfig", "MESAMixin", "MESATrainer", "SAFConfig", "SAFMixin", "SAFTrainer"]
METHODS = collect(__name__)
