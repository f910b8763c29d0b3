"""Attention implementations, by name: `from_pretrained(path, attn_implementation="hfext_triton")`.

How to choose:

| you want | take | cost | not when |
|---|---|---|---|
| soft cap, sinks, bias, windows, padding, and their gradients | `hfext_triton` | | attention weights are asked for |
| to train a model that attends to some k keys a query | `hfext_spark` | scores made twice | soft cap, sinks, bias |
| a pretrained model's own scores masked alike | `hfext_topk` | k keys about, not exactly | soft cap, sinks, bias |
| to train a model that needs no positions | `hfext_stickbreaking` | slower | the weights are of softmax |
| to steer heads over long prompts | `hfext_pasta` | one more call for each key head that is steered | |

Importing hfext registers each in `AttentionInterface` and, under the same name, its mask in `AttentionMaskInterface`.
"""

from ..registry import collect
from . import hfext_pasta, hfext_triton, spark, stickbreaking
from ._mask import IntervalMask, interval_mask

__all__ = ["IntervalMask", "interval_mask"]
METHODS = collect(__name__)
