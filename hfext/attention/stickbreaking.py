"""`attn_implementation="hfext_stickbreaking"`: attention that breaks a stick from the nearest key to the farthest.

    b_ij = sigmoid(scaling <q_i, k_j>),  A_ij = b_ij prod_{j < m <= i} (1 - b_im),  o_i = sum_j A_ij v_j

over the keys that query i sees. The nearest key takes its part first, so weights fade with the distance by themselves
and need no positional encoding; what is left of the stick, prod_m (1 - b_im), is dropped, so weights sum to at most 1.
A hidden key has b = 0. Everything in logarithms, `kernels/hfext-stickbreaking` on a GPU, plain torch elsewhere.

Options are read from the model's config, are saved with it, and may be changed at any time:

    config.stickbreaking_attention = {"attend_current": True, "remainder": False}

`attend_current=False` leaves a query's own key out (the rule of 2410.17980); `remainder=True` gives what is left to
the query's own value. A model with rotary or learned positions keeps them: nothing but the weights is replaced, so
build one without them where the paper's model is wanted. A model trained with softmax attention has to be trained
again.

ModuleFormer: Modularity Emerges from Mixture-of-Experts, arXiv 2306.04640 (section 3.2); Scaling Stick-Breaking
Attention, arXiv 2410.17980 (the kernels' algorithm). What differs: two edges a tile of keys in the backward pass, so
that its sums do not cancel; no atomics; grouped heads, any interval of keys, a split of the keys for decoding. The
experts of ModuleFormer are not part of it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.masking_utils import causal_mask_function

from ..compat import is_causal as says_causal
from ..compat import mask_parts
from ..registry import Method, Result
from ._mask import IntervalMask, interval_mask
from .hfext_triton import refuse, under_autocast

NAME = "hfext_stickbreaking"
OTHERWISE = "use attn_implementation='hfext_triton' or 'sdpa'"
NOT_CAUSAL = f"Stick-breaking attention goes back from a query's own key, so it is causal: {OTHERWISE}."


@dataclass(frozen=True)
class StickbreakingConfig:
    """
    Options of `config.stickbreaking_attention`, which may be this object's dict.

    Args:
        attend_current (`bool`, *optional*, defaults to `True`): Whether a query sees its own key, as in ModuleFormer.
        remainder (`bool`, *optional*, defaults to `False`): Give what is left of the stick to a query's own value.
    """

    attend_current: bool = True
    remainder: bool = False

    def __post_init__(self):
        for name, value in (("attend_current", self.attend_current), ("remainder", self.remainder)):
            if not isinstance(value, bool):
                raise TypeError(f"stickbreaking_attention: {name} is {value!r} but must be True or False.")

    @classmethod
    def of(cls, config: PretrainedConfig | None) -> "StickbreakingConfig":
        """The options of a model's config; the defaults where it has none."""
        given = {} if config is None else vars(config).get("stickbreaking_attention") or {}
        if not isinstance(given, dict):
            raise TypeError(f"stickbreaking_attention is a {type(given).__name__} but must be a dict.")
        for name in given:
            if name not in ("attend_current", "remainder"):
                raise ValueError(
                    f"stickbreaking_attention has {name!r} but its options are attend_current, remainder."
                )
        return cls(**given)


