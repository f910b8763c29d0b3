"""What truncation samplers share: checks of the scores, and writing a kept set without touching the input.

Everything here takes scores as `generate` hands them over: raw logits in sampling modes, log-probabilities in beam
modes, with `-inf` where an earlier processor has removed a token. Only differences between scores of a row matter.
"""

import math
from numbers import Integral, Real

import torch
from torch import Tensor

# A weight below e^-80 of the largest counts as zero: in float32 its entropy could not be told from rounding.
NEGLIGIBLE = -80.0
# Stands for -inf inside: 0 times it is 0, where 0 times -inf would be NaN, and the order of the tokens stays.
MASKED = -1e30
BLOCK = 32


def captured(scores: Tensor) -> bool:
    """Whether the call is being compiled or recorded in a CUDA graph, where no branch may depend on values."""
    return torch.compiler.is_compiling() or (scores.is_cuda and torch.cuda.is_current_stream_capturing())


def row_maxima(scores: Tensor) -> Tensor:
    """Largest score of each row, `[batch, 1]`. `ValueError` for NaN, `+inf`, rows of `-inf` only and other shapes."""
    if scores.dim() != 2:
        raise ValueError(f"scores have the shape {tuple(scores.shape)} but must be [batch, vocab].")
    largest = scores.amax(dim=-1, keepdim=True)
    # One number says that all are finite; float64 so that large ones do not add up to infinity.
    if not captured(scores) and not math.isfinite(largest.sum(dtype=torch.float64)):
        row = int((~torch.isfinite(largest)).nonzero()[0, 0])
        value = float(largest[row, 0])
        why = "every token is masked with -inf" if value == -math.inf else f"the largest score is {value}"
        raise ValueError(
            f"scores[{row}] cannot be sampled from: {why}. Look at the model's logits and at earlier processors."
        )
    return largest


def shifted(scores: Tensor, largest: Tensor, temperature: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """(scores - largest) / temperature, at most 0 and at least `MASKED`, in `dtype`. A new tensor."""
    logits = scores.to(dtype) - largest.to(dtype)
    return (logits if temperature == 1.0 else logits.div_(temperature)).clamp_(min=MASKED)


def largest_first(logits: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The `size` largest of each row `[batch, vocab]`, falling, and their tokens; among equal ones any.

    The k largest lie in the k blocks with the largest maxima: a search among block maxima and one inside these blocks
    take a fraction of the time of one search over the vocabulary.
    """
    batch, vocab = logits.shape
    if size >= vocab:
        return logits.sort(dim=-1, descending=True)
    if 2 * size * BLOCK > vocab:
        return logits.topk(size)
    blocks = vocab // BLOCK
    body, tail = logits[:, : blocks * BLOCK].view(batch, blocks, BLOCK), logits[:, blocks * BLOCK :]
    chosen = body.amax(dim=-1).topk(size, sorted=False).indices[:, :, None]
    values = body.gather(1, chosen.expand(-1, -1, BLOCK)).flatten(1)
    tokens = (chosen * BLOCK + torch.arange(BLOCK, device=logits.device)).flatten(1)
    if tail.shape[1]:
        rest = torch.arange(blocks * BLOCK, vocab, device=logits.device)
        values, tokens = torch.cat([values, tail], dim=1), torch.cat([tokens, rest.expand(batch, -1)], dim=1)
    top, place = values.topk(size)
    return top, tokens.gather(1, place)


def keep_first(
    scores: Tensor, logits: Tensor, top: Tensor, order: Tensor, count: Tensor, filter_value: float
) -> Tensor:
    """`scores` with all but the first `count[row]` tokens of `order` at `filter_value`. Ties go to the lower token id.

    Args:
        scores: `[batch, vocab]`, left as they are.
        logits: `[batch, vocab]`, what was sorted.
        top, order: `[batch, k]`, the k largest `logits`, falling, and their tokens.
        count: `[batch]`, at least 1; where it is k or more, ties beyond the k-th are not looked at.
    """
    kept = torch.arange(order.shape[1], device=order.device) < count[:, None]
    values = torch.where(kept, scores.gather(1, order), filter_value)
    out = torch.full_like(scores, filter_value, memory_format=torch.contiguous_format).scatter_(1, order, values)
    if order.shape[1] < 2:
        return out
    # The order of equal scores is arbitrary; it matters only where the cut goes through them.
    cut = count[:, None] - 1
    tied = (top[:, 1:] == top[:, :-1]).gather(1, cut.clamp(max=order.shape[1] - 2))
    if captured(scores):
        last = top.gather(1, cut.clamp(max=order.shape[1] - 1))
        return torch.where(tied, _cut_ties(scores, logits, last, count, filter_value), out)
    if tied.any():
        rows = tied.nonzero()[:, 0]
        last = top[rows].gather(1, cut[rows].clamp(max=order.shape[1] - 1))
        out[rows] = _cut_ties(scores[rows], logits[rows], last, count[rows], filter_value)
    return out


def _cut_ties(scores: Tensor, logits: Tensor, last: Tensor, count: Tensor, filter_value: float) -> Tensor:
    above, equal = logits > last, logits == last
    room = count[:, None] - above.sum(dim=-1, keepdim=True)
    return scores.masked_fill(~(above | (equal & (equal.cumsum(dim=-1) <= room))), filter_value)


def check_positive_int(owner: str, name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{owner}: {name} is {value!r} but must be an integer >= 1.")
    if value < 1:
        raise ValueError(f"{owner}: {name} is {value} but must be an integer >= 1.")
    return int(value)


def check_number(owner: str, name: str, value: object, low: float, high: float, closed: str = "") -> float:
    """A float in an interval; `closed` holds `[` and `]` for the ends that belong to it."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{owner}: {name} is {value!r} but must be a number.")
    left, right = "[" if "[" in closed else "(", "]" if "]" in closed else ")"
    above = value >= low if left == "[" else value > low
    below = value <= high if right == "]" else value < high
    if not (above and below):
        raise ValueError(f"{owner}: {name} is {value} but must be in {left}{low:g}, {high:g}{right}.")
    return float(value)
