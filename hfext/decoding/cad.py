"""Context-aware decoding: what the context changed in the next-token distribution counts (1 + alpha) times.

    l(y) = (1 + alpha) * log p(y | c, x, y_<t) - alpha * log p(y | x, y_<t);   p_CAD = softmax(l)

c is the context, x the query. The second stream sees the prompt without the context and the same generated tokens, so
a step costs two forwards.

Trusting Your Evidence: Hallucinate Less with Context-aware Decoding, arXiv 2305.14739.
"""

import inspect
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutput

from ..registry import Method, Result
from ._active_steering import suspended
from ._adapters import refuse_prompt_learning
from ._cad_prompts import both_prompts, texts_of, tokens_of
from ._cad_stream import AskedTexts, Stream


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


class ContextAwareLogitsProcessor(LogitsProcessor):
    """Context-aware decoding for `generate(logits_processor=[...])`: greedy, sampling, beams, assisted.

    The scores come back as log-probabilities, so that beams add up log p_CAD. State belongs to token prefixes: rows
    may be reordered, duplicated or shortened between calls, and the object may be used for another `generate`. There
    a prompt that is one token longer than a text asked about before counts as its continuation, unless
    `prompt_length` is given or `reset()` called first.

    Args:
        model (`PreTrainedModel`): The model that generates, with or without LoRA-like PEFT adapters. An attention
            steering of it does not act on the second stream.
        no_context_ids (`torch.LongTensor` of shape `[batch, length]`): Prompts without the context; for an
            encoder-decoder model the encoder input without it. Row i belongs to row i of the prompts of `generate`:
            where prompts share a query, as with several contexts, its row is repeated.
        no_context_mask (`torch.LongTensor` of shape `[batch, length]`, *optional*, defaults to all ones): 0 at
            padding, which must be on the left for decoder-only models.
        alpha (`float`, *optional*, defaults to 0.5): Strength, >= 0. 0 is plain decoding at no cost.
        prompt_length (`int`, *optional*): Tokens of the prompts of `generate`, padding included; what follows them
            is shared. By default that of the first call, and again of a call that continues no text asked about.

    Raises:
        ValueError: For values out of range, a batch that does not fit, NaN scores, another vocabulary.
        TypeError: For a wrong kind of model or ids.
        NotImplementedError: For prompt tuning, prefix tuning and p-tuning.
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
        refuse_prompt_learning(model, "Context-aware decoding")
        alpha = alpha.item() if isinstance(alpha, Tensor) and alpha.ndim == 0 else alpha
        if isinstance(alpha, bool) or not isinstance(alpha, Real):
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
        self._core = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._accepts = frozenset(inspect.signature(self._core.forward).parameters)
        self.reset()

    def reset(self) -> None:
        """Forget the texts asked about and the keys and values of the second stream."""
        self._stream: Stream | None = None
        self._asked = AskedTexts()
        self._encoded: Tensor | None = None
        self._start = 0

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
        with suspended(self.model):
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
        self._continue_or_begin(input_ids)
        groups, layers = len(self.no_context_ids), self._layers()
        stream, seen = self._stream, 0
        # Of a failed forward nothing remains.
        self._stream = None
        if stream is not None and stream.layers == layers:
            seen = stream.continued(input_ids, groups)
        cache = stream.cache if seen else None
        repeats = len(input_ids) // groups
        shared = input_ids[:, self._start :]
        mask = self.no_context_mask.to(input_ids.device).repeat_interleave(repeats, 0)
        inputs: dict[str, Any] = {"past_key_values": cache, "use_cache": True}
        if self.model.config.is_encoder_decoder:
            encoded = self._encode(input_ids.device).repeat_interleave(repeats, 0)
            inputs["encoder_outputs"] = BaseModelOutput(last_hidden_state=encoded)
            inputs |= {"attention_mask": mask, "decoder_input_ids": shared[:, seen:]}
        else:
            ids = self.no_context_ids.to(input_ids.device).repeat_interleave(repeats, 0)
            done = ids.shape[1] + seen - self._start if seen else 0
            mask = torch.cat([mask, mask.new_ones(shared.shape)], 1)
            inputs |= {"input_ids": torch.cat([ids, shared], 1)[:, done:], "attention_mask": mask}
            if "position_ids" in self._accepts:
                inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, done:]
            if "logits_to_keep" in self._accepts:
                inputs["logits_to_keep"] = 1
        out = self.model(**inputs)
        cache = out.get("past_key_values")
        # Recurrent models keep their state elsewhere; they are run over the whole prefix again.
        self._stream = Stream(input_ids.clone(), cache, layers) if isinstance(cache, Cache) else None
        return out.logits[:, -1]

    def _continue_or_begin(self, input_ids: Tensor) -> None:
        """Begin anew, with `_start` where the tokens begin that both streams share, unless the call continues one."""
        groups = len(self.no_context_ids)
        known = self._asked.know_parents(input_ids, groups)
        if not all(known):
            alone = self.model.config.is_encoder_decoder or self.prompt_length is not None
            if any(known) and not alone:
                raise ValueError(
                    f"input_ids: row {known.index(False)} continues no prompt of this generate while others do. Call "
                    "reset() before a generate with other prompts, or give prompt_length."
                )
            start = self._prompt_columns(input_ids)
            self.reset()
            self._start = start
        self._asked.add(input_ids, groups)

    def _prompt_columns(self, input_ids: Tensor) -> int:
        """Columns of the prompts in the first call of a generate, of which a group may hold one alone."""
        if self.model.config.is_encoder_decoder:
            return 0
        groups, (rows, length) = len(self.no_context_ids), input_ids.shape
        columns = length if self.prompt_length is None else self.prompt_length
        if columns > length:
            raise ValueError(f"prompt_length is {columns} but must be <= {length}, the tokens given.")
        prompts = input_ids[:, :columns]
        if not torch.equal(prompts[:: rows // groups].repeat_interleave(rows // groups, 0), prompts):
            raise ValueError(
                f"no_context_ids has {groups} rows but must have one for each prompt, here at least "
                f"{len(prompts.unique_consecutive(dim=0))}: repeat the row that several prompts share."
            )
        return columns

    def _layers(self) -> int | None:
        """Layers that the model runs: a draft by early exit runs fewer of its own."""
        base = getattr(self._core, self._core.base_model_prefix, self._core)
        return getattr(base.config, "num_hidden_layers", None)

    def _encode(self, device: torch.device) -> Tensor:
        """Encoder states of the inputs without context, once for each `generate`, [batch, length, hidden]."""
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
        contexts, queries = texts_of("context", context), texts_of("query", query)
        if len(contexts) != len(queries):
            raise ValueError(f"context has {len(contexts)} texts but query {len(queries)}: one of each for a prompt.")
        if tokenizer is None:
            raise ValueError("tokenizer is None but must be given with texts.")
        prompts = both_prompts(contexts, queries, template, tokenizer)
        side = "right" if model.config.is_encoder_decoder else "left"
        pairs = [tokens_of(texts, tokenizer, side, special=template != "chat") for texts in prompts]
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
