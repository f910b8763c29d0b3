"""The cache that `generate` sees and the base of its layers.

A layer holds every tensor in one dictionary, `held`, batch first. Reordering, selecting, repeating, offloading,
counting bytes and saving are therefore written once, and a method says only how it stores and returns keys and values.
"""

import json
import os
import tempfile
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, Cache, CacheLayerMixin

from ._geometry import COMPRESSIBLE, Geometry
from ._state import Shared, Step


class CompressedLayer(CacheLayerMixin):
    """One layer of a compressed cache. A method fills `held` in `append` and says in `drop_last` how tokens leave.

    Attributes:
        held (`dict[str, Tensor]`): All that is stored, batch first.
        seen (`int`): Tokens seen, which is what `get_seq_length` returns; never the number stored.
        step (`Step` or `None`): The attention call under way, when the model's hooks gave it.
    """

    is_sliding = False
    is_croppable = True
    is_compileable = False
    supports_early_init = False
    wants_block_input = False  # what enters the decoder layer, put into `block_input` before `append`
    numbers: tuple[str, ...] = ("seen",)  # plain attributes that are saved with `held`

    def __init__(self, shared: Shared, layer_idx: int):
        self.shared, self.layer_idx = shared, layer_idx
        self.held: dict[str, Tensor] = {}
        self.seen = 0
        self.record_past = False
        self.is_initialized = False
        self.step: Step | None = None
        self.block_input: Tensor | None = None
        self.dtype: torch.dtype | None = None
        self.device: torch.device | None = None

    # -- what a method writes

    @abstractmethod
    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Take new keys and values [batch, kv_heads, tokens, head_dim]; return those to attend to."""

    @abstractmethod
    def drop_last(self, tokens: int) -> None:
        """Forget the last `tokens` tokens, or raise before anything has changed."""

    def finish_prefill(self) -> None:
        """The prompt is complete: compress what waited for it."""

    def mask(self, query_length: int, dtype: torch.dtype) -> Tensor | None:
        """A mask of this layer alone, bool [batch, 1 or heads, queries, keys]; `None` for the model's own."""
        return None

    def decompressed(self) -> tuple[Tensor, Tensor]:
        """All stored keys and values as the attention would see them."""
        raise NotImplementedError(f"{type(self).__name__} cannot give back all its keys and values.")

    # -- what transformers calls

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.shared.dtype = key_states.dtype
        self.is_initialized = True

    def fits(self, key_states: Tensor, value_states: Tensor) -> None:
        """Refuse keys and values of other heads than the geometry has."""
        shape = self.shared.geometry
        wanted = [shape.num_kv_heads, shape.head_dim]
        got = [[x.shape[1], x.shape[3]] for x in (key_states, value_states)]
        if got != [wanted, wanted]:
            raise NotImplementedError(
                f"Layer {self.layer_idx} gives keys and values of [heads, channels] {got} where the config says "
                f"{wanted} of both. The cache was made for another model: use `config.make_cache(model)`."
            )

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.fits(key_states, value_states)
            self.lazy_initialization(key_states, value_states)
        try:
            keys, values = self.append(owned(key_states), owned(value_states))
        finally:
            self.step = None
        return keys, values

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Drop tokens from the end; a non-positive number, as transformers has it."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop({tokens_to_remove}) is not possible: give the number of tokens to drop as a negative number."
            )
        if not self.is_initialized:
            return
        if -tokens_to_remove > self.seen:
            raise ValueError(f"crop({tokens_to_remove}) drops more than the {self.seen} tokens that were seen.")
        if tokens_to_remove < 0:
            self.drop_last(-tokens_to_remove)

    def activate_past_recording(self) -> None:
        """Assisted decoding begins: tokens may be taken back after every call."""
        self.record_past = True

    def _rows(self, change: Callable[[Tensor], Tensor]) -> None:
        self.held.update({name: change(tensor) for name, tensor in self.held.items()})

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._rows(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._rows(lambda x: x[indices.to(x.device)])

    def offload(self) -> None:
        self._rows(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self._rows(lambda x: x.to(self.device, non_blocking=True))

    def reset(self) -> None:
        self.held.clear()
        self.seen, self.step, self.record_past, self.is_initialized = 0, None, False, False

    @property
    def keys(self) -> Tensor | None:
        return self.decompressed()[0] if self.seen else None

    @property
    def values(self) -> Tensor | None:
        return self.decompressed()[1] if self.seen else None

    # -- what we offer

    def nbytes(self) -> int:
        """Bytes of every stored tensor."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.held.values())


def owned(x: Tensor) -> Tensor:
    """x, copied when it is a part of something larger (a fused projection), which it would keep alive."""
    return x if x.untyped_storage().nbytes() <= x.numel() * x.element_size() else x.clone()


class CompressedCache(Cache):
    """A `Cache` whose full-attention layers are compressed; other layers are those of transformers.

    Made by `config.make_cache(model)`, or for every call by `hfext.kv_cache.apply(model, config)`.

    Args:
        config (`KVCacheConfig`): The method and its options.
        geometry (`Geometry`): Of the model.
    """

    def __init__(self, config: Any, geometry: Geometry):
        self.config = config
        self.shared = Shared(geometry, config.undoes_rotary)
        made = config.make_layers(self.shared)
        layers = [
            made[index] if index in made else DYNAMIC_LAYER_TYPE_MAPPING[kind](**kwargs)
            for index, (kind, kwargs) in enumerate(zip(geometry.layer_types, geometry.layer_kwargs, strict=True))
        ]
        super().__init__(layers=layers)
        self.compressed = [layer for layer in layers if isinstance(layer, CompressedLayer)]

    def begin(self, query_length: int, padding: Tensor | None, attention: str) -> None:
        """The model is about to run on `query_length` new tokens; `padding` is [batch, all tokens] or `None`."""
        seen = self.compressed[0].seen
        self.shared.begin(seen, padding)
        self.shared.attention = attention
        told = self.shared.prompt_length
        if self.shared.prefilling and seen and (query_length == 1 if told is None else seen >= told):
            self.finish_prefill()

    def finish_prefill(self) -> None:
        """Compress what waits for the end of the prompt. `generate` does so by itself; calling twice is harmless."""
        self.shared.prefilling = False
        for layer in self.compressed:
            if layer.is_initialized:
                layer.finish_prefill()

    def nbytes(self) -> int:
        """Bytes of all tensors held: codes, scales, full-precision tokens, positions, and the uncompressed layers.

        Methods that compress a prompt as a whole do so at the first call after it, or when `finish_prefill` is called.
        """
        plain = (layer for layer in self.layers if not isinstance(layer, CompressedLayer))
        others = sum(
            x.numel() * x.element_size() for layer in plain for x in vars(layer).values() if torch.is_tensor(x)
        )
        return sum(layer.nbytes() for layer in self.compressed) + self.shared.nbytes() + others

    def reset(self) -> None:
        super().reset()
        self.shared.prefilling, self.shared.recording = True, False
        self.shared.positions = self.shared.padding = self.shared.prompt_length = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.shared.rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.shared.rows(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.shared.rows(lambda x: x[indices.to(x.device)])

    def activate_past_recording(self) -> None:
        super().activate_past_recording()
        self.shared.recording = True

    def crop(self, tokens_to_remove: int) -> None:
        for layer in self.compressed:  # a refusal comes before the first layer has changed
            if layer.is_initialized and (
                -tokens_to_remove > layer.seen or (tokens_to_remove < 0 and not layer.is_croppable)
            ):
                layer.crop(tokens_to_remove)
        super().crop(tokens_to_remove)
        self.shared.crop(self.compressed[0].seen)

    def save(self, path: str | os.PathLike) -> None:
        """Write the compressed prompt to one safetensors file, to be read by `config.load_cache(model, path)`.

        The prompt is taken to be complete, see `finish_prefill`.
        """
        if len(self.compressed) != len(self.layers):
            raise NotImplementedError("Only caches whose layers are all compressed can be saved.")
        self.finish_prefill()
        tensors, numbers = {}, {}
        for layer in self.compressed:
            tensors |= {f"{layer.layer_idx}.{name}": x.contiguous() for name, x in layer.held.items()}
            numbers[layer.layer_idx] = {name: getattr(layer, name) for name in layer.numbers}
        if self.shared.positions is not None:
            tensors["positions"] = self.shared.positions.contiguous()
        about = {
            "names": sorted(tensors),
            "config": self.config.to_dict(),
            "model": self.shared.geometry.facts,
            "numbers": numbers,
            "prefilling": self.shared.prefilling,
            "dtype": str(self.shared.dtype).removeprefix("torch."),
        }
        write_tensors(path, tensors, about)

    def load(self, path: str | os.PathLike, device: torch.device | str = "cpu") -> "CompressedCache":
        """Fill this empty cache from a file that `save` wrote. Refuses a file of another method or model."""
        tensors, about = read_tensors(path)
        mine = {"model": self.shared.geometry.facts, "config": self.config.to_dict()}
        for name, value in mine.items():
            old, new = about.get(name) or {}, json.loads(json.dumps(value))
            other = [f"{k} {old.get(k)} and not {new.get(k)}" for k in {**old, **new} if old.get(k) != new.get(k)]
            if other:
                raise ValueError(f"{path} holds the cache of another {name}: {'; '.join(other)}.")
        missing = sorted(set(about["names"]) - set(tensors))
        if missing:
            raise ValueError(f"{path} lacks {', '.join(missing)}.")
        self.reset()
        dtype, device = getattr(torch, about["dtype"]), torch.device(device)
        tensors = {name: x.to(device) for name, x in tensors.items()}
        self.shared.dtype, self.shared.prefilling = dtype, about["prefilling"]
        self.shared.positions = tensors.pop("positions", None)
        for layer in self.compressed:
            start = f"{layer.layer_idx}."
            layer.held.update({name.removeprefix(start): x for name, x in tensors.items() if name.startswith(start)})
            for name, value in about["numbers"][str(layer.layer_idx)].items():
                setattr(layer, name, value)
            layer.dtype, layer.device, layer.is_initialized = dtype, device, layer.seen > 0
        return self


def write_tensors(path: str | os.PathLike, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    """One safetensors file with a JSON header entry `hfext`, written beside and renamed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    os.close(handle)
    try:
        safetensors.torch.save_file(tensors, temporary, metadata={"format": "pt", "hfext": json.dumps(about)})
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def read_tensors(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the `hfext` entry of such a file; `ValueError` for one that is not whole."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            about = (file.metadata() or {}).get("hfext")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from None
    if about is None:
        raise ValueError(f"{path} was not written by hfext: its header has no entry `hfext`.")
    return tensors, json.loads(about)


__all__ = ["COMPRESSIBLE", "CompressedCache", "CompressedLayer", "read_tensors", "write_tensors"]
