"""How much of the attention A2ATS finds: codes learnt with the queries, plain ones, exact scores and chance.

SmolLM2-135M-Instruct on WikiText-2. Codebooks are learnt on the validation file. On contexts of the test file every
query head selects a share of the tokens, and the measure is the part of its exact attention to all tokens outside
window and sinks that the selected ones hold: of the sum over all heads and queries, and as a mean over them. Plain
codes of rotated keys, with the positions of keys and queries as they are, show what the windowed rotary embedding
costs. The error of scores is that of codes alone, against keys at the same distance, by the variance of these.

Then perplexity: segments of 1024 tokens, the first 768 prefilled, the rest fed one token a call, so that every
prediction goes through the selection.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.utils import logging

from ..kv_cache import A2ATSConfig, StreamingLLMConfig
from ..kv_cache._calibration import Calibration, Observed, watch
from ..kv_cache._geometry import Geometry, geometry
from ..kv_cache._query_aware_vq import encode, kmeans, score_table
from ..kv_cache._retrieval import at_distance, best
from ..kv_cache._state import project_queries
from ..kv_cache.a2ats import METHOD, seen_by
from . import _smollm2
from ._data import wikitext2
from ._kv_protocol import continuation_nll, held_bytes, perplexity, prefill
from ._plots import lines
from .kv_quality import PREFILL, text_segments

BAR = 1.1  # query-aware against plain codes
VARIANTS = {"query-aware codes": True, "plain codes": False}


@dataclass(kw_only=True)
class Config:
    """
    Args:
        topk: Share of the tokens that a query head selects.
        codebook_sizes: Codes of a kv head; the evidence is about the last.
        distance: Tokens that a key is taken to be behind a query when it is scored.
        window: Latest tokens, which are not counted.
        n_sink: First tokens, which are not counted.
        contexts: Texts of the test file whose attention is measured.
        length: Tokens of such a text.
        queries: Queries of a text, evenly among its tokens from the 512th.
        calibration_texts: Texts of 1024 tokens of the validation file for the codebooks.
        max_iterations: Of k-means.
        seeds: Of k-means; one run each.
        segments: Text segments of 1024 tokens for the perplexity; 0 for none.
        data_dir: Folder that holds `wikitext2`; `HFEXT_DATA` or `shared/data` beside the checkout when left out.
    """

    topk: float = 0.03
    codebook_sizes: list[int] = field(default_factory=lambda: [16, 256])
    distance: int = 2048
    window: int = 64
    n_sink: int = 8
    contexts: int = 2
    length: int = 2048
    queries: int = 48
    calibration_texts: int = 8
    max_iterations: int = 10
    seeds: int = 3
    segments: int = 1
    data_dir: str | None = None

    def __post_init__(self):
        for name in ("contexts", "queries", "calibration_texts", "max_iterations", "seeds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)} but must be >= 1.")
        if self.segments < 0:
            raise ValueError(f"segments is {self.segments} but must be >= 0.")
        if self.length % 1024 or self.length < 1024:
            raise ValueError(f"length is {self.length} but must be a multiple of 1024.")
        if not self.codebook_sizes:
            raise ValueError("codebook_sizes is empty but must name at least one size.")
        for size in self.codebook_sizes:
            self.options(codebook_size=size)

    def options(self, **fields: Any) -> A2ATSConfig:
        names = ("topk", "distance", "window", "n_sink")
        return A2ATSConfig(**{name: getattr(self, name) for name in names}, **fields)


@dataclass(frozen=True)
class Attention:
    """One layer of one text: what selecting needs to know.

    Attributes:
        mass: Exact attention probabilities to tokens outside window and sinks [queries, heads, tokens].
        logits: Exact ones [queries, heads, tokens].
        keys, rotated: Before and after the rotary embedding [1, kv_heads, tokens, head_dim].
        turned, queries: Turned for keys `distance` tokens behind, and as they are [1, heads, queries, head_dim].
        place: Index of every query [queries].
    """

    mass: Tensor
    logits: Tensor
    keys: Tensor
    rotated: Tensor
    turned: Tensor
    queries: Tensor
    place: Tensor


Scorer = Callable[[int, Attention], Tensor]


def attention_of(seen: Observed, shape: Geometry, config: Config) -> Attention:
    """Exact attention of some queries of a text, and what stands for it."""
    tokens = seen.keys.shape[2]
    place = torch.linspace(512, tokens - 1, config.queries).long()
    rotary, step = shape.rotary, seen.step
    rotated = rotary.rotate(seen.keys, step.cos.float(), step.sin.float())
    queries = step.queries()[:, :, place].float()
    logits = products(queries, rotated) * step.module.scaling
    token, here = torch.arange(tokens), place.unsqueeze(1)
    logits = logits.masked_fill((token > here).unsqueeze(1), -torch.inf)
    far = (token <= here - config.window) & (token >= config.n_sink)
    mass = logits.softmax(-1) * far.unsqueeze(1)
    flat = project_queries(step.module, step.hidden_states[:, place], shape).float()
    turned = at_distance(flat, rotary, config.distance)
    return Attention(mass, logits, seen.keys, rotated, turned, queries, place)


def products(queries: Tensor, keys: Tensor) -> Tensor:
    """q . k [queries, heads, tokens] of queries [1, heads, queries, d] and keys [1, kv_heads, tokens, d]."""
    group = queries.shape[1] // keys.shape[1]
    return (queries[0] @ keys[0].repeat_interleave(group, dim=0).transpose(1, 2)).transpose(0, 1)


def approximate(queries: Tensor, keys: Tensor, codebook: Tensor, lower: Tensor, inverse: Tensor) -> Tensor:
    """The same by codes."""
    table = score_table(queries, codebook, inverse)[0]
    codes = encode(keys, codebook, lower)[0].repeat_interleave(queries.shape[1] // keys.shape[1], dim=0)
    return table.gather(2, codes.unsqueeze(1).expand(-1, table.shape[1], -1)).transpose(0, 1)


def found(seen: Attention, scores: Tensor, config: Config, kv_heads: int) -> Tensor:
    """Mass that heads select, that groups select together, and all of it; shares of heads, and their number: [5]."""
    count = ((seen.place + 1).double() * config.topk + 1e-9).floor().long().clamp(min=1)
    marks = best(scores.masked_fill(seen.mass == 0, -torch.inf), count)
    group = marks.shape[1] // kv_heads
    joined = marks.unflatten(1, (kv_heads, group)).any(2).repeat_interleave(group, dim=1)
    own, together, whole = ((seen.mass * part).sum(-1).double() for part in (marks, joined, torch.ones(1)))
    share = own / whole.clamp(min=1e-30)
    return torch.stack([own.sum(), together.sum(), whole.sum(), share.sum(), torch.tensor(float(share.numel()))])


def recalled(
    model: PreTrainedModel, texts: Tensor, scorers: dict[str, Scorer], config: Config
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Sums over all texts for every scorer: [layers, 5] as in `found`, and errors and variances [layers, 2]."""
    shape = geometry(model)
    sums = {name: torch.zeros(len(shape.layers), 5, dtype=torch.float64) for name in scorers}
    errors = {name: torch.zeros(len(shape.layers), 2, dtype=torch.float64) for name in scorers}

    def visit(observed: Observed) -> None:
        seen = attention_of(observed, shape, config)
        reference = products(seen.turned, seen.keys)
        spread = (reference - reference.mean()).square().sum().double()
        for name, scorer in scorers.items():
            scores = scorer(observed.layer, seen)
            sums[name][observed.layer] += found(seen, scores, config, shape.num_kv_heads)
            error = (scores - reference).square().sum().double()
            errors[name][observed.layer] += torch.stack([error, spread])

    watch(model, texts, visit, config.length)
    return sums, errors


