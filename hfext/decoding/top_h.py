"""Top-H: the most probable tokens whose entropy is at most a share of the entropy of the whole distribution.

    p = softmax(logits / T), sorted;  q_j = p_1..p_j / Gamma_j,  Gamma_j = p_1 + ... + p_j
    H(q_j) = log Gamma_j - (sum_{i<=j} p_i log p_i) / Gamma_j
    keep the longest prefix with H(q_j) <= alpha H(p)                                  (the paper's algorithms 1 and 2)

H(q_j) grows with j, because a token that is no likelier than those before adds at least -log(1 - p_j / Gamma_j) > 0. A
prefix of n tokens has H <= log n, so at least e^(alpha H(p)) tokens are kept: a top-k of a few times that size decides
most rows exactly, and only the others are looked at again with more candidates. No full sort is needed.

Two other rules are in circulation, which do not bound H(q): the authors' code (`mode="reference"`) and `top_h` in
transformers (`mode="transformers"`) compare partial sums of -p log p over the 100 likeliest tokens, not divided by
Gamma_j. Choosing the best subset is NP-hard; the greedy prefix is the paper's, `solver="skip"` goes on behind a token
that does not fit.

Top-H Decoding: Adapting the Creativity and Coherence with Bounded Entropy in Text Generation, arXiv 2509.02510.
"""

import math
from typing import Literal

import torch
from torch import Tensor
from transformers import LogitsProcessor

from ..registry import Method, Result, suggest
from ._truncate import (
    NEGLIGIBLE,
    captured,
    check_number,
    check_positive_int,
    keep_first,
    largest_first,
    row_maxima,
    shifted,
)

MODES = ("paper", "reference", "transformers")
SOLVERS = ("prefix", "skip")
CAP = 100  # candidates of the two other rules
# In favour of keeping, so that exact ties such as a uniform distribution are not decided by rounding.
TOLERANCE = 2e-7
FIRST, WIDEN = 128, 8


def entropy(logits: Tensor, likeliest: Tensor) -> Tensor:
    """H(softmax(logits)) in nats, `[batch, vocab] -> [batch]`; `likeliest` `[batch, 1]` has logit 0."""
    weights = logits.exp()
    # Without the largest weight, which is 1: log1p keeps the digits that log(1 + rest) would lose on peaked rows.
    rest = weights.scatter_(1, likeliest, 0).sum(dim=-1)
    return torch.log1p(rest) - weights.mul_(logits).sum(dim=-1) / (1 + rest)


def prefix_entropies(logits: Tensor) -> Tensor:
    """H(q_j) of every prefix, falling logits `[batch, k]` that begin with 0 -> float64 `[batch, k]`."""
    logits = logits.double()
    weights = logits.exp()
    times = (weights * logits).cumsum(dim=-1)
    weights[:, 0] = 0
    rest = weights.cumsum(dim=-1)
    return torch.log1p(rest) - times / (1 + rest)


def length_within(values: Tensor, bound: Tensor, logits: Tensor) -> Tensor:
    """How many rising `values` `[batch, k]` are at most `bound` `[batch]` and of no negligible token; at least 1."""
    return ((values <= bound[:, None]) & (logits > NEGLIGIBLE)).sum(dim=-1).clamp_(min=1)


def partial_sums(logits: Tensor, log_normaliser: Tensor) -> Tensor:
    """-sum_{i<=j} p_i log p_i of every prefix `[batch, k]`, with p = exp(logits - log_normaliser)."""
    log_p = logits.double() - log_normaliser.double()
    return -(log_p.exp() * log_p).cumsum(dim=-1)


