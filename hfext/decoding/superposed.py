"""Superposed decoding: k drafts of a prompt for the cost of one, from a single stream of superposed embeddings.

    x = sum_i gamma_i E[last token of draft i],   gamma = softmax(s),   s_i = sum of log p_f over draft i
    log p_f(v|i) = (1 - alpha) log P(v) + alpha log p_ng(v|i)
    log p_f(v|i) = (1 - alpha) log P(v) - delta           where p_ng(v|i) = 0 for every candidate v
    log p_f(v|i) = log P(v)                               without an n-gram store, or with alpha = 0

P is the softmax of the shared logits over tau, renormalised over the best candidates. Of all pairs (draft, candidate)
the best k continue; a pair among the best k that ends (EOS, length, another stopping criterion) is a finished draft.
Drafts are ranked by s alone, and a prompt is done when its finished drafts are at least as good as all that are alive:
s never grows, so this changes no result, and one draft without n-grams is greedy decoding. At the first step and after
resets all drafts branch from one text, by log p_f, or by log P where fewer than k candidates have an n-gram.

Superposed Decoding: Multiple Generations from a Single Autoregressive Inference Pass, arXiv 2405.18400. Ranking by
length-normalised score and running on after the end, as the authors' code does, would not equal greedy decoding.
"""

import copy
import functools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteriaList, StopStringCriteria
from transformers.utils import ModelOutput

from .. import compat
from ..registry import Method, Result
from ._superposed_drafts import Drafts
from ._superposed_loop import GIVEN_STREAMER, Stream, refuse_arguments, refuse_config
from ._superposed_ngrams import check_store, draft_ngrams, opened_store
from .ngram_store import NGramStore

compat.let_callables_refuse(GIVEN_STREAMER)


@dataclass(frozen=True, kw_only=True)
class SuperposedConfig:
    """Options of [`superposed_generate`].

    Args:
        num_drafts (`int`, *optional*, defaults to 3): k, drafts of each prompt, >= 1.
        temperature (`float`, *optional*, defaults to 0.06): tau, > 0. Only what is passed to `generate` itself counts;
            `generation_config.temperature` belongs to sampling and is not read.
        alpha (`float`, *optional*, defaults to 0.54): Weight of the n-grams, in [0, 1); 0 turns them off.
        num_candidates (`int`, *optional*): Tokens considered for a draft, >= 1; 3k by default. At least k plus the
            number of EOS tokens are taken.
        unseen_penalty (`float`, *optional*, defaults to 200.0): delta, in nats, >= 0.
        lambdas (`Sequence[float]`, *optional*): Weights of the orders 2, 3, ..., each >= 0, in sum at most 1.
        reset_every (`int`, *optional*): Every so many tokens one draft is sampled by gamma, its tokens are read into
            the cache, and drafts branch from it alone. >= 1; for continuations above some 20 tokens.
        early_exit (`bool`, *optional*, defaults to `True`): Stop when no result can change any more.
        output_mixing_weights (`bool`, *optional*, defaults to `False`): Return gamma of every step.
    """

    num_drafts: int = 3
    temperature: float = 0.06
    alpha: float = 0.54
    num_candidates: int | None = None
    unseen_penalty: float = 200.0
    lambdas: Sequence[float] = (0.01, 0.04, 0.15, 0.18, 0.12)
    reset_every: int | None = None
    early_exit: bool = True
    output_mixing_weights: bool = False

    def __post_init__(self):
        for name in ("num_drafts", "num_candidates", "reset_every"):
            value = getattr(self, name)
            if name == "num_drafts" or value is not None:
                _check(
                    self, name, isinstance(value, Integral) and not isinstance(value, bool), "an integer", TypeError
                )
                _check(self, name, value >= 1, ">= 1")
                object.__setattr__(self, name, int(value))
        for name in ("temperature", "alpha", "unseen_penalty"):
            value = getattr(self, name)
            _check(self, name, isinstance(value, Real) and not isinstance(value, bool), "a number", TypeError)
            object.__setattr__(self, name, float(value))
        # The logits are divided in float32.
        tau = torch.tensor(self.temperature, dtype=torch.float32)
        _check(self, "temperature", 0 < tau < math.inf, "> 0 (tau), and finite, in float32")
        _check(self, "alpha", 0 <= self.alpha < 1, "in [0, 1)")
        _check(self, "unseen_penalty", 0 <= self.unseen_penalty < math.inf, ">= 0")
        try:
            object.__setattr__(self, "lambdas", tuple(map(float, self.lambdas)))
        except (TypeError, ValueError) as error:
            raise TypeError(f"lambdas is {self.lambdas!r} but must be a sequence of numbers.") from error
        valid = all(weight >= 0 for weight in self.lambdas) and 0 < sum(self.lambdas) <= 1 + 1e-9
        _check(self, "lambdas", valid, "weights >= 0 with a sum in (0, 1]")


