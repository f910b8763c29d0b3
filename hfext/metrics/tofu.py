"""TOFU's measures: does the model still know the forget set, would a retrained one say the same, is the rest intact?

L(a) is the mean negative log-likelihood of a token of answer a. For a question with its answer, a paraphrase of it and
wrong answers b:

    probability        exp(-L(answer)); with wrong answers (real authors, world facts) its share in the sum over all
    ROUGE              ROUGE-L recall of the greedy answer, words stemmed
    truth ratio        R = P_wrong / P_paraphrase,  P_paraphrase = exp(-L(paraphrase)),
                       P_wrong = mean_b exp(-L(b)) ("arithmetic") or exp(-mean_b L(b)) ("geometric")
    truth-ratio score  mean of min(R, 1/R) on the forget set, of max(0, 1 - R) elsewhere
    forget quality     p of the two-sided Kolmogorov-Smirnov test between R of the model and of a retrained one
    model utility      harmonic mean of probability, ROUGE, truth-ratio score on retain, real authors, world facts

The authors compute the forget quality with the geometric R and the utility with the arithmetic one; both are the
defaults here. Never read forget quality without utility: a ruined model can have a good one. In float64.

TOFU: A Task of Fictitious Unlearning for LLMs, arXiv 2401.06121.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from transformers.utils import logging

from .._fields import one_of
from ..registry import Method, Result
from ._form import Form
from ._rouge import check_pairs, rouge_l

logger = logging.get_logger(__name__)

Aggregation = Literal["arithmetic", "geometric"]
# Names in the authors' logs.
FORGET, RETAIN = "eval_log_forget.json", "eval_log.json"
AUTHORS, WORLD = "eval_real_author_wo_options.json", "eval_real_world_wo_options.json"


def _losses(name: str, values: Sequence[float]) -> np.ndarray:
    found = np.asarray(values, dtype=np.float64)
    if found.ndim != 1 or not len(found) or np.isnan(found).any():
        raise ValueError(f"{name} has the shape {list(found.shape)} but must be [rows >= 1], without NaN.")
    return found


def _wrong(name: str, values: Sequence[Sequence[float]], rows: int) -> list[np.ndarray]:
    found = [_losses(f"{name}[{i}]", row) for i, row in enumerate(values)]
    if len(found) != rows:
        raise ValueError(f"{name} has {len(found)} rows but must have {rows}.")
    return found


def _gaps(right: np.ndarray, wrong: list[np.ndarray]) -> list[np.ndarray]:
    """L - L_b of each row; an infinite L_b is a probability of 0, whatever L is."""
    for i, (r, w) in enumerate(zip(right, wrong, strict=True)):
        if math.isinf(r) and np.isinf(w).all():
            raise ValueError(f"Row {i} has infinite losses on both sides, 0 / 0: score it in a higher precision.")
    with np.errstate(invalid="ignore"):
        return [np.where(np.isposinf(w), -np.inf, r - w) for r, w in zip(right, wrong, strict=True)]


def probability(losses: Sequence[float], wrong: Sequence[Sequence[float]] | None = None) -> np.ndarray:
    """[rows]: exp(-L) of each answer, or its share among itself and the wrong answers.

    Args:
        losses: Mean loss of a token of each answer, `-log_p.mean()` of each row of `score_rows`.
        wrong: The same of the wrong answers of each row.
    """
    right = _losses("losses", losses)
    if wrong is None:
        return np.exp(-right)
    # As 1 / (1 + sum exp(L - L_b)): a share is defined where all probabilities underflow.
    with np.errstate(over="ignore"):
        return np.array([1 / (1 + np.exp(gaps).sum()) for gaps in _gaps(right, _wrong("wrong", wrong, len(right)))])


def truth_ratio(paraphrase: Sequence[float], wrong: Sequence[Sequence[float]], wrong_agg: Aggregation) -> np.ndarray:
    """[rows]: R, from the mean loss of a token of the paraphrases [rows] and of the wrong answers [rows][wrong]."""
    one_of("wrong_agg", wrong_agg, ("arithmetic", "geometric"))
    right = _losses("paraphrase", paraphrase)
    other = _wrong("wrong", wrong, len(right))
    if wrong_agg == "geometric":
        other = [w.mean(keepdims=True) for w in other]
    with np.errstate(over="ignore"):
        return np.array([np.exp(gaps).mean() for gaps in _gaps(right, other)])


def truth_ratio_score(ratios: Sequence[float], forget: bool = False) -> float:
    """mean min(R, 1/R) of a forget set: 1 where right and wrong are alike. Elsewhere mean max(0, 1 - R)."""
    r = _losses("ratios", ratios)
    with np.errstate(divide="ignore"):
        return float(np.minimum(r, 1 / r).mean() if forget else np.maximum(0, 1 - r).mean())


def forget_quality(ratios: Sequence[float], gold: Sequence[float]) -> dict[str, float]:
    """`{"forget_quality": p, "log10_forget_quality", "ks_statistic"}` of R of the model and of the retrained one.

    The same for R and 1/R. p is exact up to 10,000 rows; its logarithm is so where p itself underflows.
    """
    from scipy.stats import ks_2samp

    a, b = _losses("ratios", ratios), _losses("gold", gold)
    found = ks_2samp(a, b, alternative="two-sided", method="auto")
    p = min(1.0, float(found.pvalue))
    log10 = math.log10(p) if p > 1e-280 else _log10_p(a, b)
    return {"forget_quality": p, "log10_forget_quality": log10, "ks_statistic": float(found.statistic)}


def _log10_p(a: np.ndarray, b: np.ndarray) -> float:
    """Exact, in integers: of all orders of the n + m values, the share whose path leaves the band of the statistic."""
    n, m = len(a), len(b)
    a, b, both = np.sort(a), np.sort(b), np.concatenate([a, b])
    steps = np.searchsorted(a, both, "right") * m - np.searchsorted(b, both, "right") * n
    gap = int(np.abs(steps).max())
    inside = [int(j * n < gap) for j in range(m + 1)]
    for i in range(1, n + 1):
        inside[0] = inside[0] if i * m < gap else 0
        for j in range(1, m + 1):
            inside[j] = inside[j] + inside[j - 1] if abs(i * m - j * n) < gap else 0
    paths = math.comb(n + m, n)
    return math.log10(paths - inside[m]) - math.log10(paths)


def harmonic_mean(values: Sequence[float]) -> float:
    """0 where any value is 0."""
    found = [float(v) for v in values]
    if not found or any(not v >= 0 for v in found):
        raise ValueError(f"The values are {found} but all must be >= 0.")
    return len(found) / sum(1 / v for v in found) if all(found) else 0.0


PARTS = ("probability", "rouge", "truth_ratio_score")


def _harmonic(part: Mapping[str, float], where: str) -> list[float]:
    missing = [name for name in PARTS if name not in part]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}: utility needs all of {', '.join(PARTS)}.")
    return [part[name] for name in PARTS]


def model_utility(
    retain: Mapping[str, float], real_authors: Mapping[str, float], world_facts: Mapping[str, float]
) -> float:
    """Harmonic mean of nine; each part is `{"probability", "rouge", "truth_ratio_score"}`."""
    parts = {"retain": retain, "real_authors": real_authors, "world_facts": world_facts}
    return harmonic_mean([v for name, part in parts.items() for v in _harmonic(part, name)])


def retain_utility(retain: Mapping[str, float]) -> float:
    """Harmonic mean of the three numbers of the retain set, for models without knowledge of the world."""
    return harmonic_mean(_harmonic(retain, "retain"))


def part(
    losses: Sequence[float],
    paraphrase: Sequence[float],
    wrong: Sequence[Sequence[float]],
    rouge: Sequence[float],
    wrong_agg: Aggregation = "arithmetic",
    share: bool = False,
    forget: bool = False,
) -> dict[str, float]:
    """The three numbers of one set. `share`: probability among the wrong answers; `forget`: the other score of R."""
    return {
        "probability": float(probability(losses, wrong if share else None).mean()),
        "rouge": float(_losses("rouge", rouge).mean()),
        "truth_ratio_score": truth_ratio_score(truth_ratio(paraphrase, wrong, wrong_agg), forget),
    }


def part_from_log(log: Mapping[str, Mapping], name: str, wrong_agg: Aggregation) -> dict[str, float]:
    """[`part`] of one file of the authors' evaluation log, `log[name]`."""
    if name not in log:
        raise ValueError(f"The log has no {name!r}; it has {', '.join(log)}.")
    names = ("avg_gt_loss", "avg_paraphrased_loss", "average_perturb_loss", "rougeL_recall")
    columns = [_column(log[name], field) for field in names]
    return part(*columns, wrong_agg=wrong_agg, share=name in (AUTHORS, WORLD), forget=name == FORGET)


