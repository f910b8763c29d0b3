"""ThinK: drop the key channels that the prompt's last queries make least of.

score[g, j] = (mean over the heads of KV head g of the sum of q_j^2 over the last w queries q)
            x (sum of k_j^2 over the prompt's keys k)

which, but for a constant, is the squared Frobenius norm of the part of the logits that channel j makes. The
floor(ratio d) channels of lowest score leave all keys of the prompt but the last w, once, when the prompt is complete;
later keys stay whole. What leaves is read as zero, which is the same as a query without these channels.

"ThinK: Thinner Key Cache by Query-Driven Pruning", arXiv 2407.21018.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._fields import in_range
from ..registry import Method
from ._attention_mass import group_mean
from ._codec_layer import CodecLayer
from ._config import KVCacheConfig
from ._evicting_layer import NOT_SHOWN, needs_queries
from ._geometry import Geometry
from ._state import Shared


@dataclass(kw_only=True, repr=False)
class ThinKConfig(KVCacheConfig):
    """Options of ThinK.

    Args:
        ratio (`float`, *optional*, defaults to 0.4): Share of the key channels that is dropped, in [0, 1).
        window (`int`, *optional*, defaults to 32): Last tokens of the prompt, whose queries score the channels and
            whose keys stay whole. A prompt that is not longer stays whole.

    Raises:
        ValueError: A value is out of range.
    """

    method: ClassVar[str] = "think"
    ratio: float = 0.4
    window: int = 32

    def check(self) -> None:
        if not 0 <= self.ratio < 1:
            raise ValueError(f"ratio is {self.ratio} but must be in [0, 1).")
        in_range("window", self.window, 1, 65536)

    def check_model(self, geometry: Geometry) -> None:
        needs_queries(self.method, geometry)

    def make_layer(self, shared: Shared, layer_idx: int) -> CodecLayer:
        return ThinKLayer(shared, layer_idx, self)


def channel_scores(queries: Tensor, keys: Tensor) -> Tensor:
    """Scores of the channels [batch, kv_heads, dim], float32.

    Of `queries` [batch, heads, w, dim] and `keys` [batch, kv_heads, tokens, dim], which are 0 at padding.
    """
    asked = queries.float().square().sum(2)
    return group_mean(asked, keys.shape[1]) * keys.float().square().sum(2)


def kept_channels(score: Tensor, count: int) -> Tensor:
    """The `count` channels of highest score [batch, kv_heads, dim], ascending: int16 [batch, kv_heads, count]."""
    order = score.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    return order.sort(dim=-1).values.to(torch.int16)


class ThinKLayer(CodecLayer):
    """Held: `key_thin` [batch, tokens, kv_heads, kept channels], `channels` int16 [batch, kv_heads, kept channels],
    later keys and all values as they are; until the prompt is complete `window_queries` [batch, heads, .., head_dim]
    and `window_real` bool [batch, tokens]."""

    def __init__(self, shared: Shared, layer_idx: int, config: ThinKConfig):
        super().__init__(shared, layer_idx, config.window)
        self.dropped = int(config.ratio * shared.geometry.head_dim)

    def due(self, side: str, recent: int) -> int:
        """Nothing, until `finish_prefill` codes the prompt."""
        return 0

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if self.dropped and self.shared.prefilling:
            self.note_queries(keys)
        return super().append(keys, values)

    def note_queries(self, keys: Tensor) -> None:
        if self.step is None:
            raise RuntimeError(NOT_SHOWN)
        padding = self.shared.padding
        real = torch.ones(len(keys), keys.shape[2], dtype=torch.bool, device=keys.device)
        if padding is not None:
            real = padding[:, self.seen : self.seen + keys.shape[2]]
        queries = self.step.queries() * real[:, None, :, None]
        for name, new, dim in (("window_queries", queries, 2), ("window_real", real, 1)):
            old = self.held.get(name)
            self.held[name] = new.clone() if old is None else torch.cat([old, new], dim=dim)
        if not self.record_past:
            self.held["window_queries"] = self.held["window_queries"][:, :, -self.residual :].clone()

    def finish_prefill(self) -> None:
        if "window_queries" not in self.held:
            return
        queries, real = self.held.pop("window_queries"), self.held.pop("window_real")
        keys = self.held["key_recent"]
        old = keys.shape[2] - self.residual
        if old <= 0:
            return
        score = channel_scores(queries[:, :, -self.residual :], keys * real[:, None, :, None])
        channels = kept_channels(score, keys.shape[-1] - self.dropped)
        index = channels.long().unsqueeze(2).expand(-1, -1, old, -1)
        self.held["key_thin"] = keys[:, :, :old].gather(-1, index).transpose(1, 2).contiguous()
        self.held["channels"] = channels
        self.held["key_recent"] = keys[:, :, old:].clone()

    def encode(self, side: str, x: Tensor, start: int) -> dict[str, Tensor]:
        raise NotImplementedError("ThinK codes the prompt once.")

    def decode(self, side: str, codes: dict[str, Tensor], start: int | Tensor) -> Tensor:
        thin = codes["thin"].transpose(1, 2)
        index = self.held["channels"].to(thin.device).long().unsqueeze(2).expand(-1, -1, thin.shape[2], -1)
        whole = thin.new_zeros(*thin.shape[:3], self.shared.geometry.head_dim)
        return whole.scatter(-1, index, thin)

    def drop_last(self, tokens: int) -> None:
        """Exact for tokens that are whole, which are the last of the prompt and all after it."""
        if "key_thin" in self.held and tokens > self.held["key_recent"].shape[2]:
            whole = self.held["key_recent"].shape[2]
            raise NotImplementedError(
                f"{tokens} tokens cannot be taken back: only the last {whole} still have all channels of their keys. "
                "Make `window` larger."
            )
        waiting = {name: self.held.pop(name) for name in ("window_queries", "window_real") if name in self.held}
        super().drop_last(tokens)
        for name, tensor in waiting.items():
            dim = 2 if name == "window_queries" else 1
            self.held[name] = tensor.narrow(dim, 0, max(0, tensor.shape[dim] - tokens)).clone()

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if "window_queries" in self.held:
            self.held["window_queries"] = self.held["window_queries"][:, :, -self.residual :].clone()


METHOD = Method(
    name="think",
    family="kv_cache",
    title="ThinK: Thinner Key Cache by Query-Driven Pruning",
    arxiv="2407.21018",
    year=2024,
    authors="Yuhui Xu et al.",
    repo="SalesforceAIResearch/ThinK",
    status="faithful",
    target="hfext.kv_cache.think:ThinKConfig",
    config=ThinKConfig,
    usage="from_pretrained(path, quantization_config=hfext.kv_cache.ThinKConfig(ratio=0.4))",
    summary="Drops the key channels that matter least to the prompt's last queries; values stay whole.",
    notes="A baseline of this family; `hfext bench kv` measures it.",
)
