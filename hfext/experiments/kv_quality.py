"""Quality, bytes and decoding time of key-value caches on one model, by one protocol.

SmolLM2-135M-Instruct on WikiText-2. Perplexity: segments of 1024 tokens, the first 768 prefilled with exact attention
and compressed, the rest fed in calls of 32. Pass key and needle: 20 contexts of 700 tokens, compressed without the
question, then question and answer in one call. Bytes: what the cache of a bfloat16 copy of the model holds after a
prefill of 768 tokens, against a full fp16 cache. Time: CPU seconds of a decoded token, by turns, at several lengths.

The results of a finished method are kept in the output folder and used again when the settings are the same.
"""

import copy
import functools
import json
import random
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, QuantizedCache
from transformers.utils import logging

from .. import __version__, kv_cache
from ..recipe import write_json
from . import _smollm2
from ._data import shared_data
from ._kv_protocol import (
    Make,
    Question,
    Recording,
    Setting,
    decode_times,
    held_bytes,
    perplexity,
    quality,
    record,
    replay,
    replay_difference,
)
from ._plots import lines

logger = logging.get_logger(__name__)

SEGMENT, PREFILL, CALL, CONTEXT = 1024, 768, 32, 700
FILLER = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
CITIES = ("Lisbon Oslo Cairo Lima Quito Delhi Kyoto Turin Bergen Havana Dakar Perth Sofia Riga Hanoi Nairobi").split()


def stock(backend: str, bits: int | None = None, **fields: Any) -> Make:
    """A `QuantizedCache` of transformers."""
    options = fields if bits is None else {"nbits": bits, **fields}
    return lambda model: QuantizedCache(backend, model.config, **options)


def ours(config: str, **fields: Any) -> Make:
    """A cache of this library: the class `config` of `hfext.kv_cache` with `fields`."""
    return lambda model: getattr(kv_cache, config)(**fields).make_cache(model)


# Name to a function that makes an empty cache for a model. Digits at the end are bits, or the share of tokens or
# channels kept: plots join what is before them.
METHODS: dict[str, Callable[[PreTrainedModel], Cache]] = {
    "dynamic": lambda model: DynamicCache(config=model.config),
    "fp8": stock("fp8"),
    "quanto4": stock("quanto", 4),
    "quanto2": stock("quanto", 2),
    "hqq4": stock("hqq", 4, axis_key=1, axis_value=1),
    "hqq2": stock("hqq", 2, axis_key=1, axis_value=1),
    "kivi4": ours("KIVIConfig", bits=4, group_size=32, residual_length=32),
    "kivi2": ours("KIVIConfig", bits=2, group_size=32, residual_length=32),
    "turboquant4": ours("TurboQuantConfig", bits=4),
    "turboquant3": ours("TurboQuantConfig", bits=3),
    "turboquant2": ours("TurboQuantConfig", bits=2),
    "turboquant_r32_2": ours("TurboQuantConfig", bits=2, residual_length=32),
    "rotatekv4": ours("RotateKVConfig", bits=4, group_size=64),
    "rotatekv3": ours("RotateKVConfig", bits=3, group_size=64),
    "rotatekv2": ours("RotateKVConfig", bits=2, group_size=64),
    "rotatekv_r32_3": ours("RotateKVConfig", bits=3, group_size=64, residual_length=32),
    "rotatekv_r32_2": ours("RotateKVConfig", bits=2, group_size=64, residual_length=32),
    "rotatekv_mean_r32_2": ours(
        "RotateKVConfig", bits=2, group_size=64, residual_length=32, subtract_mean=True, reorder="none"
    ),
    "prefixkv50": ours("PrefixKVConfig", ratio=0.5),
    "prefixkv25": ours("PrefixKVConfig", ratio=0.75),
    "uniform50": ours("PrefixKVConfig", ratio=0.5, profile="uniform"),
    "uniform25": ours("PrefixKVConfig", ratio=0.75, profile="uniform"),
    "snapkv50": ours("SnapKVConfig", capacity=0.5),
    "snapkv25": ours("SnapKVConfig", capacity=0.25),
    "h2o50": ours("H2OConfig", heavy=0.25, recent=0.25),
    "h2o25": ours("H2OConfig", heavy=0.125, recent=0.125),
    "streamingllm50": ours("StreamingLLMConfig", window=0.5),
    "streamingllm25": ours("StreamingLLMConfig", window=0.25),
    "think60": ours("ThinKConfig", ratio=0.4),
}
# Perplexity of 8 segments in an earlier study with the same protocol, and how far a run may be from it.
KNOWN = {
    "dynamic": 21.408,
    "fp8": 21.643,
    "quanto4": 21.749,
    "quanto2": 118.43,
    "hqq4": 21.586,
    "hqq2": 86.47,
}
NEAR = 0.02


