"""H2O: keep the tokens that have received most attention so far, and the latest ones.

a[g, t] = sum over queries i of the mean over the query heads of KV head g of P[h, i, t]
kept    = the `recent` latest tokens and, of the others, the `heavy` ones of largest a

Attention is accumulated from the first query of the prompt to the last one decoded; what a forgotten token had is
forgotten with it. Each KV head keeps its own tokens.

"H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models", arXiv 2306.14048.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..registry import Method
from ._attention_mass import attention_mass, group_mean
from ._config import KVCacheConfig
from ._evicting_layer import EvictingLayer, budget, check_amount, needs_queries
from ._geometry import Geometry
from ._state import Shared


@dataclass(kw_only=True, repr=False)
class H2OConfig(KVCacheConfig):
    """Options of H2O.

    Args:
        heavy (`int` or `float`, *optional*, defaults to 0.1): Heavy hitters: a number of tokens, or as a float a share
            of the tokens seen so far.
        recent (`int` or `float`, *optional*, defaults to 0.1): Latest tokens, in the same way. Shares that add up to 1
            keep everything.

    Raises:
        ValueError: A number is negative, a share is not in [0, 1], or both are 0.
    """

    method: ClassVar[str] = "h2o"
    heavy: int | float = 0.1
    recent: int | float = 0.1

    def check(self) -> None:
        check_amount("heavy", self.heavy, least=0)
        check_amount("recent", self.recent, least=0)
        if self.heavy == 0 and self.recent == 0:
            raise ValueError("heavy and recent are both 0 but at least one must be above: nothing would be kept.")

    def check_model(self, geometry: Geometry) -> None:
        needs_queries(self.method, geometry)

    def make_layer(self, shared: Shared, layer_idx: int) -> EvictingLayer:
        return H2OLayer(shared, layer_idx, self)


def priority(score: Tensor, filled: Tensor, recent: Tensor) -> Tensor:
    """Scores [batch, kv_heads, slots] with infinity for the `recent` [batch] latest filled slots."""
    age = filled.flip(-1).cumsum(-1).flip(-1) - 1
    return score.masked_fill(filled & (age < recent[:, None, None]), torch.inf)


class H2OLayer(EvictingLayer):
    """Held besides the slots: `kept_mass` float32 [batch, kv_heads, slots], the attention received."""

    def __init__(self, shared: Shared, layer_idx: int, config: H2OConfig):
        super().__init__(shared, layer_idx)
        self.heavy, self.recent = config.heavy, config.recent

    @property
    def may_evict(self) -> bool:
        shares = isinstance(self.heavy, float) and isinstance(self.recent, float)
        return not shares or self.heavy + self.recent < 1

    def after_append(self, new: int) -> None:
        if not self.may_evict:
            return
        keys = self.held["kept_keys"]
        mass = attention_mass(self.queries(), keys, self.filled, self.scale, self.softcap)
        mass = group_mean(mass, keys.shape[1])
        if "kept_mass" in self.held:
            mass[..., : self.slots - new] += self.held["kept_mass"]
        self.held["kept_mass"] = mass
        if not self.shared.prefilling:
            self.evict()

    def evict(self) -> None:
        """Keep as many tokens as the budget has; the recent ones come first when heavy ones are too many."""
        tokens = self.held["tokens"]
        recent = budget(self.recent, tokens)
        count = (recent + budget(self.heavy, tokens)).clamp(min=1)
        self.keep_best(priority(self.held["kept_mass"], self.filled, recent), count)

    def finish_prefill(self) -> None:
        if self.may_evict:
            self.evict()


METHOD = Method(
    name="h2o",
    family="kv_cache",
    title="H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models",
    arxiv="2306.14048",
    year=2023,
    authors="Zhenyu Zhang et al.",
    repo="FMInference/H2O",
    status="faithful",
    target="hfext.kv_cache.h2o:H2OConfig",
    config=H2OConfig,
    usage="from_pretrained(path, quantization_config=hfext.kv_cache.H2OConfig(heavy=0.1, recent=0.1))",
    summary="Keeps the tokens that received most attention so far and the latest ones, for each KV head.",
    notes="A baseline of this family; `hfext bench kv` measures it. With grouped queries the attention is averaged "
    "over the query heads of a KV head. A share is of the tokens seen, so that the cache grows with the text; give "
    "numbers for a fixed size.",
)
