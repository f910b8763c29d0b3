"""A layer that keeps some tokens as they are and forgets the others: what evicting methods share.

Slots hold keys, values and the index of their token. The model's mask looks columns up by their place, which is wrong
once tokens have left, so the layer gives its own: a slot is visible when it is filled and its token is no padding, and
new tokens see each other causally.
"""

import torch
from torch import Tensor

from ._cache import CompressedLayer
from ._state import Shared


class EvictingLayer(CompressedLayer):
    """Held: `kept_keys`, `kept_values` [batch, kv_heads, slots, head_dim] and `kept_index` int32 [.., slots].

    The index of a slot is that of its token in the padded text, -1 for an empty slot. A method calls `keep`.
    """

    numbers = ("seen", "evicted")

    def __init__(self, shared: Shared, layer_idx: int):
        super().__init__(shared, layer_idx)
        self.evicted = False

    @property
    def may_evict(self) -> bool:
        """Whether this configuration ever forgets a token."""
        return True

    @property
    def is_croppable(self) -> bool:
        return not (self.evicted or self.may_evict)

    @property
    def slots(self) -> int:
        return self.held["kept_keys"].shape[2] if self.held else 0

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        batch, heads, new, _ = keys.shape
        index = torch.arange(self.seen, self.seen + new, dtype=torch.int32, device=keys.device).expand(
            batch, heads, new
        )
        if self.held:
            keys = torch.cat([self.held["kept_keys"], keys], dim=2)
            values = torch.cat([self.held["kept_values"], values], dim=2)
            index = torch.cat([self.held["kept_index"], index], dim=2)
        self.held.update(kept_keys=keys, kept_values=values, kept_index=index.contiguous())
        self.seen += new
        self.after_append(new)
        return keys, values

    def after_append(self, new: int) -> None:
        """The last `new` slots were just added: score, and evict by `keep` if the method does so at every call."""

    def keep(self, slots: Tensor) -> None:
        """Keep the `slots` int64 [batch, kv_heads, n], in the order of the text; -1 leaves a slot empty."""
        order = torch.where(slots < 0, self.slots, slots).sort(dim=-1).values
        empty = order >= self.slots
        order = order.masked_fill(empty, 0)
        wide = order.unsqueeze(-1).expand(*order.shape, self.held["kept_keys"].shape[-1])
        wide_values = order.unsqueeze(-1).expand(*order.shape, self.held["kept_values"].shape[-1])
        self.held["kept_keys"] = self.held["kept_keys"].gather(2, wide)
        self.held["kept_values"] = self.held["kept_values"].gather(2, wide_values)
        self.held["kept_index"] = self.held["kept_index"].gather(2, order).masked_fill(empty, -1)
        self.evicted = True

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.slots + query_length, self.seen - self.slots

    def visible(self) -> Tensor:
        """Which slots hold a real token: bool [batch, kv_heads, slots]."""
        index = self.held["kept_index"].long()
        filled = index >= 0
        padding = self.shared.padding
        if padding is None:
            return filled
        rows = padding.unsqueeze(1).expand(-1, index.shape[1], -1)
        return filled & rows.gather(2, index.clamp(0, padding.shape[1] - 1))

    def mask(self, query_length: int, dtype: torch.dtype) -> Tensor | None:
        if not self.evicted:
            return None
        if self.shared.attention not in ("sdpa", "eager"):
            raise NotImplementedError(
                f"A cache that forgets tokens needs a mask a layer, which attention {self.shared.attention!r} does "
                'not take. Load the model with attn_implementation="sdpa" or "eager".'
            )
        old = self.visible()
        groups = self.shared.geometry.num_heads // old.shape[1]
        old = old.repeat_interleave(groups, dim=1).unsqueeze(2).expand(-1, -1, query_length, -1)
        new = torch.ones(query_length, query_length, dtype=torch.bool, device=old.device).tril()
        new = new.expand(old.shape[0], old.shape[1], -1, -1)
        padding = self.shared.padding
        if padding is not None:
            itself = torch.eye(query_length, dtype=torch.bool, device=old.device)  # a row of nothing has no softmax
            new = new & padding[:, None, None, self.seen : self.seen + query_length] | itself
        return torch.cat([old, new], dim=-1)

    def activate_past_recording(self) -> None:
        if not self.is_croppable:
            raise NotImplementedError(
                "Assisted and prompt-lookup decoding take tokens back, which a cache that has forgotten some cannot. "
                "Take a quantising method (rotatekv, kivi) or decode without drafts."
            )
        super().activate_past_recording()

    def drop_last(self, tokens: int) -> None:
        if not self.is_croppable:
            raise NotImplementedError(f"{tokens} tokens cannot be taken back from a cache that has forgotten others.")
        self.held = {name: tensor[:, :, : self.slots - tokens].clone() for name, tensor in self.held.items()}
        self.seen -= tokens

    def decompressed(self) -> tuple[Tensor, Tensor]:
        """The kept keys and values; their tokens are in `held["kept_index"]`."""
        return self.held["kept_keys"], self.held["kept_values"]
