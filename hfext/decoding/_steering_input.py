"""What a user gives to attention steering, checked: token ranges of the prompts and heads by layer."""

from collections.abc import Collection, Mapping, Sequence
from numbers import Integral
from typing import Any


def span_rows(spans: Any) -> list[list[tuple[int, int]]]:
    """Spans, of one prompt or of several, as a sorted list for each prompt."""
    spans = spans.tolist() if hasattr(spans, "tolist") else spans
    if not isinstance(spans, Sequence) or not spans:
        raise ValueError("spans is empty: highlight at least one token range.")
    rows = [spans] if isinstance(spans[0], Sequence) and spans[0] and isinstance(spans[0][0], Integral) else spans
    out = []
    for i, row in enumerate(rows):
        if not isinstance(row, Sequence) or not all(
            isinstance(s, Sequence) and len(s) == 2 and all(isinstance(n, Integral) for n in s) for s in row
        ):
            raise TypeError(f"spans: row {i} is {row!r} but must be a list of pairs of token positions.")
        if not row:
            raise ValueError(f"spans: row {i} has no span.")
        ordered = sorted((int(start), int(end)) for start, end in row)
        for start, end in ordered:
            if not 0 <= start < end:
                raise ValueError(f"spans: ({start}, {end}) of row {i} is empty or negative; 0 <= start < end.")
        for (a, b), (c, d) in zip(ordered, ordered[1:], strict=False):
            if c < b:
                raise ValueError(f"spans: ({a}, {b}) and ({c}, {d}) of row {i} overlap.")
        out.append(ordered)
    return out


def heads_by_layer(heads: Any, layers: Collection[int], count: int) -> dict[int, list[int]]:
    """`heads` with integers, of these layers with `count` heads each."""
    if not isinstance(heads, Mapping):
        raise TypeError(f"heads is a {type(heads).__name__} but must be a dict from layer to heads.")
    out: dict[int, list[int]] = {}
    for key, chosen in heads.items():
        # Keys of a JSON object are strings.
        layer = int(key) if isinstance(key, str) and key.isdigit() else key
        if layer not in layers:
            raise ValueError(f"heads names layer {key!r} but the layers are {min(layers)} to {max(layers)}.")
        for head in chosen:
            if not isinstance(head, Integral) or not 0 <= head < count:
                raise ValueError(f"heads names head {head!r} of layer {layer} but the heads are 0 to {count - 1}.")
        out[int(layer)] = [int(head) for head in chosen]
    return out