def skip_and_continue(logits: Tensor, bound: float) -> Tensor:
    """Which ranks the greedy keeps that goes on behind a token that does not fit; falling logits `[k]` -> bool `[k]`.

    Given a kept set, H grows with the weight of the next token as long as that is no likelier than the kept ones. So
    what fits after a miss is a tail of the list, and whole runs are found from sums.
    """
    logits = logits.double()
    weights, kept = logits.exp(), logits == 0
    end = int((logits > NEGLIGIBLE).sum())
    kept[1:] = False
    rest, times, start = 0.0, 0.0, 1
    while start < end:
        w, t = rest + weights[start:end], times + weights[start:end] * logits[start:end]
        fits = torch.log1p(w) - t / (1 + w) <= bound
        if not fits.any():
            break
        start += int(fits.int().argmax())
        w, t = rest + weights[start:end].cumsum(0), times + (weights[start:end] * logits[start:end]).cumsum(0)
        run = int((torch.log1p(w) - t / (1 + w) <= bound).int().cumprod(0).sum())
        kept[start : start + run] = True
        rest, times, start = float(w[run - 1]), float(t[run - 1]), start + run
    return kept


class TopHLogitsProcessor(LogitsProcessor):
    """[`~transformers.LogitsProcessor`] that keeps the likeliest tokens with H(q) <= alpha H(p): top-H.

    Args:
        alpha (`float`, *optional*, defaults to 0.4):
            Share of the entropy, in (0, 1]. 1 keeps everything.
        temperature (`float`, *optional*):
            The temperature that `generate` applies after this processor, > 0. It decides which tokens are kept; their
            scores are returned as they came. Leave it out where the scores are tempered already, as with
            [`enable`].
        mode (`str`, *optional*, defaults to `"paper"`):
            `"paper"`, or one of the rules `"reference"` and `"transformers"`, which keep H(q) below no bound.
        solver (`str`, *optional*, defaults to `"prefix"`):
            `"skip"` goes on behind a token that does not fit, with more mass on average; it sorts the vocabulary.
        max_candidates (`int`, *optional*):
            Keep at most so many tokens. H(p) is still that of the whole vocabulary.
        min_tokens_to_keep (`int`, *optional*, defaults to 1):
            Keep so many whatever the bound says, where the row has them.
        filter_value (`float`, *optional*, defaults to `-inf`):
            Score of the removed tokens.

    `scores` are float `[batch, vocab]`; NaN, `+inf` and rows of `-inf` raise `ValueError`.

    ```python
    >>> processor = TopHLogitsProcessor(alpha=0.4, temperature=1.5)
    >>> model.generate(**inputs, do_sample=True, temperature=1.5, top_k=0, logits_processor=[processor])
    ```
    """

    supports_continuous_batching = True

    def __init__(
        self,
        alpha: float = 0.4,
        temperature: float | None = None,
        mode: Literal["paper", "reference", "transformers"] = "paper",
        solver: Literal["prefix", "skip"] = "prefix",
        max_candidates: int | None = None,
        min_tokens_to_keep: int = 1,
        filter_value: float = -math.inf,
    ):
        owner = type(self).__name__
        self.alpha = check_number(owner, "alpha", alpha, 0, 1, "]")
        self.temperature = (
            None if temperature is None else check_number(owner, "temperature", temperature, 0, math.inf)
        )
        for name, value, known in (("mode", mode, MODES), ("solver", solver, SOLVERS)):
            if value not in known:
                raise ValueError(f"{owner}: {name} is {value!r}. {suggest(str(value), known)}")
        if solver == "skip" and mode != "paper":
            raise ValueError(f"{owner}: solver='skip' searches under the paper's bound; mode={mode!r} has none.")
        self.mode, self.solver = mode, solver
        self.max_candidates = None
        if max_candidates is not None:
            self.max_candidates = check_positive_int(owner, "max_candidates", max_candidates)
        self.min_tokens_to_keep = check_positive_int(owner, "min_tokens_to_keep", min_tokens_to_keep)
        self.filter_value = filter_value

    @torch.no_grad()
    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        largest = row_maxima(scores)
        if self.alpha == 1 and self.mode == "paper" and self.max_candidates is None:
            return scores
        # What goes on behind a miss ends right at the bound, where the rounding of float32 would show.
        exact = self.solver == "skip"
        logits = shifted(scores, largest, self.temperature or 1.0, torch.float64 if exact else torch.float32)
        if self.mode != "paper":
            return self._compare_sums(scores, logits)
        if exact:
            return self._skip(scores, logits)
        size = scores.shape[-1] if captured(scores) else FIRST
        top, order = largest_first(logits, size)
        return self._prefix(scores, logits, self._bound(logits, order), top, order)

    def _bound(self, logits: Tensor, order: Tensor) -> Tensor:
        return entropy(logits, order[:, :1]) * (self.alpha * (1 + TOLERANCE))

    def _prefix(self, scores: Tensor, logits: Tensor, bound: Tensor, top: Tensor, order: Tensor) -> Tensor:
        """The paper's rule among candidates; rows that would go on are looked at again with more."""
        size, vocab = order.shape[1], scores.shape[-1]
        count = self._limited(length_within(prefix_entropies(top), bound, top))
        out = keep_first(scores, logits, top, order, count, self.filter_value)
        if size < vocab and int(count.max()) >= size:
            rows = (count >= size).nonzero()[:, 0]
            more = max(WIDEN * size, int(1.5 * bound.max().exp()))
            scores, logits, bound = scores[rows], logits[rows], bound[rows]
            out[rows] = self._prefix(scores, logits, bound, *largest_first(logits, more))
        return out

    def _skip(self, scores: Tensor, logits: Tensor) -> Tensor:
        top, order = logits.sort(dim=-1, descending=True, stable=True)
        bound = self._bound(logits, order).tolist()
        kept = torch.stack([skip_and_continue(row, limit) for row, limit in zip(top, bound, strict=True)])
        ranks = torch.arange(order.shape[1], device=order.device)
        kept |= ranks < self.min_tokens_to_keep
        if self.max_candidates is not None:
            kept &= kept.cumsum(dim=-1) <= max(self.max_candidates, self.min_tokens_to_keep)
        return scores.masked_fill(~torch.zeros_like(kept).scatter_(1, order, kept), self.filter_value)

    def _compare_sums(self, scores: Tensor, logits: Tensor) -> Tensor:
        # One more than can be kept, so that a tie through the cut is seen.
        top, order = largest_first(logits, max(CAP, self.min_tokens_to_keep) + 1)
        over = logits if self.mode == "reference" else top[:, :CAP]
        sums = partial_sums(top[:, :CAP], over.logsumexp(dim=-1, keepdim=True))
        count = self._limited(length_within(sums, self.alpha * sums[:, -1], top[:, :CAP]))
        return keep_first(scores, logits, top, order, count, self.filter_value)

    def _limited(self, count: Tensor) -> Tensor:
        if self.max_candidates is not None:
            count = count.clamp(max=self.max_candidates)
        return count.clamp(min=self.min_tokens_to_keep)


