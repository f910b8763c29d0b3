"""Mirostat: truncation by feedback, so that the mean surprise of the tokens comes to a target.

    surprise S = -log2 p(x) of the token that was drawn;   mu <- mu - eta (S - tau),  mu_0 = 2 tau

    version 2: keep the tokens with -log2 p <= mu
    version 1: fit p_i ~ i^-s by least squares through the origin, s = sum t_i b_i / sum t_i^2 with
               t_i = log((i+1) / i), b_i = log(p_i / p_{i+1}), i = 1..m;  epsilon = s - 1;
               keep k = round(((epsilon 2^mu) / (1 - V^-epsilon))^(1/s)) tokens

The paper measures S under the whole distribution (`feedback="full"`). Later ports measure it after the truncation,
which is smaller, so that the text is more surprising than asked for (`feedback="truncated"`).

Mirostat: A Neural Text Decoding Algorithm that Directly Controls Perplexity, arXiv 2007.14966.
"""

import math
from typing import Literal

import torch
from torch import Tensor
from transformers import LogitsProcessor

from ..registry import Method, Result, suggest
from ._prefix import PrefixMemory
from ._truncate import MASKED, check_number, check_positive_int, keep_first, largest_first, row_maxima, shifted

FEEDBACKS = ("full", "truncated")


def zipf_exponent(top: Tensor) -> Tensor:
    """s of p_i ~ i^-s from the falling logits `top` `[batch, m + 1]`; masked ones are left out. `[batch]`, float64."""
    rank = torch.arange(1, top.shape[1], dtype=torch.float64, device=top.device)
    t = ((rank + 1) / rank).log()
    valid = top[:, 1:] > MASKED
    b = (top[:, :-1] - top[:, 1:]).double().masked_fill(~valid, 0)
    return (t * b).sum(dim=-1) / (t.square() * valid).sum(dim=-1).clamp(min=1e-300)


def tokens_for(mu: Tensor, s: Tensor, vocab: int) -> Tensor:
    """k of version 1 for each row, rounded, in [1, vocab]. The limit for s = 1 is 2^mu / ln V."""
    s, vocab = s.clamp(min=1e-6), max(vocab, 2)
    epsilon = s - 1
    near = epsilon.abs() < 1e-9
    safe = torch.where(near, torch.ones_like(epsilon), epsilon)
    share = torch.where(near, torch.full_like(s, 1 / math.log(vocab)), safe / -torch.expm1(-safe * math.log(vocab)))
    log_k = (mu * math.log(2) + share.log()) / s
    return log_k.clamp(0, math.log(vocab)).exp().round().long()


