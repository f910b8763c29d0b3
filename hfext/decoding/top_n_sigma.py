"""Top-n-sigma: the tokens whose logit lies within n standard deviations of the largest one.

    keep i  where  l_i >= max l - n sigma,   sigma^2 = mean (l - mean l)^2 over the tokens that are not masked

Threshold and deviation scale alike, so the kept set does not depend on the temperature.

Top-n-sigma: Not All Logits Are You Need, arXiv 2411.07641.
"""

import math

import torch
from torch import Tensor
from transformers import LogitsProcessor

from ..registry import Method
from ._truncate import check_number, check_positive_int, row_maxima, shifted


def deviation(logits: Tensor, valid: Tensor) -> Tensor:
    """Population standard deviation of the `valid` logits of each row, `[batch, vocab] -> [batch, 1]`."""
    size = valid.sum(dim=-1, keepdim=True)
    mean = logits.masked_fill(~valid, 0).sum(dim=-1, keepdim=True) / size
    squares = (logits - mean).masked_fill_(~valid, 0).square_().sum(dim=-1, keepdim=True)
    return (squares / size).sqrt_()


class TopNSigmaLogitsProcessor(LogitsProcessor):
    """[`~transformers.LogitsProcessor`] that keeps what lies within n standard deviations of the largest logit.

    Args:
        n (`float`, *optional*, defaults to 1.0):
            Width in standard deviations, > 0.
        min_tokens_to_keep (`int`, *optional*, defaults to 1):
            Keep so many at least, where the row has them.
        filter_value (`float`, *optional*, defaults to `-inf`):
            Score of the removed tokens.

    `scores` are float `[batch, vocab]`; NaN, `+inf` and rows of `-inf` raise `ValueError`.

    ```python
    >>> model.generate(**inputs, do_sample=True, top_k=0, logits_processor=[TopNSigmaLogitsProcessor(1.0)])
    ```
    """

    supports_continuous_batching = True

    def __init__(self, n: float = 1.0, min_tokens_to_keep: int = 1, filter_value: float = -math.inf):
        owner = type(self).__name__
        self.n = check_number(owner, "n", n, 0, math.inf)
        self.min_tokens_to_keep = check_positive_int(owner, "min_tokens_to_keep", min_tokens_to_keep)
        self.filter_value = filter_value

    @torch.no_grad()
    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        logits = shifted(scores, row_maxima(scores))
        threshold = -self.n * deviation(logits, scores > -math.inf)
        if self.min_tokens_to_keep > 1:
            enough = logits.topk(min(self.min_tokens_to_keep, logits.shape[-1])).values[:, -1:]
            threshold = torch.minimum(threshold, enough)
        return scores.masked_fill(logits < threshold, self.filter_value)


METHOD = Method(
    name="top_n_sigma",
    family="decoding",
    title="Top-nσ: Not All Logits Are You Need",
    authors="Tang et al.",
    arxiv="2411.07641",
    year=2024,
    repo="Tomorrowdawn/top_nsigma",
    status="faithful",
    target="hfext.decoding.top_n_sigma:TopNSigmaLogitsProcessor",
    usage="model.generate(**inputs, do_sample=True, top_k=0, logits_processor=[hfext.TopNSigmaLogitsProcessor(1.0)])",
    summary="Samples among the tokens within n standard deviations of the largest logit, whatever the temperature.",
    notes="Masked logits are left out of the deviation; some ports count them as zero.",
)
