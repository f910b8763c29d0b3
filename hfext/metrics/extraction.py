"""Memorisation: how much of a text comes back, with the truth before every token or from a prefix alone.

With n scored tokens y, and c_t = 1 where the likeliest token is y_t (teacher forcing):

    memorisation accuracy   MA = mean c_t, of all tokens behind the first
    exact memorisation      mean c_t, of the answer's tokens (prompts are not scored)
    extraction strength     1 - k / n for the least k with c_t = 1 for all t > k; 0 where the last token is wrong
    extraction likelihood   EL_n = 1/(T - n) sum_{t=1}^{T-n} overlap_n(greedy(x_1..x_t), x_t+1..x_T)
    overlap_n(g, y)         n-grams of g, as often as they stand there, that occur in y, over the n-grams of y

A greedy continuation has at most T - t tokens and stops at the end of sequence; one shorter than n gives 0. A text
counts as forgotten when EL_10 and MA are at most their means on unseen text. `include_eos=False` leaves out the last
scored token of each row.

Knowledge Unlearning for Mitigating Privacy Risks in Language Models, arXiv 2210.01504.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..registry import Method, Result
from ._form import Form
from ._generate import generate_ids
from ._token_scores import TokenScores

Flags = Sequence[Tensor | Sequence[bool]]


def _correct(rows: TokenScores | Flags, include_eos: bool) -> list[Tensor]:
    found = [torch.as_tensor(x).double() for x in (rows.correct if isinstance(rows, TokenScores) else rows)]
    found = found if include_eos else [row[:-1] for row in found]
    empty = next((i for i, row in enumerate(found) if not len(row)), None)
    if empty is not None or not found:
        raise ValueError(
            f"{'Row ' + str(empty) if found else 'scores'} has no scored token (include_eos={include_eos})."
        )
    return found


def exact_memorization(scores: TokenScores | Flags, include_eos: bool = True) -> Tensor:
    """[rows], float64: share of scored tokens that are the likeliest one; `score_rows(model, rows)`, or its `correct`.

    Rows without a prompt (`labels = input_ids`) give the memorisation accuracy MA.
    """
    return torch.stack([row.mean() for row in _correct(scores, include_eos)])


def memorization_accuracy(scores: TokenScores | Flags) -> Tensor:
    """[rows], float64: MA, of rows whose labels are all their tokens."""
    return exact_memorization(scores)


def extraction_strength(scores: TokenScores | Flags, include_eos: bool = True) -> Tensor:
    """[rows], float64: share of the answer, from its end, that follows from the rest without an error."""
    rows = _correct(scores, include_eos)
    return torch.stack([row.flip(0).cumprod(0).mean() for row in rows])


def overlap(generated: Sequence[int], true: Sequence[int], n: int) -> float:
    """overlap_n; 0 where either has no n-gram."""
    grams = [Counter(tuple(x[i : i + n]) for i in range(len(x) - n + 1)) for x in (list(generated), list(true))]
    total = sum(grams[1].values())
    return sum(count for gram, count in grams[0].items() if gram in grams[1]) / total if total else 0.0


def extraction_likelihood(
    model: PreTrainedModel, rows: Sequence[Sequence[int]], n: int = 10, batch_size: int = 8
) -> Tensor:
    """[rows], float64: EL_n of tokenised texts of more than n tokens.

    Every prefix of every text is continued, T - n generations each: texts of a few hundred tokens take long.
    """
    if n < 1:
        raise ValueError(f"n is {n} but must be >= 1.")
    rows = [list(map(int, row)) for row in rows]
    short = next((i for i, row in enumerate(rows) if len(row) <= n), None)
    if short is not None or not rows:
        raise ValueError(f"Every text needs more than n = {n} tokens; text {short} is shorter, or there is none.")
    cuts = [(i, t) for i, row in enumerate(rows) for t in range(1, len(row) - n + 1)]
    # The end of sequence may be part of a text: it is compared like any other token.
    new = generate_ids(
        model, [rows[i][:t] for i, t in cuts], [len(rows[i]) - t for i, t in cuts], batch_size, keep_end=True
    )
    found = torch.zeros(len(rows), dtype=torch.float64)
    for (i, t), ids in zip(cuts, new, strict=True):
        found[i] += overlap(ids, rows[i][t:], n) / (len(rows[i]) - n)
    return found


def compute(
    predictions: Sequence[Sequence[int]], references: Sequence[Sequence[int]], include_eos: bool = True
) -> dict[str, Any]:
    """`{"exact_memorization", "extraction_strength"}`, means, from the likeliest token at each place and the label."""
    if len(predictions) != len(references) or any(map(lambda a, b: len(a) != len(b), predictions, references)):
        raise ValueError("predictions and references must have the same rows of the same lengths.")
    correct = [torch.as_tensor(a) == torch.as_tensor(b) for a, b in zip(predictions, references, strict=True)]
    return {
        "exact_memorization": exact_memorization(correct, include_eos).mean().item(),
        "extraction_strength": extraction_strength(correct, include_eos).mean().item(),
    }


FORMS = {
    "extraction": Form(
        compute,
        {"predictions": ["int64"], "references": ["int64"]},
        "predictions: the likeliest token at each scored place of each row; references: the labels there.",
    )
}

METHOD = Method(
    name="extraction",
    family="metrics",
    title="Knowledge Unlearning for Mitigating Privacy Risks in Language Models",
    authors="Jang et al.",
    arxiv="2210.01504",
    year=2022,
    repo="joeljang/knowledge-unlearning",
    status="faithful",
    target="hfext.metrics.extraction:extraction_likelihood",
    usage="hfext.metrics.extraction.extraction_likelihood(model, token_ids, n=10)",
    summary="Memorisation accuracy, extraction likelihood, exact memorisation and extraction strength.",
    claim="A text that a model has learnt by heart has MA and EL_10 near 1, and one it never saw near 0.",
    headline=Result(
        metric="EL_10 and MA",
        setting="GPT-Neo after unlearning",
        value="below their means on unseen text (figures not re-checked)",
    ),
    notes="Exact memorisation and extraction strength are of later papers and stand here beside MA. The end of "
    "sequence counts unless include_eos=False. No recipe: checked in the tests on a model that learnt texts by heart.",
)
