"""Orders of slices for S3T: which to train under a budget, what of them survives deletions, and for how long.

A sequence is a permutation of the slices 0 .. L-1 of one shard. A deletion in slice s leaves the prefix before s.
"""

import math
from collections.abc import Collection, Iterable, Sequence

import numpy as np
import torch

Slices = tuple[int, ...]


def cyclic_sequences(slices: int, budget: int) -> list[Slices]:
    """`budget` permutations: the rotations of (0, .., L-1), and beyond L of them rotations of their suffixes.

    Of more than L, every rotation keeps its first slice, gets an equal share of the budget (the first ones one more),
    and its other slices are treated the same. Up to L, all first slices differ. `budget` beyond L! gives all L!.
    """
    _positive(slices=slices, budget=budget)
    return _rotated(tuple(range(slices)), min(budget, math.factorial(slices)))


def _rotated(items: Slices, budget: int) -> list[Slices]:
    size = len(items)
    turned = [items[size - i :] + items[: size - i] for i in range(size)]
    if budget <= size:
        return turned[:budget]
    shares = [budget // size + (i < budget % size) for i in range(size)]
    return [(t[0], *rest) for t, n in zip(turned, shares, strict=True) for rest in _rotated(t[1:], n)]


def sequence_score(probabilities: Iterable[float], deletions: int) -> float:
    """sum_n n (1 - p_1 - .. - p_n)^t: a longer prefix counts more, if it survives t deletions."""
    total = np.cumsum(np.fromiter(probabilities, dtype=np.float64))
    return float((np.arange(1, len(total) + 1) * np.clip(1 - total, 0, 1) ** deletions).sum())


def matched_sequences(probabilities: Sequence[float], budget: int, deletions: int = 100) -> list[Slices]:
    """Permutations for slices of unequal risk: sequences grow by a slice in turn, by matchings of greatest score.

    A round matches all L sequences to L different slices, so every slice stands once at every place (a Latin square):
    what a round may not repeat is a regular bipartite graph, which always has a perfect matching. The `budget` <= L
    sequences of greatest score are returned, best first.
    """
    from scipy.optimize import linear_sum_assignment

    p = np.asarray(probabilities, dtype=np.float64)
    size = len(p)
    _positive(slices=size, budget=budget, deletions=deletions)
    if p.ndim != 1 or not np.isfinite(p).all() or (p < 0).any() or p.sum() <= 0:
        raise ValueError(f"probabilities is {list(probabilities)} but must be >= 0 and not all 0.")
    if budget > size:
        raise ValueError(f"budget is {budget} but must be in [1, {size}]: a matching gives one sequence a slice.")
    p = p / p.sum()

    def score(sequence: Slices) -> float:
        return sequence_score(p[list(sequence)], deletions)

    found: list[Slices] = [(i,) for i in range(size)]
    for _ in range(size - 1):
        # Only the new place's term: the rest of a row's scores is a constant, in which small terms would drown.
        gain = np.full((size, size), -np.inf)
        for i, sequence in enumerate(found):
            for j in set(range(size)) - set(sequence):
                gain[i, j] = (len(sequence) + 1) * max(0.0, 1 - p[[*sequence, j]].sum()) ** deletions
        for i, j in zip(*linear_sum_assignment(gain, maximize=True), strict=True):
            found[i] += (int(j),)
    return sorted(found, key=score, reverse=True)[:budget]


def partition(rows: int, shards: int, slices: int, seed: int, prior: Sequence[float] | None = None) -> list[list]:
    """Row numbers by [shard][slice], at random; sizes differ by at most one in all.

    With a `prior` of deletion for every row, the rows of a shard are sorted by it and cut, so that slices differ in
    risk; then sizes within a shard differ by at most one.
    """
    if rows < shards * slices:
        raise ValueError(f"train_dataset has {rows} rows but {shards} shards of {slices} slices need one row each.")
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed)).tolist()
    if prior is None:
        return [[sorted(order[s * slices + i :: shards * slices]) for i in range(slices)] for s in range(shards)]
    ranked = [sorted(order[s::shards], key=lambda row: prior[row]) for s in range(shards)]
    return [[sorted(part.tolist()) for part in np.array_split(np.array(r), slices)] for r in ranked]


def surviving(sequence: Slices, deleted: Collection[int]) -> Slices:
    """The longest prefix without a deleted slice."""
    return sequence[: next((i for i, s in enumerate(sequence) if s in deleted), len(sequence))]


def best_prefix(sequences: Sequence[Slices], deleted: Collection[int]) -> Slices:
    """The longest surviving prefix of all sequences, the first of equal ones; () when all are dead."""
    return max((surviving(s, deleted) for s in sequences), key=len)


def stages(sequences: Sequence[Slices]) -> list[Slices]:
    """All prefixes, each once, parents before children: what is trained."""
    return list(dict.fromkeys(s[:j] for s in sequences for j in range(1, len(s) + 1)))


def expected_deletions(shards: int, slices: int, budget: int, until: str = "all") -> float:
    """Mean number of deletions, each in one of all m L slices at random, until models fail; exact.

    A sequence dies with its first slice. With B' = min(B, L) different first slices a shard, "all" waits for m B' of
    m L coupons: m L H(m B'). "first" waits for the first dead shard:
    m L integral_0^1 (1 - u^B')^m / (1 - u) du = (m L / B') sum_{r=1}^{B'} Beta(r / B', m). SISA is B = 1.
    """
    _positive(shards=shards, slices=slices, budget=budget)
    first = min(budget, slices)
    if until == "all":
        return shards * slices * sum(1 / i for i in range(1, shards * first + 1))
    if until != "first":
        raise ValueError(f"until is {until!r} but must be one of all, first.")
    beta = (
        math.lgamma(r / first) + math.lgamma(shards) - math.lgamma(r / first + shards) for r in range(1, first + 1)
    )
    return shards * slices / first * sum(map(math.exp, beta))


def simulated_deletions(
    sequences: Sequence[Slices],
    shards: int,
    runs: int,
    seed: int = 0,
    until: str = "all",
    probabilities: Sequence[float] | None = None,
) -> np.ndarray:
    """Deletions until all shards (or the first) are dead, [runs], by deleting from the sequences one by one.

    `probabilities` are of the slices of a shard, uniform by default; shards are equally likely.
    """
    _positive(shards=shards, runs=runs)
    rng, size, counts = np.random.default_rng(seed), len(sequences[0]), np.zeros(runs, dtype=np.int64)
    p = None if probabilities is None else np.asarray(probabilities, dtype=np.float64) / np.sum(probabilities)
    for run in range(runs):
        alive = [list(sequences) for _ in range(shards)]
        dead, draws = 0, iter(())
        while dead < (shards if until == "all" else 1):
            drawn = next(draws, None)
            if drawn is None:
                draws = zip(rng.integers(shards, size=256).tolist(), rng.choice(size, 256, p=p).tolist(), strict=True)
                drawn = next(draws)
            shard, hit = drawn
            counts[run] += 1
            if not alive[shard]:
                continue
            alive[shard] = [kept for s in alive[shard] if (kept := surviving(s, (hit,)))]
            dead += not alive[shard]
    return counts


def _positive(**values: int) -> None:
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} is {value!r} but must be an integer >= 1.")
