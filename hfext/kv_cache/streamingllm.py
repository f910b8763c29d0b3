"""StreamingLLM: keep the first tokens and the latest ones.

kept = the first `sinks` tokens and the last `window` ones

Positions are those within the cache: a query at place S sees the kept keys at 0 .. S-1. Rotary attention depends on
distances alone, and the latest tokens, which are contiguous, already have the right ones. So it is enough to turn the
sinks: when the first new token is at position p and S tokens are stored, the sink of rank r is used at p - S + r.

"Efficient Streaming Language Models with Attention Sinks", arXiv 2309.17453.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._fields import in_range
from ..registry import Method
from ._config import KVCacheConfig
from ._evicting_layer import NOT_SHOWN, EvictingLayer, budget, check_amount
from ._geometry import Geometry
from ._state import Shared


@dataclass(kw_only=True, repr=False)
class StreamingLLMConfig(KVCacheConfig):
    """Options of StreamingLLM.

    Args:
        window (`int` or `float`, *optional*, defaults to 1020): Latest tokens that are kept. A float is the share of
            the tokens seen so far that sinks and latest tokens make together; 1.0 keeps everything.
        sinks (`int`, *optional*, defaults to 4): First tokens that are kept.
        reposition (`bool`, *optional*, defaults to `True`): Positions within the cache, as in the paper; `False` for
            the tokens' own ones, which any model can do.

    Raises:
        ValueError: A value is out of range, or positions within the cache are asked of a model without a rotary
            embedding that can be undone.
    """

    method: ClassVar[str] = "streamingllm"
    window: int | float = 1020
    sinks: int = 4
    reposition: bool = True

    @property
    def undoes_rotary(self) -> bool:
        return self.reposition

    def check(self) -> None:
        check_amount("window", self.window)
        in_range("sinks", self.sinks, 0, 65536)

    def check_model(self, geometry: Geometry) -> None:
        if self.reposition and geometry.rotary is None:
            raise ValueError(
                "reposition is True but the model has no rotary embedding: its positions are part of the hidden "
                "states. Set reposition=False."
            )

    def make_layer(self, shared: Shared, layer_idx: int) -> EvictingLayer:
        return StreamingLLMLayer(shared, layer_idx, self)


class StreamingLLMLayer(EvictingLayer):
    """Keys are stored as the model gave them; those of the sinks are turned when they are used."""

    per_head = False

    def __init__(self, shared: Shared, layer_idx: int, config: StreamingLLMConfig):
        super().__init__(shared, layer_idx)
        self.config = config

    @property
    def may_evict(self) -> bool:
        return not (isinstance(self.config.window, float) and self.config.window == 1)

    def attended(self, new: int) -> tuple[Tensor, Tensor]:
        keys, values = self.held["kept_keys"], self.held["kept_values"]
        moves = self.config.reposition and self.config.sinks and self.may_evict and not self.shared.prefilling
        return (self.repositioned(new) if moves else keys), values

    def repositioned(self, new: int) -> Tensor:
        """All keys [batch, kv_heads, slots, head_dim], the sinks turned to just before the latest tokens."""
        keys, index = self.held["kept_keys"], self.held["kept_index"][:, 0]
        if self.shared.geometry.rotary_of(self.layer_idx) is None:
            return keys  # nothing to turn
        if self.shared.positions is None:
            raise RuntimeError(NOT_SHOWN)
        rank = (index >= 0).cumsum(-1) - 1
        # every row's sinks lie in the columns up to the last of any row
        wide = int((rank < self.config.sinks).sum(-1).max())
        index, rank = index[:, :wide], rank[:, :wide]
        positions = self.shared.positions.expand(len(index), -1).long()
        own = positions.gather(1, index.clamp(min=0).long())
        stored = self.filled[:, 0, : self.slots - new].sum(-1, keepdim=True)
        first = positions[:, self.seen - new, None]
        moved = (index >= 0) & (rank < self.config.sinks) & (rank < stored)
        target = torch.where(moved, first - stored + rank, own)
        rotary, dtype = self.shared.geometry.rotary_of(self.layer_idx), self.shared.dtype
        sinks = rotary.unrotate(keys[:, :, :wide].float(), *rotary.tables(own, dtype))
        sinks = rotary.rotate(sinks, *rotary.tables(target, dtype)).to(keys.dtype)
        sinks = torch.where(moved[:, None, :, None], sinks, keys[:, :, :wide])
        return torch.cat([sinks, keys[:, :, wide:]], dim=2)

    def after_append(self, new: int) -> None:
        if self.may_evict and not self.shared.prefilling:
            self.evict()

    def evict(self) -> None:
        filled, tokens, sinks = self.filled, self.held["tokens"], self.config.sinks
        count = budget(self.config.window, tokens)
        count = count + sinks if isinstance(self.config.window, int) else count.clamp(min=sinks + 1)
        place = torch.arange(self.slots, device=filled.device).expand(filled.shape).float()
        self.keep_best(place.masked_fill(filled.cumsum(-1) <= sinks, torch.inf), count)

    def finish_prefill(self) -> None:
        if self.may_evict:
            self.evict()


METHOD = Method(
    name="streamingllm",
    family="kv_cache",
    title="Efficient Streaming Language Models with Attention Sinks",
    arxiv="2309.17453",
    year=2023,
    authors="Guangxuan Xiao et al.",
    repo="mit-han-lab/streaming-llm",
    status="faithful",
    target="hfext.kv_cache.streamingllm:StreamingLLMConfig",
    config=StreamingLLMConfig,
    usage="from_pretrained(path, quantization_config=hfext.kv_cache.StreamingLLMConfig(window=1020))",
    summary="Keeps the first tokens and the latest ones, at positions within the cache.",
    notes="A baseline of this family; `hfext bench kv` measures it.",
)
