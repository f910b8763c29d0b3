"""What a processor remembers of a sequence, found again by the tokens of the sequence.

`generate` gives a processor no identity of a row: beams are reordered and copied between calls, finished rows go on
with padding, assisted decoding asks about prefixes that are rejected later. So memory is looked up by prefix: what was
stored when the row's tokens were all but the last. A call with sequences of length L makes obsolete what is stored for
lengths >= L, which is how a rejected draft or the calls of a draft model leave.

Rows with equal tokens may differ all the same: the rows of an encoder-decoder batch share their first tokens. Then the
row of the same index is taken, or one of the same input, or the nearest.
"""

from typing import Any

import torch
from torch import Tensor

# Of all kept calls together. Assisted decoding, which works on one sequence, can go back by so many tokens.
ROWS_KEPT = 64


class PrefixMemory:
    """Memory of the last calls of a processor. `rows_per_input`: beams of one input, where it is known."""

    def __init__(self, rows_per_input: int | None = None):
        self.rows_per_input = rows_per_input
        self.calls: dict[int, tuple[dict[bytes, list[int]], Any]] = {}

    def find(self, input_ids: Tensor) -> tuple[Any, Tensor, Tensor] | None:
        """What was stored one token before, which rows of `input_ids` `[rows, length]` it knows, and as which rows."""
        if input_ids.shape[1] - 1 not in self.calls:
            return None
        known, memory = self.calls[input_ids.shape[1] - 1]
        keys = [_key(tokens) for tokens in input_ids[:, :-1].cpu()]
        found = {row: self._nearest(known[key], row) for row, key in enumerate(keys) if key in known}
        rows, then = (torch.tensor(list(x), device=input_ids.device) for x in (found, found.values()))
        return (memory, rows, then) if found else None

    def store(self, input_ids: Tensor, memory: Any) -> None:
        """Keep `memory` for the sequences `input_ids`, and forget what they make obsolete."""
        length = input_ids.shape[1]
        known: dict[bytes, list[int]] = {}
        for row, tokens in enumerate(input_ids.cpu()):
            known.setdefault(_key(tokens), []).append(row)
        self.calls = {n: call for n, call in self.calls.items() if n < length}
        self.calls[length] = known, memory
        for n in sorted(self.calls)[:-1]:
            if len(self.calls) * len(input_ids) > ROWS_KEPT:
                del self.calls[n]

    def _nearest(self, candidates: list[int], row: int) -> int:
        group = self.rows_per_input or 1
        return min(candidates, key=lambda other: (other != row, other // group != row // group, abs(other - row)))


def _key(tokens: Tensor) -> bytes:
    return tokens.contiguous().numpy().tobytes()
