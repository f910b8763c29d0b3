"""The largest attention logit of every layer while a model runs, without an attention matrix of its own.

Models of transformers that call an attention function hand over queries and keys as they enter the product: after
projections, q/k norms and rotary embeddings. Those are multiplied here block by block, with the scaling, bias, soft
cap and mask that the function is given. Models with attention of their own are seen at their calls of `softmax` and
of `scaled_dot_product_attention`. Logits are in float32, or float64 for such models.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface

from ..compat import replaced

LIMIT = 2**22  # logits that exist at one time

# Called with (query, key, value, attn_mask, dropout_p, is_causal, ...); softmax with (input, dim, ...).
_SOFTMAX = (torch.softmax, Tensor.softmax, F.softmax)
_FLASH = "flash_attention"


@torch.no_grad()
def max_attention_logit(
    query: Tensor,
    key: Tensor,
    scaling: float | None = None,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    rows: Tensor | None = None,
    limit: int = LIMIT,
) -> Tensor:
    """The largest logit that enters the softmax where it may be looked at, a scalar; -inf when nothing may.

    Args:
        query (`torch.Tensor`): [batch, heads, q, dim].
        key (`torch.Tensor`): [batch, key heads, k, dim]; groups of heads share a key head.
        scaling (`float`, *optional*): Of q.k; dim^-1/2 when left out.
        mask (`torch.Tensor`, *optional*): bool (true is allowed) or additive, [batch or 1, heads or 1, q or 1, k].
        causal (`bool`, *optional*, defaults to `False`): Query i sees keys up to i.
        window (`int`, *optional*): With `causal`, and the last `window` of them only.
        softcap (`float`, *optional*): c of c tanh(logit / c).
        bias (`torch.Tensor`, *optional*): Added to the logits, shaped as `mask`.
        rows (`torch.Tensor`, *optional*): bool [batch, q], the queries that count (padding does not).
        limit (`int`, *optional*): Logits that exist at one time, at least one row of all heads.
    """
    batch, heads, n, dim = query.shape
    kv, m = key.shape[1:3]
    dtype = torch.promote_types(query.dtype, torch.float32)
    scaling = dim**-0.5 if scaling is None else scaling
    positions = torch.arange(m, device=query.device)
    best = torch.full((), -torch.inf, dtype=dtype, device=query.device)
    for b in range(batch):
        keys = key[b].to(dtype).mT
        for at in torch.arange(n, device=query.device).split(max(1, limit // (heads * m))):
            q = query[b, :, at].to(dtype).reshape(kv, -1, dim)
            scores = (q @ keys).mul_(scaling).view(heads, len(at), m)
            if softcap is not None:
                scores = scores.div_(softcap).tanh_().mul_(softcap)
            for extra in (bias, mask):
                if extra is not None:
                    scores = _masked(scores, extra[b if len(extra) > 1 else 0][:, at if extra.shape[2] > 1 else [0]])
            if causal:
                distance = at[:, None] - positions
                seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
                scores.masked_fill_(~seen, -torch.inf)
            if rows is not None:
                scores.masked_fill_(~rows[b, at, None], -torch.inf)
            best = torch.maximum(best, scores.amax())
    return best


def _masked(scores: Tensor, extra: Tensor) -> Tensor:
    extra = extra[..., : scores.shape[-1]]
    if extra.dtype == torch.bool:
        return scores.masked_fill_(~extra, -torch.inf)
    # What transformers adds where nothing may be seen is the smallest number of the type, or less.
    hidden = extra <= torch.finfo(extra.dtype).min / 2
    return scores.add_(extra).masked_fill_(hidden, -torch.inf)


class AttentionLogits:
    """Largest attention logit by the name of the attention module: `with AttentionLogits(model).watch(batch): ...`.

    Nothing of what the model computes is touched. Values grow over several `watch`; `reset` forgets them.

    Args:
        model (`nn.Module`): Unwrapped. Other models that run inside `watch` are not seen.
        limit (`int`, *optional*): Of [`max_attention_logit`].
    """

    def __init__(self, model: nn.Module, limit: int = LIMIT):
        self.names = {id(m): name for name, m in model.named_modules() if "attention" in type(m).__name__.lower()}
        self.all_names = {id(m): name for name, m in model.named_modules()}
        self.modules = [m for m in model.modules() if id(m) in self.names]
        config = vars(model).get("config")
        self.two_lengths = bool(vars(config).get("is_encoder_decoder")) if config is not None else False
        self.limit = limit
        self.largest: dict[str, Tensor] = {}
        self.stack: list[str] = []
        self.inside = False  # of an attention function whose queries and keys were seen
        self.padding: Tensor | None = None

    def reset(self) -> None:
        self.largest = {}

    @contextlib.contextmanager
    def watch(self, inputs: Mapping[str, Any]) -> Iterator[None]:
        """Inside, every attention of the model is measured; `inputs` is its batch, whose padding does not count."""
        mask = inputs.get("attention_mask")
        # The mask of an encoder-decoder is the encoder's; queries of the decoder all count.
        usable = isinstance(mask, Tensor) and mask.dim() == 2 and not self.two_lengths
        self.padding, self.stack = mask.bool() if usable else None, []
        hooks = [m.register_forward_pre_hook(self._enter) for m in self.modules]
        hooks += [m.register_forward_hook(self._leave, always_call=True) for m in self.modules]
        find = AttentionInterface.get_interface
        try:
            # On the class: some models have an instance of their own.
            with replaced(AttentionInterface, "get_interface", self._finder(find)), _Calls(self):
                yield
        finally:
            for hook in hooks:
                hook.remove()
            self.padding, self.stack = None, []

    def _enter(self, module: nn.Module, args: Any) -> None:
        self.stack.append(self.names[id(module)])

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.stack.pop()

    def _finder(self, find):
        def get_interface(interface, name, default):
            function = find(interface, name, default)

            def attention(module, query, key, value, attention_mask, *args, **kwargs):
                if id(module) not in self.all_names:
                    return function(module, query, key, value, attention_mask, *args, **kwargs)
                self._attention(name or "eager", module, query.detach(), key.detach(), attention_mask, kwargs)
                with replaced(self, "inside", True):
                    return function(module, query, key, value, attention_mask, *args, **kwargs)

            return attention

        return get_interface

    def _attention(self, kind: str, module: nn.Module, query: Tensor, key: Tensor, mask: Any, given: dict) -> None:
        if "flex" in kind or given.get("cu_seq_lens_q") is not None:
            raise NotImplementedError(
                f"Attention logits cannot be measured with attn_implementation={kind!r} here: its mask is no tensor. "
                "Use sdpa or eager, or measure without attention (attention=False)."
            )
        causal, window = False, None
        if kind != "eager" and (mask is None or _FLASH in kind):
            causal = given.get("is_causal")
            causal = bool(vars(module).get("is_causal", True) if causal is None else causal) and query.shape[2] > 1
        if _FLASH in kind:
            mask = None if mask is None else mask.bool()[:, None, None]
            window = given.get("sliding_window")
        self._note(
            self.all_names[id(module)],
            max_attention_logit(
                query,
                key,
                given.get("scaling"),
                mask,
                causal=causal,
                window=window,
                softcap=given.get("softcap"),
                bias=given.get("position_bias"),
                rows=self._rows(query),
                limit=self.limit,
            ),
        )

    def call(self, function: Any, args: tuple, kwargs: dict) -> None:
        """A function of torch is called; it counts when it is the softmax of an attention module."""
        if self.inside or not self.stack:
            return
        if function is F.scaled_dot_product_attention:
            names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
            given = dict(zip(names, args, strict=False)) | kwargs
            query, key = given["query"].detach(), given["key"].detach()
            mask = given.get("attn_mask")
            mask = mask if mask is None or mask.dim() == 4 else mask.view((1,) * (4 - mask.dim()) + mask.shape)
            causal, rows = given.get("is_causal", False), self._rows(query)
            found = max_attention_logit(
                query, key, given.get("scale"), mask, causal=causal, rows=rows, limit=self.limit
            )
            self._note(self.stack[-1], found)
        elif function in _SOFTMAX:
            scores = args[0] if args else kwargs["input"]
            self._note(self.stack[-1], self._largest(scores.detach()))

    def _largest(self, scores: Tensor) -> Tensor:
        """Of [..., q, k] that enter a softmax, in which what may not be seen has the smallest number of its type."""
        rows = None if self.padding is None else self.padding
        if rows is not None and scores.dim() > 2 and scores.shape[-2] == rows.shape[1]:
            if scores.shape[0] % len(rows) == 0:  # [batch * heads, q, k]
                scores = scores.reshape(len(rows), -1, *scores.shape[-2:])
                scores = scores.masked_fill(~rows[:, None, :, None], -torch.inf)
        top = scores.amax().float() if scores.numel() else torch.tensor(-torch.inf)
        low = torch.finfo(scores.dtype).min / 2
        return torch.where(top <= low, -torch.inf, top)

    def _rows(self, query: Tensor) -> Tensor | None:
        fits = self.padding is not None and self.padding.shape == (query.shape[0], query.shape[2])
        return self.padding if fits else None

    def _note(self, name: str, found: Tensor) -> None:
        known = self.largest.get(name)
        self.largest[name] = found if known is None else torch.maximum(known, found.to(known.device))


class _Calls(TorchFunctionMode):
    def __init__(self, logits: AttentionLogits):
        super().__init__()
        self.logits = logits

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention or func in _SOFTMAX:
            with torch.no_grad():
                self.logits.call(func, args, kwargs)
        return func(*args, **kwargs)
