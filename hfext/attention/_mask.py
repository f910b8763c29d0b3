"""The mask of our attention implementations: for each query the interval of keys that it sees, never the whole matrix.

`interval_mask` is registered in `AttentionMaskInterface` and returns an `IntervalMask` where it recognises what
transformers asks for (causal, bidirectional, sliding, chunked, packed, padded, and any of them together), and
transformers' dense boolean mask where it does not.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, masking_utils
from transformers.masking_utils import causal_mask_function, sdpa_mask
from transformers.utils import logging

from ..compat import computes_its_own_attention, mask_parts

logger = logging.get_logger(__name__)

FAR = 2**40


class IntervalMask:
    """Query i of row b sees the keys lo[b, i] <= j < hi[b, i], but for those that `keys` hides.

    Whatever treats it as the dense boolean mask [batch, 1, q, k] gets that: it is made then, and a warning is given
    once.

    Attributes:
        lo, hi (`Tensor`): int32 [batch or 1, q].
        keys (`Tensor` or `None`): bool [batch or 1, k], False for hidden keys.
        shape (`torch.Size`): Of the dense mask.
    """

    def __init__(self, lo: Tensor, hi: Tensor, keys: Tensor | None, shape: tuple[int, int, int, int]):
        self.lo, self.hi, self.keys, self.shape = lo, hi, keys, torch.Size(shape)
        self.ndim, self.dtype, self.device = 4, torch.bool, lo.device

    def dense(self) -> Tensor:
        """bool [batch, 1, q, k]."""
        j = torch.arange(self.shape[-1], device=self.device)
        seen = (j >= self.lo[..., None]) & (j < self.hi[..., None])
        if self.keys is not None:
            seen = seen & self.keys[:, None]
        return seen[:, None].expand(self.shape)

    def to(self, *args: Any, **kwargs: Any) -> "IntervalMask | Tensor":
        """The mask on another device; to another dtype, the dense one."""
        device, dtype, *_ = torch._C._nn._parse_to(*args, **{k: v for k, v in kwargs.items() if k != "copy"})
        if dtype not in (None, torch.bool):
            return self._asked().to(*args, **kwargs)
        move = (lambda x: x) if device is None else (lambda x: None if x is None else x.to(device))
        return IntervalMask(move(self.lo), move(self.hi), move(self.keys), tuple(self.shape))

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return 4

    def contiguous(self) -> "IntervalMask":
        return self

    def _asked(self) -> Tensor:
        logger.warning_once("An attention mask of hfext was used as a dense one, which takes memory of q times k.")
        return self.dense()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._asked(), name)

    @classmethod
    def __torch_function__(cls, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        def dense(x: Any) -> Any:
            if isinstance(x, list | tuple):
                return type(x)(dense(y) for y in x)
            return x._asked() if isinstance(x, IntervalMask) else x

        return function(*dense(args), **{name: dense(x) for name, x in (kwargs or {}).items()})


def _operator(name: str) -> Callable:
    return lambda self, *args: getattr(self._asked(), name)(*args)


for _name in "getitem add radd sub rsub mul rmul and rand or ror xor invert eq ne lt gt le ge len iter bool".split():
    setattr(IntervalMask, f"__{_name}__", _operator(f"__{_name}__"))
IntervalMask.__hash__ = object.__hash__


def interval_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    config: PretrainedConfig | None = None,
    **kwargs: Any,
) -> IntervalMask | Tensor | None:
    """The mask function of transformers' `AttentionMaskInterface`; arguments as those of `sdpa_mask`.

    `None` stands for "all keys", or with several queries of a causal layer for plain causal attention.
    """
    if isinstance(attention_mask, IntervalMask):
        return attention_mask
    if attention_mask is not None and attention_mask.ndim != 2:
        raise ValueError(
            f"attention_mask is {tuple(attention_mask.shape)} but must be [batch, keys], or a mask of every pair "
            "[batch, heads or 1, queries, keys]."
        )
    alone = None if torch.compiler.is_compiling() else computes_its_own_attention(type(config))
    if alone:
        raise NotImplementedError(
            f"{alone} computes attention in its own code and asks no implementation: use attn_implementation='eager'."
        )
    parts = None if use_vmap or not _agrees() else mask_parts(mask_function)
    if parts is None:
        if not torch.compiler.is_compiling():
            logger.warning_once("An attention mask is of no pattern that hfext knows: it takes memory of q times k.")
        return sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            local_size=local_size,
            allow_is_causal_skip=False,
            allow_is_bidirectional_skip=allow_is_bidirectional_skip,
            use_vmap=use_vmap,
            device=device,
            config=config,
            **kwargs,
        )
    keys = _visible_keys(attention_mask, kv_length, kv_offset)
    known = isinstance(q_offset, int)
    if keys is None and [name for name, _ in parts] == ["bidirectional"] and allow_is_bidirectional_skip:
        return None
    if keys is None and [name for name, _ in parts] == ["causal"] and allow_is_causal_skip and known:
        last = q_offset + q_length == kv_offset + kv_length
        if last and (q_length == 1 or q_length == kv_length):
            return None
    lo, hi, hidden = _interval(parts, torch.arange(q_length, device=device)[None] + q_offset)
    for padding in hidden:
        more = _visible_keys(padding, kv_length, kv_offset)
        keys = more if keys is None else keys if more is None else keys & more
    lo, hi = (lo - kv_offset).clamp(0, kv_length), (hi - kv_offset).clamp(0, kv_length)
    if keys is not None:
        lo, hi, keys = _without_padding(lo, hi, keys)
    return IntervalMask(lo.int(), hi.int(), keys, (batch_size, 1, q_length, kv_length))


def _visible_keys(attention_mask: Tensor | None, kv_length: int, kv_offset: int) -> Tensor | None:
    """bool [batch, kv_length], or None when nothing is hidden."""
    if attention_mask is None:
        return None
    keys = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
    if keys.shape[1] < kv_length:
        keys = torch.nn.functional.pad(keys, (0, kv_length - keys.shape[1]))
    if torch.compiler.is_compiling() or not keys.all():
        return keys
    return None


def _without_padding(lo: Tensor, hi: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Intervals cut to the first and last visible key of each row; the keys go when nothing is hidden in between."""
    n = keys.shape[1]
    some = keys.any(1)
    first = torch.where(some, keys.int().argmax(1), n)[:, None]
    stop = torch.where(some, n - keys.flip(1).int().argmax(1), 0)[:, None]
    if not torch.compiler.is_compiling() and bool((keys.sum(1) == (stop - first)[:, 0].clamp(min=0)).all()):
        keys = None
    return torch.maximum(lo, first), torch.minimum(hi, stop), keys


