"""RotateKV: two-bit keys and values, rotated so that no channel stands out.

keys of a token, over all kv heads, before the rotary embedding:  y = (x M_n)[pi],   codes = Q(y; b, g, c)
values of a token, head by head:                                  y = v M_d,         codes = Q(y; b, d, c)
M_n is the orthonormal Hadamard matrix on blocks of n channels (several heads); pi sorts the channels by their mean
after the rotation, so that a group of g channels has a small range. Q is asymmetric: s = c (max - min) / (2^b - 1),
z = round(-c min / s), code = clamp(round(y / s) + z). Tokens of massive activations, found by the 20 largest entries
of what enters the decoder layer, stay as they are. Everything is undone when the cache is read.

"RotateKV: Accurate and Robust 2-Bit KV Cache Quantization for LLMs via Outlier-Aware Adaptive Rotations",
arXiv 2501.16383. As in the released code pi sorts signed sums over calibration text; without calibration it is learnt
from each prompt. Where the clipped range of a group lies beside all its values the group is not clipped.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from .._fields import divides, in_range, one_of
from .._packing import dequantize_packed, pack, unpack_to
from ..registry import Method, Result
from ._calibration import Calibration, Observed, watch
from ._codec_layer import CodecLayer
from ._config import KVCacheConfig
from ._geometry import Geometry, geometry, unwrapped
from ._hadamard import rotate, rotation_block
from ._quantize import quantize_affine
from ._sinks import Sinks
from ._state import Shared

LEARN_FROM = 32  # tokens that an order is learnt from at least, when there was no calibration


@dataclass(kw_only=True, repr=False)
class RotateKVConfig(KVCacheConfig):
    """Options of RotateKV. Works with and without `calibrate(model, data)`.

    Without it a batch stays in full precision until its shortest row has 32 tokens to learn an order from; a prompt
    that comes in chunks is learnt from its first, and each chunk has `sink_topk` entries of its own.

    Args:
        bits (`int`, *optional*, defaults to 2): Bits of a code: 2, 3, 4, 8 or 16.
        group_size (`int`, *optional*): Channels of a key group; must divide the channels of a token's keys. By default
            the largest power of two up to 128 that does.
        head_group (`int`, *optional*, defaults to 4): Heads rotated together; the largest number up to this one that
            divides the heads and has a Hadamard matrix is taken.
        clip (`float`, *optional*): Ratio c in (0, 1]; by default 0.8 at 2 bits and 1 otherwise.
        rotation (`str`, *optional*, defaults to `"pre_rope"`): Or, for comparison, `"post_rope"` and `"none"`.
        reorder (`str`, *optional*, defaults to `"after"`): Sort channels `"after"` the rotation (by signed mean),
            `"before"` it (by mean magnitude), or not (`"none"`).
        subtract_mean (`bool`, *optional*, defaults to `False`): Store keys less the mean of each rotated channel. Not
            in the paper.
        sink_topk (`int`, *optional*, defaults to 20): Entries of the layer's input whose tokens stay as they are.
        detect_in_decode (`bool`, *optional*, defaults to `False`): Look for such tokens after the prompt too.
        residual_length (`int`, *optional*, defaults to 0): Latest tokens kept in full precision, up to 15 more before
            they are coded together. The paper has none; 32 help much at 2 bits.
        prefill_exact (`bool`, *optional*, defaults to `True`): The prompt attends to exact keys and values. `False`
            quantises first, as the paper does to measure perplexity in one call.
        fused_values (`bool`, *optional*, defaults to `False`): The weights rotate the values, see `fuse_values`.
    """

    method: ClassVar[str] = "rotatekv"
    calibration_optional: ClassVar[bool] = True
    learns_with: ClassVar[tuple[str, ...]] = ("rotation", "reorder", "head_group")
    bits: int = 2
    group_size: int | None = None
    head_group: int = 4
    clip: float | None = None
    rotation: Literal["pre_rope", "post_rope", "none"] = "pre_rope"
    reorder: Literal["after", "before", "none"] = "after"
    subtract_mean: bool = False
    sink_topk: int = 20
    detect_in_decode: bool = False
    residual_length: int = 0
    prefill_exact: bool = True
    fused_values: bool = False

    @property
    def undoes_rotary(self) -> bool:
        return self.rotation != "post_rope"

    def check(self) -> None:
        one_of("bits", self.bits, (2, 3, 4, 8, 16))
        in_range("head_group", self.head_group, 1, 1024)
        in_range("clip", self.ratio, 0, 1, low_open=True)
        in_range("sink_topk", self.sink_topk, 0, 4096)
        in_range("residual_length", self.residual_length, 0, 65536)
        if self.group_size is not None:
            in_range("group_size", self.group_size, 1, 65536)

    @property
    def learns(self) -> bool:
        """Whether these options have something to learn from text."""
        return self.reorder != "none" or self.subtract_mean

    @property
    def ratio(self) -> float:
        """The clip ratio in use."""
        return (0.8 if self.bits == 2 else 1.0) if self.clip is None else self.clip

    def group(self, geometry: Geometry) -> int:
        """Channels of a key group."""
        return self.group_size or max(2**k for k in range(8) if geometry.width % 2**k == 0)

    def check_model(self, geometry: Geometry) -> None:
        divides("group_size", self.group(geometry), geometry.width, "key channels of a token")

    def calibration_shapes(self, geometry: Geometry) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        wanted = {"key_order": torch.int32} if self.reorder != "none" else {}
        wanted |= {"key_mean": torch.float32} if self.subtract_mean else {}
        return {f"{i}.{name}": ((geometry.width,), kind) for i in geometry.layers for name, kind in wanted.items()}

    def check_calibration(self, geometry: Geometry) -> None:
        for index in geometry.layers if self.reorder != "none" else ():
            order = self.calibration.layer(index, "key_order")
            if not torch.equal(order.long().sort().values, torch.arange(geometry.width)):
                raise ValueError(f"The calibration tensor {index}.key_order is not an order of the channels.")

    def calibrate(self, model: nn.Module, data: Any, length: int = 512) -> "RotateKVConfig":
        """A copy with the order (and mean) of the key channels, learnt from text: 8,000 tokens or more.

        Args:
            model (`PreTrainedModel`): Runs with its own attention.
            data: Token ids; see `hfext.kv_cache.calibration_batches`. Not the text you measure on.
            length (`int`, *optional*, defaults to 512): Tokens of a row when `data` is one long tensor.
        """
        shape = geometry(unwrapped(model))
        self.check_model(shape)
        if self.undoes_rotary:
            shape.needs_rotary(self.method)
        if not self.calibration_shapes(shape):
            return super().calibrate(model, data)
        sums: dict[int, Tensor] = {}
        counts: dict[int, int] = {}

        def visit(seen: Observed) -> None:
            keys = seen.keys
            rotary = shape.rotary_of(seen.layer)
            if self.rotation == "post_rope" and rotary is not None:
                keys = rotary.rotate(keys, seen.step.cos.float(), seen.step.sin.float())
            real = seen.real & (seen.real.cumsum(-1) > 1)  # the first token of a text is like no other
            flat = keys.transpose(1, 2).flatten(2)[real]
            new = torch.stack([self.turned(flat, shape).double().sum(0), flat.abs().double().sum(0)])
            sums[seen.layer] = sums.get(seen.layer, 0) + new
            counts[seen.layer] = counts.get(seen.layer, 0) + len(flat)

        tokens = watch(model, data, visit, length)
        if not all(counts.values()):
            raise ValueError(
                "The calibration data holds no token behind the first of a text, so nothing can be learnt."
            )
        tensors: dict[str, Tensor] = {}
        for index, (signed, size) in sums.items():
            order, mean = self.learnt(signed / counts[index], size / counts[index], shape)
            tensors |= {f"{index}.key_order": order.int().cpu(), f"{index}.key_mean": mean.float().cpu()}
        wanted = self.calibration_shapes(shape)
        kept = {name: x for name, x in tensors.items() if name in wanted}
        return dataclasses.replace(self, calibration=Calibration(kept, self.facts(shape), tokens))

    def turned(self, x: Tensor, geometry: Geometry) -> Tensor:
        """Keys [..., channels] after the rotation alone."""
        if self.rotation == "none":
            return x
        return rotate(x, rotation_block(geometry.num_kv_heads, geometry.head_dim, self.head_group))

    def learnt(self, signed: Tensor, size: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
        """Order and mean [..., channels] of the coded channels, from means of rotated keys and of magnitudes."""
        if self.reorder == "after":
            order = signed.argsort(dim=-1, stable=True)
            return order, signed.gather(-1, order)
        if self.reorder == "none":
            return torch.arange(signed.shape[-1], device=signed.device).expand(signed.shape), signed
        order = size.argsort(dim=-1, stable=True)
        block = rotation_block(geometry.num_kv_heads, geometry.head_dim, self.head_group)
        before = signed if self.rotation == "none" else rotate(signed, block, inverse=True)
        return order, self.turned(before.gather(-1, order), geometry)

    def make_layer(self, shared: Shared, layer_idx: int) -> CodecLayer:
        return RotateKVLayer(shared, layer_idx, self)


def permuted(x: Tensor, order: Tensor) -> Tensor:
    """x [batch, tokens, channels] with channel order[j] in place j; order [channels] or [batch, channels]."""
    if order.dim() == 1 or order.shape[0] == 1:
        return x.index_select(-1, order.view(-1))
    return x.gather(-1, order.unsqueeze(1).expand(x.shape))


def group_members(order: Tensor, group_size: int) -> Tensor:
    """Which channels a group holds: [batch or 1, groups, channels] of 0 and 1, from an order [.., channels].

    A product with it spreads the scales of the groups over the channels, much faster than putting values in order.
    """
    place = order.view(-1, order.shape[-1]).argsort(-1)
    groups = torch.arange(order.shape[-1] // group_size, device=order.device)
    return (place.unsqueeze(1) // group_size == groups[:, None]).float()


class RotateKVLayer(CodecLayer):
    """Held: codes [batch, tokens, packed], scales and zeros [batch, tokens, groups], and the sinks."""

    wants_block_input = True

    def __init__(self, shared: Shared, layer_idx: int, config: RotateKVConfig):
        super().__init__(shared, layer_idx, config.residual_length)
        self.config = config
        self.sinks = Sinks(self.held)

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        looks = self.config.sink_topk and (self.shared.prefilling or self.config.detect_in_decode)
        padding = self.shared.padding
        real = None if padding is None else padding[:, self.seen : self.seen + keys.shape[2]]
        self.sinks.note(keys, self.block_input if looks else None, self.config.sink_topk if looks else 0, real)
        self.block_input = None
        out = super().append(keys, values)
        return out if self.config.prefill_exact or keys.shape[2] == 1 else self.decompressed()

    def due(self, side: str, recent: int) -> int:
        return 0 if self._learns_yet() and self._fewest_real() < LEARN_FROM else super().due(side, recent)

    def _learns_yet(self) -> bool:
        """Whether order and mean are to be learnt from the prompt, and have not been."""
        return self.config.learns and self.config.calibration is None and not {"order", "mean"} & self.held.keys()

    def _fewest_real(self) -> int:
        """Real tokens of the shortest row."""
        padding = self.shared.padding
        return self.seen if padding is None else int(padding[:, : self.seen].sum(1).min())

    def code(self) -> None:
        count = self.due("key", self.held["key_recent"].shape[2])
        if count and self._learns_yet():
            self._learn(self.held["key_recent"])
        if count:
            self.sinks.keep(count, self.seen - self.held["key_recent"].shape[2])
        super().code()

    def drop_last(self, tokens: int) -> None:
        super().drop_last(tokens)
        self.sinks.drop_last(tokens, self.seen)

    # -- keys and values

    def _learn(self, keys: Tensor) -> None:
        """Order and mean of each row from the keys seen so far, which are its prompt."""
        cfg, shape = self.config, self.shared.geometry
        before = self._flat(keys, 0)
        padding = self.shared.padding
        real = torch.ones(before.shape[:2], device=keys.device) if padding is None else padding[:, : self.seen].float()
        real = (real * (real.cumsum(-1) > 1)).unsqueeze(-1)
        count = real.sum(1).clamp(min=1)
        signed, size = (self.config.turned(before, shape) * real).sum(1) / count, (before.abs() * real).sum(1) / count
        order, mean = cfg.learnt(signed, size, shape)
        kind = torch.int16 if shape.width < 2**15 else torch.int32
        if cfg.reorder != "none":
            self.held["order"] = order.to(kind).contiguous()
        if cfg.subtract_mean:
            self.held["mean"] = mean.half()

    def _order(self) -> Tensor | None:
        if self.config.reorder == "none":
            return None
        if "order" in self.held:
            return self.held["order"].long()
        return self.config.calibration.layer(self.layer_idx, "key_order").to(self.device).long()

    def _mean(self) -> Tensor | None:
        if not self.config.subtract_mean:
            return None
        if "mean" in self.held:
            return self.held["mean"].float().unsqueeze(1)
        return self.config.calibration.layer(self.layer_idx, "key_mean").to(self.device)

    def _flat(self, keys: Tensor, start: int) -> Tensor:
        """Keys [batch, tokens, channels] float32, before the rotary embedding unless the rotation comes after it."""
        before = self.unrotated(keys, start) if self.config.undoes_rotary else keys.float()
        return before.transpose(1, 2).flatten(2)

    def encode(self, side: str, x: Tensor, start: int) -> dict[str, Tensor]:
        cfg, shape = self.config, self.shared.geometry
        if side == "value":
            flat = x.transpose(1, 2).float()
            if cfg.rotation != "none" and not cfg.fused_values:
                flat = rotate(flat, rotation_block(1, flat.shape[-1], 1))
            flat, group = flat.flatten(2), flat.shape[-1]
        else:
            flat, group = self._flat(x, start), cfg.group(shape)
            order, mean = self._order(), self._mean()
            if cfg.reorder == "before":
                flat = permuted(flat, order)
            flat = cfg.turned(flat, shape)
            if cfg.reorder == "after":
                flat = permuted(flat, order)
            if mean is not None:
                flat = flat - mean
        codes, scale, zero = quantize_affine(flat, cfg.bits, group, cfg.ratio)
        if side == "key" and cfg.reorder == "after":
            codes = permuted(codes, order.argsort(-1))  # stored in the channels' own order, see `decode`
        return {"codes": pack(codes, cfg.bits), "scale": scale, "zero": zero}

    def decode(self, side: str, codes: dict[str, Tensor], start: int | Tensor) -> Tensor:
        cfg, shape = self.config, self.shared.geometry
        heads, dim = shape.num_kv_heads, shape.head_dim
        group = dim if side == "value" else cfg.group(shape)
        order = self._order() if side == "key" else None
        if order is not None and cfg.reorder == "after":
            members = group_members(order, group)
            flat = unpack_to(codes["codes"], cfg.bits, heads * dim)
            scale = codes["scale"].float()
            flat.mul_(scale @ members).sub_((scale * codes["zero"]) @ members)
        else:
            flat = dequantize_packed(codes["codes"], codes["scale"], codes["zero"], cfg.bits, group, heads * dim)
        if side == "value":
            turned = flat.unflatten(2, (heads, dim))
            if cfg.rotation != "none" and not cfg.fused_values:
                turned = rotate(turned, rotation_block(1, dim, 1), inverse=True)
            out = turned.transpose(1, 2)
        else:
            mean = self._mean()
            if mean is not None:
                flat += mean if cfg.reorder != "after" else permuted(mean.view(-1, 1, heads * dim), order.argsort(-1))
            if cfg.rotation != "none":
                flat = rotate(flat, rotation_block(heads, dim, cfg.head_group), inverse=True)
            if cfg.reorder == "before":
                flat = permuted(flat, order.argsort(-1))
            out = flat.unflatten(2, (heads, dim)).transpose(1, 2)
            out = self.rotated(out, start) if cfg.undoes_rotary else out
        return self.sinks.restore(side, out.to(self.dtype), start)


METHOD = Method(
    name="rotatekv",
    family="kv_cache",
    title="RotateKV: Accurate and Robust 2-Bit KV Cache Quantization for LLMs via Outlier-Aware Adaptive Rotations",
    arxiv="2501.16383",
    year=2025,
    authors="Zunhai Su et al.",
    repo="ZunhaiSu/RotateKV",
    status="variant",
    difference="The prompt attends to exact keys and values; a group whose clipped range holds none of its values is "
    "not clipped; without calibration the order of the channels is learnt from each prompt. `residual_length` and "
    "`subtract_mean` are ours.",
    target="hfext.kv_cache.rotatekv:RotateKVConfig",
    config=RotateKVConfig,
    usage="from_pretrained(path, quantization_config=hfext.RotateKVConfig(bits=2, residual_length=32))",
    summary="Keys and values in 2 to 4 bits after a rotation before the rotary embedding and a reorder of channels.",
    claim="At two bits a rotated and reordered cache loses far less than one quantised as it is.",
    headline=Result(
        metric="perplexity increase at 2 bits", setting="Llama-2-13B, WikiText-2", value="< 0.3", baseline="full cache"
    ),
    recipe="kv_cache/rotatekv-smollm2-wikitext2.yaml",
)
