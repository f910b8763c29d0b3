"""`attn_implementation="hfext_pasta"`: attention that `hfext.decoding.steer_attention` steers without a dense mask.

    a'_ij = alpha^[j in G^-] a_ij / sum_k alpha^[k in G^-] a_ik     for the heads that are steered

that is, log(alpha) is added to the scores of the keys in G^-, the tokens of the prompt that are not highlighted. The
bias is one number for each key, the same for all queries, so it takes memory of k and not of q times k, whatever the
mask. Heads that are not steered come out of the same call as without steering, bit for bit; those that are, of one
more for each of their key heads, or of one for all where all are steered. Without steering this is `hfext_triton`,
and under steering `hfext_triton` is this.

Steering leaves (heads, bias) on the layer as the attribute `STEERING` before the layer runs, and takes an attribute
that is still there afterwards as a layer that did not steer: it raises then. No family imports the other.

Tell Your Model Where to Attend: Post-hoc Attention Steering for LLMs, arXiv 2311.02262. The paper's method is
`hfext.decoding.pasta`, whose record says what differs; this file is where it runs and has no record of its own.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from . import hfext_triton
from ._mask import IntervalMask, interval_mask
from .hfext_triton import triton_attention

NAME = "hfext_pasta"
STEERING = "hfext_steering"


def pasta_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: IntervalMask | Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """
    The attention function that models call; arguments, result and errors as of `triton_attention`.

    Args:
        module (`nn.Module`): The layer. Its attribute `hfext_steering`, if it has one, is taken off: query heads and
            what is added to the scores of each key for them, `(list[int], Tensor [batch, k])`.
        query (`Tensor` [batch, heads, q, head_dim]): As key [batch, kv_heads, k, head_dim] and value.
    """
    steering = vars(module).get(STEERING)
    if steering is None:
        return triton_attention(module, query, key, value, attention_mask, **kwargs)
    delattr(module, STEERING)
    heads, bias = steering
    count, groups = query.shape[1], query.shape[1] // key.shape[1]
    bias = _for_keys(bias, key.shape[2])[:, None, None]
    given = kwargs.pop("position_bias", None)
    if len(heads) == count:
        bias = bias if given is None else bias + given
        return triton_attention(module, query, key, value, attention_mask, position_bias=bias, **kwargs)
    out, _ = triton_attention(module, query, key, value, attention_mask, position_bias=given, **kwargs)
    steered = []
    for own in sorted({head // groups for head in heads}):
        chosen = [head for head in heads if head // groups == own]
        part = dict(kwargs)
        if part.get("s_aux") is not None:
            part["s_aux"] = part["s_aux"][chosen]
        added = bias if given is None else bias + _of(given, chosen)
        states = (x[:, own : own + 1] for x in (key, value))
        mask = _of(attention_mask, chosen) if isinstance(attention_mask, Tensor) else attention_mask
        steered.append(triton_attention(module, query[:, chosen], *states, mask, position_bias=added, **part)[0])
    index = torch.tensor(sorted(heads), device=out.device)
    return out.index_copy(2, index, torch.cat(steered, 2)), None


def _for_keys(bias: Tensor, keys: int) -> Tensor:
    """The bias of all keys; those behind its end are places of a static cache that the mask leaves out."""
    if bias.shape[1] > keys:
        raise ValueError(f"Steering is for {bias.shape[1]} keys but the layer has {keys}.")
    return nn.functional.pad(bias, (0, keys - bias.shape[1]))


def _of(x: Tensor, heads: list[int]) -> Tensor:
    """The part of [batch or 1, heads or 1, q, k] that is for some heads."""
    return x if x.shape[1] == 1 else x[:, heads]


for _name in (NAME, hfext_triton.NAME):
    AttentionInterface.register(_name, pasta_attention)
AttentionMaskInterface.register(NAME, interval_mask)  # without it every mask would be left out silently
