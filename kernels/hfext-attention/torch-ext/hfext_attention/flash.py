"""The functions of the flash_attn package, version 2, by their own names, arguments and layouts, on these kernels.

Tensors are [batch, tokens, heads, head_dim], or [tokens, heads, head_dim] with `cu_seqlens`. Causal attention and
windows are aligned to the last query and the last key. Every call is deterministic.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .attention import attention, intervals


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = True,
    return_attn_probs: bool = False,
    s_aux: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """Attention over whole sequences; with `return_attn_probs` also the log-sum-exp [batch, heads, q] and None."""
    M, N = q.shape[1], k.shape[1]
    lo, hi = _window(M, N, N - M, causal, window_size, q)
    out, lse = attention(
        *(x.transpose(1, 2) for x in (q, k, v)), lo=lo, hi=hi, scale=softmax_scale, softcap=softcap or None,
        alibi_slopes=alibi_slopes, dropout_p=dropout_p, sink=s_aux, return_lse=True,
    )  # fmt: skip
    return (out, lse, None) if return_attn_probs else out


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = True,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    s_aux: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """Attention within each of several sequences that lie behind one another; `cu_seqlens` int32 [sequences + 1]."""
    if block_table is not None:
        raise NotImplementedError("block_table is not read: gather the pages into k and v before.")
    for name, ends, tokens in (("cu_seqlens_q", cu_seqlens_q, len(q)), ("cu_seqlens_k", cu_seqlens_k, len(k))):
        if ends.dtype != torch.int32 or ends.ndim != 1 or len(ends) < 2:
            raise ValueError(f"{name} is {ends.dtype} {tuple(ends.shape)} but must be int32 [sequences + 1].")
        if not ends.is_cuda and (bool((ends.diff() < 0).any()) or int(ends[0]) != 0 or int(ends[-1]) != tokens):
            raise ValueError(f"{name} must rise from 0 to {tokens}, the tokens there are.")
    _no_shifted_alibi(alibi_slopes, causal, s_aux, return_attn_probs)
    t = torch.arange(len(q), device=q.device, dtype=torch.int32)
    own = torch.searchsorted(cu_seqlens_q, t, right=True) - 1
    first, stop = cu_seqlens_k[own], cu_seqlens_k[own + 1]
    place = t - cu_seqlens_q[own] + (stop - first) - (cu_seqlens_q[own + 1] - cu_seqlens_q[own]) + first
    left, right = window_size[0], 0 if causal else window_size[1]
    lo = torch.maximum(first, place - left) if left >= 0 else first
    hi = torch.minimum(stop, place + right + 1) if right >= 0 else stop
    out, lse = attention(
        *(x.transpose(0, 1)[None] for x in (q, k, v)), lo=lo[None].int(), hi=hi[None].int(), scale=softmax_scale,
        softcap=softcap or None, alibi_slopes=alibi_slopes, dropout_p=dropout_p, sink=s_aux, return_lse=True,
    )  # fmt: skip
    return (out[0], lse[0], None) if return_attn_probs else out[0]


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: Tensor | int | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    s_aux: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention to a cache [batch, places, kv_heads, head_dim] of which row b holds `cache_seqlens[b]` tokens. New
    keys and values, where given, are written behind them first, in place."""
    unread = {"rotary_cos": rotary_cos, "cache_batch_idx": cache_batch_idx, "block_table": block_table}
    for name, given in {**unread, "cache_leftpad": cache_leftpad}.items():
        if given is not None:
            raise NotImplementedError(f"{name} is not read: apply it to the tensors before.")
    _no_shifted_alibi(alibi_slopes, causal, s_aux, return_softmax_lse)
    B, M, N = q.shape[0], q.shape[1], k_cache.shape[1]
    held = N if cache_seqlens is None else cache_seqlens
    held = torch.as_tensor(held, device=q.device, dtype=torch.int32).expand(B)
    if k is not None:
        at = held[:, None] + torch.arange(k.shape[1], device=q.device)
        rows = torch.arange(B, device=q.device)[:, None]
        k_cache[rows, at], v_cache[rows, at] = k.to(k_cache.dtype), v.to(v_cache.dtype)
        held = held + k.shape[1]
    place = held[:, None] - M + torch.arange(M, device=q.device, dtype=torch.int32)
    left, right = window_size[0], 0 if causal else window_size[1]
    lo = (place - left).clamp_(min=0) if left >= 0 else torch.zeros_like(place)
    hi = torch.minimum(held[:, None], place + right + 1) if right >= 0 else held[:, None].expand(B, M)
    out, lse = attention(
        *(x.transpose(1, 2) for x in (q, k_cache, v_cache)), lo=lo.int(), hi=hi.clamp(min=0).int(),
        scale=softmax_scale, softcap=softcap or None, alibi_slopes=alibi_slopes, sink=s_aux, return_lse=True,
        parts=num_splits,
    )  # fmt: skip
    return (out, lse) if return_softmax_lse else out


def _window(M, N, offset, causal, window_size, q):
    if not causal and min(window_size) < 0 and max(window_size) < 0:
        return None, None
    return intervals(M, N, offset, causal, window_size, q.device)


def _no_shifted_alibi(alibi_slopes, causal, sink, lse) -> None:
    """Its bias counts from each row's own last key. That differs from ours by a number which the softmax cancels where
    attention is causal, but neither a sink nor the log-sum-exp does."""
    if alibi_slopes is not None and (not causal or sink is not None or lse):
        raise NotImplementedError("alibi_slopes needs causal=True here, and neither s_aux nor the log-sum-exp.")
