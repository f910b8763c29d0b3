"""Softmax attention with every modifier and every gradient, in Triton and in plain torch."""

from .attention import attention, intervals
from .flash import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from .packed import PackedStates, packed_attention

__all__ = [
    "PackedStates",
    "attention",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "intervals",
    "packed_attention",
]
