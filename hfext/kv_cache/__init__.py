"""Compressed key-value caches."""

from ..compression import register_part
from ._cache import CompressedCache
from ._config import KVCacheConfig
from ._fused_values import fuse_values
from ._install import apply, remove
from .h2o import H2OConfig
from .kivi import KIVIConfig
from .prefixkv import PrefixKVConfig
from .rotatekv import RotateKVConfig
from .snapkv import SnapKVConfig
from .streamingllm import StreamingLLMConfig
from .think import ThinKConfig
from .turboquant import TurboQuantConfig

register_part("kv_cache", KVCacheConfig.from_dict)