def _column(log: Mapping[str, Mapping[str, Any]], field: str) -> list:
    if field not in log:
        raise ValueError(f"The log has no {field!r}; it has {', '.join(log)}.")
    return [log[field][key] for key in sorted(log[field], key=int)]


def utility_from_log(log: Mapping[str, Mapping], wrong_agg: Aggregation = "arithmetic") -> dict[str, float]:
    """`model_utility` and its nine numbers from the authors' aggregated log, a JSON of four files."""
    parts = {
        where: part_from_log(log, name, wrong_agg)
        for where, name in (("retain", RETAIN), ("real_authors", AUTHORS), ("world_facts", WORLD))
    }
    nine = {f"{where}_{name}": value for where, one in parts.items() for name, value in one.items()}
    return {"model_utility": model_utility(**parts), **nine}


def forget_quality_from_logs(
    log: Mapping[str, Mapping], gold: Mapping[str, Mapping], wrong_agg: Aggregation = "geometric"
) -> dict[str, float]:
    """[`forget_quality`] of two of the authors' logs, all rows of each; logs of different rows are warned about."""
    ratios = []
    for one in (log, gold):
        if FORGET not in one:
            raise ValueError(f"The log has no {FORGET!r}; it has {', '.join(one)}.")
        columns = (_column(one[FORGET], field) for field in ("avg_paraphrased_loss", "average_perturb_loss"))
        ratios.append(truth_ratio(*columns, wrong_agg))
    if len(ratios[0]) != len(ratios[1]):
        logger.warning(
            f"The logs have {len(ratios[0])} and {len(ratios[1])} rows of the forget set: they were made on different "
            "questions, and their distributions differ for that reason too."
        )
    return forget_quality(*ratios)


