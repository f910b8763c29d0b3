"""One `quantization_config` that joins quantised weights and a compressed key-value cache.

transformers has one slot for both: `CompressionConfig(weights=..., kv_cache=...)`. Weights may be any config that
transformers knows, whose own quantiser then does that part of the work; the cache is a config of `hfext.kv_cache`.
Either part alone is accepted, and a cache config may also stand by itself. What the cache has learnt from text is
saved with the model's safetensors under `kv_cache.` and named by its digest in config.json.

A config of a cache has two methods for this file, `attach(model, tensors)` and `stored()`; its family registers its
reader with `register_part`.
"""

import difflib
import inspect
import os
from collections.abc import Callable
from typing import Any

import safetensors
import torch
from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    AutoHfQuantizer,
    AutoQuantizationConfig,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

METHOD = "hfext"
PREFIX = "kv_cache."
READERS: dict[str, Callable[[dict[str, Any]], Any]] = {}


def register_part(slot: str, reader: Callable[[dict[str, Any]], Any]) -> None:
    """`reader` makes the config of a slot from its JSON form."""
    READERS[slot] = reader


class CompressionConfig(QuantizationConfigMixin):
    """Quantised weights and a compressed cache in one `quantization_config`.

    Args:
        weights (`QuantizationConfigMixin` or `dict`, *optional*): Any quantisation config of transformers, or its JSON
            form. Its quantiser does the work as if it had been given alone.
        kv_cache (`KVCacheConfig` or `dict`, *optional*): A config of `hfext.kv_cache`, or its JSON form.

    Raises:
        ValueError: Neither part is given, or a part has the wrong kind of config.
        TypeError: An unknown option.
    """

    quant_method = METHOD

    def __init__(self, weights: Any = None, kv_cache: Any = None, **unknown: Any):
        unknown.pop("quant_method", None)
        if unknown.get("method"):  # the JSON form of a cache config that stood by itself
            raise ValueError(f"This is the config of a cache; give it as CompressionConfig(kv_cache={unknown}).")
        for key in unknown:
            near = difflib.get_close_matches(key, ("weights", "kv_cache"), n=1)
            hint = f" Did you mean {near[0]!r}?" if near else " It has weights and kv_cache."
            raise TypeError(f"CompressionConfig has no option {key!r}.{hint}")
        if weights is None and kv_cache is None:
            raise ValueError("CompressionConfig needs weights, kv_cache or both.")
        if isinstance(weights, dict):
            weights = AutoQuantizationConfig.from_dict(weights)
        if isinstance(kv_cache, dict):
            kv_cache = READERS["kv_cache"](kv_cache)
        if weights is not None and not isinstance(weights, QuantizationConfigMixin):
            raise ValueError(f"weights is {weights!r} but must be a quantisation config of transformers or hfext.")
        if isinstance(weights, CompressionConfig) or is_cache_config(weights):
            raise ValueError("weights is a config of hfext's cache; give it as kv_cache=.")
        if kv_cache is not None and not is_cache_config(kv_cache):
            raise ValueError(
                f"kv_cache is {kv_cache!r} but must be a config of hfext.kv_cache, such as RotateKVConfig."
            )
        self.weights, self.kv_cache = weights, kv_cache

    def to_dict(self) -> dict[str, Any]:
        parts = {"weights": self.weights, "kv_cache": self.kv_cache}
        return {"quant_method": METHOD} | {k: None if v is None else v.to_dict() for k, v in parts.items()}

    def __iter__(self):
        yield from self.to_dict().items()

    def __repr__(self) -> str:
        return f"CompressionConfig(weights={self.weights!r}, kv_cache={self.kv_cache!r})"


def is_cache_config(config: Any) -> bool:
    """Whether a config is that of a cache of ours."""
    return isinstance(config, QuantizationConfigMixin) and hasattr(config, "make_cache")


def joined(config: Any) -> CompressionConfig:
    """A cache config that stands by itself as the whole."""
    return config if isinstance(config, CompressionConfig) else CompressionConfig(kv_cache=config)


