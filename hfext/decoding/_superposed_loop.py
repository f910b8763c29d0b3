"""The model side of superposed decoding: one cache of B rows, whatever the number of drafts, and what it cannot do."""

import copy
import inspect
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from ._adapters import refuse_prompt_learning

# Of the `generate` that runs, where the library hooks into it; `generate` itself keeps it from a callable.
GIVEN_STREAMER: ContextVar[Any] = ContextVar("given_streamer", default=None)
_CARRIED = ("attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep")
_REASONS = {
    "do_sample": "the drafts are found without sampling: pass do_sample=False",
    "num_beams": "the drafts are the beams: use num_drafts",
    "num_return_sequences": "every prompt returns its drafts: use num_drafts",
    "output_scores": "drafts share logits: read `sequences_scores` of the output",
    "output_logits": "drafts share logits: score the returned drafts with the model",
    "output_attentions": "superposed steps belong to no single draft",
    "output_hidden_states": "superposed steps belong to no single draft",
    "dola_layers": "drafts share the logits of the last layer",
    "prompt_lookup_num_tokens": "a superposed step has no token to verify",
    "prefill_chunk_size": "the prompt is read in one piece",
}


def refuse_arguments(streamer: Any = None, assistant_model: Any = None, **kwargs: Any) -> None:
    """What `generate` would keep from a callable. A refused streamer is ended, so that nobody waits for its text."""
    if streamer is not None:
        if not callable(getattr(streamer, "end", None)):
            raise TypeError(f"streamer is a {type(streamer).__name__}, without `end`; and no streamer can be used.")
        streamer.end()
        raise ValueError(
            "`streamer` cannot be used with superposed decoding: which draft is best is known only at the end. "
            "Leave it out, or stream greedy decoding."
        )
    if kwargs.get("num_return_sequences") not in (None, 1):
        raise ValueError(
            f"num_return_sequences is {kwargs['num_return_sequences']!r}, which superposed decoding does not support: "
            f"{_REASONS['num_return_sequences']}."
        )
    if assistant_model is not None or kwargs.get("assistant_tokenizer") is not None:
        raise ValueError(
            "`assistant_model` cannot be used with superposed decoding: a superposed step has no token to verify. "
            "Leave it out."
        )
    if kwargs.get("stop_strings") is not None:
        raise ValueError(
            "`generate` does not hand the tokenizer to a callable, so `stop_strings` cannot work. Use "
            "`generate_superposed(stop_strings=..., tokenizer=...)` or pass "
            "`stopping_criteria=[StopStringCriteria(tokenizer, stop_strings)]`."
        )


def refuse_config(generation_config: Any) -> None:
    """Modes of `generate` that have no meaning for superposed drafts."""
    given = generation_config.to_dict()
    for name, reason in _REASONS.items():
        value = given.get(name)
        if value not in (None, False) and not (name in ("num_beams", "num_return_sequences") and value == 1):
            raise ValueError(f"{name} is {value!r}, which superposed decoding does not support: {reason}.")
    if given.get("guidance_scale") not in (None, 1, 1.0):
        raise ValueError(
            "guidance_scale does not work with superposed decoding: its second stream follows one draft only."
        )


