"""Key-value caches that are really smaller, in plain `generate`.

How to choose:

| you want | take | cost | not when |
|---|---|---|---|
| 2 to 4 bits a number, every token kept | `rotatekv` | a rotation each way | rotary cannot be undone |
| the same without rotation, or without scales | `kivi`, `turboquant` | a pass over the cache | 2 bits, short texts |
| long prompts, read often | `xkv` | an SVD of the prompt | prompts below some 1,000 tokens |
| the same, learnt once for a model | `cskv` (`minicache` merges layers) | calibration | heads not redundant |
| a bounded cache, or thin keys | `snapkv`, `prefixkv`, `h2o`, `streamingllm`, `think` | scores | facts asked later |
| the whole cache on the host, little read | `a2ats` | calibration | short contexts |
| an earlier first token | `kv_prediction` | training | no smaller model of the family |
| prefill that does not stall decoding | `layered_prefill` | | one prompt at a time |

`apply(model, config)` or `from_pretrained(..., quantization_config=config)` make `generate` use a cache;
`config.make_cache(model)` makes one. `config.calibrate(model, data)` learns what a method needs.
"""

from ..registry import collect
from . import (
    a2ats,
    cskv,
    h2o,
    kivi,
    kv_prediction,
    layered_prefill,
    minicache,
    prefixkv,
    rotatekv,
    snapkv,
    streamingllm,
    think,
    turboquant,
    xkv,
)
from ._cache import CompressedCache
from ._config import KVCacheConfig
from ._cskv_trainer import CSKVTrainer
from ._fused_values import fuse_values
from ._install import apply, remove
from ._kv_prediction_trainer import KVPredictionTrainer
from .a2ats import A2ATSConfig
from .cskv import CSKVConfig
from .h2o import H2OConfig
from .kivi import KIVIConfig
from .kv_prediction import KVPredictionConfig, KVPredictor, even_map, prune_layers
from .layered_prefill import LayeredPrefillEngine, LayeredPrefillScheduler
from .minicache import MiniCacheConfig
from .prefixkv import PrefixKVConfig
from .rotatekv import RotateKVConfig
from .snapkv import SnapKVConfig
from .streamingllm import StreamingLLMConfig
from .think import ThinKConfig
from .turboquant import TurboQuantConfig
from .xkv import XKVConfig

METHODS = collect(__name__)
