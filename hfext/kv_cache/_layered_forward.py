"""Prefill by groups of layers: the layers are called one by one with what the model's own forward hands to them.

A first pass of the model over stand-ins for its layers records embeddings, masks, positions and rotary tables, before
any layer has written to the cache. The last pass puts the hidden states back, for the model's own norm and head.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel

from ._cache import CompressedCache

# Models whose layers are a plain chain, each checked against its own forward.
CHECKED = (
    "cohere gemma gemma2 gemma3_text glm4 gpt2 gpt_neox granite llama mistral mixtral olmo olmo2 olmo3 phi3 qwen2 "
    "qwen2_moe qwen3 qwen3_moe smollm3 starcoder2"
).split()


def partition(layers: int, groups: int) -> list[tuple[int, int]]:
    """`groups` contiguous ranges (first, end) of 0..layers-1 whose sizes differ by at most one, larger ones first."""
    if not 1 <= groups <= layers:
        raise ValueError(f"groups is {groups} but must be in [1, {layers}], the number of layers.")
    small, larger = divmod(layers, groups)
    ends = [small * i + min(i, larger) for i in range(groups + 1)]
    return list(zip(ends, ends[1:], strict=False))


@dataclass(frozen=True)
class LayeredStep:
    """What one `next()` of [`layered_prefill`] ran: layers `first..end-1`; the last has `logits` [B, kept, vocab]."""

    group: int
    first: int
    end: int
    cache: Cache
    logits: Tensor | None = None


@torch.no_grad()
def layered_prefill(
    model: PreTrainedModel,
    input_ids: Tensor,
    groups: int,
    cache: Cache | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    logits_to_keep: int = 0,
) -> Iterator[LayeredStep]:
    """Prefill a prompt group by group of layers; any other work on the model may run between two `next()`.

    Masks, positions and rotary tables are those that the model's own forward hands to its layers before the first
    layer writes to the cache; its own norm and head make the logits. Nothing else may use `cache` until the end.

    Args:
        model ([`~transformers.PreTrainedModel`]): A decoder-only language model of a type in `CHECKED`.
        input_ids (`Tensor` [B, n]): The prompt, or its part that is not in `cache`.
        groups (`int`): 1 to the number of layers.
        cache ([`~transformers.Cache`], *optional*): Filled in place; a `DynamicCache` by default.
        attention_mask (`Tensor` [B, past + n], *optional*): 0 for padding on the left.
        position_ids (`Tensor` [B, n], *optional*): By default those of `generate`: padding is not counted.
        logits_to_keep (`int`, *optional*, defaults to 0): Last positions to give logits for; 0 for all.

    Yields: [`LayeredStep`], `groups` times.
    """
    stack = layers_of(model)
    ranges = partition(len(stack), groups)
    cache = DynamicCache(config=model.config) if cache is None else cache
    past = int(cache.get_seq_length())
    positions = _positions(input_ids, past, attention_mask) if position_ids is None else position_ids
    flags = {"output_hidden_states": False, "output_attentions": False, "return_dict": True}
    if model.config.to_dict().get("output_router_logits"):
        flags["output_router_logits"] = False
    recorders = [_Recorder() for _ in stack]
    with _replaced(model, recorders):
        model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **flags,
        )
    if any(r.calls != 1 for r in recorders) or any(r.hidden is not recorders[0].hidden for r in recorders):
        raise NotImplementedError(
            f"{type(model).__name__} does not run its layers as one chain: prefill it as a whole."
        )
    hidden = recorders[0].hidden
    for group, (first, end) in enumerate(ranges):
        if int(cache.get_seq_length(first)) != past:
            raise RuntimeError(
                f"The cache was written to between groups: layer {first} no longer holds {past} tokens."
            )
        with _padding_known(cache, attention_mask):
            for layer, recorder in zip(stack[first:end], recorders[first:end], strict=True):
                hidden = layer(hidden, *recorder.args, **recorder.kwargs)
                if not isinstance(hidden, Tensor):
                    raise NotImplementedError(f"{type(layer).__name__} returns more than its hidden states.")
        if group < groups - 1:
            yield LayeredStep(group, first, end, cache)
    with _replaced(model, [_Recorder(hidden) for _ in stack]):
        out = model(
            input_ids=input_ids,
            attention_mask=None if attention_mask is None else attention_mask[:, past:],
            position_ids=positions,
            use_cache=False,
            logits_to_keep=logits_to_keep,
            **flags,
        )
    yield LayeredStep(groups - 1, *ranges[-1], cache, out.logits)


@contextmanager
def _padding_known(cache: Cache, attention_mask: Tensor | None) -> Iterator[None]:
    """A compressed cache learns of padding when the decoder is called, and layers are called here without it."""
    if not isinstance(cache, CompressedCache):
        yield
        return
    padded = attention_mask is not None and not bool(attention_mask.all())
    cache.shared.padding = attention_mask.bool() if padded else None
    try:
        yield
    finally:
        cache.shared.end()


class _Recorder(nn.Module):
    """Stands for a layer: notes its arguments and hands on the hidden states, or `answer`."""

    def __init__(self, answer: Tensor | None = None):
        super().__init__()
        self.calls, self.answer = 0, answer

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.calls += 1
        self.hidden, self.args, self.kwargs = hidden, args, kwargs
        return hidden if self.answer is None else self.answer


def _stack_name(model: PreTrainedModel) -> str:
    decoder = model.get_decoder()
    number = model.config.num_hidden_layers
    names = [n for n, m in decoder.named_children() if isinstance(m, nn.ModuleList) and len(m) == number]
    if len(names) != 1:
        raise NotImplementedError(f"{type(model).__name__} has no single list of {number} layers.")
    return names[0]


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    config = model.config
    if config.is_encoder_decoder or not model.can_generate() or config.to_dict().get("use_bidirectional_attention"):
        raise ValueError(f"model is a {type(model).__name__} but must be a causal, decoder-only language model.")
    if config.model_type not in CHECKED:
        raise NotImplementedError(
            f"layered_prefill was not checked for model type {config.model_type!r}, only for {', '.join(CHECKED)}. "
            "Prefill the model as a whole."
        )
    if model.training:
        raise ValueError("model is in training mode: call model.eval() first.")
    return getattr(model.get_decoder(), _stack_name(model))


@contextmanager
def _replaced(model: PreTrainedModel, stand_ins: Sequence[nn.Module]) -> Iterator[None]:
    """The model's layers are `stand_ins` inside the block, and what they were after it, also after an error."""
    decoder, name = model.get_decoder(), _stack_name(model)
    layers = getattr(decoder, name)
    setattr(decoder, name, nn.ModuleList(stand_ins))
    try:
        yield
    finally:
        setattr(decoder, name, layers)


def _positions(input_ids: Tensor, past: int, attention_mask: Tensor | None) -> Tensor:
    """[B or 1, n]; refuses padding that is not on the left."""
    n = input_ids.shape[1]
    if attention_mask is None:
        return torch.arange(past, past + n, device=input_ids.device)[None]
    if tuple(attention_mask.shape) != (input_ids.shape[0], past + n):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)} but must be {(input_ids.shape[0], past + n)}."
        )
    real = attention_mask.bool()
    if not real[:, -1].all() or (real[:, :-1] & ~real[:, 1:]).any():
        raise ValueError("attention_mask has padding after a token but must have it on the left only.")
    return (real.long().cumsum(-1) - 1).clamp(min=0)[:, past:]
