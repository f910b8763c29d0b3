"""Efficient EigenScore against EigenScore: error over moments, answers and condition; rank correlation; CPU time.

The sets of answers are drawn here: a common vector and a part of each answer's own, whose features have a decaying
spectrum as hidden states have.
"""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils.logging import tqdm

from ..metrics.efficient_eigenscore import METHOD, efficient_eigenscore
from ..metrics.eigenscore import eigenscore

# Of the authors' ablation, training and comparison scripts.
_REFERENCE_MOMENTS = (10, 20, 100)


@dataclass(kw_only=True)
class Config:
    """
    Args:
        moments: M of the error tables.
        answers: K of the error tables.
        conditions: Largest over smallest eigenvalue of Sigma + alpha I.
        sets: Sets of answers of the rank correlation.
        sizes: K x d of the times, as `[[K, d], ...]`.
        repeats: Turns of each program of the times.
        bar: Speed-up over the best exact score at the last size that counts as reproduced.
        tolerance: Error of the score, relative, up to which that counts.
        seed: Of everything.
    """

    moments: list[int]
    answers: list[int]
    conditions: list[float]
    sizes: list[list[int]]
    sets: int = 60
    repeats: int = 3
    bar: float = 2.0
    tolerance: float = 0.01
    seed: int = 0

    def __post_init__(self):
        if min(*self.moments, *self.answers, self.sets - 1, self.repeats) < 1:
            raise ValueError("moments, answers and repeats must be >= 1 and sets >= 2.")
        if min(self.conditions) <= 1:
            raise ValueError(f"conditions is {self.conditions} but must be > 1.")


def with_condition(k: int, d: int, condition: float, generator: torch.Generator) -> Tensor:
    """[k, d] whose Sigma + 1e-3 I has eigenvalues even in log from 1e-3 to 1e-3 * condition."""
    right = torch.randn(d, k, generator=generator, dtype=torch.float64)
    right = torch.linalg.qr(right - right.mean(0)).Q
    left = torch.linalg.qr(torch.randn(k, k, generator=generator, dtype=torch.float64)).Q
    values = 1e-3 * torch.logspace(0, math.log10(condition), k, dtype=torch.float64) - 1e-3
    return left @ torch.diag((values * (d - 1)).clamp(min=0).sqrt()) @ right.T


def hidden_states(k: int, d: int, own: float, size: float, generator: torch.Generator) -> Tensor:
    """[k, d]: a common vector and a share `own` of each answer's own, features with a 1/f spectrum, times `size`."""
    decay = torch.arange(1, d + 1, dtype=torch.float64) ** -0.5
    decay = decay / decay.square().mean().sqrt()
    common = torch.randn(1, d, generator=generator, dtype=torch.float64)
    return size * decay * (common * (1 - own) + torch.randn(k, d, generator=generator, dtype=torch.float64) * own)


def rank_correlation(a: list[float], b: list[float]) -> float:
    """Spearman's; there are no ties among real numbers."""
    x, y = (torch.tensor(v).argsort().argsort().double() for v in (a, b))
    return float(torch.corrcoef(torch.stack([x, y]))[0, 1])


def covariance(z: Tensor) -> Tensor:
    centred = z - z.mean(-1, keepdim=True)
    return centred @ centred.T / (z.shape[1] - 1) + 1e-3 * torch.eye(len(z), dtype=z.dtype)


def by_svd(z: Tensor) -> Tensor:
    """EigenScore as it was published: all singular vectors of the K x K covariance."""
    return torch.linalg.svd(covariance(z)).S.log10().mean()


def slogdet(z: Tensor) -> Tensor:
    return torch.linalg.slogdet(covariance(z)).logabsdet / len(z) / math.log(10)


def errors(config: Config) -> list[dict[str, Any]]:
    rows = []
    for condition in config.conditions:
        for k in config.answers:
            z = with_condition(k, max(2 * k, 64), condition, torch.Generator().manual_seed(config.seed))
            exact = float(eigenscore(z))
            row: dict[str, Any] = {"condition": f"{condition:g}", "K": k, "EigenScore": round(exact, 4)}
            for m in config.moments:
                truncated = float(efficient_eigenscore(z, moments=m, deflate=0, exact_trace=True))
                row[f"M={m}, exact trace"] = f"{abs(truncated - exact):.1e}"
            row["default, exact trace"] = f"{abs(float(efficient_eigenscore(z, exact_trace=True)) - exact):.1e}"
            for probes in (4, 20):
                drawn = [
                    float(efficient_eigenscore(z, num_probes=probes, generator=torch.Generator().manual_seed(seed)))
                    for seed in range(10)
                ]
                error = math.sqrt(statistics.fmean((x - exact) ** 2 for x in drawn))
                row[f"default, {probes} probes"] = f"{error:.1e}"
            rows.append(row)
    return rows


