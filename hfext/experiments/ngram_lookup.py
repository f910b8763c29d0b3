"""What n-gram lookups cost in superposed decoding when the store holds a large corpus.

The corpus is synthetic: phrases of 8 to 32 tokens drawn from a book, both by a Zipf-like law, so that n-grams repeat
as they do in text. The store is written and read in a temporary folder of the output folder. The prompts and the
looked-up contexts come from the corpus itself: contexts that are found cost more than those that are not. Of every k
contexts, k // 2 stay as they are; in the others the last token but one is drawn anew, so that bigrams find theirs and
longer n-grams rarely do. A Python dictionary of the first tokens of the same corpus, looked up draft by draft, is what
the authors' code does.
"""

import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers.utils.logging import tqdm

from ..decoding.ngram_store import NGramStore
from ..decoding.superposed import SuperposedConfig, superposed_generate
from . import _smollm2

_DOCUMENT = 1 << 20


@dataclass(kw_only=True)
class Config:
    """
    Args:
        tokens: Of the corpus.
        orders: n of the n-grams.
        phrases: In the book.
        num_drafts: The k that are measured.
        prompts: Prompts of 15 tokens, continued by `new_tokens`.
        lookups: Batches of k drafts that are looked up.
        dict_tokens: Corpus of the comparison with a Python dictionary.
        bar: The most that lookups may take of the decoding time.
        seed: Of the corpus.
    """

    tokens: int = 100_000_000
    orders: tuple[int, ...] = (2, 3, 4, 5, 6)
    phrases: int = 500_000
    num_drafts: tuple[int, ...] = (3, 8)
    prompts: int = 6
    new_tokens: int = 10
    lookups: int = 300
    dict_tokens: int = 300_000
    bar: float = 0.10
    seed: int = 0

    def __post_init__(self):
        for name in ("phrases", "prompts", "new_tokens", "lookups"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)} but must be >= 1.")
        if not 100 <= self.dict_tokens <= self.tokens:
            raise ValueError(f"dict_tokens is {self.dict_tokens} but must be in 100..{self.tokens}, the tokens.")
        if not self.num_drafts or min(self.num_drafts) < 1:
            raise ValueError(f"num_drafts is {self.num_drafts} but must hold numbers >= 1.")