def _check(config: Any, name: str, valid: bool, range_: str, error: type[Exception] = ValueError) -> None:
    if not valid:
        raise error(f"{name} is {getattr(config, name)!r} but must be {range_}.")


@dataclass
class SuperposedOutput(ModelOutput):
    """
    Args:
        sequences (`torch.LongTensor` of shape `(B * k, L)`): Prompts with their drafts, best first inside each prompt;
            padded on the right after an end. Where fewer than k drafts are possible, rows of padding fill up.
        sequences_scores (`torch.FloatTensor` of shape `(B * k,)`): s, in nats; -inf for a row of padding.
        mixing_weights (`tuple(torch.FloatTensor)`, *optional*): gamma [B, k] of every step after the first.
        num_model_calls (`int`): One for the prompts and one for each further token, whatever k. Where layers have a
            recurrent state, a reset takes a call for each token that it reads again.
        uninterpolated_fraction (`float`, *optional*): Share of (draft, step) without any n-gram; near 1 the store is
            of another domain.

    No cache is returned: after the prompt its entries are valid for no single draft.
    """

    sequences: torch.LongTensor | None = None
    sequences_scores: torch.FloatTensor | None = None
    mixing_weights: tuple[torch.FloatTensor, ...] | None = None
    num_model_calls: int | None = None
    uninterpolated_fraction: float | None = None

    @property
    def draft_scores(self) -> torch.FloatTensor:
        return self.sequences_scores