def continued(model: PreTrainedModel, make: Callable[[], Any], segments: list[Tensor]) -> tuple[float, float]:
    """Perplexity of the tokens after the prompts in calls of one token, and mean bytes at the end."""
    nll, held = [], []
    for ids in segments:
        cache = make()
        prefill(model, cache, ids[:, :PREFILL])
        nll.append(continuation_nll(model, cache, ids, PREFILL, 1))
        held.append(held_bytes(cache))
    return perplexity(nll), statistics.fmean(held)


def codebooks(
    shape: Geometry, seen: tuple[dict[int, Tensor], dict[int, Tensor], int], config: Config
) -> dict[tuple[str, int, int], A2ATSConfig]:
    """A calibrated config for every variant, size and seed."""
    keys, moments, tokens = seen
    todo = [(name, size, seed) for name in VARIANTS for size in config.codebook_sizes for seed in range(config.seeds)]
    learnt = {}
    for name, size, seed in logging.tqdm(todo, desc="codebooks"):
        options = config.options(codebook_size=size, query_aware=VARIANTS[name])
        tensors: dict[str, Tensor] = {}
        for index in shape.layers:
            tensors |= options.fitted(index, keys[index], moments[index], config.max_iterations, seed)
        options.calibration = Calibration(tensors, shape.facts, tokens)
        learnt[name, size, seed] = options
    return learnt


