"""Context-aware decoding: what the context changed in the next-token distribution counts (1 + alpha) times.

    l(y) = (1 + alpha) * log p(y | c, x, y_<t) - alpha * log p(y | x, y_<t);   p_CAD = softmax(l)

c is the context, x the query. The second stream sees the prompt without the context and the same generated tokens, so
a step costs two forwards.

Trusting Your Evidence: Hallucinate Less with Context-aware Decoding, arXiv 2305.14739.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutput

from ..registry import Method, Result


def cad_scores(scores: Tensor, null: Tensor, alpha: float) -> Tensor:
    """log p_CAD from two rows of logits or log-probabilities, [rows, vocab] each, computed in float32.

    What is -inf in `scores` stays so. What is -inf in `null` alone counts as its row's least finite log-probability:
    the ratio of the definition would be infinite there.
    """
    out_of_reach = scores == -torch.inf
    given = scores.float().log_softmax(-1)
    null = null.float().log_softmax(-1)
    least = null.masked_fill(null == -torch.inf, torch.inf).amin(-1, keepdim=True)
    combined = (1 + alpha) * given - alpha * torch.where(null == -torch.inf, least, null)
    combined = combined.masked_fill(out_of_reach, -torch.inf).log_softmax(-1)
    return combined.masked_fill(out_of_reach, -torch.inf).to(scores.dtype)


def find_parents(old: Tensor, new: Tensor, groups: int) -> Tensor | None:
    """For each row of `new` [rows, n] the equal row of `old` [old rows, n] in its group; None if one has none.

    Rows of one prompt stand together and the groups in the same order on both sides. Other groups are not looked at:
    the decoder prefixes of an encoder-decoder model are equal while its inputs differ.
    """
    per_old, per_new = len(old) // groups, len(new) // groups
    old, new = old.view(groups, 1, per_old, -1), new.view(groups, per_new, 1, -1)
    same = (old == new).all(-1)
    if not same.any(-1).all():
        return None
    first = same.int().argmax(-1) + per_old * torch.arange(groups, device=same.device).unsqueeze(1)
    return first.flatten()


@dataclass
class _Stream:
    """What the null stream has seen: the rows of the last call and their keys and values."""

    tokens: Tensor
    cache: Cache | None


class ContextAwareLogitsProcessor(LogitsProcessor):
    """Context-aware decoding for `generate(logits_processor=[...])`: greedy, sampling, beams, assisted.

    The scores come back as log-probabilities, so that beams add up log p_CAD. State belongs to token prefixes: rows
    may be reordered, duplicated or shortened between calls, and the object may be used for another `generate`.

    Args:
        model (`PreTrainedModel`): The model that generates, with or without PEFT adapters.
        no_context_ids (`torch.LongTensor` of shape `[batch, length]`): Prompts without the context; for an
            encoder-decoder model the encoder input without it. Row i belongs to row i of the prompts of `generate`.
        no_context_mask (`torch.LongTensor` of shape `[batch, length]`, *optional*, defaults to all ones): 0 at
            padding, which must be on the left for decoder-only models.
        alpha (`float`, *optional*, defaults to 0.5): Strength, >= 0. 0 is plain decoding at no cost.
        prompt_length (`int`, *optional*): Tokens of the prompts of `generate`, padding included; what follows them
            is shared. By default that of the first call, and again of a call that does not begin with its prompts.

    Raises:
        ValueError: For values out of range, a batch that does not fit, NaN scores, another vocabulary.
        TypeError: For a wrong kind of model or ids.
    """

    supports_continuous_batching = False

    def __init__(
        self,
        model: PreTrainedModel,
        no_context_ids: Tensor,
        no_context_mask: Tensor | None = None,
        alpha: float = 0.5,
        prompt_length: int | None = None,
    ):
        if not isinstance(model, torch.nn.Module) or not callable(getattr(model, "generate", None)):
            raise TypeError(f"model is a {type(model).__name__} but must be a model with `generate`.")
        if isinstance(alpha, bool) or not isinstance(alpha, int | float):
            raise TypeError(f"alpha is {alpha!r} but must be a number.")
        if not 0 <= alpha < float("inf"):
            raise ValueError(f"alpha is {alpha} but must be >= 0 and finite.")
        if no_context_ids is None:
            raise ValueError("no_context_ids is None but must hold the prompts without the context.")
        if not isinstance(no_context_ids, Tensor) or no_context_ids.is_floating_point():
            raise TypeError("no_context_ids must be a tensor of token ids.")
        if no_context_ids.ndim != 2 or 0 in no_context_ids.shape:
            raise ValueError(
                f"no_context_ids has the shape {list(no_context_ids.shape)} but must be [batch, length], both >= 1."
            )
        mask = torch.ones_like(no_context_ids) if no_context_mask is None else no_context_mask.long()
        if mask.shape != no_context_ids.shape:
            raise ValueError(
                f"no_context_mask has the shape {list(mask.shape)} but must have that of no_context_ids, "
                f"{list(no_context_ids.shape)}."
            )
        if not model.config.is_encoder_decoder and not (mask.diff(dim=1) >= 0).all():
            raise ValueError("no_context_mask has padding after tokens: pad the prompts on the left.")
        if not mask.any(-1).all():
            raise ValueError("no_context_mask has a row without any token.")
        if prompt_length is not None and prompt_length < 0:
            raise ValueError(f"prompt_length is {prompt_length} but must be >= 0.")
        self.model, self.alpha, self.prompt_length = model, float(alpha), prompt_length
        self.no_context_ids, self.no_context_mask = no_context_ids, mask
        # A PEFT model passes its arguments on, so that its own signature says little.
        core = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._accepts = frozenset(inspect.signature(core.forward).parameters)
        self.reset()

    def reset(self) -> None:
        """Forget the rows seen and the keys and values of the second stream."""
        self._stream: _Stream | None = None
        self._prompts: Tensor | None = None
        self._encoded: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.alpha == 0:
            return scores
        groups = len(self.no_context_ids)
        if len(input_ids) % groups:
            raise ValueError(
                f"no_context_ids has {groups} rows but must have one for each prompt: generate has "
                f"{len(input_ids)} rows, which is no multiple."
            )
        if scores.isnan().any():
            raise ValueError("scores contain NaN: the model or an earlier logits processor made them.")
        null = self._null_logits(input_ids)
        if null.shape != scores.shape:
            raise ValueError(
                f"scores have {scores.shape[-1]} tokens but the model of the second stream has {null.shape[-1]}: an "
                "assistant model must have the same vocabulary."
            )
        return cad_scores(scores, null.to(scores.device), self.alpha)

    @torch.no_grad()
    def _null_logits(self, input_ids: Tensor) -> Tensor:
        """Next-token logits without the context, [rows, vocab]; forwards the tokens that are not in the cache."""
        start = self._shared_from(input_ids)
        repeats = len(input_ids) // len(self.no_context_ids)
        cache, seen = self._continued(input_ids, start)
        # Of a failed forward nothing remains.
        self._stream = None
        shared = input_ids[:, start:]
        ids = self.no_context_ids.to(input_ids.device).repeat_interleave(repeats, 0)
        mask = self.no_context_mask.to(input_ids.device).repeat_interleave(repeats, 0)
        inputs: dict[str, Any] = {"past_key_values": cache, "use_cache": True}
        if self.model.config.is_encoder_decoder:
            encoded = self._encode(input_ids.device).repeat_interleave(repeats, 0)
            inputs["encoder_outputs"] = BaseModelOutput(last_hidden_state=encoded)
            inputs |= {"attention_mask": mask, "decoder_input_ids": shared[:, seen:]}
        else:
            mask = torch.cat([mask, mask.new_ones(shared.shape)], 1)
            inputs |= {"input_ids": torch.cat([ids, shared], 1)[:, seen:], "attention_mask": mask}
            if "position_ids" in self._accepts:
                inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, seen:]
            if "logits_to_keep" in self._accepts:
                inputs["logits_to_keep"] = 1
        out = self.model(**inputs)
        cache = out.get("past_key_values")
        # Recurrent models keep their state elsewhere; they are run over the whole prefix again.
        self._stream = _Stream(input_ids.clone(), cache) if isinstance(cache, Cache) else None
        return out.logits[:, -1]

    def _shared_from(self, input_ids: Tensor) -> int:
        """Where the tokens begin that both streams share; forgets the stream of other prompts."""
        if self.model.config.is_encoder_decoder:
            return 0
        length = input_ids.shape[1]
        if self.prompt_length is not None:
            if self.prompt_length > length:
                raise ValueError(f"prompt_length is {self.prompt_length} but must be <= {length}, the tokens given.")
            return self.prompt_length
        groups, known = len(self.no_context_ids), self._prompts
        if known is not None and known.shape[1] <= length and known.device == input_ids.device:
            if find_parents(known, input_ids[:, : known.shape[1]], groups) is not None:
                return known.shape[1]
        self._stream = None
        self._prompts = input_ids[:: len(input_ids) // groups].clone()
        return length

    def _continued(self, input_ids: Tensor, start: int) -> tuple[Cache | None, int]:
        """The cache with one row for each row of `input_ids`, and how many tokens it holds; `(None, 0)` on a miss."""
        stream = self._stream
        if stream is None or stream.tokens.device != input_ids.device:
            return None, 0
        before = 0 if self.model.config.is_encoder_decoder else self.no_context_ids.shape[1]
        old = stream.tokens.shape[1]
        common = min(old, input_ids.shape[1] - 1)
        if common < max(start, 1):
            return None, 0
        parents = find_parents(stream.tokens[:, :common], input_ids[:, :common], len(self.no_context_ids))
        if parents is None:
            return None, 0
        if common < old:
            if not stream.cache.is_croppable or any(stream.cache.is_sliding):
                return None, 0
            stream.cache.crop(common - old)
        if not torch.equal(parents, torch.arange(len(stream.tokens), device=parents.device)):
            stream.cache.reorder_cache(parents)
        return stream.cache, before + common - start

    def _encode(self, device: torch.device) -> Tensor:
        """Encoder states of the inputs without context, once, [batch, length, hidden]."""
        if self._encoded is None or self._encoded.device != device:
            encoder = self.model.get_encoder()
            ids, mask = self.no_context_ids.to(device), self.no_context_mask.to(device)
            self._encoded = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return self._encoded


def generate_cad(
    model: PreTrainedModel,
    context: str | Sequence[str] | None = None,
    query: str | Sequence[str] | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    alpha: float = 0.5,
    template: tuple[str, str] | str = ("{context}\n\n{query}", "{query}"),
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    no_context_ids: Tensor | None = None,
    no_context_mask: Tensor | None = None,
    **generate_kwargs: Any,
) -> Any:
    """`model.generate` with context-aware decoding; returns what `generate` returns.

    Args:
        model (`PreTrainedModel`): Decoder-only or encoder-decoder.
        context, query (`str` or a list, *optional*): One of each for each prompt. An empty context is allowed.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): Of the model; needed for strings.
        alpha (`float`, *optional*, defaults to 0.5): Of [`ContextAwareLogitsProcessor`].
        template (`tuple[str, str]` or `"chat"`, *optional*): The prompt with `{context}` and `{query}`, and the one
            with `{query}` alone. `"chat"` puts the default pair into a user message of the tokenizer's chat template.
        input_ids, attention_mask, no_context_ids, no_context_mask (`torch.LongTensor`, *optional*): Both prompts as
            tokens, in place of the strings.
        **generate_kwargs: Passed to `generate`. Own logits processors act on what context-aware decoding returns.
    """
    for name in ("guidance_scale", "negative_prompt_ids", "inputs"):
        if generate_kwargs.get(name) is not None:
            other = "input_ids and no_context_ids" if name == "inputs" else "alpha and no_context_ids"
            raise ValueError(f"{name} cannot be combined with context-aware decoding: use {other}.")
    if input_ids is None:
        if no_context_ids is not None:
            raise ValueError("no_context_ids is given without input_ids: give both, or context and query.")
        contexts, queries = _texts("context", context), _texts("query", query)
        if len(contexts) != len(queries):
            raise ValueError(f"context has {len(contexts)} texts but query {len(queries)}: one of each for a prompt.")
        if tokenizer is None:
            raise ValueError("tokenizer is None but must be given with texts.")
        prompts = _prompts(contexts, queries, template, tokenizer)
        side = "right" if model.config.is_encoder_decoder else "left"
        pairs = [_tokens(texts, tokenizer, side, special=template != "chat") for texts in prompts]
        (input_ids, attention_mask), (no_context_ids, no_context_mask) = (
            [part.to(model.device) for part in pair] for pair in pairs
        )
    elif context is not None or query is not None:
        raise ValueError("input_ids is given beside context or query: give tokens or texts.")
    elif no_context_ids is None:
        raise ValueError("no_context_ids is None but must hold the prompts without the context.")
    elif len(no_context_ids) != len(input_ids):
        raise ValueError(f"no_context_ids has {len(no_context_ids)} rows but input_ids has {len(input_ids)}.")
    if generate_kwargs.get("stop_strings") is not None or generate_kwargs.get("assistant_tokenizer") is not None:
        generate_kwargs["tokenizer"] = tokenizer
    processor = ContextAwareLogitsProcessor(model, no_context_ids, no_context_mask, alpha)
    processors = LogitsProcessorList([processor, *(generate_kwargs.pop("logits_processor", None) or [])])
    return model.generate(
        input_ids=input_ids, attention_mask=attention_mask, logits_processor=processors, **generate_kwargs
    )


def _texts(name: str, value: Any) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, Sequence) or not texts or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"{name} must be a string or a list of strings, not {value!r:.80}.")
    return list(texts)


def _prompts(contexts: list[str], queries: list[str], template: Any, tokenizer: Any) -> tuple[list[str], list[str]]:
    chat = template == "chat"
    if not chat and (isinstance(template, str) or len(template) != 2):
        raise ValueError(f"template is {template!r} but must be 'chat' or a pair (with context, without).")
    given, null = ("{context}\n\n{query}", "{query}") if chat else template
    if "{context}" not in given or "{query}" not in given or "{context}" in null:
        raise ValueError(
            f"template is {template!r} but its first part must name {{context}} and {{query}}, its second {{query}}."
        )
    pairs = list(zip(contexts, queries, strict=True))
    both = [given.format(context=c, query=q) for c, q in pairs], [null.format(query=q) for q in queries]
    if not chat:
        return both
    return tuple(
        [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
            )
            for text in texts
        ]
        for texts in both
    )


def _tokens(texts: list[str], tokenizer: Any, side: str, special: bool) -> tuple[Tensor, Tensor]:
    if len(texts) > 1 and tokenizer.pad_token_id is None:
        raise ValueError("The tokenizer has no pad token, which a batch needs: set tokenizer.pad_token.")
    batch = tokenizer(
        texts, padding=len(texts) > 1, padding_side=side, add_special_tokens=special, return_tensors="pt"
    )
    return batch["input_ids"], batch["attention_mask"]


METHOD = Method(
    name="cad",
    family="decoding",
    title="Trusting Your Evidence: Hallucinate Less with Context-aware Decoding",
    authors="Shi et al.",
    arxiv="2305.14739",
    year=2023,
    repo="xhan77/context-aware-decoding",
    status="faithful",
    target="hfext.decoding.cad:ContextAwareLogitsProcessor",
    usage="hfext.decoding.generate_cad(model, context, query, tokenizer=tokenizer, alpha=0.5, max_new_tokens=50)",
    summary="Amplifies what the context changes in the next-token distribution, against a second stream without it.",
    claim="Context-aware decoding makes a model follow its context where this contradicts what it has memorised.",
    headline=Result(
        metric="factuality metrics of summaries",
        setting="CNN-DM and XSUM, LLaMA",
        value="+14.3 %",
        baseline="plain decoding",
    ),
    recipe="decoding/cad-smollm2-conflict.yaml",
    notes="Twice the forwards of plain decoding. Per-stream nucleus filters and sets of more than two weighted "
    "contexts, options of the authors' code, are not built. The second stream always has a plain cache.",
)
