"""`attn_implementation="hfext_triton"`: one attention for training and generation, with every modifier.

    s_ij = scaling <q_i, k_j>;  s <- cap tanh(s / cap);  s <- s + bias_ij;  P = softmax over visible keys, the sink

Grouped queries, causal, sliding, chunked and packed patterns, padding on either side, soft cap, attention sinks and
position bias with gradients, dropout, head sizes up to 256, values of another size, static caches. On a GPU the
kernels of `kernels/hfext-attention` run (FlashAttention-2's algorithm, 2307.08691; a split of the keys for decoding;
a backward pass without atomics, so that runs repeat); elsewhere the same formula in plain torch.

FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning, arXiv 2307.08691. What differs: every
pattern is an interval of keys for each query; modifiers and their gradients; two backward kernels instead of atomics.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from ..compat import is_causal as says_causal
from ..registry import Method, Result
from ._mask import IntervalMask, interval_mask

NAME = "hfext_triton"

# Arguments of model layers that say nothing about the function that is computed here.
HARMLESS = {
    "add_pooling_layer", "cu_seq_lens_k", "cu_seq_lens_q", "cu_seqlens", "deterministic", "interpolate_pos_encoding",
    "is_training", "labels", "layer_idx", "logits_to_keep",
    "max_length_k", "max_length_q", "max_seqlen", "num_items_in_batch", "num_logits_to_keep", "output_hidden_states",
    "output_router_logits", "padding_mask", "past_key_values", "position_embeddings", "position_ids", "return_dict",
    "return_legacy_cache", "return_loss", "seq_idx", "target_dtype", "token_type_ids", "use_cache",
}  # fmt: skip


def triton_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: IntervalMask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """
    The attention function that models call; arguments as `sdpa_attention_forward` of transformers, and more.

    Keys and values of a compressed cache that are stored as codes (`hfext.kv_cache.KIVIConfig`) are read as they are.

    Args:
        module (`nn.Module`): The layer; its `is_causal` counts where neither a mask nor the call says it.
        query (`Tensor` [batch, heads, q, head_dim]): In fp32, bf16 or fp16, as keys and values are.
        key, value (`Tensor` [batch, kv_heads, k, head_dim]): Values may have another head size.
        attention_mask (`IntervalMask`, `Tensor` or `None`): Of `interval_mask`, or [batch or 1, heads or 1, q, k],
            boolean or added to the scores.
        dropout (`float`, *optional*, defaults to 0.0): Part of the weights that is dropped, in [0, 1).
        scaling (`float`, *optional*, defaults to head_dim ** -0.5): Factor of the products.
        is_causal (`bool`, *optional*): Of the call; by default what the layer says. Without a mask alone.
        sliding_window (`int`, *optional*): The latest keys that a query sees, where there is no mask to say so.
        softcap (`float`, *optional*): Scores become softcap tanh(score / softcap).
        s_aux (`Tensor` [heads], *optional*): Attention sinks; they have a gradient.
        position_bias (`Tensor` [batch or 1, heads or 1, q, k], *optional*): Is added to scores; has a gradient.
        cache (*optional*): Of continuous batching, which is refused.

    Returns:
        `(Tensor, None)`: [batch, q, heads, head_dim] in the dtype of `query`; weights are never made.

    Raises:
        ValueError: `output_attentions=True`, or a mask of another shape.
        NotImplementedError: Continuous batching, or a modifier that is not known here.
    """
    from hfext_attention import PackedStates, attention, packed_attention

    modifiers = visible(
        module, query, key, attention_mask, is_causal=is_causal, sliding_window=sliding_window, cache=cache, **kwargs
    )
    n = modifiers.pop("length")
    if isinstance(key, PackedStates) and isinstance(value, PackedStates) and n == key.shape[2]:
        pairs = position_bias, modifiers["mask"], modifiers["bias"], dropout or None
        if query.dtype == key.dtype and all(x is None for x in pairs):
            seen = {name: modifiers[name] for name in ("lo", "hi", "keys")}
            return packed_attention(query, key, value, scale=scaling, softcap=softcap, sink=s_aux, **seen), None
    query, key, value = under_autocast(query, key, value)
    if n < key.shape[2]:
        key, value = key[:, :, :n], value[:, :, :n]
    if position_bias is not None:
        position_bias = position_bias[..., :n]
        added = modifiers["bias"]
        modifiers["bias"] = position_bias if added is None else position_bias + added
    out = attention(
        query, key, value, scale=scaling, softcap=softcap, sink=s_aux, dropout_p=dropout, offset=0, **modifiers
    )
    return out, None


def visible(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    attention_mask: IntervalMask | Tensor | None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> dict[str, Any]:
    """Which keys take part, as arguments of `attention`: lo, hi, keys, mask, bias; and their number."""
    refuse(cache, kwargs)
    m, n = query.shape[2], key.shape[2]
    found: dict[str, Any] = dict(lo=None, hi=None, keys=None, mask=None, bias=None, length=n)
    if isinstance(attention_mask, IntervalMask):
        if attention_mask.shape[2] != m or attention_mask.shape[3] > n:
            raise ValueError(
                f"The mask is for {tuple(attention_mask.shape[2:])} queries and keys, but there are {m, n}."
            )
        found.update(lo=attention_mask.lo, hi=attention_mask.hi, keys=attention_mask.keys)
        found["length"] = attention_mask.shape[3]
    elif attention_mask is not None:
        if attention_mask.dtype != torch.bool and not attention_mask.is_floating_point():
            raise ValueError(f"attention_mask is {attention_mask.dtype} but must be boolean, or added to the scores.")
        whole = (*query.shape[:3], n)
        if attention_mask.ndim != 4 or any(a not in (1, b) for a, b in zip(attention_mask.shape, whole, strict=True)):
            raise ValueError(
                f"attention_mask is {tuple(attention_mask.shape)} but must broadcast to "
                f"[batch, heads, queries, keys] = {whole}."
            )
        found["mask" if attention_mask.dtype == torch.bool else "bias"] = attention_mask
    elif m > 1 and (says_causal(module) if is_causal is None else is_causal):
        # As transformers means it: keys behind the queries are places of a static cache that are not written yet.
        found["length"] = min(m, n)
        make = causal if torch.compiler.is_compiling() else _kept
        found["lo"], found["hi"] = make(m, min(m, n), sliding_window, query.device)
    return found


def causal(m: int, n: int, window: int | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """lo and hi of causal attention whose first query stands at the first key."""
    from hfext_attention import intervals

    with torch.inference_mode(False):  # they are saved for backward by whoever asks next
        return intervals(m, n, 0, True, window, device)


_kept = lru_cache(maxsize=64)(causal)  # the layers of a model ask for the same ones


def refuse(cache: Any, kwargs: dict[str, Any]) -> None:
    """Raise for what would change the result and is not known here."""
    if kwargs.get("output_attentions"):
        raise ValueError("hfext attention makes no weights: load the model with attn_implementation='eager' for them.")
    if cache is not None:
        raise NotImplementedError(
            "hfext attention does not read the paged cache of continuous batching: use attn_implementation='sdpa'."
        )
    unknown = sorted(
        name for name, value in kwargs.items() if name not in HARMLESS and value is not None and value is not False
    )
    if unknown:
        raise NotImplementedError(
            f"The model passes {', '.join(unknown)} to its attention, which hfext does not know and will not leave "
            "out: use attn_implementation='eager'."
        )


def under_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors as autocast wants products to have them."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    to = torch.get_autocast_dtype(kind)
    return tuple(x.to(to) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors)


AttentionInterface.register(NAME, triton_attention)
AttentionMaskInterface.register(NAME, interval_mask)  # without it every mask would be left out silently

METHOD = Method(
    name=NAME,
    family="attention",
    title="FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning",
    arxiv="2307.08691",
    year=2023,
    authors="Tri Dao",
    repo="Dao-AILab/flash-attention",
    status="variant",
    difference="Every pattern is an interval of keys for each query; soft cap, sinks and bias have gradients; the "
    "backward pass has no atomics.",
    target="hfext.attention.hfext_triton:triton_attention",
    usage='AutoModelForCausalLM.from_pretrained(path, attn_implementation="hfext_triton")',
    summary="Attention in Triton with every modifier and every gradient; plain torch where there is no GPU.",
    headline=Result(
        metric="speed, forward and backward",
        setting="A100, fp16 and bf16",
        value="50-73 % of the peak",
        baseline="FlashAttention 25-40 %",
    ),
    notes="No small claim to verify: `hfext bench kernels` measures it on a GPU. CPU results equal eager attention.",
)
