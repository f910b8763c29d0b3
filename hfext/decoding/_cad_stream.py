"""State of the second stream of context-aware decoding: what it has computed and which texts it was asked about."""

from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor
from transformers.cache_utils import Cache


def find_parents(old: Tensor, new: Tensor, groups: int) -> Tensor | None:
    """For each row of `new` [rows, n] the equal row of `old` [old rows, n] in its group; None if one has none.

    Rows of one prompt stand together and the groups in the same order on both sides. Other groups are not looked at:
    the decoder prefixes of an encoder-decoder model are equal while its inputs differ.
    """
    per_old, per_new = len(old) // groups, len(new) // groups
    old, new = old.view(groups, 1, per_old, -1), new.view(groups, per_new, 1, -1)
    same = (old == new).all(-1)
    if not same.any(-1).all():
        return None
    first = same.int().argmax(-1) + per_old * torch.arange(groups, device=same.device).unsqueeze(1)
    return first.flatten()


@dataclass
class Stream:
    """The rows of the last call, their keys and values, and how many layers the model had then."""

    tokens: Tensor
    cache: Cache
    layers: int | None

    def continued(self, input_ids: Tensor, groups: int) -> int:
        """Make the cache that of the rows of `input_ids`; how many columns of them it then covers, 0 on a miss.

        The rows continue texts of the same `generate`, so that these columns hold the prompts at least.
        """
        old = self.tokens.shape[1]
        common = min(old, input_ids.shape[1] - 1)
        if self.tokens.device != input_ids.device or common < 1:
            return 0
        parents = find_parents(self.tokens[:, :common], input_ids[:, :common], groups)
        if parents is None:
            return 0
        if common < old:
            if not self.cache.is_croppable or any(self.cache.is_sliding):
                return 0
            self.cache.crop(common - old)
        if not torch.equal(parents, torch.arange(len(self.tokens), device=parents.device)):
            self.cache.reorder_cache(parents)
        return common


class AskedTexts:
    """The rows that were asked about, by digest. One `generate` asks about a text only after all of its prefixes.

    That holds for beams, for drafts that are rejected and for the next round after them, and tells the calls of one
    `generate` from the first of another, whose prompt may well begin with the prompt of the first.
    """

    def __init__(self):
        self._keys: set[tuple[int, bytes]] = set()

    def add(self, input_ids: Tensor, groups: int) -> None:
        """Remember the rows [rows, length] of each group."""
        self._keys.update(_keys(input_ids, groups))

    def know_parents(self, input_ids: Tensor, groups: int) -> list[bool]:
        """For each row whether it was known in its group when it was one token shorter."""
        if not self._keys:
            return [False] * len(input_ids)
        return [key in self._keys for key in _keys(input_ids[:, :-1], groups)]


def _keys(rows: Tensor, groups: int) -> list[tuple[int, bytes]]:
    each = len(rows) // groups
    texts = rows.long().cpu().contiguous().numpy()
    return [(i // each, blake2b(text.tobytes(), digest_size=16).digest()) for i, text in enumerate(texts)]
