"""Attention implementations, by name: `from_pretrained(path, attn_implementation="hfext_triton")`.

How to choose:

| you want | take | cost | not when |
|---|---|---|---|
| soft cap, sinks, bias, windows, padding, and their gradients | `hfext_triton` | | attention weights are asked for |

Importing hfext registers each in `AttentionInterface` and, under the same name, its mask in `AttentionMaskInterface`.
"""

from ..registry import collect
from . import hfext_triton
from ._mask import IntervalMask, interval_mask

__all__ = ["IntervalMask", "interval_mask"]
METHODS = collect(__name__)
