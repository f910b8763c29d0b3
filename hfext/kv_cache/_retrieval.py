"""Finding the tokens to attend to by cheap scores, and keeping keys and values so that any few can be fetched."""

import torch
from torch import Tensor

from ._codec_layer import CodecLayer
from ._geometry import Rotary


def at_distance(queries: Tensor, rotary: Rotary | None, distance: int) -> Tensor:
    """Queries before the rotary embedding [batch, heads, n, d], float32, turned for keys `distance` tokens behind.

    The product with a key before the rotary embedding is that of the two after it, at positions `distance` apart. The
    key would be turned at position 0, which is no turn but the factor by which some embeddings (yarn) scale both.
    """
    if rotary is None:
        return queries
    cos, sin = rotary.tables(torch.tensor([[distance, 0]], device=queries.device), torch.float32)
    for place in (slice(0, 1), slice(1, 2)):
        queries = rotary.rotate(queries, cos[:, place], sin[:, place])
    return queries


def best(scores: Tensor, count: Tensor) -> Tensor:
    """The `count` [batch] highest scores [batch, heads, n] as bool; of equal ones the latest; never -infinity."""
    top = scores.topk(min(int(count.max()), scores.shape[-1]), dim=-1).values
    last = (count.clamp(max=top.shape[-1]) - 1).view(-1, 1, 1).expand(-1, top.shape[1], 1)
    least = top.gather(-1, last)
    above = scores > least
    equal = (scores == least) & (scores > -torch.inf)
    room = count.view(-1, 1, 1) - above.sum(-1, keepdim=True)
    return above | equal & (equal.flip(-1).cumsum(-1).flip(-1) <= room)


def chosen(scores: Tensor, real: Tensor, kv_heads: int, topk: float, window: int, n_sink: int) -> Tensor:
    """What a new token attends to: bool [batch, kv_heads, n + 1], itself last.

    scores [batch, heads, n] of the earlier tokens; real bool [batch, n + 1], padding being no part of the text.
    """
    rank = real.cumsum(-1)
    place = torch.arange(real.shape[1], device=real.device)
    always = real & ((place >= len(place) - window) | (rank <= n_sink))
    count = (rank[:, -1].double() * topk + 1e-9).floor().long().clamp(min=1)  # 0.29 * 100 is a little less than 29
    free = (real & ~always)[:, None, :-1]
    far = best(scores.masked_fill(~free, -torch.inf), count).unflatten(1, (kv_heads, -1)).any(2)
    marks = always[:, None].repeat(1, kv_heads, 1)
    marks[..., :-1] |= far
    marks[..., -1] = True
    return marks


class ExactLayer(CodecLayer):
    """Keys and values as they are, [batch, tokens, kv_heads, head_dim]: they leave `recent` by `residual` at a time,
    so that a step copies no more than what is recent."""

    def due(self, side: str, recent: int) -> int:
        return recent - self.residual if recent >= 2 * self.residual else 0

    def encode(self, side: str, x: Tensor, start: int) -> dict[str, Tensor]:
        return {"exact": x.transpose(1, 2).contiguous()}

    def decode(self, side: str, codes: dict[str, Tensor], start: int | Tensor) -> Tensor:
        return codes["exact"].transpose(1, 2)

    def decode_some(self, side: str, index: Tensor) -> Tensor:
        tensor = self.held[f"{side}_exact"]
        batch, tokens, heads, _ = tensor.shape
        row, head = (torch.arange(n, device=index.device) for n in (batch, heads))
        rows = (row.view(-1, 1, 1) * tokens + index) * heads + head.view(-1, 1)
        taken = tensor.flatten(0, 2).index_select(0, rows.flatten().to(tensor.device))
        return taken.unflatten(0, index.shape).to(index.device)