class CacheSlot:
    """The cache's part of a quantiser; mixed over the quantiser of the weights, or over `NoWeights`."""

    compression: CompressionConfig

    def __init__(self, config: Any, **kwargs: Any):
        self.compression = joined(config)
        super().__init__(self.compression.weights or self.compression, **kwargs)
        self.read: dict[str, torch.Tensor] = {}
        self.given: dict[str, torch.Tensor] | None = None

    def __reduce__(self):
        return _remade, (type(self).__mro__[2], vars(self))

    def _process_model_before_weight_loading(self, model: nn.Module, checkpoint_files: Any = None, **kwargs: Any):
        if self.pre_quantized and checkpoint_files:
            self.read = stored_tensors(checkpoint_files)
            ignored = model._keys_to_ignore_on_load_unexpected or set()
            model._keys_to_ignore_on_load_unexpected = {*ignored, rf"^{PREFIX.replace('.', '[.]')}"}
        return super()._process_model_before_weight_loading(model, checkpoint_files=checkpoint_files, **kwargs)

    def postprocess_model(self, model: nn.Module, **kwargs: Any):
        made = super().postprocess_model(model, **kwargs)
        model.config.quantization_config = self.compression
        own_save(model, True)
        cache = self.compression.kv_cache
        if cache is not None:
            cache.attach(model, self.read)
            self.read = {}
        return made

    def get_state_dict_and_metadata(self, model: nn.Module):
        state, metadata = super().get_state_dict_and_metadata(model)
        state = self.given if state is None else state
        cache = self.compression.kv_cache
        extra = {} if cache is None else {PREFIX + name: x for name, x in cache.stored().items()}
        if extra:
            state = {**(model.state_dict() if state is None else state), **extra}
        return state, metadata


def _joined_class(inner: type[HfQuantizer]) -> type[HfQuantizer]:
    return type(f"Compression{inner.__name__}", (CacheSlot, inner), {})


def _remade(inner: type[HfQuantizer], state: dict[str, Any]) -> HfQuantizer:
    """A quantiser from a pickle."""
    made = object.__new__(_joined_class(inner))
    vars(made).update(state)
    return made


class NoWeights(HfQuantizer):
    """The quantiser of weights that stay as they are."""

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def quantizer(config: Any, **kwargs: Any) -> HfQuantizer:
    """The quantiser of a config: that of its weights with the cache's part before it."""
    weights = joined(config).weights
    inner = NoWeights if weights is None else type(AutoHfQuantizer.from_config(weights, **kwargs))
    return _joined_class(inner)(config, **kwargs)


class CompressionQuantizer(HfQuantizer):
    """What transformers finds under `hfext`; making one gives the quantiser that fits the config."""

    def __new__(cls, config: Any, **kwargs: Any) -> HfQuantizer:
        return quantizer(config, **kwargs)

    def is_serializable(self) -> bool:
        return True

    is_trainable = True


class _OwnSave:
    """Stands for `save_pretrained` on one model; copied and pickled with it."""

    def __init__(self, model: torch.nn.Module):
        self.model = model

    def __call__(self, *args, **kwargs):
        given = inspect.signature(type(self.model).save_pretrained).bind(self.model, *args, **kwargs).arguments
        quantizer = self.model.hf_quantizer
        quantizer.given = given.get("state_dict")
        try:
            return type(self.model).save_pretrained(self.model, *args, **kwargs)
        finally:
            quantizer.given = None


def own_save(model: torch.nn.Module, on: bool) -> None:
    """Tell `model.hf_quantizer.given` the `state_dict` that `save_pretrained` is given, which transformers replaces by
    what the quantiser returns. Set on the instance alone; `on=False` takes it off again."""
    if isinstance(vars(model).get("save_pretrained"), _OwnSave):
        del vars(model)["save_pretrained"]
    if on:
        vars(model)["save_pretrained"] = _OwnSave(model)


def stored_tensors(files: Any) -> dict[str, torch.Tensor]:
    """The tensors under `kv_cache.` in a checkpoint."""
    found = {}
    for path in [files] if isinstance(files, str | os.PathLike) else files:
        if str(path).endswith(".safetensors"):
            with safetensors.safe_open(path, framework="pt") as file:
                found |= {
                    key.removeprefix(PREFIX): file.get_tensor(key) for key in file.keys() if key.startswith(PREFIX)
                }
    return found


def adopt(model: nn.Module, cache: Any) -> None:
    """A loaded model got a cache: `save_pretrained` is to write it, beside what quantises the weights."""
    old = getattr(model, "hf_quantizer", None)
    if isinstance(old, CacheSlot):
        old.compression.kv_cache = cache
        return
    if old is None:
        new = quantizer(cache, pre_quantized=False)
    else:
        config = CompressionConfig(weights=old.quantization_config, kv_cache=cache)
        new = _remade(type(old), {**vars(old), "compression": config, "read": {}, "given": None, "adopted": old})
    model.hf_quantizer = new
    model.config.quantization_config = new.compression
    own_save(model, True)


def abandon(model: nn.Module) -> None:
    """The cache of a model was taken off: its quantiser and its config are as before."""
    found = getattr(model, "hf_quantizer", None)
    if not isinstance(found, CacheSlot):
        return
    own_save(model, False)
    if found.compression.weights is None:
        found.remove_quantization_config(model)
        return
    model.hf_quantizer = vars(found).get("adopted", found)
    if model.hf_quantizer is found:
        found.compression.kv_cache = None
    else:
        model.config.quantization_config = found.compression.weights


if METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantization_config(METHOD)(CompressionConfig)
    register_quantizer(METHOD)(CompressionQuantizer)