@dataclass(kw_only=True)
class Config:
    """
    Args:
        methods: Names in `METHODS`.
        segments: Text segments of 1024 tokens.
        passkeys: Contexts of the pass-key and of the needle test; 0 for none.
        lengths: Context lengths of the decoding times; empty for none.
        steps: Timed tokens of each cache.
        seed: Of keys, cities and depths.
        data_dir: Folder that holds `wikitext2`; the shared data by default.
        replay: Fill caches from recorded inputs of the attention modules; `false` prefills every time.
        tolerance: Difference of logits up to which a replay counts as the prefill; beyond it the method is prefilled.
    """

    methods: list[str] = field(default_factory=lambda: list(METHODS))
    segments: int = 8
    passkeys: int = 20
    lengths: list[int] = field(default_factory=lambda: [1024, 4096, 8192])
    steps: int = 8
    seed: int = 0
    data_dir: str | None = None
    replay: bool = True
    tolerance: float = 1e-3

    def __post_init__(self):
        unknown = [name for name in self.methods if name not in METHODS]
        if unknown or not self.methods or len(set(self.methods)) < len(self.methods):
            raise ValueError(f"methods is {self.methods} but must be different names of {', '.join(METHODS)}.")
        for name, least in (("segments", 1), ("passkeys", 0), ("steps", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)} but must be >= {least}.")
        if any(length < 1 for length in self.lengths):
            raise ValueError(f"lengths is {self.lengths} but must be >= 1.")


def text_segments(tokenizer: Any, path: Path, count: int) -> list[Tensor]:
    """The first `count` segments [1, 1024] of a file, without special tokens."""
    # The tokens of a prefix of the file are a prefix of its tokens, but for the last ones.
    text = path.read_text(encoding="utf-8")[: count * SEGMENT * 8]
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    if ids.shape[1] < count * SEGMENT + 8:
        raise ValueError(
            f"segments is {count} but {path.name} holds only {ids.shape[1] // SEGMENT} of {SEGMENT} tokens."
        )
    return list(ids[:, : count * SEGMENT].split(SEGMENT, dim=1))


def passkey_questions(tokenizer: Any, count: int, seed: int) -> list[Question]:
    """A 5-digit key in filler sentences, at depths (i + 0.5) / count."""
    rng = random.Random(seed)
    found = []
    for i in range(count):
        key = f"{rng.randrange(10_000, 100_000)}"
        needle = f" The pass key is {key}. Remember it. {key} is the pass key."
        asked = (" What is the pass key? The pass key is", f" {key}")
        found.append(_planted(tokenizer, [FILLER] * CONTEXT, needle, (i + 0.5) / count, *asked))
    return found


def needle_questions(tokenizer: Any, text: str, count: int, seed: int) -> list[Question]:
    """One sentence with a number for a city in running text."""
    rng = random.Random(seed + 1)
    sentences = [part + " ." for part in text[: count * CONTEXT * 12].split(" .") if part.strip()]
    found, first = [], 0
    for i in range(count):
        city, number = rng.choice(CITIES), f"{rng.randrange(1000, 10_000)}"
        needle = f" The secret number of {city} is {number} ."
        question = _planted(
            tokenizer,
            sentences[first:],
            needle,
            (i + 0.5) / count,
            f" The secret number of {city} is",
            f" {number}",
        )
        found.append(question)
        first = (first + 30) % max(1, len(sentences) - 200)
    return found


