"""Tokens of massive activations, which a quantising layer keeps as they are beside its codes."""

import torch
from torch import Tensor
from transformers.utils.logging import get_logger

logger = get_logger(__name__)


def massive_tokens(x: Tensor, top: int, real: Tensor | None) -> Tensor:
    """Tokens that hold one of the `top` largest magnitudes of their row.

    x [batch, tokens, hidden]; real bool [batch, tokens] or None. Returns bool [batch, tokens].
    """
    # The largest entries lie in the tokens of the largest maxima, and only these few are searched.
    size = x.abs().amax(-1)
    size = size if real is None else size.masked_fill(~real, -1)
    tokens = size.topk(min(top, x.shape[1]), dim=-1).indices
    entries = x.gather(1, tokens.unsqueeze(-1).expand(-1, -1, x.shape[2])).abs()
    if real is not None:
        entries = entries.masked_fill(~real.gather(1, tokens).unsqueeze(-1), -1)
    flat = entries.flatten(1)
    value, index = flat.topk(min(top, flat.shape[1]), dim=-1)
    found = torch.zeros(x.shape[:2], dtype=torch.long, device=x.device)
    return found.scatter_add_(1, tokens.gather(1, index // x.shape[2]), (value >= 0).long()) > 0


class Sinks:
    """The kept tokens of one layer, in the layer's own dictionary.

    Held: `sinks_recent` bool [batch, recent tokens], marks of tokens that are not coded yet; `sinks_index` int32
    [batch, n], -1 where a row has fewer; `sinks_key` and `sinks_value` [batch, n, kv_heads, head_dim].
    """

    def __init__(self, held: dict[str, Tensor]):
        self.held = held

    def note(self, keys: Tensor, block_input: Tensor | None, top: int, real: Tensor | None) -> None:
        """Mark new tokens by what entered the decoder layer, [batch, tokens, hidden]; none with `top` 0."""
        marks = torch.zeros(keys.shape[0], keys.shape[2], dtype=torch.bool, device=keys.device)
        if top and block_input is None:
            logger.warning_once("The inputs of the decoder layers are not seen, so no token is kept as a sink.")
        elif top:
            marks = massive_tokens(block_input, top, real)
        old = self.held.get("sinks_recent")
        self.held["sinks_recent"] = marks if old is None else torch.cat([old, marks], dim=1)

    def keep(self, count: int, start: int) -> None:
        """The oldest `count` recent tokens, the first being `start`, are about to be coded: copy the marked ones."""
        marks = self.held["sinks_recent"]
        self.held["sinks_recent"] = marks[:, count:].clone()
        marks = marks[:, :count]
        most = int(marks.sum(1).max())
        if most == 0:
            return
        place = marks.long().argsort(dim=1, descending=True, stable=True)[:, :most]
        none = ~marks.gather(1, place)
        new = {"index": (place + start).int().masked_fill(none, -1)}
        for side in ("key", "value"):
            recent = self.held[f"{side}_recent"].transpose(1, 2)
            new[side] = recent.gather(1, place[..., None, None].expand(-1, -1, *recent.shape[2:]))
        for name, tensor in new.items():
            old = self.held.get(f"sinks_{name}")
            self.held[f"sinks_{name}"] = tensor if old is None else torch.cat([old, tensor], dim=1)

    def restore(self, side: str, x: Tensor, start: int | Tensor) -> Tensor:
        """x [batch, kv_heads, tokens from `start`, head_dim] with the kept tokens put back, in place.

        `start` may be the index of every token instead, int64 [batch, tokens].
        """
        index = self.held.get("sinks_index")
        if index is not None and not isinstance(start, int):
            row, slot, token = (index.unsqueeze(2) == start.unsqueeze(1)).nonzero(as_tuple=True)
            x.transpose(1, 2)[row, token] = self.held[f"sinks_{side}"][row, slot]
        elif index is not None:
            row, slot = ((index >= start) & (index < start + x.shape[2])).nonzero(as_tuple=True)
            x.transpose(1, 2)[row, index[row, slot].long() - start] = self.held[f"sinks_{side}"][row, slot]
        return x

    def drop_last(self, tokens: int, seen: int) -> None:
        """`tokens` tokens were taken back, which leaves `seen`."""
        marks = self.held["sinks_recent"]
        self.held["sinks_recent"] = marks[:, : max(0, marks.shape[1] - tokens)].clone()
        if "sinks_index" in self.held:
            index = self.held["sinks_index"]
            self.held["sinks_index"] = index.masked_fill(index >= seen, -1)
