"""Compressed key-value caches."""

from ..compression import register_part
from ._cache import CompressedCache
from ._config import KVCacheConfig
from ._install import apply, remove
from .kivi import KIVIConfig
from .turboquant import TurboQuantConfig

register_part("kv_cache", KVCacheConfig.from_dict)
