"""Drop-in modules: `replace(model, template)` puts them where linear layers are, with the same weights and names.

How to choose:

| you want | take | cost | not when |
|---|---|---|---|
| a third of what linear layers keep for backward | `wta_crs` | noisy gradients | pretraining; gradient checkpointing |

Adapters come first: wrap the model by PEFT, then call `replace`.
"""

from ..registry import collect
from . import wta_crs
from ._replace import DropIn, Replacement, replace
from .wta_crs import WTACRSConfig, WTACRSLinear, WTACRSMixin

__all__ = [
    "DropIn",
    "Replacement",
    "WTACRSConfig",
    "WTACRSLinear",
    "WTACRSMixin",
    "replace",
]
METHODS = collect(__name__)