def _planted(tokenizer: Any, pieces: list[str], needle: str, depth: float, question: str, answer: str) -> Question:
    """`pieces` cut to 700 tokens with the needle between two of them, at `depth`."""

    def ids(piece: str) -> list[int]:
        return tokenizer(piece, add_special_tokens=False).input_ids

    inside = ids(needle)
    room = CONTEXT - len(inside)
    before: list[int] = []
    rest: list[int] = []
    for piece in pieces:
        part = ids(piece)
        if not rest and len(before) + len(part) <= depth * room:
            before += part
        else:
            rest += part
        if len(before) + len(rest) >= room:
            break
    context = before + inside + rest[: room - len(before)]
    return Question(*(torch.tensor([x]) for x in (context, ids(question), ids(answer))))


def prepared(config: Config, model: PreTrainedModel, tokenizer: Any) -> Setting:
    """Texts, questions, and the recorded prefill of each."""
    folder = shared_data("wikitext2", config.data_dir)
    if folder is None:
        raise FileNotFoundError("kv_quality needs WikiText-2: set data_dir to a folder that holds wikitext2/test.txt.")
    segments = text_segments(tokenizer, folder / "test.txt", config.segments)
    questions = {
        "passkey": passkey_questions(tokenizer, config.passkeys, config.seed),
        "needle": needle_questions(
            tokenizer, (folder / "valid.txt").read_text(encoding="utf-8"), config.passkeys, config.seed
        ),
    }
    prompts = [ids[:, :PREFILL] for ids in segments]
    contexts = {name: [q.context for q in asked] for name, asked in questions.items()}
    with logging.tqdm(total=len(prompts) + sum(map(len, contexts.values())), desc="prefill") as bar:

        def recorded(ids: Tensor) -> Recording:
            bar.update()
            return record(model, ids)

        return Setting(
            segments,
            PREFILL,
            CALL,
            questions,
            [recorded(ids) for ids in prompts],
            {name: [recorded(ids) for ids in texts] for name, texts in contexts.items()},
        )


def elements(model: PreTrainedModel, tokens: int) -> int:
    """Numbers in the full cache of `tokens` tokens."""
    c = model.config
    return 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * tokens


def cache_bytes(model: PreTrainedModel, make: Make, recording: Recording) -> int:
    """What the cache of `model` holds after the recorded prompt."""
    cache = make(model)
    replay(model, cache, recording.to(model.dtype))
    return held_bytes(cache)


def measured(model: PreTrainedModel, half: PreTrainedModel, make: Make, setting: Setting, config: Config) -> dict:
    """One method: quality, bytes, and whether the replay was its prefill."""
    first, ids = setting.prompts[0], setting.segments[0]
    off = replay_difference(model, make, first, ids, CALL) if config.replay else 0.0
    if off > config.tolerance:
        logger.warning(f"A replayed prefill differs by {off:.2g} from a real one; every prompt is prefilled instead.")
    held = cache_bytes(half, make, first)
    return {
        **quality(model, make, setting, config.replay and off <= config.tolerance),
        "replay_difference": off,
        "bytes": held,
        "bytes_fp32": cache_bytes(model, make, first),
        "ratio": held / (2 * elements(model, PREFILL)),
        "bits": 8 * held / elements(model, PREFILL),
    }


def kept(path: Path, settings: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """`measure()`, or what it returned for the same settings in an earlier run."""
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        if found.get("settings") == settings:
            return found
    try:
        found = {"settings": settings, **measure()}
    except ImportError as error:
        return {"settings": settings, "missing": str(error)}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, found)
    return found


def timed(model: PreTrainedModel, methods: list[str], recording: Recording, length: int, steps: int) -> dict:
    """Milliseconds of a decoded token behind `length` tokens: median and mean of each method, by turns."""
    prompt, caches = recording.resized(length), {}
    for name in methods:
        caches[name] = METHODS[name](model)
        replay(model, caches[name], prompt)
    times = decode_times(model, caches, prompt.ids[:, -1:], steps)
    return {
        name: {"median_ms": 1e3 * statistics.median(t), "mean_ms": 1e3 * statistics.fmean(t)}
        for name, t in times.items()
    }


