"""CSKV: what is cached is a few channels made from the hidden state; the latest tokens are kept in full as well.

With the input x [D] of the attention module, keys W_k x + b [C] and thin matrices A_k [r, D], B_k [C, r]:

    cached   A_k x [r]          used   B_k A_k x + b, then the key norm where there is one, then the rotary embedding

and the same for values, without norm and rotation; r = floor(density head_dim) kv_heads. Tokens lie in two branches:
those of finished windows of w tokens only as A x, those of the window that is not finished as A x and as they are,
which is what the attention uses. The call that finishes a window still uses its tokens as they are, so that a prompt
in one call attends to exact keys and values.

With fewer than 16 bits a finished window is coded once, min-max: keys per channel over the tokens of the window,
values per token over r / kv_heads channels. The windows of a row begin at its first real token.

"CSKV: Training-Efficient Channel Shrinking for KV Cache in Long-Context Scenarios", arXiv 2409.10593. Our additions:
the closed form (init "whitened"), and projections with a bias or with a key norm, which stay exact.
"""

import dataclasses
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .._fields import in_range, one_of
from .._packing import dequantize_packed_minmax, pack
from ..registry import Method, Result
from ._calibration import Calibration, Observed, watch
from ._channel_factors import (
    INITS,
    SIDES,
    factors,
    in_heads,
    key_norm,
    normed_keys,
    projections,
)
from ._config import KVCacheConfig
from ._evicting_layer import NOT_SHOWN
from ._geometry import Geometry, attention_modules, geometry, unwrapped
from ._quantize import quantize_minmax
from ._state import Shared
from ._window_layer import WindowLayer

PROBE = 16  # tokens on which a model without data is checked


