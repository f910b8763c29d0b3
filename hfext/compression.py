"""One `quantization_config` that joins quantised weights and a compressed key-value cache.

transformers has one slot for both: `CompressionConfig(weights=..., kv_cache=...)`. Weights may be any config that
transformers knows, whose own quantiser then does that part of the work; the cache is a config of `hfext.kv_cache`.
Either part alone is accepted, and a cache config may also stand by itself. What the cache has learnt from text is
saved with the model's safetensors under `kv_cache.` and named by its digest in config.json.

Weights may also be a config of `hfext.quantization`, or such a config may stand by itself.

A config of ours is a `PartConfig`. One of a cache has two methods for this file, `attach(model, tensors)` and
`stored()`; one of weights names its quantiser in `hf_quantizer`.
"""

import dataclasses
import difflib
import importlib.metadata
import inspect
import os
from dataclasses import dataclass
from typing import Any, ClassVar, get_type_hints

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

from ._fields import VERSION, coerce, explained

METHOD = "hfext"
PREFIX = "kv_cache."
PARTS: dict[str, type["PartConfig"]] = {}


@dataclass(kw_only=True, repr=False)
class PartConfig(QuantizationConfigMixin):
    """Base of our configs: options are checked when they are made, and written and read as plain JSON.

    A class with a `method` can be found by that name. Fields named in `apart` are not checked by type and not written.
    """

    quant_method: ClassVar[str] = METHOD
    method: ClassVar[str] = ""
    slot: ClassVar[str] = ""  # of CompressionConfig
    kind: ClassVar[str] = "compression"
    apart: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if cls.method:
            PARTS[cls.method] = cls

    def __new__(cls, *args, **kwargs):
        names = [f.name for f in dataclasses.fields(cls)]
        for key in kwargs:
            if key not in names:
                near = difflib.get_close_matches(key, names, n=1)
                hint = f"Did you mean {near[0]!r}?" if near else f"It has {', '.join(names)}."
                raise TypeError(f"{cls.__name__} has no option {key!r}. {hint}")
        return super().__new__(cls)

    def __post_init__(self):
        hints = get_type_hints(type(self))
        for f in dataclasses.fields(self):
            if f.name not in self.apart:
                setattr(self, f.name, coerce(f.name, hints[f.name], getattr(self, f.name)))
        self.check()

    def check(self) -> None:
        """Check the values of the options; raises `ValueError` with field, value and range."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        options = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in self.apart}
        options = {k: v.to_dict() if isinstance(v, PartConfig) else v for k, v in options.items()}
        return {"quant_method": self.quant_method, "method": self.method, **options}

    def __repr__(self) -> str:
        changed = ", ".join(
            f"{f.name}={getattr(self, f.name)!r}"
            for f in dataclasses.fields(self)
            if f.name not in self.apart and getattr(self, f.name) != f.default
        )
        return f"{type(self).__name__}({changed})"

    @classmethod
    def read(cls, options: dict[str, Any]) -> "PartConfig":
        """The config of this class from its options in JSON."""
        return cls(**options)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any):
        """The config of `to_dict`; its method decides the class. Unknown keys are errors."""
        with explained(config_dict.get(VERSION)):
            config = cls._from_dict(config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    @classmethod
    def _from_dict(cls, config_dict: dict[str, Any]) -> "PartConfig":
        options = {key: value for key, value in config_dict.items() if key not in ("quant_method", "method", VERSION)}
        name = config_dict.get("method", cls.method)
        known = {method: part for method, part in PARTS.items() if issubclass(part, cls)}
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"There are {', '.join(sorted(known))}."
            raise ValueError(f"There is no {cls.kind} {name!r}. {hint}")
        return known[name].read(options)


class CompressionConfig(QuantizationConfigMixin):
    """Quantised weights and a compressed cache in one `quantization_config`.

    Args:
        weights (`QuantizationConfigMixin` or `dict`, *optional*): A config of `hfext.quantization` or any quantisation
            config of transformers, or its JSON form. Its quantiser does the work as if it had been given alone.
        kv_cache (`KVCacheConfig` or `dict`, *optional*): A config of `hfext.kv_cache`, or its JSON form.

    Raises:
        ValueError: Neither part is given, or a part has the wrong kind of config.
        TypeError: An unknown option.
    """

    quant_method = METHOD

    def __init__(self, weights: Any = None, kv_cache: Any = None, **unknown: Any):
        unknown = {key: value for key, value in unknown.items() if key not in ("quant_method", VERSION)}
        for key in unknown:
            near = difflib.get_close_matches(key, ("weights", "kv_cache"), n=1)
            hint = f" Did you mean {near[0]!r}?" if near else " It has weights and kv_cache."
            raise TypeError(f"CompressionConfig has no option {key!r}.{hint}")
        if weights is None and kv_cache is None:
            raise ValueError("CompressionConfig needs weights, kv_cache or both.")
        if isinstance(weights, dict):
            ours = weights.get("quant_method") == METHOD
            weights = (PartConfig if ours else AutoQuantizationConfig).from_dict(weights)
        if isinstance(kv_cache, dict):
            kv_cache = PartConfig.from_dict(kv_cache)
        if weights is not None and not isinstance(weights, QuantizationConfigMixin):
            raise ValueError(f"weights is {weights!r} but must be a quantisation config of transformers or hfext.")
        if isinstance(weights, CompressionConfig) or slot_of(weights) == "kv_cache":
            raise ValueError("weights is a config of hfext's cache; give it as kv_cache=.")
        if kv_cache is not None and slot_of(kv_cache) != "kv_cache":
            raise ValueError(
                f"kv_cache is {kv_cache!r} but must be a config of hfext.kv_cache, such as RotateKVConfig."
            )
        self.weights, self.kv_cache = weights, kv_cache

    def to_dict(self) -> dict[str, Any]:
        parts = {"weights": self.weights, "kv_cache": self.kv_cache}
        parts = {k: None if v is None else v.to_dict() for k, v in parts.items()}
        return {"quant_method": METHOD, VERSION: importlib.metadata.version("hfext"), **parts}

    def __iter__(self):
        yield from self.to_dict().items()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any):
        """The config of `to_dict`; the JSON form of a part that stands by itself is read too."""
        written = config_dict.get(VERSION)
        with explained(written):
            options = {key: value for key, value in config_dict.items() if key != VERSION}
            config = joined(PartConfig.from_dict(options)) if options.get("method") else cls(**options)
        return (config, kwargs) if return_unused_kwargs else config

    def __repr__(self) -> str:
        return f"CompressionConfig(weights={self.weights!r}, kv_cache={self.kv_cache!r})"


def slot_of(config: Any) -> str:
    """The slot of `CompressionConfig` that a config of ours belongs to; empty for others."""
    return config.slot if isinstance(config, PartConfig) else ""


def joined(config: Any) -> CompressionConfig:
    """A config that stands by itself as the whole."""
    return config if isinstance(config, CompressionConfig) else CompressionConfig(**{slot_of(config): config})


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
        if self.pre_quantized and checkpoint_files and self.compression.kv_cache is not None:
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

    def remove_quantization_config(self, model: nn.Module):
        own_save(model, False)
        super().remove_quantization_config(model)

    def dequantize(self, model: nn.Module, dtype: torch.dtype | None = None):
        made = super().dequantize(model, dtype)
        if self.compression.kv_cache is not None:
            adopt(made, self.compression.kv_cache)
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
    if weights is None:
        inner = NoWeights
    elif isinstance(weights, PartConfig):
        inner = weights.hf_quantizer
    else:
        inner = type(AutoHfQuantizer.from_config(weights, **kwargs))
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


def adopt_weights(model: nn.Module, weights: Any) -> None:
    """A loaded model got quantised weights: `save_pretrained` is to write their config."""
    old = getattr(model, "hf_quantizer", None)
    cache = old.compression.kv_cache if isinstance(old, CacheSlot) else None
    config = CompressionConfig(weights=weights, kv_cache=cache)
    model.hf_quantizer = quantizer(config, pre_quantized=True)
    model.config.quantization_config = config
    model.is_quantized, model.quantization_method = True, METHOD
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
