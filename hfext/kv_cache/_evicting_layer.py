"""A layer that keeps some tokens as they are and forgets the others: what evicting methods share.

Slots hold keys, values and the index of their token, in the order of the text, empty ones first. The model's mask
looks columns up by their place, which is wrong once tokens have left, so the layer gives its own: a slot is visible
when it is filled, and new tokens see each other causally. Padding is an empty slot from the start.

A prompt attends to all of itself; its tokens leave when it is complete. Later tokens attend to all that is stored and
to each other before any leaves.
"""

import torch
from torch import Tensor

from ._attention_mass import logit_options
from ._cache import CompressedLayer
from ._geometry import Geometry
from ._state import Shared

NOT_SHOWN = (
    "The cache was not shown the queries and positions of its tokens. Use it with the model it was made for: "
    "`config.make_cache(model)` or `hfext.kv_cache.apply(model, config)`."
)


class EvictingLayer(CompressedLayer):
    """Held: `kept_keys`, `kept_values` [batch, kv_heads, slots, head_dim], `kept_index` int32 [.., slots], `tokens`.

    The index of a slot is that of its token in the padded text, -1 for an empty slot; `tokens` int64 [batch] counts
    the real tokens seen. Whatever a method holds as `kept_...` [batch, 1 or kv_heads, slots, ...] follows the slots.

    Attributes:
        per_head (`bool`): Heads keep different tokens; otherwise there is one index for all.
        scale (`float`), softcap (`float` or `None`): Of the attention logits, known after `queries`.
    """

    per_head = True

    def __init__(self, shared: Shared, layer_idx: int):
        super().__init__(shared, layer_idx)
        self.scale, self.softcap = 1.0, None

    # -- what a method writes

    @property
    def may_evict(self) -> bool:
        """Whether this configuration ever forgets a token."""
        return True

    def after_append(self, new: int) -> None:
        """The last `new` slots were just added: score, and evict if the prompt is complete and the method does so."""

    def attended(self, new: int) -> tuple[Tensor, Tensor]:
        """Keys and values of all slots as the attention uses them, the last `new` being those of this call."""
        return self.held["kept_keys"], self.held["kept_values"]

    # -- what methods use

    @property
    def slots(self) -> int:
        return self.held["kept_keys"].shape[2] if "kept_keys" in self.held else 0

    @property
    def filled(self) -> Tensor:
        """Which slots hold a real token: bool [batch, 1 or kv_heads, slots]."""
        return self.held["kept_index"] >= 0

    def queries(self, last: int | None = None) -> Tensor:
        """Queries of the call under way, or of its last tokens: [batch, heads, tokens, head_dim]."""
        if self.step is None:
            raise RuntimeError(NOT_SHOWN)
        self.scale, self.softcap = logit_options(self.step.module, self.shared.geometry.head_dim)
        return self.step.queries(last)

    def keep_best(self, score: Tensor, count: Tensor) -> None:
        """Keep the `count` [batch] slots of highest `score` [batch, 1 or kv_heads, slots], or all if there are fewer.

        A score of infinity is always kept; an empty slot never, whatever its score.
        """
        filled = self.filled
        if bool((filled.sum(-1) <= count[:, None]).all()):
            return
        slots = best_slots(score.masked_fill(~filled, -torch.inf), count)
        order = slots.sort(dim=-1).values
        empty = order < 0
        order = order.clamp(min=0)
        for name, tensor in self.held.items():
            if name.startswith("kept_"):
                wide = order.expand(-1, tensor.shape[1], -1)
                if tensor.dim() == 4:
                    wide = wide.unsqueeze(-1).expand(-1, -1, -1, tensor.shape[-1])
                self.held[name] = tensor.gather(2, wide)
        self.held["kept_index"] = self.held["kept_index"].masked_fill(empty, -1)

    # -- what the cache calls

    @property
    def is_croppable(self) -> bool:
        return not self.may_evict

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        batch, heads, new, _ = keys.shape
        index = torch.arange(self.seen, self.seen + new, dtype=torch.int32, device=keys.device)
        index = index.expand(batch, heads if self.per_head else 1, new)
        padding = self.shared.padding
        if padding is not None:
            index = index.masked_fill(~padding[:, None, self.seen : self.seen + new], -1)
        for name, tensor in (("keys", keys), ("values", values), ("index", index)):
            old = self.held.get(f"kept_{name}")
            self.held[f"kept_{name}"] = torch.cat([tensor] if old is None else [old, tensor], dim=2)
        real = (index[:, 0] >= 0).sum(-1)
        self.held["tokens"] = self.held["tokens"] + real if "tokens" in self.held else real
        self.seen += new
        attended = self.attended(new)
        self.after_append(new)
        return attended

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.slots + query_length, self.seen - self.slots

    def visible(self) -> Tensor:
        """Which slots the attention may see: those filled, but for tokens that the caller's mask hides now."""
        padding = self.shared.padding
        if padding is None:
            return self.filled
        index = self.held["kept_index"].long()
        rows = padding.unsqueeze(1).expand(-1, index.shape[1], -1)
        return self.filled & rows.gather(2, index.clamp(0, padding.shape[1] - 1))

    def mask(self, query_length: int, dtype: torch.dtype) -> Tensor | None:
        if not self.may_evict or self.shared.prefilling or not self.slots:
            return None
        if self.shared.attention not in ("sdpa", "eager"):
            raise NotImplementedError(
                f"A cache that forgets tokens needs a mask a layer, which attention {self.shared.attention!r} does "
                'not take. Load the model with attn_implementation="sdpa" or "eager".'
            )
        old = self.visible()
        if self.per_head:
            old = old.repeat_interleave(self.shared.geometry.num_heads // old.shape[1], dim=1)
        old = old.unsqueeze(2).expand(-1, -1, query_length, -1)
        new = torch.ones(query_length, query_length, dtype=torch.bool, device=old.device).tril()
        padding = self.shared.padding
        if padding is not None:
            itself = torch.eye(query_length, dtype=torch.bool, device=old.device)  # a row of nothing has no softmax
            new = new & padding[:, None, None, self.seen : self.seen + query_length] | itself
        return torch.cat([old, new.expand(old.shape[0], old.shape[1], -1, -1)], dim=-1)

    def activate_past_recording(self) -> None:
        if not self.is_croppable:
            raise NotImplementedError(
                "Assisted and prompt-lookup decoding take tokens back, which a cache that forgets some cannot. "
                "Take a quantising method (rotatekv, kivi) or decode without drafts."
            )
        super().activate_past_recording()

    def drop_last(self, tokens: int) -> None:
        if not self.is_croppable:
            raise NotImplementedError(f"{tokens} tokens cannot be taken back from a cache that forgets others.")
        left = self.filled[:, 0, : self.slots - tokens].sum(-1)
        kept = {name: x[:, :, : self.slots - tokens].clone() for name, x in self.held.items() if name != "tokens"}
        self.held = {**kept, "tokens": left}
        self.seen -= tokens

    def decompressed(self) -> tuple[Tensor, Tensor]:
        """The kept keys and values; their tokens are in `held["kept_index"]`."""
        return self.held["kept_keys"], self.held["kept_values"]


def best_slots(score: Tensor, count: Tensor) -> Tensor:
    """The `count` [batch] slots of highest `score` [batch, heads, slots], of equal ones the earlier: int64 [.., n].

    n is the largest count; a row with a smaller one, or with fewer scores above -infinity, ends in -1.
    """
    top = score.sort(dim=-1, descending=True, stable=True)
    most = min(int(count.max()), score.shape[-1])
    values, slots = top.values[..., :most], top.indices[..., :most]
    rank = torch.arange(most, device=score.device)
    return slots.masked_fill((rank >= count[:, None, None]) | (values == -torch.inf), -1)


def budget(amount: int | float, tokens: Tensor) -> Tensor:
    """`amount` as a number of tokens, or, as a float, that share of `tokens` [batch]: int64 [batch]."""
    if isinstance(amount, int):
        return torch.full_like(tokens, amount)
    return (tokens.double() * amount).round().long()


def check_amount(name: str, value: int | float, least: int = 1) -> None:
    """Raise unless an amount is a number of tokens, at least `least`, or a share in [0, 1], above 0 with `least`."""
    if isinstance(value, int):
        if value < least:
            raise ValueError(f"{name} is {value} but must be at least {least} tokens, or a share such as 0.5.")
    elif not (0.0 <= value <= 1.0) or (least > 0 and value == 0.0):
        raise ValueError(f"{name} is {value} but a share must be in {'(0' if least else '[0'}, 1].")


def needs_queries(method: str, geometry: Geometry) -> None:
    """Refuse a model whose queries cannot be made again because of its rotary embedding."""
    if geometry.rotary_problem is not None:
        raise ValueError(f"{method} makes queries again to score tokens: {geometry.rotary_problem}")