def run(config: Config, out: Path) -> dict:
    model, tokenizer = _smollm2.load()
    model.eval()
    settings = {k: v for k, v in asdict(config).items() if k not in ("methods", "lengths", "steps", "data_dir")}
    settings["version"] = __version__

    @functools.cache
    def setting() -> Setting:
        return prepared(config, model, tokenizer)

    @functools.cache
    def half() -> PreTrainedModel:
        return copy.deepcopy(model).to(torch.bfloat16)

    results = {}
    with logging.tqdm(total=len(config.methods), desc="methods") as bar:
        for name in config.methods:
            results[name] = kept(
                out / "methods" / f"{name}.json",
                settings,
                lambda make=METHODS[name]: measured(model, half(), make, setting(), config),
            )
            bar.update()
    present = [name for name in config.methods if "missing" not in results[name]]
    times = {
        length: kept(
            out / "times" / f"{length}.json",
            {"methods": present, "steps": config.steps, "version": __version__},
            lambda length=length: timed(model, present, setting().prompts[0], length, config.steps),
        )
        for length in config.lengths
    }
    return {
        "tables": tables(config, results, times, present),
        "artifacts": [str(path) for path in plots(out, results, present)],
    }


def tables(config: Config, results: dict[str, dict], times: dict[int, dict], present: list[str]) -> dict[str, list]:
    rows, near = [], []
    for name in config.methods:
        r = results[name]
        if name not in present:
            rows.append({"method": name, "state": "not installed"})
            continue
        row = {
            "method": name,
            "bits": round(r["bits"], 3),
            "of fp16": round(r["ratio"], 4),
            "KiB": round(r["bytes"] / 1024, 1),
            f"PPL {config.segments}": round(perplexity(r["nll"]), 3),
        }
        if config.segments > 4:
            row["PPL 4"] = round(perplexity(r["nll"][:4]), 3)
        for test in ("passkey", "needle"):
            if test in r:
                row[f"{test} exact"], row[f"{test} tokens"] = (round(r[test][k], 3) for k in ("exact", "tokens"))
                row[f"{test} logprob"] = round(r[test]["logprob"], 3)
        row["CPU s segments"] = round(r["segments_cpu_s"], 1)
        row["CPU s retrieval"] = round(r["retrieval_cpu_s"], 1)
        rows.append(row)
        if name in KNOWN and config.segments == 8:
            off = perplexity(r["nll"]) / KNOWN[name] - 1
            near.append(
                {
                    "method": name,
                    "PPL": row["PPL 8"],
                    "earlier study": KNOWN[name],
                    "off by": f"{off:+.2%}",
                    "met": abs(off) <= NEAR,
                }
            )
    found = {"Quality and bytes": rows}
    if near:
        found[f"Perplexity against an earlier study, within {NEAR:.0%}"] = near
    if times:
        found["CPU milliseconds of a decoded token, median"] = [
            {"method": name, **{f"{length}": round(t[name]["median_ms"], 1) for length, t in times.items()}}
            for name in present
        ]
    return found


def plots(out: Path, results: dict[str, dict], present: list[str]) -> list[Path]:
    """Perplexity and pass-key accuracy against bytes; the settings of one method are joined by a line."""
    paths = []
    for key, label, value in (
        ("perplexity", "perplexity", lambda r: perplexity(r["nll"])),
        ("passkey", "pass-key tokens found", lambda r: r["passkey"]["tokens"]),
    ):
        series: dict[str, list[tuple[float, float]]] = {}
        for name in present:
            if key == "passkey" and "passkey" not in results[name]:
                continue
            series.setdefault(name.rstrip("0123456789"), []).append((results[name]["ratio"], value(results[name])))
        if series:
            drawn = {name: (*zip(*sorted(points), strict=True), None) for name, points in series.items()}
            paths.append(
                lines(
                    out / f"{key}.png",
                    drawn,
                    "bytes against the full fp16 cache, after 768 tokens",
                    label,
                    "SmolLM2-135M",
                    logx=True,
                    logy=key == "perplexity",
                )
            )
    return paths