@dataclass(kw_only=True, repr=False)
class CSKVConfig(KVCacheConfig):
    """Options of CSKV. `calibrate` makes the matrices, `CSKVTrainer` trains them further.

    Args:
        k_density (`float`, *optional*, defaults to 0.5): Share of the key channels that is cached, in (0, 1].
        v_density (`float`, *optional*, defaults to 0.5): The same of the values.
        window (`int`, *optional*, defaults to 32): Tokens of a window.
        bits (`int`, *optional*, defaults to 16): Bits of a cached number of a finished window: 2, 3, 4 or 8; 16 is the
            model's type.
        init (`str`, *optional*, defaults to `"asvd"`): The matrices of `calibrate`: `"svd"` of the weights, `"asvd"`
            of the weights scaled by the mean size of their inputs, `"whitened"` with the least squared error on the
            data.
        alpha (`float`, *optional*, defaults to 0.5): Exponent of the sizes for `"asvd"`, in [0, 1].

    Raises:
        ValueError: A value is out of range, or a density leaves no channel of a head.
    """

    method: ClassVar[str] = "cskv"
    undoes_rotary: ClassVar[bool] = True
    k_density: float = 0.5
    v_density: float = 0.5
    window: int = 32
    bits: int = 16
    init: str = "asvd"
    alpha: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        self._placed: dict[tuple, Tensor] = {}

    def check(self) -> None:
        for name in ("k_density", "v_density"):
            in_range(name, getattr(self, name), 0, 1, low_open=True)
        in_range("window", self.window, 1, 65536)
        one_of("bits", self.bits, (2, 3, 4, 8, 16))
        one_of("init", self.init, INITS)
        in_range("alpha", self.alpha, 0, 1)

    def check_model(self, geometry: Geometry) -> None:
        for side in SIDES:
            if self.rank(side, geometry) < 1:
                raise ValueError(
                    f"{side}_density is {getattr(self, f'{side}_density')} but must leave a channel of the "
                    f"{geometry.head_dim} of a head: at least {1 / geometry.head_dim:.4g}."
                )

    def rank(self, side: str, geometry: Geometry) -> int:
        """Cached channels of a side ("k" or "v") of one token."""
        return int(getattr(self, f"{side}_density") * geometry.head_dim) * geometry.num_kv_heads

    def calibration_shapes(self, geometry: Geometry) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        width, hidden = geometry.width, geometry.hidden_size
        shapes = {}
        for side in SIDES:
            r = self.rank(side, geometry)
            shapes |= {f"{side}_down": (r, hidden), f"{side}_up": (width, r), f"{side}_bias": (width,)}
        return {f"{i}.{name}": (shape, torch.float32) for i in geometry.layers for name, shape in shapes.items()}

    def calibrate(self, model: nn.Module, data: Any = None, length: int = 512) -> "CSKVConfig":
        """A copy with the matrices of every layer.

        Args:
            model (`PreTrainedModel`): Runs with its own attention.
            data (*optional*): Token ids; see `hfext.kv_cache.calibration_batches`. Needed but for `init="svd"`.
            length (`int`, *optional*, defaults to 512): Tokens of a row when `data` is one long tensor.

        Raises:
            NotImplementedError: Keys or values are more than a projection of the input and a norm of the keys.
        """
        inner = unwrapped(model)
        shape = geometry(inner)
        self.check_model(shape)
        shape.needs_rotary(self.method)
        if data is None and self.init != "svd":
            raise ValueError(f"init is {self.init!r}, which needs data: call `config.calibrate(model, data)`.")
        weights = {i: projections(attention_modules(inner)[i], shape) for i in shape.layers}
        moments, tokens = input_statistics(inner, data, shape, weights, self.init == "whitened", length)
        tensors = {}
        for index, (size, moment) in moments.items():
            for side in SIDES:
                weight, bias = weights[index][side]
                down, up = factors(weight, self.rank(side, shape), self.init, size, moment, self.alpha)
                parts = {"down": down, "up": up, "bias": bias}
                tensors |= {f"{index}.{side}_{name}": x.cpu().contiguous().clone() for name, x in parts.items()}
        return dataclasses.replace(self, calibration=Calibration(tensors, shape.facts, tokens))

    def placed(self, layer: int, name: str, like: Tensor) -> Tensor:
        """A calibrated tensor with the device and type of `like`; copies are kept with the config."""
        x = self.calibration.layer(layer, name)
        if x.device == like.device and x.dtype == like.dtype:
            return x
        key = (self.calibration.digest, layer, name, like.device, like.dtype)
        if key not in self._placed:
            self._placed[key] = x.to(like.device, like.dtype)
        return self._placed[key]

    def make_layer(self, shared: Shared, layer_idx: int) -> "CSKVLayer":
        return CSKVLayer(shared, layer_idx, self)


def input_statistics(
    model: nn.Module,
    data: Any,
    shape: Geometry,
    weights: dict[int, dict[str, tuple[Tensor, Tensor]]],
    second: bool,
    length: int = 512,
) -> tuple[dict[int, tuple[Tensor, Tensor | None]], int]:
    """mean |x| [hidden] and with `second` E[x x^T] [hidden, hidden] of every layer, float64, and the tokens read.

    Padding is left out. Checks that keys and values are the projections of the input that `weights` say, on `data` or,
    without any, on a few tokens, which are not counted.
    """
    sums: dict[int, list[Tensor]] = {}

    def visit(seen: Observed) -> None:
        hidden, module = seen.step.hidden_states, seen.step.module
        x = hidden[seen.real].double()
        if seen.layer not in sums:
            _check_projections(hidden, module, seen, weights[seen.layer], shape)
            sums[seen.layer] = [torch.zeros_like(x[0]), x.new_zeros(x.shape[1], x.shape[1] if second else 0)]
        sums[seen.layer][0] += x.abs().sum(0)
        if second:
            sums[seen.layer][1] += x.T @ x

    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    tokens = watch(model, torch.arange(min(PROBE, vocabulary))[None] if data is None else data, visit, length)
    means = {index: (size / tokens, moment / tokens if second else None) for index, (size, moment) in sums.items()}
    return means, 0 if data is None else tokens


