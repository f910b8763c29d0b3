"""RotateKV at two bits, part by part: what rotation, order, place before the rotary embedding, clip and sinks do.

SmolLM2-135M-Instruct on WikiText-2 by the protocol of `kv_quality`: the first 768 tokens of a segment prefilled with
exact attention and compressed, the other 256 fed in calls and scored. Orders are learnt from the validation text.
"""

import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.utils import logging

from .. import kv_cache
from ..kv_cache.rotatekv import METHOD
from . import _smollm2
from ._data import wikitext2
from ._kv_protocol import Make, Recording, continuation_nll, held_bytes, perplexity, record, replay
from .kv_quality import PREFILL, elements, text_segments

# Options of RotateKVConfig; 64 channels a group and head by head, as the variants are compared.
VARIANTS: dict[str, dict[str, Any]] = {
    "as released": {},
    "without sinks": {"sink_topk": 0},
    "clip 1": {"clip": 1.0},
    "rotation without reorder": {"reorder": "none"},
    "reorder without rotation": {"rotation": "none"},
    "rotation behind the rotary embedding, no reorder": {"rotation": "post_rope", "reorder": "none"},
    "neither rotation nor reorder": {"rotation": "none", "reorder": "none"},
    "neither, clip 1": {"rotation": "none", "reorder": "none", "clip": 1.0},
    "reorder before the rotation": {"reorder": "before"},
    "three heads together": {"head_group": 4},
    "order of each prompt": {"calibrated": False},
    "32 recent tokens": {"residual_length": 32},
    "mean and no reorder, 32 recent": {"residual_length": 32, "subtract_mean": True, "reorder": "none"},
    "mean and reorder, 32 recent": {"residual_length": 32, "subtract_mean": True},
    "three heads, 32 recent": {"head_group": 4, "residual_length": 32},
    "128 recent tokens": {"residual_length": 128},
    "3 bits": {"bits": 3},
    "3 bits, 32 recent": {"bits": 3, "residual_length": 32},
    "4 bits": {"bits": 4},
}
BASE, PLAIN = "as released", "neither, clip 1"


@dataclass(kw_only=True)
class Config:
    """
    Args:
        segments: Text segments of 1024 tokens.
        call: Tokens of a call behind the prompt; those of one call see each other exactly.
        single: Segments that are fed token by token as well, as `generate` does; 0 for none.
        calibration_tokens: Of the validation text, in rows of 512.
        variants: Names in `VARIANTS`; all by default.
        data_dir: Folder that holds `wikitext2`; the shared data by default.
    """

    segments: int = 8
    call: int = 32
    single: int = 2
    calibration_tokens: int = 4096
    variants: list[str] = field(default_factory=lambda: list(VARIANTS))
    data_dir: str | None = None

    def __post_init__(self):
        for name, least in (("segments", 2), ("call", 1), ("single", 0), ("calibration_tokens", 512)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)} but must be >= {least}.")
        unknown = [name for name in self.variants if name not in VARIANTS]
        missing = [name for name in (BASE, PLAIN) if name not in self.variants]
        if unknown or missing:
            raise ValueError(
                f"variants must be names of {', '.join(VARIANTS)}, with {BASE!r} and {PLAIN!r} among them."
            )


def made(options: dict[str, Any], model: PreTrainedModel, text: torch.Tensor) -> kv_cache.RotateKVConfig:
    """The config of a variant, calibrated where there is something to learn."""
    options = {"group_size": 64, "head_group": 1, **options}
    learns = options.pop("calibrated", True)
    config = kv_cache.RotateKVConfig(**options)
    return config.calibrate(model, text) if learns and config.learns else config


def scores(
    model: PreTrainedModel, make: Make, prompts: list[Recording], segments: list[torch.Tensor], call: int
) -> list[tuple[float, int]]:
    """NLL and number of predictions of each segment behind its prompt."""
    found = []
    for prompt, ids in zip(prompts, segments, strict=True):
        cache = make(model)
        replay(model, cache, prompt)
        found.append(continuation_nll(model, cache, ids, PREFILL, call))
    return found


def run(config: Config, out: Path) -> dict:
    folder = wikitext2(config.data_dir)
    model, tokenizer = _smollm2.load()
    model.eval()
    segments = text_segments(tokenizer, folder / "test.txt", config.segments)
    valid = (folder / "valid.txt").read_text(encoding="utf-8")[: config.calibration_tokens * 8]
    ids = tokenizer(valid, add_special_tokens=False, return_tensors="pt").input_ids[0, : config.calibration_tokens]
    prompts = [record(model, segment[:, :PREFILL]) for segment in logging.tqdm(segments, desc="prefill")]
    single = (prompts[: config.single], segments[: config.single], 1)

    def full(model: PreTrainedModel) -> DynamicCache:
        return DynamicCache(config=model.config)

    exact = scores(model, full, prompts, segments, config.call)
    exact_single = scores(model, full, *single)
    rows, increase = [], {}
    for name in logging.tqdm(config.variants, desc="variants"):
        chosen = made(VARIANTS[name], model, ids)
        nll = scores(model, chosen.make_cache, prompts, segments, config.call)
        cache = chosen.make_cache(model)
        replay(model, cache, prompts[0])
        increase[name] = [math.exp(a / n) - math.exp(b / n) for (a, n), (b, _) in zip(nll, exact, strict=True)]
        row = {
            "variant": name,
            "bits": chosen.bits,
            "perplexity": round(perplexity(nll), 3),
            "increase": round(perplexity(nll) - perplexity(exact), 3),
            "bits held a number": round(8 * held_bytes(cache) / elements(model, PREFILL), 2),
        }
        if config.single:
            row[f"token by token, {config.single} segments"] = round(
                perplexity(scores(model, chosen.make_cache, *single)), 3
            )
        rows.append(row)
    first = {"variant": "full cache", "bits": 32, "perplexity": round(perplexity(exact), 3), "increase": 0.0}
    if config.single:
        first[f"token by token, {config.single} segments"] = round(perplexity(exact_single), 3)
    ours, plain = increase[BASE], increase[PLAIN]
    evidence = {
        "claim": METHOD.claim,
        "paper": "below 0.3",
        "metric": "increase of perplexity at 2 bits",
        "setting": f"SmolLM2-135M-Instruct, WikiText-2, {config.segments} segments, 768 tokens compressed, 256 scored",
        "method": "rotatekv, as released",
        "ours": statistics.fmean(ours),
        "ours_sd": statistics.stdev(ours),
        "n": config.segments,
        "baseline_name": "2 bits a token without rotation and reorder",
        "baseline": statistics.fmean(plain),
        "baseline_sd": statistics.stdev(plain),
        "reproduced": all(a < b / 3 for a, b in zip(ours, plain, strict=True)),
        "note": "Reproduced if every segment loses less than a third of what plain quantisation loses. The paper's "
        "increase below 0.3 is of a model a hundred times larger. Tokens of one call see each other exactly.",
    }
    return {"evidence": evidence, "tables": {"RotateKV, part by part": [first, *rows]}, "artifacts": []}