def correlations(config: Config) -> list[dict[str, Any]]:
    """What varies among the sets: how different their answers are, or the size of the hidden states, or both."""
    draw, rows = torch.Generator().manual_seed(config.seed), []
    for what in ("spread of the answers", "size of the states", "both"):
        scores: dict[str, list[float]] = {name: [] for name in ("exact", "kpm", *map(str, _REFERENCE_MOMENTS))}
        for _ in range(config.sets):
            u, v = torch.rand(2, generator=draw).tolist()
            own = 0.05 + 0.9 * u if what != "size of the states" else 0.5
            size = math.exp(2 * v - 1) if what != "spread of the answers" else 1.0
            z = hidden_states(10, 576, own, size, draw)
            scores["exact"].append(float(eigenscore(z)))
            scores["kpm"].append(float(efficient_eigenscore(z)))
            for m in _REFERENCE_MOMENTS:
                scores[str(m)].append(float(efficient_eigenscore(z, method="reference", moments=m)))
        rows.append(
            {
                "sets differ in": what,
                "Chebyshev": round(rank_correlation(scores["kpm"], scores["exact"]), 3),
            }
            | {
                f"authors' number, M={m}": round(rank_correlation(scores[str(m)], scores["exact"]), 3)
                for m in _REFERENCE_MOMENTS
            }
            | {"its range, M=20": f"{min(scores['20']):.2f} ... {max(scores['20']):.2f}"}
        )
    return rows


def times(config: Config) -> list[dict[str, Any]]:
    rows = []
    for k, d in config.sizes:
        z = hidden_states(k, d, 0.5, 1.0, torch.Generator().manual_seed(config.seed))
        programs: dict[str, Callable[[], Tensor]] = {
            "SVD of the covariance": lambda z=z: by_svd(z),
            "slogdet": lambda z=z: slogdet(z),
            "eigenscore": lambda z=z: eigenscore(z),
            "Chebyshev": lambda z=z: efficient_eigenscore(z),
            "Chebyshev, 4 probes": lambda z=z: efficient_eigenscore(z, num_probes=4),
            "authors' number": lambda z=z: efficient_eigenscore(z, method="reference", moments=20),
        }
        values = {name: float(program()) for name, program in programs.items()}
        seconds: dict[str, list[float]] = {name: [] for name in programs}
        for _ in range(config.repeats):
            for name, program in programs.items():
                start = time.process_time()
                program()
                seconds[name].append(time.process_time() - start)
        median = {name: statistics.median(s) for name, s in seconds.items()}
        rows.append(
            {"K": k, "d": d}
            | {f"{name}, ms": round(1e3 * s, 2) for name, s in median.items()}
            | {
                "SVD / Chebyshev": round(median["SVD of the covariance"] / median["Chebyshev"], 2),
                "best exact / Chebyshev": round(min(median["slogdet"], median["eigenscore"]) / median["Chebyshev"], 2),
                "relative error": round(abs(values["Chebyshev"] / values["slogdet"] - 1), 5),
                "with 4 probes": round(abs(values["Chebyshev, 4 probes"] / values["slogdet"] - 1), 5),
            }
        )
    return rows


def run(config: Config, out: Path) -> dict[str, Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tqdm(total=3, desc="tables") as bar:
            tables = {}
            for title, build in (
                ("Error of the score (root mean square of 10 draws where probes are random)", errors),
                (f"Rank correlation with EigenScore over {config.sets} sets of 10 answers", correlations),
                ("CPU time, float64, one thread, medians", times),
            ):
                tables[title] = build(config)
                bar.update()
    finally:
        torch.set_num_threads(threads)
    last = list(tables.values())[2][-1]
    return {
        "tables": tables,
        "evidence": {
            "claim": METHOD.claim,
            "paper": "about 2x: 4 s against 7 s on a matrix of 10^8 entries",
            "metric": "CPU time of the best exact EigenScore over that of the Chebyshev estimate",
            "setting": f"{last['K']} answers of {last['d']} features, defaults, float64, one thread",
            "method": "efficient_eigenscore",
            "ours": last["best exact / Chebyshev"],
            "ours_sd": None,
            "n": config.repeats,
            "baseline_name": "eigenscore",
            "baseline": 1.0,
            "baseline_sd": None,
            "reproduced": last["best exact / Chebyshev"] >= config.bar and last["relative error"] <= config.tolerance,
            "note": (
                f"Reproduced means at least {config.bar:g}x with a relative error of at most {config.tolerance:g}; it "
                f"is {last['relative error']}. Against the published EigenScore, an SVD of the covariance, it is "
                f"{last['SVD / Chebyshev']}: the gain is real there, and gone once the exact score leaves out "
                "the singular vectors. The authors' own number is another quantity and ranks otherwise."
            ),
        },
    }