def corpus(tokens: int, vocab_size: int, phrases: int, seed: int) -> Iterator[np.ndarray]:
    """Documents of about a million ids, `tokens` in all."""
    rng = np.random.default_rng(seed)

    def zipf(size: int, below: int) -> np.ndarray:
        return np.minimum(below ** rng.random(size) - 1, below - 1).astype(np.int64)

    lengths = rng.integers(8, 33, phrases)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    # The frequent ids are spread over the vocabulary.
    book = rng.permutation(vocab_size).astype(np.int32)[zipf(int(starts[-1]), vocab_size)]
    while tokens > 0:
        size = min(_DOCUMENT, tokens)
        drawn = zipf(size // 8 + 1, phrases)
        repeats = lengths[drawn]
        inside = np.arange(int(repeats.sum())) - np.repeat(np.cumsum(repeats) - repeats, repeats)
        yield book[np.repeat(starts[drawn], repeats) + inside][:size]
        tokens -= size


class Timed:
    """A store that adds up the CPU seconds of its lookups."""

    def __init__(self, store: NGramStore):
        self.store, self.orders, self.vocab_size, self.seconds = store, store.orders, store.vocab_size, 0.0

    def probabilities(self, *args):
        start = time.process_time()
        found = self.store.probabilities(*args)
        self.seconds += time.process_time() - start
        return found


class Dictionary:
    """{context: {token: count}} of every order, as the authors' code keeps it."""

    def __init__(self, ids: list[int], orders: tuple[int, ...]):
        self.tables = {n: {} for n in orders}
        for n, table in self.tables.items():
            for i in range(n - 1, len(ids)):
                seen = table.setdefault(tuple(ids[i - n + 1 : i]), {})
                seen[ids[i]] = seen.get(ids[i], 0) + 1

    def probabilities(self, histories, candidates, lambdas):
        rows = []
        for history, wanted in zip(histories.tolist(), candidates.tolist(), strict=True):
            found = [0.0] * len(wanted)
            for n, table in self.tables.items():
                seen = table.get(tuple(history[len(history) - n + 1 :]))
                if seen is not None:
                    total = sum(seen.values())
                    for i, token in enumerate(wanted):
                        found[i] += lambdas[n - 2] * seen.get(token, 0) / total
            rows.append(found)
        return torch.tensor(rows, dtype=torch.float64)


def queries(ids: np.ndarray, k: int, count: int, width: int, rng: np.random.Generator) -> list[tuple]:
    """`count` batches of k contexts, k // 2 of them as in the corpus, with what follows and others as candidates."""
    found = []
    for _ in range(count):
        at = rng.integers(width, len(ids) - 1, k)
        contexts = np.stack([ids[i - width : i] for i in at]).astype(np.int64)
        contexts[k // 2 :, -2] = rng.integers(0, 49152, k - k // 2)
        candidates = np.concatenate([ids[at][:, None], ids[rng.integers(0, len(ids), (k, 3 * k - 1))]], 1)
        found.append((torch.from_numpy(contexts), torch.from_numpy(candidates.astype(np.int64))))
    return found


def microseconds(table, batches: list[tuple], lambdas: tuple[float, ...]) -> float:
    """CPU time of a batch, median of five rounds over all batches."""
    rounds = []
    for _ in range(6):
        start = time.process_time()
        for contexts, candidates in batches:
            table.probabilities(contexts, candidates, lambdas)
        rounds.append((time.process_time() - start) / len(batches))
    return 1e6 * statistics.median(rounds[1:])


def run(config: Config, out: Path) -> dict:
    model, tokenizer = _smollm2.load()
    model.eval()
    vocabulary, lambdas = len(tokenizer), SuperposedConfig().lambdas
    out.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="store.", dir=out))
    try:
        steps = (-(-config.tokens // _DOCUMENT)) if config.tokens else 0
        documents = corpus(config.tokens, vocabulary, config.phrases, config.seed)
        start = time.process_time()
        store = NGramStore.build(
            tqdm(documents, total=steps, desc="corpus"), tokenizer, config.orders, folder=folder / "store"
        )
        built = time.process_time() - start
        size = sum(path.stat().st_size for path in (folder / "store").iterdir())
        contexts = sum(len(table["hashes"]) for table in store.tables.values())
        first = next(corpus(min(config.tokens, _DOCUMENT), vocabulary, config.phrases, config.seed))
        rng = np.random.default_rng(config.seed + 1)
        shares, times = [], []
        for k in config.num_drafts:
            shares.append(_share(model, store, first, k, config, rng))
            batches = queries(first, k, config.lookups, max(config.orders) - 1, rng)
            times.append({"table": f"this store, {config.tokens:,} tokens", "k": k})
            times[-1]["us a batch of k drafts"] = round(microseconds(store, batches, lambdas), 1)
        small = first[: config.dict_tokens]
        tables = {
            f"this store, {config.dict_tokens:,} tokens": NGramStore.build([small], tokenizer, config.orders),
            f"Python dictionary, {config.dict_tokens:,} tokens": Dictionary(small.tolist(), config.orders),
        }
        for k in config.num_drafts:
            batches = queries(small, k, config.lookups, max(config.orders) - 1, rng)
            for name, table in tables.items():
                us = round(microseconds(table, batches, lambdas), 1)
                times.append({"table": name, "k": k, "us a batch of k drafts": us})
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    facts = {
        "tokens": config.tokens,
        "contexts": contexts,
        "GB on disk": round(size / 1e9, 2),
        "bytes a token": round(size / config.tokens, 1),
        "CPU s to build": round(built, 1),
    }
    return {
        "tables": {
            "Share of n-gram lookups in superposed decoding of SmolLM2, one CPU thread": shares,
            "CPU time of a lookup": times,
            "The store": [facts],
        }
    }


def _share(model, store: NGramStore, ids: np.ndarray, k: int, config: Config, rng: np.random.Generator) -> dict:
    timed, total, unseen = Timed(store), 0.0, []
    for i, at in enumerate(rng.integers(0, len(ids) - 15, config.prompts + 1)):
        prompt = torch.from_numpy(ids[at : at + 15].astype(np.int64))[None]
        timed.seconds = 0.0 if i == 1 else timed.seconds
        start = time.process_time()
        drafts = model.generate(
            prompt,
            custom_generate=superposed_generate,
            num_drafts=k,
            ngram_store=timed,
            max_new_tokens=config.new_tokens,
            do_sample=False,
            eos_token_id=None,
            return_dict_in_generate=True,
        )
        if i:
            total += time.process_time() - start
            unseen.append(drafts.uninterpolated_fraction)
    share = timed.seconds / total
    return {
        "k": k,
        "lookup ms a token": round(1e3 * timed.seconds / config.prompts / config.new_tokens, 3),
        "decoding ms a token": round(1e3 * total / config.prompts / config.new_tokens, 1),
        "share": round(share, 4),
        "without an n-gram": round(statistics.fmean(unseen), 3),
        "bar": f"<= {config.bar}",
        "met": share <= config.bar,
    }