class MirostatLogitsProcessor(LogitsProcessor):
    """[`~transformers.LogitsProcessor`] that keeps the mean surprise of the sampled tokens at `tau` bits.

    It only filters; `generate` draws the token. Its state is looked up by the tokens of the sequence, so batches,
    beams and assisted decoding work, and an object can be used again: a prompt that is an earlier sequence and its
    next token takes up the state of that sequence, every other begins anew. With batches of one, drafts of up to 60
    tokens are followed. Use it as the only truncation, with
    `top_k=0`: the default is 50.

    Args:
        tau (`float`, *optional*, defaults to 3.0):
            Target in bits a token, > 0. It must lie between the surprise of greedy decoding and that of sampling from
            the whole distribution to be reached.
        eta (`float`, *optional*, defaults to 1.0):
            Learning rate in [0, 1]; 0 keeps the threshold at 2 tau.
        version (`int`, *optional*, defaults to 2):
            1 or 2.
        feedback (`str`, *optional*, defaults to `"full"`):
            Whether S is measured under the `"full"` or the `"truncated"` distribution.
        m (`int`, *optional*, defaults to 100):
            How many ratios version 1 fits.
        windup (`int`, *optional*, defaults to 100):
            Hold mu in [-w, log2 V + w] with w = windup eta tau bits: what so many tokens in a row can miss the target
            by is made up for later, and no more. `None`, as in the paper, sets no limit: where the target cannot be
            reached mu then goes away, and needs as long to come back.
        temperature (`float`, *optional*):
            The temperature that `generate` applies after this processor, > 0: decides what is kept and S, and leaves
            the scores as they came. Leave it out where the scores are tempered already.
        rows_per_input (`int`, *optional*):
            Beams of one input. Needed for encoder-decoder models with beams, whose inputs share their first tokens.
        min_tokens_to_keep (`int`, *optional*, defaults to 1):
            Keep so many whatever mu says, where the row has them.
        filter_value (`float`, *optional*, defaults to `-inf`):
            Score of the removed tokens.

    A token that had probability 0, such as the padding of a finished row, does not change mu.

    ```python
    >>> processor = MirostatLogitsProcessor(tau=3.0)
    >>> model.generate(**inputs, do_sample=True, top_k=0, max_new_tokens=300, logits_processor=[processor])
    ```
    """

    supports_continuous_batching = False

    def __init__(
        self,
        tau: float = 3.0,
        eta: float = 1.0,
        version: Literal[1, 2] = 2,
        feedback: Literal["full", "truncated"] = "full",
        m: int = 100,
        windup: int | None = 100,
        temperature: float | None = None,
        rows_per_input: int | None = None,
        min_tokens_to_keep: int = 1,
        filter_value: float = -math.inf,
    ):
        owner = type(self).__name__
        self.tau = check_number(owner, "tau", tau, 0, math.inf)
        self.eta = check_number(owner, "eta", eta, 0, 1, "[]")
        if version not in (1, 2):
            raise ValueError(f"{owner}: version is {version!r} but must be 1 or 2.")
        if feedback not in FEEDBACKS:
            raise ValueError(f"{owner}: feedback is {feedback!r}. {suggest(str(feedback), FEEDBACKS)}")
        if temperature is not None:
            check_number(owner, "temperature", temperature, 0, math.inf)
        if rows_per_input is not None:
            check_positive_int(owner, "rows_per_input", rows_per_input)
        self.windup = None if windup is None else check_positive_int(owner, "windup", windup)
        self.version, self.feedback, self.temperature = version, feedback, temperature
        self.m = check_positive_int(owner, "m", m)
        self.min_tokens_to_keep = check_positive_int(owner, "min_tokens_to_keep", min_tokens_to_keep)
        self.filter_value = filter_value
        self.memory = PrefixMemory(rows_per_input)

    def reset(self) -> None:
        """Forget all sequences."""
        self.memory = PrefixMemory(self.memory.rows_per_input)

    @torch.no_grad()
    def mu(self, input_ids: Tensor, vocab: int) -> Tensor:
        """Threshold of each sequence `[rows, length]` in bits, float64 `[rows]`; 2 tau where nothing is known."""
        mu = torch.full((len(input_ids),), 2 * self.tau, dtype=torch.float64, device=input_ids.device)
        if known := self.memory.find(input_ids):
            (before, bits), rows, then = known
            surprise = bits[then, input_ids[rows, -1]].double()
            mu[rows] = before[then] - torch.where(surprise.isfinite(), self.eta * (surprise - self.tau), 0.0)
        if self.windup is None:
            return mu
        room = self.windup * self.eta * self.tau
        return mu.clamp(-room, math.log2(vocab) + room)

    @torch.no_grad()
    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if input_ids.dim() != 2 or len(input_ids) != len(scores):
            raise NotImplementedError(
                f"{type(self).__name__} needs the tokens of every sequence, [rows, length], and got input_ids of "
                f"shape {tuple(input_ids.shape)}. Continuous batching hands over none: use `generate`, or top-H."
            )
        logits = shifted(scores, row_maxima(scores), self.temperature or 1.0)
        vocab = scores.shape[-1]
        bits = logits.logsumexp(dim=-1, keepdim=True).sub(logits).div_(math.log(2))
        bits.masked_fill_(scores == -math.inf, math.inf)
        mu = self.mu(input_ids, vocab)
        if self.version == 1:
            top, order = largest_first(logits, self.m + 1)
            count = tokens_for(mu, zipf_exponent(top), vocab).clamp(min=self.min_tokens_to_keep)
            if int(count.max()) >= order.shape[1]:
                top, order = largest_first(logits, int(count.max()) + 1)
            out = keep_first(scores, logits, top, order, count, self.filter_value)
        else:
            few = min(self.min_tokens_to_keep, vocab)
            # A minimum is a tenth of the time of a top-k.
            fewest = bits.amin(-1, keepdim=True) if few == 1 else bits.topk(few, largest=False).values[:, -1:]
            out = scores.masked_fill(bits > mu[:, None].to(bits).maximum(fewest), self.filter_value)
        if self.feedback == "truncated":
            removed = (out != scores) | (scores == -math.inf)
            bits = logits.masked_fill(removed, -math.inf).log_softmax(dim=-1) / -math.log(2)
        self.memory.store(input_ids, (mu, bits))
        return out


METHOD = Method(
    name="mirostat",
    family="decoding",
    title="Mirostat: A Neural Text Decoding Algorithm that Directly Controls Perplexity",
    authors="Basu et al.",
    arxiv="2007.14966",
    year=2020,
    repo="basusourya/mirostat",
    status="faithful",
    target="hfext.decoding.mirostat:MirostatLogitsProcessor",
    usage="model.generate(**inputs, do_sample=True, top_k=0, logits_processor=[hfext.MirostatLogitsProcessor()])",
    summary="Adapts the truncation after every token, so that the text's mean surprise comes to a target in bits.",
    claim="The mean surprise of the text stays at the target, whatever the length.",
    headline=Result(
        metric="cross-entropy rate",
        setting="GPT-2 117M, 200 to 900 tokens",
        value="at the target for all lengths (figures only)",
        baseline="drifts with top-k and top-p",
    ),
    recipe="decoding/mirostat-smollm2-surprise.yaml",
    notes=(
        "Version 2, which became the usual one, is not in the paper; it is that of later ports with the paper's "
        "feedback. mu is held where 100 tokens can bring it, which the paper does not do: windup=None."
    ),
)