def stickbreaking(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: IntervalMask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """
    The attention function that models call; arguments as `sdpa_attention_forward` of transformers.

    Args:
        module (`nn.Module`): The layer, of a causal model; its config holds the options.
        query (`Tensor` [batch, heads, q, head_dim]): In fp32, bf16 or fp16, as keys and values are.
        key, value (`Tensor` [batch, kv_heads, k, head_dim]): Values may have another head size.
        attention_mask (`IntervalMask`, `Tensor` or `None`): Of `stickbreaking_mask`, or boolean [batch or 1, heads or
            1, q, k], or additive with 0 and the lowest number alone. A query's own key is the last one that it sees.
            Of a boolean or additive one query i may see the keys up to i + k - q.

    Returns:
        `(Tensor, None)`: [batch, q, heads, head_dim] in the dtype of `query`; weights are never made.

    Raises:
        NotImplementedError: Layers that are not causal, dense masks that are not (unchecked under `torch.compile`),
            soft cap, sinks, position bias, dropout, continuous batching.
        ValueError: `output_attentions=True`, or a mask of another shape.
    """
    from hfext_stickbreaking import stickbreaking_attention

    for name, reason in REFUSED.items():
        if kwargs.pop(name, None) is not None:
            raise NotImplementedError(f"Stick-breaking attention has no {reason}: {OTHERWISE}.")
    if dropout:
        raise NotImplementedError("Stick-breaking attention drops no weights: set the model's attention_dropout to 0.")
    if not (says_causal(module) if is_causal is None else is_causal) and (is_causal is None or query.shape[2] > 1):
        raise NotImplementedError(NOT_CAUSAL)
    refuse(cache, kwargs)
    options = StickbreakingConfig.of(vars(module).get("config"))
    seen, n = _visible(query, key, attention_mask, sliding_window)
    query, key, value = under_autocast(query, key, value)
    if n < key.shape[2]:
        key, value = key[:, :, :n], value[:, :, :n]
    out = stickbreaking_attention(
        query, key, value, attend_current=options.attend_current, remainder=options.remainder, scale=scaling, **seen
    )
    return out, None


REFUSED = {
    "softcap": "soft cap, which would bound how much of the stick a key can take",
    "s_aux": "sinks: what no key takes is its remainder",
    "position_bias": "position bias: the distance is in the stick",
}


def _visible(
    query: Tensor, key: Tensor, mask: IntervalMask | Tensor | None, window: int | None
) -> tuple[dict[str, Tensor | None], int]:
    """lo, hi, keys, mask and own of `stickbreaking_attention`, and the number of keys that count."""
    m, n = query.shape[2], key.shape[2]
    if isinstance(mask, IntervalMask):
        if mask.shape[2] != m or mask.shape[3] > n:
            raise ValueError(f"The mask is for {tuple(mask.shape[2:])} queries and keys, but there are {m, n}.")
        return dict(lo=mask.lo, hi=mask.hi, keys=mask.keys, own=mask.hi - 1), mask.shape[3]
    if mask is None:
        # As transformers means it: keys behind the queries are places of a static cache that are not written yet.
        n = min(m, n) if m > 1 else n
        own = torch.arange(n - min(m, n), n - min(m, n) + m, device=query.device, dtype=torch.int32)[None]
        lo = None if window is None or m == 1 else (own - window + 1).clamp(min=0)
        return dict(lo=lo, hi=None if lo is None else own + 1, own=own), n
    whole = (*query.shape[:3], n)
    if mask.ndim != 4 or any(a not in (1, b) for a, b in zip(mask.shape, whole, strict=True)):
        raise ValueError(f"attention_mask is {tuple(mask.shape)} but must broadcast to {whole}.")
    if mask.dtype != torch.bool:
        shown = mask == 0
        if not (shown | (mask <= torch.finfo(mask.dtype).min / 2)).all():
            raise NotImplementedError(f"Stick-breaking attention has no {REFUSED['position_bias']}: {OTHERWISE}.")
        mask = shown
    mask = mask.expand(*mask.shape[:2], m, n)
    last = n - mask.flip(-1).int().argmax(-1) - 1  # n - 1 where nothing is seen: it stays unseen
    if m > 1:  # queries are the last of the keys, or further to the front where a static cache has room behind them
        _refuse_future(mask, n - m)
    own = last.amax(1).expand(-1, m).int()
    if mask.shape[1] > 1 and not (last == own[:, None]).all():
        raise NotImplementedError(f"Heads whose masks end at different keys: {OTHERWISE}.")
    return dict(mask=mask, own=own), n


def stickbreaking_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    **kwargs: Any,
) -> IntervalMask | Tensor | None:
    """`interval_mask`, for causal patterns alone; the dense mask of an unknown pattern is looked through for keys
    behind their queries. It also checks the options, before anything is computed.

    Under `torch.compile` patterns and dense masks are taken as they come, unchecked: there such a mask must be causal.
    """
    StickbreakingConfig.of(kwargs.get("config"))
    parts = None if torch.compiler.is_compiling() else mask_parts(mask_function)
    if parts is not None and not _is_causal(parts):
        raise NotImplementedError(NOT_CAUSAL)
    mask = interval_mask(batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, **kwargs)
    if isinstance(mask, Tensor):
        _refuse_future(mask, q_offset - kv_offset)
    return mask


def _refuse_future(mask: Tensor, offset: int | Tensor) -> None:
    """Raise when query i of a boolean mask [..., m, n] sees a key behind i + offset. Not under `torch.compile`, which
    cannot branch on what a tensor holds."""
    if torch.compiler.is_compiling():
        return
    places = torch.arange(mask.shape[-2], device=mask.device)[:, None] + offset
    if (mask & (torch.arange(mask.shape[-1], device=mask.device) > places)).any():
        raise NotImplementedError(f"A mask lets queries see keys behind them. {NOT_CAUSAL}")


def _is_causal(parts: list[tuple[str, dict]]) -> bool:
    return any(kind == "causal" or (kind == "remapped" and _is_causal(closed["parts"])) for kind, closed in parts)


AttentionInterface.register(NAME, stickbreaking)
AttentionMaskInterface.register(NAME, stickbreaking_mask)  # without it every mask would be left out silently

METHOD = Method(
    name="stickbreaking",
    family="attention",
    title="ModuleFormer: Modularity Emerges from Mixture-of-Experts",
    arxiv="2306.04640",
    year=2023,
    authors="Shen et al.",
    repo="IBM/ModuleFormer",
    status="variant",
    difference="The attention alone, without ModuleFormer's experts, in models that keep the positions they have. "
    "Grouped heads, windows and padding; a backward pass without atomics whose sums do not cancel.",
    target="hfext.attention.stickbreaking:stickbreaking",
    usage='AutoModelForCausalLM.from_config(config, attn_implementation="hfext_stickbreaking")',
    summary="Attention that gives each key a part of what nearer keys have left, without positional encoding.",
    headline=Result(
        metric="perplexity",
        setting="2410.17980: a context of 2^11 in training, 2^14 in use",
        value="improves (abstract)",
        baseline="softmax with rotary positions",
    ),
    config=StickbreakingConfig,
    notes="For models that are trained with it: softmax weights do not carry over. No recipe: the papers' claims are "
    "of language models trained from the start, and the attention itself is an equation, checked key by key. "
    "`config.stickbreaking_attention = {'attend_current': False}` is the rule of Scaling Stick-Breaking "
    "Attention (2410.17980), `{'remainder': True}` its remainder at a query's own value.",
)
