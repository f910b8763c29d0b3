"""CPU time of a sampler's call: top-H against a top-H that sorts, and against the built-in samplers.

One thread; the programs take turns, and each figure is the median of its turns.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    EtaLogitsWarper,
    MinPLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
from transformers.utils import logging

from .. import decoding


@dataclass(kw_only=True)
class Config:
    """
    Args:
        vocabs: Vocabulary sizes.
        batches: Batch sizes.
        temperatures: The scores are those of a Zipf law with noise at this temperature.
        alpha: Of top-H.
        rounds: Turns of each sampler.
        calls: Calls in a turn.
        bar_sorted, bar_top_p: Ratios that count as met.
    """

    vocabs: list[int] = field(default_factory=lambda: [49_152, 152_064])
    batches: list[int] = field(default_factory=lambda: [1, 8])
    temperatures: list[float] = field(default_factory=lambda: [1.0, 2.0])
    alpha: float = 0.4
    rounds: int = 25
    calls: int = 4
    bar_sorted: float = 0.15
    bar_top_p: float = 0.25

    def __post_init__(self):
        if self.rounds < 3 or self.calls < 1:
            raise ValueError(f"rounds is {self.rounds} and calls {self.calls}, but must be >= 3 and >= 1.")
        decoding.TopHLogitsProcessor(self.alpha)


def sorted_top_h(alpha: float) -> Callable[[None, Tensor], Tensor]:
    """The paper's rule with one full sort and cumulative sums, written as well as that allows."""

    def call(_, scores):
        log_p, order = scores.log_softmax(dim=-1).sort(dim=-1, descending=True)
        p = log_p.exp()
        mass, times = p.cumsum(dim=-1), (p * log_p).cumsum(dim=-1)
        beyond = mass.log() - times / mass > -alpha * times[:, -1:]
        beyond[:, 0] = False
        return scores.masked_fill(torch.zeros_like(beyond).scatter_(1, order, beyond), -torch.inf)

    return call


def zipf(rows: int, vocab: int, temperature: float) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    order = torch.stack([torch.randperm(vocab, generator=generator) for _ in range(rows)])
    noise = torch.randn(rows, vocab, generator=generator)
    return (-1.2 * torch.arange(1.0, vocab + 1).log()[order] + 0.5 * noise) / temperature


def run(config: Config, out: Path) -> dict:
    samplers = {
        "top_h": decoding.TopHLogitsProcessor(config.alpha),
        "top_h with a sort": sorted_top_h(config.alpha),
        "top_p 0.9": TopPLogitsWarper(0.9),
        "top_h in transformers": TopHLogitsWarper(config.alpha),
        "top_k 50": TopKLogitsWarper(50),
        "min_p 0.1": MinPLogitsWarper(0.1),
        "typical 0.9": TypicalLogitsWarper(0.9),
        "eta 2e-4": EtaLogitsWarper(2e-4),
        "top_n_sigma": decoding.TopNSigmaLogitsProcessor(1.0),
    }
    threads, rows = torch.get_num_threads(), []
    try:
        torch.set_num_threads(1)
        cells = [(v, b, t) for v in config.vocabs for b in config.batches for t in config.temperatures]
        with logging.tqdm(cells, desc="sizes") as bar:
            for vocab, batch, temperature in bar:
                scores = zipf(batch, vocab, temperature)
                same = torch.equal(samplers["top_h"](None, scores), samplers["top_h with a sort"](None, scores))
                seconds = {name: [] for name in samplers}
                for turn in range(config.rounds + 2):
                    for name, sampler in samplers.items():
                        start = time.process_time()
                        for _ in range(config.calls):
                            sampler(None, scores)
                        if turn >= 2:
                            seconds[name].append((time.process_time() - start) / config.calls)
                ms = {name: 1e3 * statistics.median(values) for name, values in seconds.items()}
                to_sorted, to_top_p = ms["top_h"] / ms["top_h with a sort"], ms["top_h"] / ms["top_p 0.9"]
                rows.append(
                    {
                        "V": vocab,
                        "batch": batch,
                        "T": temperature,
                        "to the sort": round(to_sorted, 3),
                        "to top_p": round(to_top_p, 3),
                        "same tokens": same,
                        **{f"{name}, ms": round(value, 3) for name, value in ms.items()},
                        "met": to_sorted <= config.bar_sorted and to_top_p <= config.bar_top_p and same,
                    }
                )
    finally:
        torch.set_num_threads(threads)
    return {"tables": {"CPU time of a call, one thread, medians": rows}}
