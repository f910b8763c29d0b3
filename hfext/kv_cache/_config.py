"""Options of a compressed cache: what every method's config can do, and how configs are written and read."""

import dataclasses
import difflib
import os
from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, get_type_hints

import torch
from torch import nn
from transformers.utils.quantization_config import QuantizationConfigMixin

from .._fields import coerce
from ._cache import CompressedCache, CompressedLayer
from ._calibration import Calibration
from ._geometry import Geometry, geometry, unwrapped
from ._install import apply, observe
from ._state import Shared

CONFIGS: dict[str, type["KVCacheConfig"]] = {}


@dataclass(kw_only=True, repr=False)
class KVCacheConfig(QuantizationConfigMixin):
    """Base of the configs of compressed caches; each method has its own.

    `from_pretrained(path, quantization_config=config)` loads a model whose `generate` uses the cache;
    `hfext.kv_cache.apply(model, config)` does so for a loaded model; `config.make_cache(model)` makes one cache for
    one call, `generate(..., past_key_values=cache)`.
    """

    quant_method: ClassVar[str] = "hfext"
    method: ClassVar[str] = ""
    undoes_rotary: ClassVar[bool] = False  # works on keys before the rotary embedding
    calibration_optional: ClassVar[bool] = False  # works without `calibrate` too
    learns_with: ClassVar[tuple[str, ...]] = ()  # options that what is learnt depends on
    calibration: Calibration | None = field(default=None, repr=False, compare=False)

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if cls.method:
            CONFIGS[cls.method] = cls

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
            if f.name != "calibration":
                setattr(self, f.name, coerce(f.name, hints[f.name], getattr(self, f.name)))
        self.check()

    def check(self) -> None:
        """Check the values of the options; raises `ValueError` with field, value and range."""

    # -- what a method writes

    @abstractmethod
    def make_layer(self, shared: Shared, layer_idx: int) -> CompressedLayer:
        """An empty layer."""

    def make_layers(self, shared: Shared) -> dict[int, CompressedLayer]:
        """The empty layers of one cache, by index."""
        return {index: self.make_layer(shared, index) for index in shared.geometry.layers}

    def check_model(self, geometry: Geometry) -> None:
        """Refuse a model that this method cannot serve, or whose sizes do not fit the options."""

    def calibration_shapes(self, geometry: Geometry) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Names, shapes and types of the tensors that `calibrate` makes; empty when there are none."""
        return {}

    def check_calibration(self, geometry: Geometry) -> None:
        """Check the values of calibrated tensors beyond their shapes and types."""

    # -- what users call

    def calibrate(self, model: nn.Module, data: Any, **options: Any) -> "KVCacheConfig":
        """A copy of this config with what the method learns from `data`; methods that learn nothing refuse."""
        raise ValueError(f"{self.method} learns nothing from data: use the config as it is.")

    def make_cache(self, model: nn.Module) -> CompressedCache:
        """An empty cache for `model.generate(..., past_key_values=cache)` or `model(..., past_key_values=cache)`."""
        cache = CompressedCache(self, self.checked(model))
        observe(model)
        return cache

    def load_cache(self, model: nn.Module, path: str | os.PathLike) -> CompressedCache:
        """The cache that `cache.save(path)` wrote, ready to continue on the model's device and in its dtype."""
        weight = next(unwrapped(model).parameters())
        cache = self.make_cache(model).load(path, weight.device)
        if cache.get_seq_length() and weight.is_floating_point() and cache.shared.dtype != weight.dtype:
            raise ValueError(
                f"{path} was saved by a model in {cache.shared.dtype}, and this one is in {weight.dtype}."
            )
        return cache

    def checked(self, model: nn.Module) -> Geometry:
        """The geometry of a model that this config fits; raises what is wrong otherwise."""
        shape = geometry(model)
        if self.undoes_rotary:
            shape.needs_rotary(self.method)
        self.check_model(shape)
        wanted = self.calibration_shapes(shape)
        if wanted and not (self.calibration is None and self.calibration_optional):
            if self.calibration is None:
                raise ValueError(
                    f"{type(self).__name__} is not calibrated: load the model without it, then call "
                    "`config = config.calibrate(model, data)` and `hfext.kv_cache.apply(model, config)`."
                )
            self.calibration.fits(self.facts(shape), wanted)
            self.check_calibration(shape)
        return shape

    def attach(self, model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
        """A model was loaded with this config; `tensors` are those of its checkpoint under `kv_cache.`."""
        if self.calibration is not None and not self.calibration.tensors:
            self.calibration = self.calibration.filled(tensors, "the checkpoint")
        apply(model, self)

    def stored(self) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps of this config beside its JSON form."""
        return {} if self.calibration is None else self.calibration.tensors

    def facts(self, geometry: Geometry) -> dict[str, Any]:
        """What a calibration belongs to: the model's sizes, and the options it was made with."""
        return {**geometry.facts, **{name: getattr(self, name) for name in self.learns_with}}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; the calibrated tensors are named by their digest and stored as safetensors."""
        options = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "calibration"}
        about = None if self.calibration is None else self.calibration.about()
        made = {"quant_method": self.quant_method, "method": self.method, **options}
        return made if about is None else {**made, "calibration": about}

    def __repr__(self) -> str:
        changed = ", ".join(
            f"{f.name}={getattr(self, f.name)!r}"
            for f in dataclasses.fields(self)
            if f.name != "calibration" and getattr(self, f.name) != f.default
        )
        learnt = "" if self.calibration is None else f" calibrated on {self.calibration.tokens} tokens"
        return f"{type(self).__name__}({changed}){learnt}"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any):
        """The config of `to_dict`; its method decides the class. Unknown keys are errors."""
        values = {key: value for key, value in config_dict.items() if key not in ("quant_method", "method")}
        name = config_dict.get("method", cls.method)
        if name not in CONFIGS:
            near = difflib.get_close_matches(str(name), CONFIGS, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"There are {', '.join(sorted(CONFIGS))}."
            raise ValueError(f"There is no key-value cache {name!r}. {hint}")
        about = values.pop("calibration", None)
        config = CONFIGS[name](**values)
        if about is not None:
            config.calibration = Calibration.awaited(about)
        return (config, kwargs) if return_unused_kwargs else config

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write `kv_cache.safetensors`, a sidecar with the options and the calibration."""
        Calibration.write(self, folder)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike) -> "KVCacheConfig":
        """Read what `save_pretrained` wrote."""
        return Calibration.read(cls, folder)


def in_range(name: str, value: float, low: float, high: float, low_open: bool = False) -> None:
    """Raise unless low <= value <= high (low < value with `low_open`)."""
    if not (low < value if low_open else low <= value) or not value <= high:
        raise ValueError(f"{name} is {value} but must be in {'(' if low_open else '['}{low}, {high}].")


def one_of(name: str, value: Any, allowed: Iterable[Any]) -> None:
    """Raise unless the value is one of those allowed."""
    allowed = list(allowed)
    if value not in allowed:
        raise ValueError(f"{name} is {value!r} but must be one of {', '.join(map(str, allowed))}.")


def divides(name: str, value: int, whole: int, what: str) -> None:
    """Raise unless `value` divides `whole`."""
    if value < 1 or whole % value:
        fitting = [n for n in range(1, whole + 1) if whole % n == 0]
        raise ValueError(
            f"{name} is {value} but must divide the {whole} {what}: one of {', '.join(map(str, fitting))}."
        )
