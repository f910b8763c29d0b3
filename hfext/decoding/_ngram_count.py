"""Counting n-grams with sorts of plain integers, block by block: no Python object an n-gram.

What a block needs beside the corpus (4 bytes a token) and its hashes (8 bytes a token) is below a gigabyte.
"""

from collections.abc import Iterator, Sequence

import numpy as np

# What a table holds. Alignment in its file decides the order: 8-byte types first.
TABLE_FIELDS = {
    "hashes": np.dtype(np.uint64),
    "offsets": np.dtype(np.int64),
    "contexts": np.dtype(np.int32),
    "next_ids": np.dtype(np.int32),
    "counts": np.dtype(np.uint32),
    "totals": np.dtype(np.uint32),
}
# Positions sorted at once while counting; the local index takes the low bits of the sort key.
_BLOCK_BITS = 24


def context_hashes(columns: Sequence[np.ndarray]) -> list[np.ndarray]:
    """64-bit hashes of contexts given column by column, the newest token first.

    m arrays [rows] -> m arrays uint64 [rows]: of the contexts of 1, 2, ..., m tokens.
    """
    hashes = []
    h = np.uint64(0x9E3779B97F4A7C15)
    for column in columns:
        h = (column.astype(np.uint64) ^ h) * np.uint64(0xBF58476D1CE4E5B9)
        h ^= h >> np.uint64(31)
        h *= np.uint64(0x94D049BB133111EB)
        h ^= h >> np.uint64(29)
        hashes.append(h)
    return hashes


def count_ngrams(
    tokens: np.ndarray, starts: np.ndarray, n: int, min_count: int = 1
) -> Iterator[dict[str, np.ndarray]]:
    """The table of order `n` in blocks, which follow each other in the order of the hashes.

    `tokens` int32 [N] are all documents in a row, `starts` their first positions. Sorting is of values only: a key
    holds the leading bits of the hash over the position's index inside the block, and what shares these bits by
    accident is put in order by its exact context.
    """
    end = len(tokens)
    valid = np.ones(end, dtype=bool)
    for j in range(n - 1):
        valid[np.minimum(starts + j, end - 1) if end else starts] = False
    hashes = np.zeros(end, dtype=np.uint64)
    for a in range(n - 1, end, 1 << 20):
        b = min(a + (1 << 20), end)
        hashes[a:b] = context_hashes([tokens[a - j : b - j] for j in range(1, n)])[-1]
    # Half a block on average, so that chance does not fill one up.
    bits = max(0, int(end >> (_BLOCK_BITS - 1)).bit_length())
    for block in range(1 << bits):
        inside = valid & (hashes >> np.uint64(64 - bits) == block) if bits else valid
        positions = np.flatnonzero(inside)
        for some in _by_hash(positions, hashes, bits):
            yield from _table(tokens, hashes, some, n, min_count)


def _by_hash(positions: np.ndarray, hashes: np.ndarray, bits: int) -> Iterator[np.ndarray]:
    """`positions`, or its halves by the next bit of the hash while there are more than fit into a block."""
    if len(positions) < 1 << _BLOCK_BITS or bits == 63:
        yield positions
        return
    upper = (hashes[positions] >> np.uint64(63 - bits)) & np.uint64(1) == 1
    yield from _by_hash(positions[~upper], hashes, bits + 1)
    yield from _by_hash(positions[upper], hashes, bits + 1)


def _table(
    tokens: np.ndarray, hashes: np.ndarray, positions: np.ndarray, n: int, min_count: int
) -> Iterator[dict[str, np.ndarray]]:
    if not len(positions):
        return
    index_bits = np.uint64(max(len(positions) - 1, 1).bit_length())
    order = (hashes[positions] >> index_bits << index_bits) | np.arange(len(positions), dtype=np.uint64)
    order.sort()
    prefix = order >> index_bits
    order = positions[(order & ((np.uint64(1) << index_bits) - np.uint64(1))).astype(np.int64)]
    new = np.zeros(len(order), dtype=bool)
    for j in range(1, n):
        column = tokens[order - j]
        new[1:] |= column[1:] != column[:-1]
    fresh = np.concatenate([[True], prefix[1:] != prefix[:-1]])
    if (new & ~fresh).any():
        group = np.cumsum(fresh) - 1
        mixed = np.flatnonzero(np.isin(group, group[new & ~fresh]))
        among = order[mixed]
        keys = [tokens[among - j] for j in range(1, n)] + [hashes[among]]
        order[mixed] = among[np.lexsort([*keys, group[mixed]])]
        new[:] = False
        for j in range(1, n):
            column = tokens[order - j]
            new[1:] |= column[1:] != column[:-1]
    new[0] = True
    first = order[np.flatnonzero(new)]
    pairs = (np.cumsum(new) - 1).astype(np.uint64) << np.uint64(32) | tokens[order].astype(np.uint64)
    totals = np.diff(np.flatnonzero(np.append(new, True)))
    del order, new, prefix, fresh
    pairs.sort()
    distinct = np.flatnonzero(np.concatenate([[True], pairs[1:] != pairs[:-1]]))
    counts = np.diff(np.append(distinct, len(pairs)))
    pairs = pairs[distinct][counts >= min_count]
    counts = counts[counts >= min_count]
    sizes = np.bincount((pairs >> np.uint64(32)).astype(np.int64), minlength=len(first))
    kept = sizes > 0
    first = first[kept]
    yield {
        "hashes": hashes[first],
        "offsets": np.concatenate([[0], np.cumsum(sizes[kept])]),
        "contexts": np.stack([tokens[first - j] for j in range(n - 1, 0, -1)], axis=1),
        "next_ids": (pairs & np.uint64(0xFFFFFFFF)).astype(np.int32),
        "counts": counts.astype(np.uint32),
        "totals": totals[kept].astype(np.uint32),
    }


def joined(blocks: list[dict[str, np.ndarray]], n: int) -> dict[str, np.ndarray]:
    """Blocks of one order as one table; an empty one where there are none."""
    if not blocks:
        empty = {name: np.zeros(0, dtype) for name, dtype in TABLE_FIELDS.items()}
        return {**empty, "offsets": np.zeros(1, np.int64), "contexts": np.zeros((0, n - 1), np.int32)}
    table = {name: np.concatenate([block[name] for block in blocks]) for name in TABLE_FIELDS if name != "offsets"}
    table["offsets"] = np.concatenate([[0], np.cumsum(np.concatenate([np.diff(b["offsets"]) for b in blocks]))])
    return table
