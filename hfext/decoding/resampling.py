"""How many samples are worth drawing when the verifier that accepts them errs: the exact expected utility.

Tasks are of types i with prior pi_i; a sample is right with probability r_i. The verifier accepts a right answer with
probability c (completeness) and rejects a wrong one with probability s (soundness). Draw until one is accepted, or
abstain after K attempts:

    a_i = c r_i                 an attempt ends with a right answer
    f_i = (1 - s)(1 - r_i)      an attempt ends with a wrong answer
    b_i = 1 - a_i - f_i         the sample is rejected
    U(K) = sum_i pi_i (V_c a_i + V_f f_i - C) (1 - b_i^K) / (1 - b_i)

K* maximises U over K >= 0, where U(0) = 0 is to abstain from the start: the answer when no K >= 1 has U > 0. Both the
worth of an attempt and b_i are linear in r_i, so U(K) - U(K - 1) changes its sign at most once, for any number of
types. When U rises for ever, K* is infinite and U its limit. However large K is, the accuracy of accepted answers of a
type stays a_i / (a_i + f_i): more samples cannot mend a verifier.

Inference Scaling fLaws: The Limits of LLM Resampling with Imperfect Verifiers, arXiv 2411.17501. The authors' notebook
multiplies a posterior mean of the value by a posterior survival, which counts the update of beliefs twice; the formula
above is the plain expectation.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..registry import Method, Result

_LARGEST_CURVE = 20_000_000


@dataclass(frozen=True, kw_only=True)
class OptimalSamples:
    """The best number of attempts and what it gives.

    Args:
        num_samples (`int` or `float`): K*; 0 is to abstain, `math.inf` to go on until something is accepted.
        utility (`float`): U(K*).
        accuracy (`float` or `None`): Share of right answers among the accepted; `None` where none is given.
        accepted (`float`): Probability that an answer is given.
        attempts (`float`): Expected number of attempts.
    """

    num_samples: int | float
    utility: float
    accuracy: float | None
    accepted: float
    attempts: float


@dataclass(frozen=True)
class _Rates:
    """Arrays [types]: prior, right accept a, wrong accept f, worth of an attempt V_c a + V_f f - C."""

    prior: np.ndarray
    right: np.ndarray
    wrong: np.ndarray
    worth: np.ndarray

    @property
    def log_reject(self) -> np.ndarray:
        # 1 - a - f loses all digits where b is near 1; log1p of the exact sum does not.
        with np.errstate(divide="ignore"):
            return np.log1p(-np.minimum(self.right + self.wrong, 1.0))

    def attempts(self, k: np.ndarray) -> np.ndarray:
        """[k, types]: (1 - b^k) / (1 - b), the expected attempts among the first k; k may be inf."""
        with np.errstate(invalid="ignore"):
            exponent = np.where(k[:, None] == 0, 0.0, k[:, None] * self.log_reject)
        return -np.expm1(exponent) / (self.right + self.wrong)

    def marginal_sign(self, k: float) -> float:
        """Sign of U(k) - U(k - 1), from terms scaled by the largest b so that they do not underflow; k may be inf."""
        weight, log_b = (self.prior * self.worth)[self.worth != 0], self.log_reject[self.worth != 0]
        # Where every sample is accepted, there is no second one.
        if not len(weight) or (k > 1 and log_b.max() == -math.inf):
            return 0.0
        with np.errstate(invalid="ignore"):
            scale = np.where(log_b == log_b.max(), 0.0, (k - 1) * (log_b - log_b.max())) if k > 1 else 0 * weight
        return float(np.sign((np.exp(scale) * weight).sum()))


def _rates(priors, successes, completeness, soundness, value_correct, value_wrong, cost) -> _Rates:
    prior, r = (np.atleast_1d(np.asarray(x, dtype=np.float64)) for x in (priors, successes))
    if prior.ndim != 1 or prior.shape != r.shape:
        raise ValueError(f"priors and successes must be lists of one length, not of shapes {prior.shape}, {r.shape}.")
    for name, values in (
        ("priors", prior),
        ("successes", r),
        ("completeness", np.atleast_1d(completeness)),
        ("soundness", np.atleast_1d(soundness)),
    ):
        bad = [float(v) for v in values if not 0 <= v <= 1]
        if bad:
            raise ValueError(f"{name} has the probability {bad[0]}, but it must be in [0, 1].")
    if abs(prior.sum() - 1) > 1e-9:
        raise ValueError(f"priors sum to {prior.sum():.12g} but must sum to 1.")
    for name, value in (("value_correct", value_correct), ("value_wrong", value_wrong), ("cost", cost)):
        if not math.isfinite(value):
            raise ValueError(f"{name} is {value} but must be finite.")
    if cost < 0:
        raise ValueError(f"cost is {cost} but must be >= 0.")
    prior, r = prior[prior > 0], r[prior > 0]
    right, wrong = completeness * r, (1 - soundness) * (1 - r)
    if (right + wrong == 0).any():
        never = float(r[right + wrong == 0][0])
        raise ValueError(
            f"A type with success {never:g} is never accepted at completeness {completeness:g} and soundness "
            f"{soundness:g}: it uses up every budget and has no accuracy. Leave it out and account for it apart."
        )
    return _Rates(prior, right, wrong, value_correct * right + value_wrong * wrong - cost)


@dataclass(frozen=True)
class ResamplingCurve:
    """Arrays over K = 0 ... max_samples: U(K), P(right | accepted) (NaN at 0), P(accepted), expected attempts."""

    utility: np.ndarray
    accuracy: np.ndarray
    accepted: np.ndarray
    attempts: np.ndarray


def _evaluate(rates: _Rates, k: np.ndarray) -> ResamplingCurve:
    tries = rates.attempts(k)
    right, wrong = tries @ (rates.prior * rates.right), tries @ (rates.prior * rates.wrong)
    with np.errstate(invalid="ignore"):
        accuracy = right / (right + wrong)
    return ResamplingCurve(tries @ (rates.prior * rates.worth), accuracy, right + wrong, tries @ rates.prior)


def resampling_curve(
    priors: Sequence[float],
    successes: Sequence[float],
    completeness: float,
    soundness: float,
    value_correct: float = 1.0,
    value_wrong: float = -1.0,
    cost: float = 0.0,
    max_samples: int = 100,
) -> ResamplingCurve:
    """U(K) and its parts for K = 0 ... `max_samples`; the arguments are those of [`optimal_num_samples`]."""
    rates = _rates(priors, successes, completeness, soundness, value_correct, value_wrong, cost)
    return _evaluate(rates, np.arange(_checked_limit(max_samples) + 1, dtype=np.float64))


def optimal_num_samples(
    priors: Sequence[float],
    successes: Sequence[float],
    completeness: float,
    soundness: float,
    value_correct: float = 1.0,
    value_wrong: float = -1.0,
    cost: float = 0.0,
    max_samples: int | None = None,
) -> OptimalSamples:
    """The number of attempts K* with the highest expected utility; the smallest one where several are equal.

    Args:
        priors (`Sequence[float]`): Probability of each type of task; they sum to 1.
        successes (`Sequence[float]`): Probability that one sample is right, for each type.
        completeness (`float`): P(accept | right).
        soundness (`float`): P(reject | wrong).
        value_correct (`float`, *optional*, defaults to 1.0): Utility of an accepted right answer.
        value_wrong (`float`, *optional*, defaults to -1.0): Utility of an accepted wrong answer; abstaining is 0.
        cost (`float`, *optional*, defaults to 0.0): Cost of an attempt, >= 0, in the same unit.
        max_samples (`int`, *optional*): Largest K that is allowed, >= 1; none by default.

    Returns:
        [`OptimalSamples`]. Raises `ValueError` for values out of range, priors that do not sum to 1 and a type that
        is never accepted.
    """
    rates = _rates(priors, successes, completeness, soundness, value_correct, value_wrong, cost)
    last = math.inf if max_samples is None else float(_checked_limit(max_samples))
    peaks = [0.0, last] if rates.marginal_sign(last) > 0 else [0.0]
    if len(peaks) == 1 and rates.marginal_sign(1.0) > 0:
        peaks.append(_last_rise(rates, last))
    curve = _evaluate(rates, np.array(peaks))
    best = int(np.argmax(curve.utility))
    accuracy = float(curve.accuracy[best])
    return OptimalSamples(
        num_samples=peaks[best] if math.isinf(peaks[best]) else int(peaks[best]),
        utility=float(curve.utility[best]),
        accuracy=None if math.isnan(accuracy) else accuracy,
        accepted=float(curve.accepted[best]),
        attempts=float(curve.attempts[best]),
    )


def _last_rise(rates: _Rates, last: float) -> float:
    """The largest K < `last` with U(K) > U(K - 1), by bisection: the marginal value changes its sign once."""
    low, high = 1.0, 2.0
    while high < last and rates.marginal_sign(high) > 0:
        low, high = high, 2 * high
    high = min(high, last)
    while high - low > 1:
        middle = math.floor((low + high) / 2)
        low, high = (middle, high) if rates.marginal_sign(middle) > 0 else (low, middle)
    return low


def _checked_limit(max_samples: int) -> int:
    if isinstance(max_samples, bool) or not isinstance(max_samples, Integral):
        raise TypeError(f"max_samples is {max_samples!r} but must be an integer.")
    if not 1 <= max_samples <= _LARGEST_CURVE:
        raise ValueError(f"max_samples is {max_samples} but must be in [1, {_LARGEST_CURVE}].")
    return int(max_samples)


def calibrate(correct: Tensor, accepted: Tensor) -> dict[str, Any]:
    """The first four arguments of [`optimal_num_samples`] from calibration runs.

    Args:
        correct (`torch.BoolTensor` of shape `[tasks, samples]`): Which samples were right.
        accepted (`torch.BoolTensor` of shape `[tasks, samples]`): Which the verifier accepted.

    Every task becomes a type with its own share of right samples. With few samples a task these shares are spread
    wider than the true ones; `ValueError` where no sample was right, or none wrong, so that a rate is unknown.
    """
    if correct.shape != accepted.shape or correct.ndim != 2:
        raise ValueError(
            f"correct and accepted must be [tasks, samples], not {list(correct.shape)}, {list(accepted.shape)}."
        )
    correct, accepted = correct.bool(), accepted.bool()
    if not correct.any() or correct.all():
        raise ValueError("The calibration needs right and wrong samples: only then are both error rates known.")
    shares, counts = np.unique(correct.double().mean(1).numpy(), return_counts=True)
    return {
        "priors": (counts / counts.sum()).tolist(),
        "successes": shares.tolist(),
        "completeness": accepted[correct].double().mean().item(),
        "soundness": (~accepted[~correct]).double().mean().item(),
    }


@dataclass(frozen=True)
class ResampledAnswers:
    """Tokens of the accepted answers (`None` where the row abstains) and the attempts each row took."""

    sequences: list[Tensor | None]
    attempts: list[int]


class ResampleUntilAccepted:
    """Draw answers with `generate` until a verifier accepts one, at most `max_attempts` for each row.

    Args:
        model (`PreTrainedModel`): The model that answers.
        verify (`Callable[[int, torch.LongTensor], bool]`): Row and generated tokens `[length]` -> accepted.
        max_attempts (`int` or `OptimalSamples`): The limit, >= 0; 0 abstains. An unlimited optimum needs a number.
        seed (`int`, *optional*, defaults to 0): Of all attempts together; the global generators are restored.
        **generate_kwargs: For `generate`, which samples.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        verify: Callable[[int, Tensor], bool],
        max_attempts: int | OptimalSamples,
        seed: int = 0,
        **generate_kwargs: Any,
    ):
        limit = max_attempts.num_samples if isinstance(max_attempts, OptimalSamples) else max_attempts
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 0:
            raise ValueError(f"max_attempts is {limit!r} but must be an integer >= 0: give max_samples a number.")
        if not generate_kwargs.get("do_sample", True) or generate_kwargs.get("num_return_sequences", 1) != 1:
            raise ValueError("Each attempt samples one sequence: do_sample must be True, num_return_sequences 1.")
        self.model, self.verify, self.limit, self.seed = model, verify, limit, seed
        self.options = {**generate_kwargs, "do_sample": True}

    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> ResampledAnswers:
        """Answers of left-padded prompts `[rows, length]`; rows that are accepted drop out of the batch."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        answers: list[Tensor | None] = [None] * len(input_ids)
        attempts, open_rows = [0] * len(input_ids), list(range(len(input_ids)))
        devices = [input_ids.device] if input_ids.is_cuda else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self.seed)
            for _ in range(self.limit):
                if not open_rows:
                    break
                ids, here = input_ids[open_rows], mask[open_rows]
                out = self.model.generate(ids, attention_mask=here, **self.options)
                start = 0 if self.model.config.is_encoder_decoder else ids.shape[1]
                for row, tokens in zip(list(open_rows), out[:, start:], strict=True):
                    attempts[row] += 1
                    if self.verify(row, tokens):
                        answers[row] = tokens
                        open_rows.remove(row)
        return ResampledAnswers(answers, attempts)


METHOD = Method(
    name="resampling",
    family="decoding",
    title="Inference Scaling fLaws: The Limits of LLM Resampling with Imperfect Verifiers",
    authors="Stroebl et al.",
    arxiv="2411.17501",
    year=2024,
    repo="benediktstroebl/inference-scaling-limits",
    status="faithful",
    target="hfext.decoding.resampling:optimal_num_samples",
    usage="optimal_num_samples([0.58, 0.42], [0.87, 0.13], completeness=1.0, soundness=0.75, value_wrong=-2.0)",
    summary="How often to resample when the verifier errs: exact expected utility, the best K, and a sampling loop.",
    claim="With an imperfect verifier the best number of samples is finite and small, and accuracy has a ceiling.",
    headline=Result(
        metric="optimal number of samples",
        setting="HumanEval+ and MBPP+, several models, realistic costs of a wrong answer",
        value="at most 10, often at most 5",
    ),
    notes=(
        "A formula, so there is no recipe: the tests compare it with exact rational sums, simulated verifiers and a "
        "search over K. The authors' notebook counts the update of beliefs twice; its optima agree in the "
        "paper's examples, its utilities do not."
    ),
)
