"""The caches that `kv_quality` compares, by name."""

from collections.abc import Callable
from typing import Any

from transformers import Cache, DynamicCache, PreTrainedModel, QuantizedCache

from .. import kv_cache
from ._kv_protocol import Make


def stock(backend: str, bits: int | None = None, **fields: Any) -> Make:
    """A `QuantizedCache` of transformers."""
    options = fields if bits is None else {"nbits": bits, **fields}
    return lambda model: QuantizedCache(backend, model.config, **options)


def ours(config: str, **fields: Any) -> Make:
    """A cache of this library: the class `config` of `hfext.kv_cache` with `fields`."""
    return lambda model: getattr(kv_cache, config)(**fields).make_cache(model)


# Name to a function that makes an empty cache for a model. Digits at the end are bits, or the share of tokens or
# channels kept: plots join what is before them.
METHODS: dict[str, Callable[[PreTrainedModel], Cache]] = {
    "dynamic": lambda model: DynamicCache(config=model.config),
    "fp8": stock("fp8"),
    "quanto4": stock("quanto", 4),
    "quanto2": stock("quanto", 2),
    "hqq4": stock("hqq", 4, axis_key=1, axis_value=1),
    "hqq2": stock("hqq", 2, axis_key=1, axis_value=1),
    "kivi4": ours("KIVIConfig", bits=4, group_size=32, residual_length=32),
    "kivi2": ours("KIVIConfig", bits=2, group_size=32, residual_length=32),
    "turboquant4": ours("TurboQuantConfig", bits=4),
    "turboquant3": ours("TurboQuantConfig", bits=3),
    "turboquant2": ours("TurboQuantConfig", bits=2),
    "turboquant_r32_2": ours("TurboQuantConfig", bits=2, residual_length=32),
    "rotatekv4": ours("RotateKVConfig", bits=4, group_size=64),
    "rotatekv3": ours("RotateKVConfig", bits=3, group_size=64),
    "rotatekv2": ours("RotateKVConfig", bits=2, group_size=64),
    "rotatekv_r32_3": ours("RotateKVConfig", bits=3, group_size=64, residual_length=32),
    "rotatekv_r32_2": ours("RotateKVConfig", bits=2, group_size=64, residual_length=32),
    "rotatekv_mean_r32_2": ours(
        "RotateKVConfig", bits=2, group_size=64, residual_length=32, subtract_mean=True, reorder="none"
    ),
    "prefixkv50": ours("PrefixKVConfig", ratio=0.5),
    "prefixkv25": ours("PrefixKVConfig", ratio=0.75),
    "uniform50": ours("PrefixKVConfig", ratio=0.5, profile="uniform"),
    "uniform25": ours("PrefixKVConfig", ratio=0.75, profile="uniform"),
    "snapkv50": ours("SnapKVConfig", capacity=0.5),
    "snapkv25": ours("SnapKVConfig", capacity=0.25),
    "h2o50": ours("H2OConfig", heavy=0.25, recent=0.25),
    "h2o25": ours("H2OConfig", heavy=0.125, recent=0.125),
    "streamingllm50": ours("StreamingLLMConfig", window=0.5),
    "streamingllm25": ours("StreamingLLMConfig", window=0.25),
    "think60": ours("ThinKConfig", ratio=0.4),
}
