"""MUSE: six ways to look at an unlearned model, three for the owner of the data and three for its deployer.

    VerbMem         mean ROUGE-L F1 of a forget text's true continuation and the greedy one (128 tokens)
    KnowMem         mean ROUGE-L F1 of short answers to questions; on the forget set low, on the retain set the utility
    PrivLeak        100 (AUC - AUC_gold) / AUC_gold,   AUC = P(Min-40 % of a forget text > of a held-out text)
    utility         KnowMem on the retain set
    scalability     utility over the size of the forget set
    sustainability  utility over successive requests

AUC is near 0 for a model that remembers and AUC_gold, of a retrained one, near 1/2: PrivLeak is -100 where membership
is plain, towards +100 where forgotten texts look stranger than unseen ones, and good near 0. The stemmer is off.

MUSE: Machine Unlearning Six-Way Evaluation for Language Models, arXiv 2407.06460.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from ..registry import Method, Result
from ._form import Form
from ._generate import generate_answers, generate_ids
from ._membership import Ragged, auc
from ._rouge import check_pairs, rouge_l
from .min_k import min_k

logger = logging.get_logger(__name__)

STOPS = ("\n\n", "\nQuestion", "Question:")


def cut_answer(answer: str, stops: Sequence[str] = STOPS) -> str:
    """The answer before the first of the stops, without outer blanks: a model goes on with a question of its own."""
    return answer[: min([len(answer), *(i for stop in stops if (i := answer.find(stop)) >= 0)])].strip()


def few_shot_prompt(question: str, examples: Sequence[tuple[str, str]] = ()) -> str:
    """`Question: ...\\nAnswer:` behind answered examples."""
    shots = [f"Question: {q}\nAnswer: {a}\n\n" for q, a in examples]
    return "".join(shots) + f"Question: {question}\nAnswer:"


def text_f1(predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """[rows]: ROUGE-L F1 without the stemmer."""
    check_pairs(predictions, references)
    return np.array([rouge_l(a, b).f1 for a, b in zip(predictions, references, strict=True)])


def verbmem(
    model: PreTrainedModel,
    tokenizer: Any,
    texts: Sequence[str],
    prompt_tokens: int = 512,
    max_new_tokens: int = 128,
    batch_size: int = 8,
) -> dict[str, Any]:
    """`{"verbmem", "scores", "answers"}`: the texts' first tokens are the prompt, those that follow the truth."""
    if prompt_tokens < 1:
        raise ValueError(f"prompt_tokens is {prompt_tokens} but must be >= 1.")
    ids = [tokenizer(text)["input_ids"] for text in texts]
    short = next((i for i, row in enumerate(ids) if len(row) <= prompt_tokens), None)
    if short is not None:
        raise ValueError(
            f"Text {short} has {len(ids[short])} tokens but must have more than the {prompt_tokens} asked."
        )
    prompts = [row[:prompt_tokens] for row in ids]
    truths = [row[prompt_tokens : prompt_tokens + max_new_tokens] for row in ids]
    new = generate_ids(model, prompts, max_new_tokens, batch_size)
    found, expected = ([tokenizer.decode(row, skip_special_tokens=True) for row in rows] for rows in (new, truths))
    scores = text_f1(found, expected)
    return {"verbmem": float(scores.mean()), "scores": scores.tolist(), "answers": found}


def knowmem(
    answer: PreTrainedModel | Callable[[list[str]], Sequence[str]],
    tokenizer: Any,
    questions: Sequence[str],
    truths: Sequence[str],
    examples: Sequence[tuple[str, str]] = (),
    max_new_tokens: int = 32,
    batch_size: int = 8,
    stops: Sequence[str] = STOPS,
) -> dict[str, Any]:
    """`{"knowmem", "scores", "answers"}` of questions behind answered examples.

    Args:
        answer (`PreTrainedModel`, or a callable): The model, or a function from prompts to texts that needs no
            tokenizer (`None`), as of a server.
        examples: Pairs of question and answer that stand before every question.
        stops: Where an answer is cut.
    """
    prompts = [few_shot_prompt(question, examples) for question in questions]
    if isinstance(answer, torch.nn.Module):
        raw = generate_answers(answer, tokenizer, prompts, max_new_tokens, batch_size)
    else:
        raw = list(answer(prompts))
    found = [cut_answer(text, stops) for text in raw]
    scores = text_f1(found, truths)
    return {"knowmem": float(scores.mean()), "scores": scores.tolist(), "answers": found}


def forget_auc(forget: Ragged, holdout: Ragged, k: float = 0.4) -> float:
    """P(Min-K % of a forget text > of a held-out one), from token log-probabilities; near 0 for a model that knows."""
    return auc(min_k(holdout, k), min_k(forget, k))