def best_candidates(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` highest of [rows, V] and their ids, [rows, count] each, descending; of equals the lower id first."""
    values, ids = logits.topk(min(count, logits.shape[-1]))
    last = values[:, -1:]
    tied = ((logits == last).sum(-1) > (values == last).sum(-1)) & torch.isfinite(last[:, 0])
    for row in tied.nonzero()[:, 0].tolist():
        ids[row] = logits[row].sort(descending=True, stable=True).indices[: ids.shape[1]]
        values[row] = logits[row, ids[row]]
    ids, by_id = ids.sort()
    values, by_value = values.gather(1, by_id).sort(descending=True, stable=True)
    return values, ids.gather(1, by_value)


def interpolate(log_p: Tensor, p_ng: Tensor, alpha: float, penalty: float, needed: int = 1) -> tuple[Tensor, Tensor]:
    """log p_f [..., c] from log P and p_ng, and where [...] fewer than `needed` candidates have an n-gram."""
    blind = (torch.isfinite(log_p) & (p_ng > 0)).sum(-1) < torch.isfinite(log_p).sum(-1).clamp(max=needed)
    mixed = (1 - alpha) * log_p + alpha * p_ng.log()
    return torch.where(blind[..., None], (1 - alpha) * log_p - penalty, mixed), blind


def mixing_weights(scores: Tensor) -> Tensor:
    """gamma [B, k], of sum 1; equal weights for a prompt that has no draft left."""
    return torch.where(torch.isneginf(scores).all(-1, keepdim=True), torch.zeros_like(scores), scores).softmax(-1)


def superpose(embeddings: Tensor, gamma: Tensor) -> Tensor:
    """sum_i gamma_i e_i: [B, k, d] and [B, k] -> [B, 1, d], summed in float32 or better."""
    precise = torch.promote_types(embeddings.dtype, torch.float32)
    mixed = torch.einsum("bk,bkd->bd", gamma.to(precise), embeddings.to(precise))
    return mixed.unsqueeze(1).to(embeddings.dtype)


@torch.no_grad()
def superposed_generate(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    generation_config: Any = None,
    num_drafts: int = 3,
    temperature: float = 0.06,
    ngram_store: NGramStore | str | os.PathLike | None = None,
    alpha: float = 0.54,
    num_candidates: int | None = None,
    unseen_penalty: float = 200.0,
    lambdas: Sequence[float] = (0.01, 0.04, 0.15, 0.18, 0.12),
    reset_every: int | None = None,
    early_exit: bool = True,
    output_mixing_weights: bool = False,
    generator: torch.Generator | None = None,
    **model_kwargs: Any,
) -> SuperposedOutput | Tensor:
    """The loop for `model.generate(..., custom_generate=superposed_generate, num_drafts=3)`.

    Args:
        ngram_store ([`NGramStore`] or path, *optional*): N-grams of text like the one wanted.
        generator (`torch.Generator`, *optional*): Draws the drafts at resets; seed 0 by default.
        **options: Fields of [`SuperposedConfig`].

    Returns:
        [`SuperposedOutput`] with `return_dict_in_generate=True`, otherwise its `sequences`. Logits processors see each
        draft as a history of its own. `ValueError` for a mode, model or argument that it cannot serve.

    A function of yours around this one takes over its refusals, of a streamer above all, whose reader would wait for
    ever, with `functools.wraps(superposed_generate)`; `functools.partial` needs nothing.
    """
    if generation_config is None:
        raise TypeError(
            "superposed_generate is what generate calls: model.generate(..., custom_generate=superposed_generate), or "
            "SuperposedGenerationMixin.generate_superposed(model, ...)."
        )
    refuse_arguments(GIVEN_STREAMER.get())
    options = SuperposedConfig(
        num_drafts=num_drafts,
        temperature=temperature,
        alpha=alpha,
        num_candidates=num_candidates,
        unseen_penalty=unseen_penalty,
        lambdas=lambdas,
        reset_every=reset_every,
        early_exit=early_exit,
        output_mixing_weights=output_mixing_weights,
    )
    k, tau, reset_every = options.num_drafts, options.temperature, options.reset_every
    if not isinstance(generator, torch.Generator | None):
        raise TypeError(f"generator is {generator!r} but must be a torch.Generator.")
    refuse_config(generation_config)
    stream = Stream(model, input_ids, model_kwargs, replayable=reset_every is not None)
    store = opened_store(ngram_store, model, options.lambdas) if alpha else None
    mask, prompt = model_kwargs.get("attention_mask"), input_ids.shape[1]
    known = torch.full(input_ids.shape[:1], prompt) if mask is None else mask[:, -prompt:].sum(-1).cpu()
    ends = _ids_of(generation_config.eos_token_id)
    width, kept = max(options.num_candidates or 3 * k, k + len(ends)), max(2, 1 + len(ends)) * k
    generator = torch.Generator().manual_seed(0) if generator is None else generator

    drafts = Drafts(input_ids, k, early_exit)
    logits, since_reset, weights, asked, blind = stream.prefill(input_ids), 0, [], 0, 0
    while True:
        heads, used = drafts.heads, drafts.used
        values, ids = _candidates(logits, heads, logits_processor, width)
        _check_logits(values, used)
        # The best first: nothing overflows, however small tau is.
        log_p = ((values - values[..., :1]) / tau).log_softmax(-1)
        if store is not None:
            p_ng = draft_ngrams(store, heads, ids, known + heads.shape[-1] - prompt, options.lambdas)
            log_p, unseen = interpolate(log_p, p_ng, options.alpha, options.unseen_penalty, k if drafts.one else 1)
            asked, blind = asked + used.sum(), blind + (unseen & used).sum()
        drafts.advance(log_p, ids, kept, stopping_criteria)
        if bool(drafts.done.all()):
            break
        since_reset += 1
        gamma = mixing_weights(drafts.scores)
        if since_reset == reset_every:
            gamma = drafts.keep_one(gamma, generator)
            logits, since_reset = stream.replay(drafts.alive[:, 0, -since_reset:]), 0
        else:
            logits = stream.step(superpose(model.get_input_embeddings()(drafts.alive[..., -1]), gamma))
        weights.append(gamma)

    sequences, scores = drafts.best(next(iter(_ids_of(generation_config.pad_token_id) + ends), None))
    if not generation_config.return_dict_in_generate:
        return sequences
    return SuperposedOutput(
        sequences=sequences,
        sequences_scores=scores,
        mixing_weights=tuple(weights) if output_mixing_weights else None,
        num_model_calls=stream.calls,
        uninterpolated_fraction=None if store is None else float(blind / asked),
    )


def _before_generate(streamer: Any, assistant_model: Any, tokenizer: Any = None, **kwargs: Any) -> None:
    """What `generate` keeps from the callable: it asks here before it begins."""
    refuse_arguments(streamer, assistant_model, **kwargs)
    store = kwargs.get("ngram_store")
    if tokenizer is not None and store is not None:
        store = NGramStore.load(store, verify=False) if isinstance(store, str | os.PathLike) else store
        check_store(store).check_tokenizer(tokenizer)


superposed_generate.hfext_before_generate = _before_generate


def _candidates(logits: Tensor, heads: Tensor, processors: Any, count: int) -> tuple[Tensor, Tensor]:
    """Best logits and their ids [B, r, count] of the histories [B, r, L]; row b of a call is always prompt b."""
    if processors:
        rows = torch.stack([processors(head.contiguous(), logits.clone()) for head in heads.unbind(1)], 1)
    else:
        rows = logits[:, None]
    values, ids = best_candidates(rows.flatten(0, 1), count)
    shape = (len(heads), heads.shape[1], values.shape[-1])
    return values.view(len(heads), -1, shape[-1]).expand(shape), ids.view(len(heads), -1, shape[-1]).expand(shape)


def _check_logits(values: Tensor, used: Tensor) -> None:
    best = values[..., 0][used]
    if bool(torch.isnan(values[used]).any()) or bool(torch.isposinf(best).any()):
        raise ValueError("The logits hold NaN or +inf: check the model's dtype and the logits processors.")
    if bool(torch.isneginf(best).any()):
        raise ValueError("The logits processors leave no token for a draft: every logit is -inf.")


def _ids_of(token_ids: Any) -> list[int]:
    return [] if token_ids is None else torch.as_tensor(token_ids).flatten().tolist()


class SuperposedGenerationMixin:
    """Adds `generate_superposed` to a model class: `class M(SuperposedGenerationMixin, LlamaForCausalLM)`.

    On a model of any class, call `SuperposedGenerationMixin.generate_superposed(model, ...)`.
    """

    def generate_superposed(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        streamer: Any = None,
        assistant_model: Any = None,
        tokenizer: Any = None,
        stop_strings: str | list[str] | None = None,
        stopping_criteria: Any = None,
        **kwargs: Any,
    ) -> SuperposedOutput | Tensor:
        """`generate` with [`superposed_generate`]: every argument of both, and `stop_strings` with a `tokenizer`.

        A `tokenizer` is also compared with the vocabulary of the n-gram store. Defaults of the model that sample or
        that turn the cache off do not apply; `do_sample=True` and `use_cache=False` themselves are refused.
        """
        _before_generate(streamer, assistant_model, tokenizer, **kwargs)
        kwargs.pop("assistant_tokenizer", None)
        stopping_criteria = StoppingCriteriaList(stopping_criteria or [])
        if stop_strings is not None:
            if tokenizer is None:
                raise ValueError("stop_strings needs the model's tokenizer: pass tokenizer=...")
            stopping_criteria.append(StopStringCriteria(tokenizer, stop_strings))
        generation_config = copy.deepcopy(generation_config)
        for name, value in {"do_sample": False, "use_cache": True}.items():
            if kwargs.get(name) is None:
                kwargs.pop(name, None)
                if generation_config is None:
                    kwargs[name] = value
                elif getattr(generation_config, name) is None:
                    setattr(generation_config, name, value)
        # Of the class: a repository's `custom_generate` replaces `generate` of the instance, which leads back here.
        model = _unwrapped(self)
        return type(model).generate(
            model,
            inputs,
            generation_config,
            custom_generate=superposed_generate,
            stopping_criteria=stopping_criteria,
            **kwargs,
        )


def _unwrapped(model: Any) -> Any:
    """The model whose `generate` a wrapper, as `torch.compile` makes it, hands on."""
    generate = model.generate
    if isinstance(generate, functools.partial):
        return generate.keywords.get("model", model)
    return getattr(generate, "__self__", model)


METHOD = Method(
    name="superposed",
    family="decoding",
    title="Superposed Decoding: Multiple Generations from a Single Autoregressive Inference Pass",
    authors="Shen et al.",
    arxiv="2405.18400",
    year=2024,
    repo="RAIVNLab/SuperposedDecoding",
    status="variant",
    difference=(
        "Drafts are ranked by their total score and a prompt stops when its finished drafts cannot be beaten (the "
        "authors' code ranks by length-normalised score and runs on); an end counts only among the best k pairs, so "
        "one draft without n-grams is greedy decoding; the n-gram tables are safetensors."
    ),
    target="hfext.decoding.superposed:SuperposedGenerationMixin",
    config=SuperposedConfig,
    usage="model.generate(**inputs, custom_generate=superposed_generate, num_drafts=3, ngram_store=store)",
    summary="Several drafts of a prompt for the model calls of one, by feeding a weighted sum of their embeddings.",
    claim="Superposed decoding is 2.44 times faster than nucleus sampling at k=3.",
    headline=Result(
        metric="speed-up over nucleus sampling at k=3",
        setting="Llama-2-7B, OpenWebText, 15-token prefixes, 10 tokens, batch 1",
        value="2.44",
        baseline="1.00",
    ),
    recipe="decoding/superposed-smollm2-drafts.yaml",
    notes=(
        "`store = NGramStore.build(texts, tokenizer)` of text like the one wanted: without it all drafts share one "
        "distribution, and the later ones become incoherent. Needs do_sample=False where the generation config says "
        "otherwise. For decoder-only text models with a key-value cache and without per-layer embeddings. Against a "
        "batch of k samples the gain is far smaller than against k samples one after the other."
    ),
)