def _interval(parts: list[tuple[str, dict]], p: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """lo and hi int64 [batch or 1, q] in the keys' own positions for queries at positions p, and padding masks."""
    lo, hi = torch.full_like(p, -FAR), torch.full_like(p, FAR)
    hidden = []
    for kind, closed in parts:
        if kind == "causal":
            low, high = -FAR, p + 1
        elif kind == "sliding":
            low, high = p - closed["sliding_window"] + 1, FAR
        elif kind == "window":
            low, high = p - closed["sliding_window"], p + closed["sliding_window"] + 1
        elif kind == "chunked":
            size, left = closed["chunk_size"], closed["left_padding"].to(p.device)[:, None]
            low = left + torch.div(p - left, size, rounding_mode="floor") * size
            high = low + size
        elif kind == "packed":
            # Indices are positions here: such masks are made without a cache and without offsets.
            ids = closed["packed_sequence_mask"].to(p.device).contiguous()
            low = torch.searchsorted(ids, ids, right=False)
            high = torch.searchsorted(ids, ids, right=True)
        elif kind == "remapped":
            place = closed["position_ids"].to(p.device)
            low, high, _ = _interval(closed["parts"], place)
            low, high = low + (p - place), high + (p - place)
        elif kind == "padding":
            hidden.append(closed["padding_mask"])
            continue
        else:  # bidirectional
            continue
        lo = torch.maximum(lo, torch.as_tensor(low, device=p.device))
        hi = torch.minimum(hi, torch.as_tensor(high, device=p.device))
    return lo, hi, hidden


@torch.compiler.assume_constant_result
def _agrees() -> bool:
    return _compared()


@lru_cache(maxsize=1)
def _compared() -> bool:
    """Whether each kind of mask is what this transformers makes of it, tried once on a small example."""
    left = torch.tensor([0, 3])
    places = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0, 1]] * 2)
    ids = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2]] * 2)
    padding = torch.tensor([[1] * 9, [0, 0, 0, 1, 1, 0, 1, 1, 0]]).bool()
    masks = masking_utils
    functions = [
        causal_mask_function,
        masks.bidirectional_mask_function,
        masks.sliding_window_causal_mask_function(3),
        masks.sliding_window_bidirectional_mask_function(2),
        masks.chunked_causal_mask_function(4, left),
        masks.and_masks(causal_mask_function, masks.padding_mask_function(padding)),
        *(
            masks.packed_sequence_compatibility_function(inner, places, ids)
            for inner in (causal_mask_function, masks.sliding_window_causal_mask_function(2))
        ),
    ]
    for function in functions:
        parts = mask_parts(function)
        if parts is None:
            break
        lo, hi, hidden = _interval(parts, torch.arange(9)[None])
        lo, hi = lo.clamp(0, 9), hi.clamp(0, 9)
        ours = IntervalMask(lo, hi, hidden[0] if hidden else None, (2, 1, 9, 9)).dense()
        if not torch.equal(ours, sdpa_mask(2, 9, 9, mask_function=function, allow_is_causal_skip=False)):
            break
    else:
        return True
    logger.warning("The masks of this version of transformers are not the known ones: dense masks are made.")
    return False
