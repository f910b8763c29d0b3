"""Options of a compressed cache: what every method's config can do, and how configs are written and read."""

import os
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from ..compression import PartConfig
from ._cache import CompressedCache, CompressedLayer
from ._calibration import Calibration
from ._geometry import Geometry, geometry, unwrapped
from ._install import apply, observe
from ._state import Shared


@dataclass(kw_only=True, repr=False)
class KVCacheConfig(PartConfig):
    """Base of the configs of compressed caches; each method has its own.

    `from_pretrained(path, quantization_config=config)` loads a model whose `generate` uses the cache;
    `hfext.kv_cache.apply(model, config)` does so for a loaded model; `config.make_cache(model)` makes one cache for
    one call, `generate(..., past_key_values=cache)`.
    """

    slot: ClassVar[str] = "kv_cache"
    kind: ClassVar[str] = "key-value cache"
    apart: ClassVar[tuple[str, ...]] = ("calibration",)
    undoes_rotary: ClassVar[bool] = False  # works on keys before the rotary embedding
    calibration_optional: ClassVar[bool] = False  # works without `calibrate` too
    learns_with: ClassVar[tuple[str, ...]] = ()  # options that what is learnt depends on
    calibration: Calibration | None = field(default=None, repr=False, compare=False)

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
        about = None if self.calibration is None else self.calibration.about()
        return super().to_dict() | ({} if about is None else {"calibration": about})

    def __repr__(self) -> str:
        learnt = "" if self.calibration is None else f" calibrated on {self.calibration.tokens} tokens"
        return super().__repr__() + learnt

    @classmethod
    def read(cls, options: dict[str, Any]) -> "KVCacheConfig":
        about = options.pop("calibration", None)
        config = super().read(options)
        if about is not None:
            config.calibration = Calibration.awaited(about)
        return config

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write `kv_cache.safetensors`, a sidecar with the options and the calibration."""
        Calibration.write(self, folder)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike) -> "KVCacheConfig":
        """Read what `save_pretrained` wrote."""
        return Calibration.read(cls, folder)
