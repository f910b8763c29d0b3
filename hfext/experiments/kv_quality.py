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
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from .. import __version__
from ..recipe import write_json
from . import _smollm2
from ._data import wikitext2
from ._kv_methods import METHODS
from ._kv_protocol import (
    Make,
    Recording,
    Setting,
    continuation_nll,
    decode_times,
    held_bytes,
    perplexity,
    prefill,
    quality,
    record,
    replay,
    replay_difference,
)
from ._kv_questions import needle_questions, passkey_questions
from ._plots import lines

logger = logging.get_logger(__name__)

SEGMENT, PREFILL, CALL = 1024, 768, 32


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
        single: Segments whose continuation is also fed token by token, as `generate` does: then no token sees the
            others of its call exactly. 0 for none.
        passkeys: Contexts of the pass-key and of the needle test; 0 for none.
        timed: Which of the methods are timed.
        lengths: Context lengths of the decoding times; empty for none.
        steps: Timed tokens of each cache.
        seed: Of keys, cities and depths.
        data_dir: Folder that holds `wikitext2`; the shared data by default.
        replay: Fill caches from recorded inputs of the attention modules; `false` prefills every time.
        tolerance: Difference of logits up to which a replay counts as the prefill; beyond it the method is prefilled.
    """

    methods: list[str] = field(default_factory=lambda: list(METHODS))
    segments: int = 8
    single: int = 1
    passkeys: int = 20
    timed: list[str] = field(default_factory=lambda: ["dynamic", "quanto4", "quanto2", "kivi2", "rotatekv_r32_2"])
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
        for name, least in (("segments", 1), ("single", 0), ("passkeys", 0), ("steps", 1)):
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


def prepared(config: Config, model: PreTrainedModel, tokenizer: Any) -> Setting:
    """Texts, questions, and the recorded prefill of each."""
    folder = wikitext2(config.data_dir)
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
    replayed = config.replay and off <= config.tolerance
    return {
        **quality(model, make, setting, replayed),
        "single_nll": [one_by_one(model, make, setting, i, replayed) for i in range(config.single)],
        "replay_difference": off,
        "bytes": held,
        "bytes_fp32": cache_bytes(model, make, first),
        "ratio": held / (2 * elements(model, PREFILL)),
        "bits": 8 * held / elements(model, PREFILL),
    }


def one_by_one(model: PreTrainedModel, make: Make, setting: Setting, index: int, replayed: bool) -> tuple[float, int]:
    """NLL of a segment behind its prompt in calls of one token, and the number of predictions."""
    cache, ids = make(model), setting.segments[index]
    if replayed:
        replay(model, cache, setting.prompts[index])
    else:
        prefill(model, cache, ids[:, :PREFILL])
    return continuation_nll(model, cache, ids, PREFILL, 1)


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
    settings = {
        k: v for k, v in asdict(config).items() if k not in ("methods", "timed", "lengths", "steps", "data_dir")
    }
    settings["version"] = __version__

    @functools.cache
    def setting() -> Setting:
        return prepared(config, model, tokenizer)

    @functools.cache
    def first_prompt() -> Recording:
        return record(model, text_segments(tokenizer, wikitext2(config.data_dir) / "test.txt", 1)[0][:, :PREFILL])

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
    clocked = [name for name in config.timed if name in present]
    times = {
        length: kept(
            out / "times" / f"{length}.json",
            {"methods": clocked, "steps": config.steps, "version": __version__},
            lambda length=length: timed(model, clocked, first_prompt(), length, config.steps),
        )
        for length in config.lengths
    }
    return {
        "tables": tables(config, results, times, present),
        "artifacts": [path.name for path in plots(out, results, present)],
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
        if config.single:
            row[f"PPL {config.single}, token by token"] = round(perplexity(r["single_nll"]), 3)
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
    if config.segments == 8:
        found["Bars"] = bars(results, times, present)
    if times:
        found["CPU milliseconds of a decoded token, median"] = [
            {"method": name, **{f"{length}": round(t[name]["median_ms"], 1) for length, t in times.items()}}
            for name in next(iter(times.values()))
            if name != "settings"
        ]
    return found


def bars(results: dict[str, dict], times: dict[int, dict], present: list[str]) -> list[dict[str, Any]]:
    """What was asked of RotateKV beforehand, where the methods it takes were run."""
    ppl = {name: perplexity(results[name]["nll"]) for name in present}
    rows = [
        {"what": f"perplexity of {name}", "value": round(ppl[name], 3), "bar": f"<= {bar}", "met": ppl[name] <= bar}
        for name, bar in (("rotatekv_r32_2", 25.3), ("rotatekv_mean_r32_2", 25.1), ("rotatekv4", 21.75))
        if name in ppl
    ]
    for rival in ("quanto2", "hqq2"):
        if {rival, "rotatekv_r32_2"} <= ppl.keys():
            value = ppl[rival] / ppl["rotatekv_r32_2"]
            what = f"perplexity of {rival} over that of rotatekv_r32_2"
            rows.append({"what": what, "value": round(value, 2), "bar": ">= 3", "met": value >= 3})
    for length, t in times.items():
        if length == 8192 and {"quanto2", "rotatekv_r32_2"} <= t.keys():
            value = t["rotatekv_r32_2"]["median_ms"] / t["quanto2"]["median_ms"]
            what = f"decoding time of rotatekv_r32_2 over that of quanto2, {length} tokens"
            rows.append({"what": what, "value": round(value, 2), "bar": "<= 0.5", "met": value <= 0.5})
    return rows


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
