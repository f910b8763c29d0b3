"""Drop-in modules: `replace(model, template)` puts them where linear layers are, with the same weights and names.

How to choose:

| you want | take | cost | not when |
|---|---|---|---|
| a third of what linear layers keep for backward | `wta_crs` | noisy gradients | pretraining; gradient checkpointing |
| activations that learn | `flashkat` | 3 to 5 times the time of GELU on a CPU | inputs are large, with `abs_sum` |
| feed-forward layers that use 8 % of their units | `spark_ffn` | must be trained anew | MLPs are to stay as they are |
| a model that grows without a jump | `tokenformer` | more work a weight than a linear map | mode `softmax` |
| fewer experts for one task | `uncurl` | quality beyond some reduction | top_k experts or fewer are left |

Adapters come first: wrap the model by PEFT, then call `replace`.
"""

from ..registry import collect
from . import flashkat, spark_ffn, tokenformer, wta_crs
from . import uncurl as _uncurl
from ._replace import DropIn, Replacement, replace
from ._replace_mlp import replace_mlp
from .flashkat import GRKAN, GRKANConfig, GroupRational
from .spark_ffn import SparkFFN, SparkFFNConfig, replace_ffn
from .tokenformer import Pattention, TauWarmup, TokenFormerConfig, TokenFormerForCausalLM, TokenFormerModel, grow
from .uncurl import UncurlConfig, UncurlReport, prune_by_activation, uncurl
from .wta_crs import WTACRSConfig, WTACRSLinear, WTACRSMixin

__all__ = [
    "DropIn",
    "GRKAN",
    "GRKANConfig",
    "GroupRational",
    "Pattention",
    "Replacement",
    "SparkFFN",
    "SparkFFNConfig",
    "TauWarmup",
    "TokenFormerConfig",
    "TokenFormerForCausalLM",
    "TokenFormerModel",
    "UncurlConfig",
    "UncurlReport",
    "WTACRSConfig",
    "WTACRSLinear",
    "WTACRSMixin",
    "grow",
    "prune_by_activation",
    "replace",
    "replace_ffn",
    "replace_mlp",
    "uncurl",
]
METHODS = collect(__name__)
