"""Which widths the layers of a supernet run at: drawing configurations, and searching a good one.

The mean of a configuration is sum n_l b_l / sum n_l over layers l with n_l weights. Drawn from all widths alike, it
has the variance sum n_l^2 Var(b) / (sum n_l)^2, which falls with the number of layers: hardly any draw has few or many
bits. Balanced draws take an interval of the mean first, each equally often, and then layers from the distribution of
largest entropy with a mean inside it, until the configuration's own mean lies there.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Found(NamedTuple):
    """The best configuration of a search: widths by layer, their mean, its loss, and (mean, loss) of all tried."""

    bits: dict[str, int]
    average_bits: float
    loss: float
    tried: list[tuple[float, float]]


def mean_of(bits: Tensor, sizes: Tensor) -> Tensor:
    """Mean bits of a weight, float64 [...], of configurations [..., layers]."""
    return (bits.double() * sizes.double()).sum(-1) / sizes.double().sum()


def max_entropy(choices: Sequence[int], mean: float) -> Tensor:
    """Chances of the widths, float64 [choices], with the largest entropy among those with this mean: p_b ~ e^(t b)."""
    low, high = -64.0, 64.0
    for _ in range(60):
        t = (low + high) / 2
        # Against the width whose exponent is largest, so that none overflows.
        most = max(t * b for b in choices)
        powers = [math.exp(t * b - most) for b in choices]
        found = sum(p * b for p, b in zip(powers, choices, strict=True)) / sum(powers)
        low, high = (t, high) if found < mean else (low, t)
    return torch.tensor(powers, dtype=torch.float64) / sum(powers)


def draw_uniform(sizes: Tensor, choices: Sequence[int], generator: torch.Generator) -> Tensor:
    """Widths [layers], each of `choices` alike."""
    return torch.tensor(choices)[torch.randint(len(choices), (len(sizes),), generator=generator)]


def draw_between(
    sizes: Tensor, choices: Sequence[int], low: float, high: float, generator: torch.Generator, tries: int = 2000
) -> Tensor:
    """Widths [layers] whose mean is in [low, high), or [low, high] at the largest width; the nearest of `tries` draws
    where no draw is."""
    closed = high >= max(choices)
    best, gap = None, math.inf
    for _ in range(0, tries, 20):
        p = max_entropy(choices, low + (high - low) * float(torch.rand((), generator=generator)))
        picked = torch.multinomial(p.expand(20, -1), len(sizes), replacement=True, generator=generator)
        drawn = torch.tensor(choices)[picked]
        means = mean_of(drawn, sizes)
        inside = (means >= low) & ((means <= high) if closed else (means < high))
        if inside.any():
            return drawn[int(inside.nonzero()[0])]
        away = torch.maximum(low - means, means - high).clamp(min=0)
        if float(away.min()) < gap:
            best, gap = drawn[int(away.argmin())], float(away.min())
    return best


def draw_balanced(sizes: Tensor, choices: Sequence[int], buckets: int, generator: torch.Generator) -> Tensor:
    """Widths [layers] with a mean in one of `buckets` equal intervals, each as often as the others."""
    k = int(torch.randint(buckets, (), generator=generator))
    step = (max(choices) - min(choices)) / buckets
    low = min(choices) + k * step
    high = max(choices) if k == buckets - 1 else low + step
    return draw_between(sizes, choices, low, high, generator)


def search(
    names: Sequence[str],
    sizes: Tensor,
    choices: Sequence[int],
    average_bits: float,
    loss_of: Callable[[dict[str, int]], float],
    candidates: int = 100,
    elite: int = 5,
    share: float = 0.1,
    slack: float = 0.1,
    seed: int = 0,
) -> Found:
    """The configuration of least loss among those of at most `average_bits`: half of the candidates are drawn with a
    mean just below the budget, the others change some layers of one of the best so far.

    Args:
        names, sizes (`Sequence[str]`, `torch.Tensor`): Layers and their weights [layers].
        choices (`Sequence[int]`): Widths.
        average_bits (`float`): Budget, from the smallest to the largest width.
        loss_of (`Callable`): Loss of a configuration.
        candidates (`int`): How many are measured.
        elite (`int`): How many of the best have offspring.
        share (`float`): Of layers that change; two at least.
        slack (`float`): How far below the budget a draw may be, in bits.
        seed (`int`): Of everything random.
    """
    generator = torch.Generator().manual_seed(seed)
    known: dict[tuple[int, ...], float] = {}
    means: list[float] = []

    def measure(bits: Tensor) -> None:
        key = tuple(bits.tolist())
        mean = float(mean_of(bits, sizes))
        if mean > average_bits + 1e-9 or key in known:
            return
        known[key] = loss_of(dict(zip(names, key, strict=True)))
        means.append(mean)

    lowest = min(choices)
    measure(torch.full((len(sizes),), max(b for b in choices if b <= average_bits + 1e-9)))
    floor, top = max(lowest, average_bits - slack), average_bits + 1e-9
    for _ in range(2 * candidates):
        if len(known) >= (candidates + 1) // 2:
            break
        measure(draw_between(sizes, choices, floor, top, generator, tries=40))
    for _ in range(20 * candidates):
        if len(known) >= candidates:
            break
        best = sorted(known, key=known.get)[:elite]
        child = torch.tensor(best[int(torch.randint(len(best), (), generator=generator))])
        count = min(len(sizes), max(2, round(share * len(sizes))))
        changed = torch.randperm(len(sizes), generator=generator)[:count]
        child[changed] = draw_uniform(changed, choices, generator)
        measure(child)
    winner = min(known, key=known.get)
    bits = dict(zip(names, winner, strict=True))
    tried = list(zip(means, known.values(), strict=True))
    return Found(bits, float(mean_of(torch.tensor(winner), sizes)), known[winner], tried)
