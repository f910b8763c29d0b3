"""How much of the attention A2ATS finds: codes learnt with the queries, plain ones, exact scores and chance.

SmolLM2-135M-Instruct on WikiText-2. Codebooks are learnt on the validation file. On contexts of the test file every
query head selects a share of the tokens, and the measure is the part of its exact attention to all tokens outside
window and sinks that the selected ones hold. Then perplexity: segments of 1024 tokens, the first 768 prefilled, the
rest fed one token a call, so that every prediction goes through the selection.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.utils import logging

from ..kv_cache import A2ATSConfig, StreamingLLMConfig
from ..kv_cache._calibration import Calibration, Observed, watch
from ..kv_cache._geometry import Geometry, geometry
from ..kv_cache._query_aware_vq import encode, factor, score_table
from ..kv_cache._retrieval import at_distance, best
from ..kv_cache._state import project_queries
from ..kv_cache.a2ats import METHOD, seen_by
from . import _smollm2
from ._data import shared_data
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
        codebook_size: Codes of a kv head.
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
    codebook_size: int = 256
    distance: int = 2048
    window: int = 64
    n_sink: int = 8
    contexts: int = 3
    length: int = 2048
    queries: int = 48
    calibration_texts: int = 8
    max_iterations: int = 20
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
        self.options()

    def options(self, **fields: Any) -> A2ATSConfig:
        names = ("topk", "codebook_size", "distance", "window", "n_sink")
        return A2ATSConfig(**{name: getattr(self, name) for name in names}, **fields)


@dataclass(frozen=True)
class Attention:
    """One layer of one text: what selecting needs to know.

    Attributes:
        mass: Exact attention probabilities to tokens outside window and sinks [queries, heads, tokens].
        keys: Before the rotary embedding [1, kv_heads, tokens, head_dim].
        turned: Queries turned for keys `distance` tokens behind [1, heads, queries, head_dim].
        logits: Exact ones [queries, heads, tokens].
        place: Index of every query [queries].
    """

    mass: Tensor
    keys: Tensor
    turned: Tensor
    logits: Tensor
    place: Tensor


def attention_of(seen: Observed, shape: Geometry, config: Config) -> Attention:
    """Exact attention of some queries of a text, and what stands for it."""
    tokens = seen.keys.shape[2]
    place = torch.linspace(512, tokens - 1, config.queries).long()
    group = shape.num_heads // shape.num_kv_heads
    rotary, step = shape.rotary, seen.step
    rotated = rotary.rotate(seen.keys, step.cos.float(), step.sin.float())[0].repeat_interleave(group, dim=0)
    logits = (step.queries()[0, :, place].float() @ rotated.transpose(1, 2)).transpose(0, 1) * step.module.scaling
    token, here = torch.arange(tokens), place.unsqueeze(1)
    logits = logits.masked_fill((token > here).unsqueeze(1), -torch.inf)
    far = (token <= here - config.window) & (token >= config.n_sink)
    mass = logits.softmax(-1) * far.unsqueeze(1)
    flat = project_queries(step.module, step.hidden_states[:, place], shape).float()
    return Attention(mass, seen.keys, at_distance(flat, rotary, config.distance), logits, place)


def approximate(seen: Attention, codebook: Tensor | None, lower: Tensor, inverse: Tensor) -> Tensor:
    """Scores from codes, or without a codebook from the keys at `distance`: [queries, heads, tokens]."""
    kv_heads = seen.keys.shape[1]
    grouped = seen.turned[0].unflatten(0, (kv_heads, -1))
    if codebook is None:
        return (grouped @ seen.keys[0].unsqueeze(1).transpose(-1, -2)).flatten(0, 1).transpose(0, 1)
    table = score_table(seen.turned, codebook, inverse)[0]
    codes = encode(seen.keys, codebook, lower)[0].repeat_interleave(grouped.shape[1], dim=0)
    return table.gather(2, codes.unsqueeze(1).expand(-1, table.shape[1], -1)).transpose(0, 1)


def found(seen: Attention, scores: Tensor, config: Config, kv_heads: int) -> Tensor:
    """Attention mass of selected tokens, alone and joined over a group, and of all: [3, heads], summed over queries."""
    count = (config.topk * (seen.place + 1) + 1e-9).floor().long().clamp(min=1)
    marks = best(scores.masked_fill(seen.mass == 0, -torch.inf), count)
    group = marks.shape[1] // kv_heads
    joined = marks.unflatten(1, (kv_heads, group)).any(2).repeat_interleave(group, dim=1)
    return torch.stack([(seen.mass * part).sum((0, 2)).double() for part in (marks, joined, torch.ones(1))])


def recalled(
    model: PreTrainedModel, texts: Tensor, scorers: dict[str, Callable[[int, Attention], Tensor]], config: Config
) -> dict[str, Tensor]:
    """Mass found by every scorer, [layers, 3, heads] as in `found`, over all texts."""
    shape = geometry(model)
    sums = {name: torch.zeros(len(shape.layers), 3, shape.num_heads, dtype=torch.float64) for name in scorers}

    def visit(observed: Observed) -> None:
        seen = attention_of(observed, shape, config)
        for name, scorer in scorers.items():
            scores = scorer(observed.layer, seen)
            sums[name][observed.layer] += found(seen, scores, config, shape.num_kv_heads)

    watch(model, texts, visit, config.length)
    return sums


def shares(mass: Tensor) -> tuple[float, float]:
    """Of [layers, 3, heads]: the share of all mass that heads find, and that groups find."""
    alone, joined, whole = mass.sum((0, 2)).tolist()
    return alone / whole, joined / whole


def continued(model: PreTrainedModel, make: Callable[[], Any], segments: list[Tensor]) -> tuple[float, float]:
    """Perplexity of the tokens after the prompts in calls of one token, and mean bytes at the end."""
    nll, held = [], []
    for ids in segments:
        cache = make()
        prefill(model, cache, ids[:, :PREFILL])
        nll.append(continuation_nll(model, cache, ids, PREFILL, 1))
        held.append(held_bytes(cache))
    return perplexity(nll), statistics.fmean(held)


def run(config: Config, out: Path) -> dict:
    model, tokenizer = _smollm2.load()
    model.eval()
    folder = shared_data("wikitext2", config.data_dir)
    if folder is None:
        raise FileNotFoundError("wikitext2 (valid.txt, test.txt) was not found: set data_dir or HFEXT_DATA.")
    shape = geometry(model)
    texts = torch.cat(text_segments(tokenizer, folder / "valid.txt", config.calibration_texts))
    keys, moments, tokens = seen_by(model, texts, config.distance, config.n_sink)

    learnt: dict[tuple[str, int], A2ATSConfig] = {}
    todo = [(seed, name) for seed in range(config.seeds) for name in VARIANTS]
    for seed, name in logging.tqdm(todo, desc="codebooks"):
        options = config.options(query_aware=VARIANTS[name])
        tensors: dict[str, Tensor] = {}
        for index in shape.layers:
            tensors |= options.fitted(index, keys[index], moments[index], config.max_iterations, seed)
        options.calibration = Calibration(tensors, shape.facts, tokens)
        learnt[name, seed] = options
    keys.clear()

    generator = torch.Generator().manual_seed(0)
    scorers: dict[str, Callable[[int, Attention], Tensor]] = {
        f"{name} {seed}": lambda index, seen, c=c: approximate(seen, *c.learnt(index, seen.keys.device))
        for (name, seed), c in learnt.items()
    }
    scorers |= {
        "exact scores": lambda index, seen: seen.logits,
        "keys at one distance, no codes": lambda index, seen: approximate(seen, None, *factor(moments[index])),
        "the latest": lambda index, seen: torch.arange(seen.logits.shape[2]).expand(seen.logits.shape).float(),
        "chance": lambda index, seen: torch.rand(seen.logits.shape, generator=generator),
    }
    wanted = config.contexts * config.length // 1024
    test = torch.cat(text_segments(tokenizer, folder / "test.txt", wanted)).view(config.contexts, config.length)
    mass = recalled(model, test, scorers, config)

    by_name = {name: [mass[f"{name} {seed}"] for seed in range(config.seeds)] for name in VARIANTS}
    by_name |= {name: [x] for name, x in mass.items() if name.rpartition(" ")[0] not in VARIANTS}
    share = {name: [shares(x) for x in runs] for name, runs in by_name.items()}
    alone = {name: [a for a, _ in runs] for name, runs in share.items()}
    bound = alone["exact scores"][0]
    rows = [
        {
            "scores": name,
            "mass of a head's own": round(statistics.fmean(alone[name]), 4),
            "sd": round(statistics.stdev(alone[name]), 4) if len(runs) > 1 else None,
            "joined in a group": round(statistics.fmean(j for _, j in runs), 4),
            "of exact": round(statistics.fmean(alone[name]) / bound, 4),
        }
        for name, runs in share.items()
    ]
    aware, plain = (alone[name] for name in VARIANTS)
    ratio = statistics.fmean(aware) / statistics.fmean(plain)
    tables = {
        f"Attention outside window and sinks that {config.topk:.0%} of the tokens hold": rows,
        "Query-aware against plain codes": [
            {"ratio": round(ratio, 4), "bar": BAR, "seeds": config.seeds, "met": ratio >= BAR}
        ],
    }
    note = f"Exact scores find {bound:.3f}, so query-aware codes find {statistics.fmean(aware) / bound:.1%} of that."
    if config.segments:
        segments = text_segments(tokenizer, folder / "test.txt", config.segments)
        near = StreamingLLMConfig(window=config.window, sinks=config.n_sink, reposition=False)
        makers: dict[str, Callable[[], Any]] = {"full cache": lambda: DynamicCache(config=model.config)}
        makers |= {name: lambda c=learnt[name, 0]: c.make_cache(model) for name in VARIANTS}
        makers["window and sinks alone"] = lambda: near.make_cache(model)
        tables["Perplexity in calls of one token"] = []
        for name, make in logging.tqdm(makers.items(), desc="perplexity"):
            value, held = continued(model, make, segments)
            row = {"cache": name, "perplexity": round(value, 3), "KiB held": round(held / 1024, 1)}
            tables["Perplexity in calls of one token"].append(row)
            note += f" Perplexity, {name}: {value:.2f}."
    series = {
        name: (
            list(range(len(runs[0]))),
            (sum(x[:, 0].sum(1) / x[:, 2].sum(1) for x in runs) / len(runs)).tolist(),
            None,
        )
        for name, runs in by_name.items()
    }
    picture = lines(
        out / "recall.png", series, "layer", f"attention found by {config.topk:.0%} of the tokens", "SmolLM2-135M"
    )
    return {
        "evidence": {
            "claim": METHOD.claim,
            "paper": "query-aware codes need fewer tokens than plain ones for the same accuracy",
            "metric": f"share of the attention outside window and sinks found by {config.topk:.0%} of the tokens",
            "setting": f"SmolLM2-135M-Instruct, WikiText-2 test, {config.contexts} texts of {config.length} tokens, "
            f"{config.codebook_size} codes learnt on {tokens} tokens",
            "method": "a2ats",
            "ours": round(statistics.fmean(aware), 4),
            "ours_sd": round(statistics.stdev(aware), 4) if len(aware) > 1 else None,
            "n": config.seeds,
            "baseline_name": "plain vector quantisation",
            "baseline": round(statistics.fmean(plain), 4),
            "baseline_sd": round(statistics.stdev(plain), 4) if len(plain) > 1 else None,
            "reproduced": ratio >= BAR,
            "note": f"Reproduced means at least {BAR} times plain codes; it is {ratio:.3f}. {note}",
        },
        "tables": tables,
        "artifacts": [str(picture)],
    }