class Stream:
    """The model fed with one position at a time: token ids for the prompt, then superposed embeddings.

    Args:
        model (`PreTrainedModel`): A decoder-only model that takes `inputs_embeds` and has a key-value cache.
        input_ids (`torch.LongTensor` of shape `(B, L)`): The prompts, padded on the left.
        model_kwargs (`dict`): What `generate` prepared. The cache is copied: the caller's stays as it was.
        replayable (`bool`): Keep a copy of the cache to which [`Stream.replay`] can return.
    """

    def __init__(self, model: Any, input_ids: Tensor, model_kwargs: dict[str, Any], replayable: bool = False):
        _check_model(model, input_ids, model_kwargs)
        self.model, self.device, self.replayable = model, input_ids.device, replayable
        self.calls = 0
        self.cache = _copied(model_kwargs["past_key_values"])
        self.mask = model_kwargs.get("attention_mask")
        self.positions = model_kwargs.get("position_ids")
        self.options = {name: model_kwargs[name] for name in ("use_cache", "logits_to_keep") if name in model_kwargs}
        self.base = None

    def prefill(self, input_ids: Tensor) -> Tensor:
        """Logits after the prompts, float32 [B, V]. Tokens that a given cache holds already are not read again."""
        past = self.cache.get_seq_length()
        new = None
        if past:
            known = next((x.shape[-1] for x in (self.mask, self.positions) if x is not None), input_ids.shape[1])
            new = known - past
            if not 0 < new <= input_ids.shape[1]:
                raise ValueError(
                    f"past_key_values holds {past} tokens, but input_ids has {input_ids.shape[1]} and attention_mask "
                    f"covers {known}: at least one token must be new and the mask must cover all of them."
                )
        inputs = self.model.prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=new,
            past_key_values=self.cache,
            attention_mask=self.mask,
            position_ids=self.positions,
            is_first_iteration=True,
            **self.options,
        )
        logits = self._forward(inputs)
        self._remember()
        return logits

    def step(self, embeddings: Tensor) -> Tensor:
        """Append one position with the embeddings [B, 1, d]; logits [B, V]."""
        return self._forward({"inputs_embeds": embeddings, **self._extended(1)})

    def replay(self, tokens: Tensor) -> Tensor:
        """Forget what came since the prompt or the last replay, and read `tokens` [B, r] there; logits [B, V].

        In one call, or token by token where layers have a recurrent state: not all of them continue it with several.
        """
        self.cache, self.mask, self.positions = self.base
        for some in tokens.split(tokens.shape[1] if _attention_alone(self.cache) else 1, dim=1):
            logits = self._forward({"input_ids": some, **self._extended(some.shape[1])})
        self._remember()
        return logits

    def _remember(self) -> None:
        if self.replayable:
            self.base = (_copied(self.cache), self.mask, self.positions)

    def _extended(self, count: int) -> dict[str, Any]:
        inputs = {"past_key_values": self.cache, **self.options}
        if self.mask is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), count)], dim=1)
            inputs["attention_mask"] = self.mask
        if self.positions is not None:
            steps = torch.arange(1, count + 1, device=self.positions.device, dtype=self.positions.dtype)
            self.positions = self.positions[..., -1:] + steps
            inputs["position_ids"] = self.positions
        return inputs

    def _forward(self, inputs: dict[str, Any]) -> Tensor:
        outputs = self.model(**inputs, return_dict=True)
        self.calls += 1
        self.cache = getattr(outputs, "past_key_values", None)
        if self.cache is None:
            raise ValueError(_no_cache(self.model))
        return outputs.logits[:, -1].to(copy=True, dtype=torch.float32, device=self.device)


def _copied(cache: Any) -> Any:
    try:
        return copy.deepcopy(cache)
    except TypeError as error:
        raise ValueError(
            f"{type(cache).__name__} cannot be copied ({error}): superposed decoding works with cache_implementation "
            "'dynamic', 'static' or 'quantized', not with offloaded caches."
        ) from error


def _attention_alone(cache: Any) -> bool:
    layers = getattr(cache, "layers", None)
    return bool(layers) and not any(hasattr(layer, "update_conv_state") for layer in layers)


def _no_cache(model: Any) -> str:
    return (
        f"{type(model).__name__} has no key-value cache (`past_key_values`), which superposed decoding needs. "
        "Use beam search."
    )


def _check_model(model: Any, input_ids: Tensor, model_kwargs: dict[str, Any]) -> None:
    name = type(model).__name__
    # An adapter that `generate` goes through owns the method that prepares its inputs.
    for owner in (model, getattr(model.prepare_inputs_for_generation, "__self__", None)):
        refuse_prompt_learning(owner, "superposed decoding")
    if model.config.is_encoder_decoder:
        raise ValueError(f"{name} is an encoder-decoder model: superposed decoding is for decoder-only models.")
    if "inputs_embeds" not in inspect.signature(model.forward).parameters:
        raise ValueError(f"{name} does not take `inputs_embeds`, which superposed decoding feeds at every step.")
    if model.config.get_text_config(decoder=True).to_dict().get("hidden_size_per_layer_input"):
        raise ValueError(
            f"{name} looks tokens up in every layer (per-layer embeddings): a superposed position has no token id. "
            "Use beam search."
        )
    if model_kwargs.get("inputs_embeds") is not None or input_ids.shape[1] == 0:
        raise ValueError("superposed decoding needs the prompt as `input_ids`, not as `inputs_embeds`.")
    if not model_kwargs.get("use_cache", True):
        raise ValueError("use_cache is False, but superposed decoding needs a key-value cache: pass use_cache=True.")
    if model_kwargs.get("past_key_values") is None:
        raise ValueError(_no_cache(model))
    # `generate` gives models of text and images an empty record of images.
    given = {
        key for key, value in model_kwargs.items() if not (value is None or isinstance(value, dict) and not value)
    }
    extra = given - set(_CARRIED)
    if extra:
        raise ValueError(f"superposed decoding is for text alone and cannot carry {', '.join(sorted(extra))}.")
    mask = model_kwargs.get("attention_mask")
    if mask is not None and not bool((mask[:, -1] == 1).all()):
        raise ValueError("a prompt ends with padding: pad on the left (`tokenizer.padding_side = 'left'`).")