def codes_of_rotated(shape: Geometry, keys: dict[int, Tensor], size: int, config: Config) -> Scorer:
    """Ordinary vector quantisation without the windowed rotary embedding: keys turned at places of the whole text."""
    generator, learnt, one = torch.Generator().manual_seed(0), {}, torch.eye(shape.head_dim)
    one = one.expand(shape.num_kv_heads, -1, -1)
    for index, x in keys.items():
        place = torch.randint(config.n_sink, config.length, (1, x.shape[1]), generator=generator)
        turned = shape.rotary.rotate(x[None], *shape.rotary.tables(place, torch.float32))[0]
        learnt[index] = kmeans(turned, size, generator, config.max_iterations)[0]
    return lambda index, seen: approximate(seen.queries, seen.rotated, learnt[index], one, one)


def run(config: Config, out: Path) -> dict:
    model, tokenizer = _smollm2.load()
    model.eval()
    folder = wikitext2(config.data_dir)
    shape, last = geometry(model), config.codebook_sizes[-1]
    texts = torch.cat(text_segments(tokenizer, folder / "valid.txt", config.calibration_texts))
    seen = seen_by(model, texts, config.distance, config.n_sink)
    learnt = codebooks(shape, seen, config)

    def coded(c: A2ATSConfig) -> Scorer:
        return lambda index, seen: approximate(seen.turned, seen.keys, *c.learnt(index, seen.keys.device))

    generator = torch.Generator().manual_seed(0)
    alone: dict[str, Scorer] = {
        "plain codes of rotated keys": codes_of_rotated(shape, seen[0], last, config),
        "keys at one distance, no codes": lambda index, seen: products(seen.turned, seen.keys),
        "exact scores": lambda index, seen: seen.logits,
        "the latest": lambda index, seen: torch.arange(seen.logits.shape[2]).expand(seen.logits.shape).float(),
        "chance": lambda index, seen: torch.rand(seen.logits.shape, generator=generator),
    }
    scorers = {f"{name} {size} {seed}": coded(c) for (name, size, seed), c in learnt.items()} | alone
    wanted = config.contexts * config.length // 1024
    test = torch.cat(text_segments(tokenizer, folder / "test.txt", wanted)).view(config.contexts, config.length)
    mass, errors = recalled(model, test, scorers, config)

    groups = {
        (name, size): [f"{name} {size} {seed}" for seed in range(config.seeds)]
        for name in VARIANTS
        for size in config.codebook_sizes
    } | {(name, last if "codes of" in name else None): [name] for name in alone}
    total = {name: x.sum(0) for name, x in mass.items()}
    share = {key: [float(total[run][0] / total[run][2]) for run in runs] for key, runs in groups.items()}
    bound = share["exact scores", None][0]

    def mean(runs: list[str], one: int, other: int) -> float:
        return statistics.fmean(float(total[run][one] / total[run][other]) for run in runs)

    rows = []
    for (name, size), runs in groups.items():
        off = statistics.fmean(float((errors[run][:, 0] / errors[run][:, 1]).mean()) for run in runs)
        rows.append(
            {
                "scores": name,
                "codes": size,
                "mass": round(statistics.fmean(share[name, size]), 4),
                "sd": round(statistics.stdev(share[name, size]), 4) if len(runs) > 1 else None,
                "of exact": round(statistics.fmean(share[name, size]) / bound, 4),
                "joined in a group": round(mean(runs, 1, 2), 4),
                "mean over heads": round(mean(runs, 3, 4), 4),
                "error of scores": round(off, 4) if name in VARIANTS else None,
            }
        )
    tables = {f"Attention outside window and sinks that {config.topk:.0%} of the tokens hold": rows}
    ratio = {
        size: statistics.fmean(share["query-aware codes", size]) / statistics.fmean(share["plain codes", size])
        for size in config.codebook_sizes
    }
    tables["Query-aware against plain codes"] = [
        {"codes": size, "ratio": round(value, 4), "bar": BAR, "reached": value >= BAR} for size, value in ratio.items()
    ]
    aware, plain = (share[name, last] for name in VARIANTS)
    note = f"Exact scores find {bound:.3f}; query-aware codes find {statistics.fmean(aware) / bound:.1%} of that, "
    note += f"keys at one distance without codes {share['keys at one distance, no codes', None][0] / bound:.1%}, "
    note += f"plain codes of rotated keys {share['plain codes of rotated keys', last][0] / bound:.1%}. Query-aware "
    note += "against plain codes by size: " + ", ".join(f"{size}: {value:.3f}" for size, value in ratio.items()) + "."
    if config.segments:
        segments = text_segments(tokenizer, folder / "test.txt", config.segments)
        near = StreamingLLMConfig(window=config.window, sinks=config.n_sink, reposition=False)
        makers: dict[str, Callable[[], Any]] = {"full cache": lambda: DynamicCache(config=model.config)}
        makers |= {name: lambda c=learnt[name, last, 0]: c.make_cache(model) for name in VARIANTS}
        makers["window and sinks alone"] = lambda: near.make_cache(model)
        tables["Perplexity in calls of one token"] = []
        for name, make in logging.tqdm(makers.items(), desc="perplexity"):
            value, held = continued(model, make, segments)
            row = {"cache": name, "perplexity": round(value, 3), "KiB held": round(held / 1024, 1)}
            tables["Perplexity in calls of one token"].append(row)
            note += f" Perplexity, {name}: {value:.2f}."
    series = {}
    for (name, size), runs in groups.items():
        by_layer = sum(mass[run][:, 0] / mass[run][:, 2] for run in runs) / len(runs)
        series[f"{name}, {size}" if size else name] = (list(range(len(by_layer))), by_layer.tolist(), None)
    lines(out / "recall.png", series, "layer", f"attention found by {config.topk:.0%} of the tokens", "SmolLM2-135M")
    return {
        "evidence": {
            "claim": METHOD.claim,
            "paper": "less loss of accuracy than other retrieval at similar or lower cost (Llama-3.1-8B-Instruct)",
            "metric": f"share of the attention outside window and sinks found by {config.topk:.0%} of the tokens",
            "setting": f"SmolLM2-135M-Instruct, WikiText-2 test, {config.contexts} texts of {config.length} tokens, "
            f"{last} codes learnt on {seen[2]} tokens",
            "method": "a2ats",
            "ours": round(statistics.fmean(aware), 4),
            "ours_sd": round(statistics.stdev(aware), 4) if len(aware) > 1 else None,
            "n": config.seeds,
            "baseline_name": "plain vector quantisation",
            "baseline": round(statistics.fmean(plain), 4),
            "baseline_sd": round(statistics.stdev(plain), 4) if len(plain) > 1 else None,
            "reproduced": ratio[last] >= BAR,
            "note": f"Reproduced means at least {BAR} times plain codes; it is {ratio[last]:.3f}. {note}",
        },
        "tables": tables,
        "artifacts": ["recall.png"],
    }