def _check_projections(
    hidden: Tensor, module: nn.Module, seen: Observed, weights: dict[str, tuple[Tensor, Tensor]], shape: Geometry
) -> None:
    k, v = (hidden.float() @ weight.T + bias for weight, bias in (weights[side] for side in SIDES))
    pairs = {"keys": (normed_keys(key_norm(module), k, shape), seen.keys), "values": (in_heads(v, shape), seen.values)}
    for name, (made, wanted) in pairs.items():
        if made.shape != wanted.shape or (made - wanted.float()).norm() > 0.02 * wanted.float().norm():
            raise NotImplementedError(
                f"The {name} of {type(module).__name__} are not a projection of its input (and a norm of the keys), "
                "which cskv needs. Take xkv, rotatekv or kivi."
            )


class CSKVLayer(WindowLayer):
    """Held of finished windows: `<side>_feature` [batch, places, r], or `<side>_codes` [batch, places, packed] with
    `<side>_scale` and `<side>_zero`."""

    def __init__(self, shared: Shared, layer_idx: int, config: CSKVConfig):
        super().__init__(shared, layer_idx, config.window)
        self.config = config
        self.rates = {} if config.bits == 16 else {"key_scale": config.window, "key_zero": config.window}
        self._norm: Callable[[], nn.Module | None] = _no_norm

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if self.step is None:
            raise RuntimeError(NOT_SHOWN)
        norm = key_norm(self.step.module)
        self._norm = _no_norm if norm is None else weakref.ref(norm)
        return super().append(keys, values)

    def features(self, side: str) -> Tensor:
        x = self.step.hidden_states
        return x @ self.config.placed(self.layer_idx, f"{side[0]}_down", x).T

    def _group(self, side: str, rank: int) -> tuple[int, int]:
        """Size and dimension of the groups that share a scale."""
        return (self.window, -2) if side == "key" else (rank // self.shared.geometry.num_kv_heads, -1)

    def encode(self, side: str, feature: Tensor) -> dict[str, Tensor]:
        bits = self.config.bits
        if bits == 16:
            return {"feature": feature}
        codes, scale, zero = quantize_minmax(feature, bits, *self._group(side, feature.shape[-1]))
        return {"codes": pack(codes, bits), "scale": scale, "zero": zero}

    def decode(self, side: str, codes: dict[str, Tensor]) -> Tensor:
        if self.config.bits == 16:
            return codes["feature"]
        rank = self.config.rank(side[0], self.shared.geometry)
        group, dim = self._group(side, rank)
        parts = (codes[name] for name in ("codes", "scale", "zero"))
        return dequantize_packed_minmax(*parts, self.config.bits, group, rank, dim, self.dtype)

    def expand(self, side: str, feature: Tensor) -> Tensor:
        shape = self.shared.geometry
        up, bias = (self.config.placed(self.layer_idx, f"{side[0]}_{name}", feature) for name in ("up", "bias"))
        flat = feature @ up.T + bias
        return normed_keys(self._norm(), flat, shape) if side == "key" else in_heads(flat, shape)


def _no_norm() -> None:
    """The weak reference to no norm."""


METHOD = Method(
    name="cskv",
    family="kv_cache",
    title="CSKV: Training-Efficient Channel Shrinking for KV Cache in Long-Context Scenarios",
    arxiv="2409.10593",
    year=2024,
    authors="Luning Wang et al.",
    repo="wln20/CSKV",
    status="variant",
    difference="Adds the closed form of the training's optimum, projections with a bias, a key norm after the "
    "decompression, batches and beams.",
    target="hfext.kv_cache.cskv:CSKVConfig",
    config=CSKVConfig,
    usage="hfext.kv_cache.apply(model, hfext.kv_cache.CSKVConfig(k_density=0.5, v_density=0.5).calibrate(model, ids))",
    summary="Caches a few channels made from the hidden state, besides a window of exact keys and values.",
    claim="Matrices trained layer by layer, on text of one small corpus, are close to the best of their rank.",
    headline=Result(
        metric="memory of keys and values",
        setting="LongChat-7B-32k and Mistral-7B, long-context benchmarks",
        value="20 %, 5 % with 4 bits",
        baseline="full cache",
    ),
    recipe="kv_cache/cskv-smollm2-wikitext2.yaml",
)