METHOD = Method(
    name="top_h",
    family="decoding",
    title="Top-H Decoding: Adapting the Creativity and Coherence with Bounded Entropy in Text Generation",
    authors="Baghaei Potraghloo et al.",
    arxiv="2509.02510",
    year=2025,
    repo="ErfanBaghaei/Top-H-Decoding",
    status="faithful",
    target="hfext.decoding.top_h:TopHLogitsProcessor",
    usage="hfext.decoding.enable(model).generate(**inputs, do_sample=True, temperature=1.5, top_k=0, top_h_alpha=0.4)",
    summary="Samples among the likeliest tokens whose entropy is at most a share of the whole distribution's.",
    claim="At high temperature top-H stays coherent where top-p does not, and H(q) <= alpha H(p) holds at every step.",
    headline=Result(
        metric="GSM8K accuracy, %",
        setting="LLaMA3.1-8B-Instruct, 8 shots, T = 2, the authors' code",
        value="39.35",
        baseline="13.72 (min-p 0.1), 2.65 (top-p 0.9)",
    ),
    recipe="decoding/top_h-smollm2-high_temperature.yaml",
    notes=(
        "As a processor, `TopHLogitsProcessor(alpha=0.4, temperature=1.5)` for generate(temperature=1.5): generate "
        "applies its temperature afterwards. "
        "The default is the paper's algorithm. The authors' code and the `top_h` of transformers compare other sums, "
        "which bound no entropy: mode='reference' and mode='transformers'. `generate` also applies top_k=50 unless "
        "top_k=0 is given."
    ),
)
