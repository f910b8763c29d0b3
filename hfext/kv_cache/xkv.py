"""xKV: adjacent layers share one low-rank factor of the prompt's tokens.

For a group of G layers with keys K_j [T, C] before the rotary embedding, for every row of a batch alone:

    [K_1 ... K_G] = U S V^T [T, G C],   A = U_r S_r [T, r],   B_j = the columns of layer j of V_r^T [r, C]
    K_j ~ A B_j, rotated at its own positions;   values likewise with a rank of their own

A is stored once a group. The prompt attends to exact keys and values; it is decomposed when it is complete. Padding
is rows of zeros. Factors of T tokens take r (T + G C) numbers instead of T G C, so that a prompt of
T <= r G C / (G C - r) tokens would grow: it stays as it is, for keys and values alone. Later tokens, a second prompt
among them, stay as they are too.

"xKV: Cross-Layer SVD for KV-Cache Compression", arXiv 2503.18893. A group of one layer is the decomposition of every
layer alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._fields import in_range, one_of
from .._packing import dequantize_packed_minmax, pack
from ..registry import Method, Result
from ._cache import CompressedCache
from ._config import KVCacheConfig
from ._geometry import Geometry
from ._group_layer import SIDES, GroupLayer, adjacent, linked
from ._low_rank import SOLVERS, factor_bytes, factorised, pays
from ._quantize import quantize_minmax
from ._state import Shared

Ranks = int | float | list[int | float]


@dataclass(kw_only=True, repr=False)
class XKVConfig(KVCacheConfig):
    """Options of xKV.

    Args:
        layer_group_size (`int`, *optional*, defaults to 4): Adjacent full-attention layers of a group. Another kind of
            layer between them ends a group.
        groups (`list[list[int]]`, *optional*): Layers of every group, in place of `layer_group_size`. Layers in none
            of them stay as they are.
        rank_k (`int` or `float` or a list of these, *optional*, defaults to 0.125): Rank of the keys of a group: a
            whole number, or a share in (0, 1] of the channels of the group's layers together. A list has one for each
            group. Of a single whole number a smaller group than `layer_group_size` gets its part, rounded up. No rank
            is above the number of tokens or of channels.
        rank_v (`int` or `float` or a list of these, *optional*, defaults to 0.1875): The same of the values.
        merge_key (`bool`, *optional*, defaults to `True`): Decompose keys.
        merge_value (`bool`, *optional*, defaults to `True`): Decompose values.
        bits (`int`, *optional*, defaults to 16): Bits of the numbers of the token factor: 2, 3, 4 or 8, with a scale
            and a minimum for every `quant_group` of a token's, to a multiple of which ranks are then rounded up; or
            16, the model's type. Bases stay in the model's type.
        quant_group (`int`, *optional*, defaults to 32): Numbers that share a scale.
        always (`bool`, *optional*, defaults to `False`): Also decompose a prompt that takes more bytes then.
        solver (`str`, *optional*, defaults to `"gram"`): `"gram"` (eigenvectors of the smaller product of the matrix
            with itself, in float64), `"exact"` (singular value decomposition) or `"random"` (randomised, for long
            prompts and wide groups).
        seed (`int`, *optional*, defaults to 0): Of the random solver.

    `report(cache)` says what was decided.

    Raises:
        ValueError: A value is out of range, or groups or ranks do not fit the model.
    """

    method: ClassVar[str] = "xkv"
    undoes_rotary: ClassVar[bool] = True
    layer_group_size: int = 4
    groups: list[list[int]] | None = None
    rank_k: int | float | list[int | float] = 0.125
    rank_v: int | float | list[int | float] = 0.1875
    merge_key: bool = True
    merge_value: bool = True
    bits: int = 16
    quant_group: int = 32
    always: bool = False
    solver: str = "gram"
    seed: int = 0

    def check(self) -> None:
        in_range("layer_group_size", self.layer_group_size, 1, 1024)
        one_of("bits", self.bits, (2, 3, 4, 8, 16))
        in_range("quant_group", self.quant_group, 1, 1024)
        one_of("solver", self.solver, SOLVERS)
        for name in ("rank_k", "rank_v"):
            value = getattr(self, name)
            for rank in value if isinstance(value, list) else [value]:
                if rank <= 0 or (isinstance(rank, float) and rank > 1):
                    raise ValueError(f"{name} is {value} but must be whole numbers >= 1 or shares in (0, 1].")
        named = [index for group in self.groups or [] for index in group]
        if self.groups is not None and (not self.groups or not all(self.groups) or len(set(named)) < len(named)):
            raise ValueError(f"groups is {self.groups} but must name layers, each of them once.")

    def check_model(self, geometry: Geometry) -> None:
        for index in [index for group in self.groups or [] for index in group]:
            if index not in geometry.layers:
                raise ValueError(
                    f"groups names layer {index} but the full-attention layers are "
                    f"{', '.join(map(str, geometry.layers))}."
                )
        count = len(self.layer_groups(geometry))
        for name in ("rank_k", "rank_v"):
            value = getattr(self, name)
            if isinstance(value, list) and len(value) != count:
                raise ValueError(f"{name} has {len(value)} ranks but must have one for each of the {count} groups.")

    def layer_groups(self, geometry: Geometry) -> list[list[int]]:
        """The layers of every group."""
        return adjacent(geometry.layers, self.layer_group_size) if self.groups is None else self.groups

    def ranks(self, geometry: Geometry) -> list[dict[str, int]]:
        """Ranks of keys and values of every group, before the length of a prompt limits them."""
        found: list[dict[str, int]] = []
        for place, group in enumerate(self.layer_groups(geometry)):
            whole = len(group) * geometry.width
            found.append({})
            for side, given in zip(SIDES, (self.rank_k, self.rank_v), strict=True):
                rank = given[place] if isinstance(given, list) else given
                if isinstance(rank, float):
                    rank = max(1, round(rank * whole))
                elif self.groups is None and not isinstance(given, list):
                    rank = -(-rank * len(group) // self.layer_group_size)
                found[-1][side] = min(rank, whole)
        return found

    def make_layer(self, shared: Shared, layer_idx: int) -> "XKVLayer":
        return XKVLayer(shared, layer_idx, self, {})

    def make_layers(self, shared: Shared) -> dict[int, "XKVLayer"]:
        made = {}
        for group, ranks in zip(self.layer_groups(shared.geometry), self.ranks(shared.geometry), strict=True):
            wanted = {"key": self.merge_key, "value": self.merge_value}
            ranks = {side: rank for side, rank in ranks.items() if wanted[side]}
            for layer in linked([XKVLayer(shared, index, self, ranks) for index in group]):
                made[layer.layer_idx] = layer
        rest = [index for index in shared.geometry.layers if index not in made]
        alone = {index: next(linked([self.make_layer(shared, index)])) for index in rest}
        return {index: {**made, **alone}[index] for index in shared.geometry.layers}


class XKVLayer(GroupLayer):
    """Held of the prompt: `<side>_basis` [batch, rank, channels], and in the first layer of a group `<side>_token`
    [batch, tokens, rank], or its codes with their scales and minima."""

    def __init__(self, shared: Shared, layer_idx: int, config: XKVConfig, ranks: dict[str, int]):
        super().__init__(shared, layer_idx)
        self.config, self.ranks = config, ranks

    def compress(self, side: str, members: Sequence["XKVLayer"], tokens: int, real: Tensor | None) -> bool:
        if side not in self.ranks:
            return False
        cfg, width = self.config, self.shared.geometry.width
        rank = min(self.ranks[side], tokens)
        stored = rank if cfg.bits == 16 else -(-rank // cfg.quant_group) * cfg.quant_group
        size = self.dtype.itemsize
        if not cfg.always and not pays(tokens, stored, len(members), width, size, cfg.bits, cfg.quant_group):
            return False
        x = torch.cat([layer.flat(side, tokens) for layer in members], dim=-1)
        if real is not None:
            x = x * real[..., None]
        rank = min(stored, *x.shape[-2:])
        token, basis = factorised(x, rank, cfg.solver, cfg.seed)
        if rank < stored:
            token = torch.nn.functional.pad(token, (0, stored - rank))
            basis = torch.nn.functional.pad(basis, (0, 0, 0, stored - rank))
        for layer, part in zip(members, basis.split(width, dim=-1), strict=True):
            layer.held[f"{side}_basis"] = part.to(self.dtype, copy=True, memory_format=torch.contiguous_format)
        members[0].keep_token(side, token)
        return True

    def flat(self, side: str, tokens: int) -> Tensor:
        """The first tokens of a side [batch, tokens, channels] float32, keys before the rotary embedding."""
        rotary = self.shared.geometry.rotary_of(self.layer_idx)
        x = self.held[f"{side}_recent"][:, :, :tokens].float()
        if side == "key" and rotary is not None:
            x = rotary.unrotate(x, *self.shared.tables(0, tokens))
        return x.transpose(1, 2).flatten(2)

    def keep_token(self, side: str, token: Tensor) -> None:
        if self.config.bits == 16:
            self.held[f"{side}_token"] = token.to(self.dtype).contiguous()
            return
        codes, scale, zero = quantize_minmax(token, self.config.bits, self.config.quant_group)
        parts = {"codes": pack(codes, self.config.bits), "scale": scale, "zero": zero}
        self.held.update({f"{side}_token_{name}": part.contiguous() for name, part in parts.items()})

    def token(self, side: str, rank: int) -> Tensor:
        """The group's token factor [batch, tokens, rank], from the layer that holds it."""
        held = self.first.held
        if self.config.bits == 16:
            return held[f"{side}_token"]
        return dequantize_packed_minmax(
            *(held[f"{side}_token_{name}"] for name in ("codes", "scale", "zero")),
            self.config.bits,
            self.config.quant_group,
            rank,
            dtype=self.dtype,
        )

    def restore(self, side: str, tokens: int) -> Tensor:
        basis, shape = self.held[f"{side}_basis"], self.shared.geometry
        # The first layer may have been moved away from this one by an offloaded cache.
        flat = self.token(side, basis.shape[1]).to(basis.device) @ basis
        x = flat.unflatten(-1, (shape.num_kv_heads, shape.head_dim)).transpose(1, 2)
        rotary = shape.rotary_of(self.layer_idx)
        if side == "key" and rotary is not None:
            x = rotary.rotate(x.float(), *self.shared.tables(0, tokens)).to(self.dtype)
        return x

    def cut(self, side: str, tokens: int) -> None:
        names = [name for name in self.held if name.startswith(f"{side}_token")]
        self.held.update({name: self.held[name][:, :tokens].clone() for name in names})