def rouge_recall(predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """[rows]: ROUGE-L recall of greedy answers, words stemmed."""
    check_pairs(predictions, references)
    return np.array([rouge_l(a, b, stemmer=True).recall for a, b in zip(predictions, references, strict=True)])


def _compute_ratio(
    predictions: Sequence[float],
    references: Sequence[Sequence[float]],
    wrong_agg: Aggregation = "arithmetic",
    forget: bool = False,
) -> dict[str, Any]:
    ratios = truth_ratio(predictions, references, wrong_agg)
    score = truth_ratio_score(ratios, forget)
    return {"truth_ratio_score": score, "truth_ratios": ratios.tolist(), "wrong_agg": wrong_agg}


def _compute_quality(predictions: Sequence[float], references: Sequence[float]) -> dict[str, float]:
    return forget_quality(predictions, references)


def _compute_rouge(predictions: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
    scores = rouge_recall(predictions, references)
    return {"rouge_recall": float(scores.mean()), "scores": scores.tolist()}


FORMS = {
    "truth_ratio": Form(
        _compute_ratio,
        {"predictions": "float64", "references": ["float64"]},
        "predictions: mean token loss of each paraphrase; references: of each row's wrong answers.",
    ),
    "forget_quality": Form(
        _compute_quality,
        {"predictions": "float64", "references": "float64"},
        "predictions: truth ratios of the unlearned model; references: of the retrained one.",
    ),
    "rouge_recall": Form(
        _compute_rouge, {"predictions": "string", "references": "string"}, "predictions: answers; references: truths."
    ),
}

METHOD = Method(
    name="tofu",
    family="metrics",
    title="TOFU: A Task of Fictitious Unlearning for LLMs",
    authors="Maini et al.",
    arxiv="2401.06121",
    year=2024,
    repo="locuslab/tofu",
    status="faithful",
    target="hfext.metrics.tofu:forget_quality",
    usage="hfext.metrics.tofu.forget_quality(ratios, gold_ratios)",
    summary="Forget quality against a retrained model, and utility on what was to be kept.",
    claim="Forget quality and utility of the published Llama-2-7B logs come out to all digits.",
    headline=Result(
        metric="model utility",
        setting="the authors' log of Llama-2-7B fine-tuned on all of TOFU",
        value="0.5859 (arithmetic truth ratio); 0.6227 with the geometric one of a later toolkit",
    ),
    notes="The aggregation of wrong answers changes utility by 0.04: say which. No recipe: the published logs are the "
    "check, in the tests.",
)
