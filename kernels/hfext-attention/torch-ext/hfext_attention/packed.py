"""Keys and values that are stored as codes, and attention to them.

`PackedStates` looks like a tensor [batch, kv_heads, tokens, head_dim] to a model, which only hands it on. An attention
that knows it calls `packed_attention`; any other operation gets the tensor itself, made whole.
"""

from __future__ import annotations

from typing import Any, Callable

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .attention import check_heads, check_keys, check_softcap

BITS = (2, 3, 4, 8)


class PackedStates(Tensor):
    """
    Keys or values of which the first tokens are codes: code * scale + minimum.

    Args:
        recent (`Tensor` [B, HK, R, D]): The last tokens as they are, in the model's dtype.
        whole (callable): Returns all tokens [B, HK, T + R, D], for whatever does not read codes.
        codes (`Tensor` uint8 [B, T, HK, bytes], *optional*): Packed along the channels; None when nothing is coded.
        scale, minimum (`Tensor` float, *optional*): [B, T / group, HK, D] with `along="tokens"`, [B, T, HK, D / group]
            with `along="channels"`.
        bits (`int`): 2, 3, 4 or 8.
        group (`int`): Tokens or channels that share a scale.
        along (`str`): "tokens" or "channels".
    """

    @staticmethod
    def __new__(
        cls,
        recent: Tensor,
        whole: Callable[[], Tensor],
        codes: Tensor | None = None,
        scale: Tensor | None = None,
        minimum: Tensor | None = None,
        bits: int = 8,
        group: int = 1,
        along: str = "channels",
    ):
        coded = 0 if codes is None else codes.shape[1]
        B, HK, R, D = recent.shape
        self = Tensor._make_wrapper_subclass(cls, (B, HK, coded + R, D), dtype=recent.dtype, device=recent.device)
        if bits not in BITS or along not in ("tokens", "channels"):
            raise ValueError(f"bits is {bits} and along {along!r}: they must be one of {BITS} and tokens or channels.")
        self.recent, self.whole, self.codes, self.scale, self.minimum = recent, whole, codes, scale, minimum
        self.bits, self.group, self.along, self.coded = bits, group, along, coded
        return self

    def __repr__(self) -> str:
        return f"PackedStates({tuple(self.shape)}, {self.coded} tokens of {self.bits} bits)"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        def plain(x):
            return x.whole() if isinstance(x, PackedStates) else x

        return function(*tree_map(plain, args), **tree_map(plain, kwargs or {}))


def packed_attention(
    q: Tensor,
    k: PackedStates,
    v: PackedStates,
    *,
    scale: float | None = None,
    lo: Tensor | None = None,
    hi: Tensor | None = None,
    keys: Tensor | None = None,
    sink: Tensor | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """
    `attention` of q [B, H, M, D] to stored keys and values, read as they are: any number of queries, no gradient.

    Tokens lie in up to three stretches: both coded, one coded, none coded; each is a split of the keys.
    """
    from ._autograd import _or, _padded, _row_stride, chunk_of, combine
    from ._launch import config, interpreted, launch
    from ._packed_kernels import attention_packed

    if torch.is_grad_enabled() and q.requires_grad:
        raise ValueError("Keys and values that are stored as codes have no gradient: use torch.no_grad().")
    B, H, M, D = q.shape
    HK, N = k.shape[1], k.shape[2]
    if v.shape != k.shape or k.shape[0] != B or k.shape[3] != D or H % HK or not {k.dtype, v.dtype} == {q.dtype}:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit together.")
    lo, hi = check_keys(B, M, N, lo, hi, keys)
    check_softcap(softcap)
    check_heads("sink", sink, H)
    scale = D**-0.5 if scale is None else float(scale)
    ends = sorted({0, k.coded, v.coded, N})
    low = interpreted() and q.dtype != torch.float32
    rows = min(64, _padded(H // HK * M))
    setting = config("packed", q, dtype="float32" if q.dtype == torch.float32 else "16 bit", D=_padded(D))
    plans, total = [], 0
    for first, stop in zip(ends, ends[1:]):
        chunk = chunk_of(q, B * HK, stop - first, setting["BN"])
        parts = -(-(stop - first) // chunk)
        plans.append((first, stop, chunk, total, parts))
        total += parts
    part_o = q.new_empty(max(total, 1), B, H, M, D, dtype=torch.float32)
    part_lse = q.new_full((max(total, 1), B, H, M), -torch.inf, dtype=torch.float32)
    if not total:
        part_o.zero_()
    keys = None if keys is None else keys.contiguous().view(torch.uint8)
    for first, stop, chunk, part0, parts in plans:
        sides = [_side(x, first) for x in (k, v)]
        pointers = [tensor for side in sides for tensor in side["tensors"]]
        strides = [number for side in sides for number in side["strides"]]
        kb, vb = (side["bits"] for side in sides)
        aligned = [first % x.group == 0 and x.group % setting["BN"] == 0 for x in (k, v)]
        launch(
            attention_packed, (parts, B * HK, -(-(H // HK * M) // rows)),
            q, *pointers, part_o, part_lse, _or(lo, q), _or(hi, q), _or(keys, q), *q.stride(), *strides,
            _row_stride(lo), _row_stride(keys), B, H, H // HK, M, N, first, stop, chunk, part0, k.coded, v.coded,
            scale, float(softcap or 0.0), D=D, BD=_padded(D), BR=rows, KBITS=kb, VBITS=vb, KGROUP=k.group,
            VGROUP=v.group, KTOKENS=k.along == "tokens", VTOKENS=v.along == "tokens", KALIGNED=aligned[0],
            VALIGNED=aligned[1],
            INTERVAL=lo is not None, SOFTCAP=bool(softcap), KEYS=keys is not None, UPCAST=low, PRECISION="ieee",
            **setting,
        )  # fmt: skip
    o, lse = combine(part_o, part_lse, None if sink is None else sink.contiguous(), q.dtype)
    return (o, lse) if return_lse else o


def _side(x: PackedStates, first: int) -> dict[str, Any]:
    """Tensors, strides over batch, head and token, and bits (16 for none) of the tokens from `first` on."""
    if first < x.coded:
        codes, scale = x.codes, x.scale
        strides = [codes.stride(n) for n in (0, 2, 1)] + [scale.stride(n) for n in (0, 2, 1)]
        if codes.stride(3) != 1 or scale.stride(3) != 1 or x.minimum.stride() != scale.stride():
            raise ValueError("codes, scale and minimum must have channels that lie behind one another.")
        return {"tensors": (codes, scale, x.minimum), "strides": strides, "bits": x.bits}
    recent = x.recent if x.recent.stride(3) == 1 else x.recent.contiguous()
    strides = [recent.stride(n) for n in (0, 1, 2)] + [0, 0, 0]
    return {"tensors": (recent, recent, recent), "strides": strides, "bits": 16}
