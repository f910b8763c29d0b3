"""SnapKV: keep the prompt's tokens that its last queries look at.

a[h, t] = sum over the last w queries i of P[h, i, t]      for the tokens t before the last w
s[g, t] = mean over the query heads h of KV head g of pool_t(a[h, t])
kept    = the last w tokens and, of those before, the (capacity - w) of largest s, for each KV head

Once, when the prompt is complete; tokens after the prompt all stay. `pool` is the mean or the maximum over
neighbouring tokens, with zeros beyond the ends.

"SnapKV: LLM Knows What You are Looking for Before Generation", arXiv 2404.14469.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d
from transformers.utils.logging import get_logger

from .._fields import in_range, one_of
from ..registry import Method
from ._attention_mass import attention_mass, group_mean
from ._config import KVCacheConfig
from ._evicting_layer import EvictingLayer, budget, check_amount, needs_queries
from ._geometry import Geometry
from ._state import Shared

logger = get_logger(__name__)


@dataclass(kw_only=True, repr=False)
class SnapKVConfig(KVCacheConfig):
    """Options of SnapKV.

    Args:
        capacity (`int` or `float`, *optional*, defaults to 2048): Tokens of the prompt that are kept, the window among
            them: a number above `window`, or as a float a share of the prompt. 1.0 keeps everything.
        window (`int`, *optional*, defaults to 32): Last tokens of the prompt, which observe and are kept.
        kernel_size (`int`, *optional*, defaults to 5): Neighbouring tokens that are pooled, an odd number; 1 for none.
        pooling (`str`, *optional*, defaults to `"avg"`): `"avg"`, as the authors' code, or `"max"`.

    Raises:
        ValueError: A value is out of range, or, at the end of a prompt, its share does not hold the window.
    """

    method: ClassVar[str] = "snapkv"
    capacity: int | float = 2048
    window: int = 32
    kernel_size: int = 5
    pooling: str = "avg"

    def check(self) -> None:
        in_range("window", self.window, 1, 65536)
        check_amount("capacity", self.capacity)
        if isinstance(self.capacity, int) and self.capacity <= self.window:
            raise ValueError(f"capacity is {self.capacity} but must be above window, which is {self.window}.")
        in_range("kernel_size", self.kernel_size, 1, 1023)
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size is {self.kernel_size} but must be odd.")
        one_of("pooling", self.pooling, ("avg", "max"))

    def check_model(self, geometry: Geometry) -> None:
        needs_queries(self.method, geometry)

    def make_layer(self, shared: Shared, layer_idx: int) -> EvictingLayer:
        return SnapKVLayer(shared, layer_idx, self)


def pooled(mass: Tensor, size: int, kind: str) -> Tensor:
    """Mean or maximum over `size` neighbours, zeros beyond the ends: [batch, heads, tokens] to the same."""
    pool = avg_pool1d if kind == "avg" else max_pool1d
    return pool(mass, size, stride=1, padding=size // 2)


class SnapKVLayer(EvictingLayer):
    """Held until the prompt is complete: `window_queries` [batch, heads, up to w, head_dim]."""

    numbers = ("seen", "scale", "softcap")

    def __init__(self, shared: Shared, layer_idx: int, config: SnapKVConfig):
        super().__init__(shared, layer_idx)
        self.config = config

    @property
    def may_evict(self) -> bool:
        return not (isinstance(self.config.capacity, float) and self.config.capacity == 1)

    def after_append(self, new: int) -> None:
        if not (self.may_evict and self.shared.prefilling):
            return
        window = self.config.window
        queries = self.queries(min(new, window))
        old = self.held.get("window_queries")
        both = [queries] if old is None else [old, queries]
        self.held["window_queries"] = torch.cat(both, dim=2)[:, :, -window:].clone()

    def finish_prefill(self) -> None:
        queries = self.held.get("window_queries")
        if queries is None:
            return
        config, tokens = self.config, self.held["tokens"]
        capacity = budget(config.capacity, tokens)
        small = (capacity < tokens) & (capacity <= config.window)
        if bool(small.any()):
            row = int(small.nonzero()[0])
            logger.warning_once(
                f"A prompt of {int(tokens[row])} tokens leaves capacity={config.capacity} only {int(capacity[row])}, "
                f"not more than window={config.window}: such a prompt is kept whole."
            )
            capacity = torch.where(small, tokens, capacity)
        if bool((capacity < tokens).any()):
            keys = self.held["kept_keys"]
            mass = attention_mass(queries, keys, self.filled, self.scale, self.softcap)
            before = pooled(mass[..., : -config.window], config.kernel_size, config.pooling)
            score = group_mean(before, keys.shape[1])
            whole = torch.full((*score.shape[:2], config.window), torch.inf, device=score.device)
            self.keep_best(torch.cat([score, whole], dim=-1), capacity)
        del self.held["window_queries"]


METHOD = Method(
    name="snapkv",
    family="kv_cache",
    title="SnapKV: LLM Knows What You are Looking for Before Generation",
    arxiv="2404.14469",
    year=2024,
    authors="Yuhong Li et al.",
    repo="FasterDecoding/SnapKV",
    status="faithful",
    target="hfext.kv_cache.snapkv:SnapKVConfig",
    config=SnapKVConfig,
    usage="from_pretrained(path, quantization_config=hfext.kv_cache.SnapKVConfig(capacity=0.5))",
    summary="Keeps the tokens of the prompt that its last queries attend to, chosen once for each KV head.",
    notes="A baseline of this family; `hfext bench kv` measures it. With grouped queries the scores are averaged over "
    "the query heads of a KV head, so that each key is stored once; the authors' code keeps keys for each query head.",
)