def privleak(auc_unlearned: float, auc_gold: float) -> float:
    """100 (AUC - AUC_gold) / AUC_gold; NaN, with a warning, for AUC_gold = 0."""
    for name, value in (("auc_unlearned", auc_unlearned), ("auc_gold", auc_gold)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is {value} but must be in [0, 1].")
    if auc_gold == 0:
        logger.warning("PrivLeak is not defined for a retrained model of AUC 0: it is NaN.")
        return math.nan
    return 100 * (auc_unlearned - auc_gold) / auc_gold


def scalability(sizes: Sequence[float], utilities: Sequence[float], base: float) -> dict[str, Any]:
    """Utility over nested forget sets of growing size, each unlearned from the same model of utility `base`.

    `{"retained": share of base at each size, "worst": the least, "slope": change of the share each time the size
    doubles (least squares)}`.
    """
    x = np.asarray(sizes, dtype=np.float64)
    if len(x) != len(utilities) or not (x > 0).all() or not (np.diff(x) > 0).all():
        raise ValueError(
            f"sizes are {list(sizes)} but must grow, be > 0 and as many as the {len(utilities)} utilities."
        )
    return _retained(np.log2(x), utilities, base)


def sustainability(utilities: Sequence[float], base: float) -> dict[str, Any]:
    """Utility after each of successive requests, each unlearned from the result of the one before.

    As [`scalability`], with the slope for each request.
    """
    return _retained(np.arange(1, len(utilities) + 1, dtype=np.float64), utilities, base)


def _retained(x: np.ndarray, utilities: Sequence[float], base: float) -> dict[str, Any]:
    if not base > 0 or not len(utilities):
        raise ValueError(
            f"base is {base} and there are {len(utilities)} utilities: base must be > 0, and >= 1 of them."
        )
    share = np.asarray(utilities, dtype=np.float64) / base
    gap = x - x.mean()
    slope = float(gap @ share / (gap @ gap)) if len(x) > 1 else 0.0
    return {"retained": share.tolist(), "worst": float(share.min()), "slope": slope}


def _compute_text(predictions: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
    scores = text_f1(predictions, references)
    return {"verbmem": float(scores.mean()), "scores": scores.tolist()}


def _compute_knowledge(
    predictions: Sequence[str], references: Sequence[str], stops: Sequence[str] = STOPS
) -> dict[str, Any]:
    scores = text_f1([cut_answer(text, stops) for text in predictions], references)
    return {"knowmem": float(scores.mean()), "scores": scores.tolist()}


def _compute_leak(predictions: Sequence[float], references: Sequence[int], auc_gold: float = 0.5) -> dict[str, float]:
    scores, forget = torch.as_tensor(predictions), torch.as_tensor(references)
    if not ((forget == 0) | (forget == 1)).all():
        raise ValueError("references must be 1 for forget texts and 0 for held-out ones.")
    value = auc(scores[forget == 0], scores[forget == 1])
    return {"privleak": privleak(value, auc_gold), "auc": value}


def scores_of(log_probs: Ragged) -> Tensor:
    """[rows]: Min-40 %, what PrivLeak is made from."""
    return min_k(log_probs, 0.4)


_TEXTS = {"predictions": "string", "references": "string"}
FORMS = {
    "verbmem": Form(_compute_text, _TEXTS, "predictions: continuations; references: the true ones."),
    "knowmem": Form(_compute_knowledge, _TEXTS, "predictions: answers, cut at the stops; references: true answers."),
    "privleak": Form(
        _compute_leak,
        {"predictions": "float64", "references": "int64"},
        "predictions: Min-40 % of each text; references: 1 for forget, 0 for held out; auc_gold: the retrained AUC.",
    ),
}

METHOD = Method(
    name="muse",
    family="metrics",
    title="MUSE: Machine Unlearning Six-Way Evaluation for Language Models",
    authors="Shi et al.",
    arxiv="2407.06460",
    year=2024,
    repo="jaechan-repo/muse_bench",
    status="variant",
    difference="Slopes of scalability and sustainability are ours, the paper plots the curves. Min-K % of a text too "
    "short for the share takes its lowest token.",
    target="hfext.metrics.muse:privleak",
    usage="hfext.metrics.muse.privleak(hfext.metrics.muse.forget_auc(forget, holdout), auc_gold)",
    summary="Verbatim and knowledge memorisation, privacy leakage, and utility over sizes and requests.",
    claim="A retrained model has a PrivLeak of 0, a model that remembers the forget set one near -100.",
    headline=Result(
        metric="PrivLeak",
        setting="News, Llama-2-7B fine-tuned on everything",
        value="-99.8",
        baseline="0 (retrained)",
    ),
    notes="verbmem and knowmem generate; privleak needs the AUC of a retrained model. No recipe: the six need models "
    "that were trained, unlearned and retrained.",
)
