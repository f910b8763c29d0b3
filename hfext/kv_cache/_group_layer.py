"""Layers that compress their prompt together, once, when it is complete; later tokens stay as they are.

What several layers share is held by the first of their group, so that it is counted, moved, reordered and saved once.
The others know the first, and the last knows all before it: references point one way only, so that a finished cache is
freed at once. The tokens that prompt lookup adds to the call of a prompt are not part of it.
"""

from abc import abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ._cache import CompressedLayer
from ._state import Shared

SIDES = ("key", "value")


class GroupLayer(CompressedLayer):
    """Held: `key_recent`, `value_recent` [batch, kv_heads, tokens, head_dim], what a method makes of the prompt, and
    in the first layer until then `prompt_real` bool [batch, tokens] where rows are padded.

    Attributes:
        first (`GroupLayer`): The layer that holds what the group shares; itself when it is the first.
        decided (`bool`): The prompt was complete, and compressed or left as it is.
    """

    numbers = ("seen", "decided")

    def __init__(self, shared: Shared, layer_idx: int):
        super().__init__(shared, layer_idx)
        self.decided = False
        self._first: GroupLayer | None = None
        self._earlier: Sequence[GroupLayer] | None = None

    # -- what a method writes

    @abstractmethod
    def compress(self, side: str, members: Sequence["GroupLayer"], tokens: int, real: Tensor | None) -> bool:
        """Put the first `tokens` tokens of a side of all `members` into their `held`; False leaves them as they are.

        `members` ends with this layer; `real` is bool [batch, tokens], or `None` when nothing is padded.
        """

    @abstractmethod
    def restore(self, side: str, tokens: int) -> Tensor:
        """The compressed keys (rotated) or values [batch, kv_heads, tokens, head_dim] in the model's dtype."""

    @abstractmethod
    def cut(self, side: str, tokens: int) -> None:
        """Keep the first `tokens` compressed tokens in what this layer itself holds."""

    # -- what methods use

    @property
    def first(self) -> "GroupLayer":
        return self if self._first is None else self._first

    def compressed_tokens(self, side: str) -> int:
        """Tokens of a side that are compressed: the prompt's, or 0 when it was left as it is."""
        recent = self.held.get(f"{side}_recent")
        return 0 if recent is None else self.seen - recent.shape[2]

    @property
    def compressed_prompt(self) -> int:
        """Tokens of the prompt that are compressed, 0 when it was left as it is."""
        return max(self.compressed_tokens(side) for side in SIDES)

    # -- the core

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        whole = []
        for side, new in zip(SIDES, (keys, values), strict=True):
            old = self._restored(side)
            recent = self.held.get(f"{side}_recent")
            recent = new.clone() if recent is None else torch.cat([recent, new], dim=2)
            self.held[f"{side}_recent"] = recent
            whole.append(recent if old is None else torch.cat([old, recent], dim=2))
        self.seen += keys.shape[2]
        if self._first is None and not self.decided and self.shared.padding is not None:
            self.held["prompt_real"] = self.shared.padding[:, : self.seen].clone()
        return whole[0], whole[1]

    def finish_prefill(self) -> None:
        if self.decided or self._earlier is None:
            return
        members = [*self._earlier, self]
        told = self.shared.prompt_length
        tokens = self.seen if told is None else min(self.seen, told)
        real = self.first.held.pop("prompt_real", None)
        real = None if real is None else real[:, :tokens]
        for side in SIDES:
            if self.compress(side, members, tokens, real):
                for layer in members:
                    recent = layer.held[f"{side}_recent"]
                    layer.held[f"{side}_recent"] = recent[:, :, tokens:].clone()
        for layer in members:
            layer.decided = True

    def _restored(self, side: str) -> Tensor | None:
        count = self.compressed_tokens(side)
        return self.restore(side, count) if count else None

    def decompressed(self) -> tuple[Tensor, Tensor]:
        sides = []
        for side in SIDES:
            old, recent = self._restored(side), self.held[f"{side}_recent"]
            sides.append(recent if old is None else torch.cat([old, recent], dim=2))
        return sides[0], sides[1]

    def drop_last(self, tokens: int) -> None:
        """Exact: recent tokens go first, then rows of what the prompt became."""
        stay = self.seen - tokens
        for side in SIDES:
            count = self.compressed_tokens(side)
            self.held[f"{side}_recent"] = self.held[f"{side}_recent"][:, :, : max(0, stay - count)].clone()
            if stay < count:
                self.cut(side, stay)
        if "prompt_real" in self.held:
            self.held["prompt_real"] = self.held["prompt_real"][:, :stay].clone()
        self.seen = stay

    def reset(self) -> None:
        super().reset()
        self.decided = False


def linked(layers: Sequence[GroupLayer]) -> Iterator[GroupLayer]:
    """The layers of one group, made known to each other. A group of none is allowed."""
    for layer in layers[1:]:
        layer._first = layers[0]
    if layers:
        layers[-1]._earlier = tuple(layers[:-1])
    yield from layers


def adjacent(layers: Sequence[int], size: int) -> list[list[int]]:
    """Groups of at most `size` neighbouring layers. A layer that is not among `layers` ends a group."""
    groups: list[list[int]] = []
    for index in layers:
        if groups and groups[-1][-1] == index - 1 and len(groups[-1]) < size:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups
