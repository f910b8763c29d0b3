"""MiniCache: pairs of deep layers share the direction of every key and value and keep their own lengths.

    e = sin((1 - t) w) / sin w  x_1 / |x_1|  +  sin(t w) / sin w  x_2 / |x_2|,   w the angle between x_1 and x_2
    x_l ~ e |x_l|

for the vectors x_1, x_2 of one token and head in two adjacent layers. The `retention` share of a row's tokens whose
angles, averaged over the heads, are largest stays as it is. The prompt is merged when it is complete; later tokens
stay as they are. The rotary embedding turns both layers alike, so that keys are merged rotated.

"MiniCache: KV Cache Compression in Depth Dimension for Large Language Models", arXiv 2405.14366.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._fields import in_range
from ..registry import Method
from ._config import KVCacheConfig
from ._group_layer import GroupLayer, adjacent, linked
from ._low_rank import angles, slerp
from ._state import Shared


@dataclass(kw_only=True, repr=False)
class MiniCacheConfig(KVCacheConfig):
    """Options of MiniCache.

    Args:
        start (`float`, *optional*, defaults to 0.5): Share of the full-attention layers, the first ones, that stay as
            they are, in [0, 1].
        t (`float`, *optional*, defaults to 0.5): Where between the directions of the first (0) and the second layer
            (1) the shared one lies, in [0, 1].
        retention (`float`, *optional*, defaults to 0.05): Share of the tokens that stay as they are, in [0, 1].

    Raises:
        ValueError: A value is out of range.
    """

    method: ClassVar[str] = "minicache"
    start: float = 0.5
    t: float = 0.5
    retention: float = 0.05

    def check(self) -> None:
        for name in ("start", "t", "retention"):
            in_range(name, getattr(self, name), 0, 1)

    def make_layer(self, shared: Shared, layer_idx: int) -> "MiniCacheLayer":
        return MiniCacheLayer(shared, layer_idx, self)

    def make_layers(self, shared: Shared) -> dict[int, "MiniCacheLayer"]:
        layers = shared.geometry.layers
        first = round(self.start * len(layers))
        groups = [[index] for index in layers[:first]] + adjacent(layers[first:], 2)
        made = [linked([self.make_layer(shared, index) for index in group]) for group in groups]
        return {layer.layer_idx: layer for group in made for layer in group}


def far_tokens(angle: Tensor, real: Tensor | None, share: float) -> Tensor:
    """The `share` of each row's tokens with the largest `angle` [batch, tokens]: int32 [batch, most], ascending.

    Rounded up; -1, in front, where a row has fewer.
    """
    counts = angle.new_full((len(angle),), angle.shape[1]) if real is None else real.sum(1).to(angle.dtype)
    counts = (counts * share).ceil().long()
    scored = angle if real is None else angle.masked_fill(~real, -1.0)
    most = int(counts.max()) if len(counts) else 0
    order = scored.sort(dim=-1, descending=True, stable=True).indices[:, :most]
    place = torch.arange(most, device=angle.device)
    return order.masked_fill(place >= counts[:, None], -1).sort(dim=-1).values.to(torch.int32)


class MiniCacheLayer(GroupLayer):
    """Held of the prompt: `<side>_length` [batch, tokens, kv_heads], `<side>_kept` [batch, most, kv_heads, head_dim],
    and in the first layer of a pair `<side>_direction` [batch, tokens, kv_heads, head_dim] and `<side>_kept_index`."""

    def __init__(self, shared: Shared, layer_idx: int, config: MiniCacheConfig):
        super().__init__(shared, layer_idx)
        self.config = config

    def compress(self, side: str, members: Sequence["MiniCacheLayer"], tokens: int, real: Tensor | None) -> bool:
        if len(members) < 2:
            return False
        x, y = (layer.held[f"{side}_recent"][:, :, :tokens].transpose(1, 2) for layer in members)
        first = members[0]
        index = far_tokens(angles(x, y).mean(-1), real, self.config.retention)
        first.held[f"{side}_direction"] = slerp(x, y, self.config.t).to(self.dtype)
        first.held[f"{side}_kept_index"] = index
        where = index.clamp(min=0).long()[..., None, None].expand(-1, -1, *x.shape[2:])
        for layer, whole in zip(members, (x, y), strict=True):
            layer.held[f"{side}_length"] = whole.float().norm(dim=-1).to(self.dtype)
            layer.held[f"{side}_kept"] = whole.gather(1, where)
        return True

    def restore(self, side: str, tokens: int) -> Tensor:
        length = self.held[f"{side}_length"]
        direction, index = (
            self.first.held[f"{side}_{name}"].to(length.device) for name in ("direction", "kept_index")
        )
        # An empty place writes into one more token, which is cut off.
        x = torch.nn.functional.pad(direction * length[..., None], (0, 0, 0, 0, 0, 1))
        place = index.masked_fill(index < 0, tokens).long()[..., None, None].expand(-1, -1, *x.shape[2:])
        return x.scatter(1, place, self.held[f"{side}_kept"])[:, :tokens].transpose(1, 2)

    def cut(self, side: str, tokens: int) -> None:
        for name in ("direction", "length"):
            if f"{side}_{name}" in self.held:
                self.held[f"{side}_{name}"] = self.held[f"{side}_{name}"][:, :tokens].clone()
        if f"{side}_kept_index" in self.held:
            index = self.held[f"{side}_kept_index"]
            self.held[f"{side}_kept_index"] = index.masked_fill(index >= tokens, -1)


METHOD = Method(
    name="minicache",
    family="kv_cache",
    title="MiniCache: KV Cache Compression in Depth Dimension for Large Language Models",
    arxiv="2405.14366",
    year=2024,
    authors="Akide Liu et al.",
    status="variant",
    difference="A fixed share of the tokens is retained, not those beyond a threshold between the least and the "
    "largest angle.",
    target="hfext.kv_cache.minicache:MiniCacheConfig",
    config=MiniCacheConfig,
    usage="from_pretrained(path, quantization_config=hfext.kv_cache.MiniCacheConfig(retention=0.05))",
    summary="Pairs of adjacent deep layers share the directions of keys and values; distant tokens stay whole.",
    notes="A baseline of this family; `hfext verify xkv` measures it.",
)