def report(cache: CompressedCache) -> list[dict[str, Any]]:
    """What an xKV cache made of its prompt, for every group and side.

    Rows have `layers`, `side`, `tokens` of the prompt, `rank` (0 where it was left as it is), `bytes` of the factors
    of one row of the batch, and `ratio`, the bytes of the keys or values that they stand for over these; all 0 before
    the prompt is complete.
    """
    rows = []
    layers = {layer.layer_idx: layer for layer in cache.compressed}
    for group in cache.config.layer_groups(cache.shared.geometry):
        for side in SIDES:
            members = [layers[index] for index in group]
            tokens, basis = members[0].compressed_tokens(side), members[0].held.get(f"{side}_basis")
            rank, width = (0, cache.shared.geometry.width) if basis is None else basis.shape[1:]
            cfg, size = cache.config, cache.shared.dtype.itemsize
            held = factor_bytes(tokens, rank, len(group), width, size, cfg.bits, cfg.quant_group) if rank else 0
            dense = tokens * len(group) * width * size
            row = {"layers": list(group), "side": side, "tokens": tokens, "rank": rank, "bytes": held}
            rows.append({**row, "ratio": dense / held if held else 0.0})
    return rows


METHOD = Method(
    name="xkv",
    family="kv_cache",
    title="xKV: Cross-Layer SVD for KV-Cache Compression",
    arxiv="2503.18893",
    year=2025,
    authors="Chi-Chih Chang et al.",
    repo="abdelfattah-lab/xKV",
    status="variant",
    difference="A prompt stays as it is where factors would take more bytes; token factors can be quantised. Keys and "
    "values are made again for all tokens: the later paper's selective reconstruction and latent caches (MLA) are not "
    "there.",
    target="hfext.kv_cache.xkv:XKVConfig",
    config=XKVConfig,
    usage="from_pretrained(path, quantization_config=hfext.kv_cache.XKVConfig(rank_k=0.125, rank_v=0.1875))",
    summary="Groups of adjacent layers share one low-rank factor of the prompt's tokens, found for every prompt.",
    claim="At equal bytes a decomposition shared by adjacent layers loses less than one of every layer alone.",
    headline=Result(
        metric="compression at 2.7 % more accuracy",
        setting="Llama-3.1-8B, RULER 64k",
        value="6.8x more",
        baseline="MiniCache",
    ),
    recipe="kv_cache/xkv-smollm2-wikitext2.yaml",
)
