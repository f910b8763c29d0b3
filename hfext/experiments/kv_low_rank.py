"""Low-rank caches on SmolLM2-135M-Instruct and WikiText-2: xKV against its rivals at equal bytes, CSKV's training.

Perplexity: a prompt is prefilled with exact attention and compressed, and the 256 tokens after it are fed in calls of
32. Bytes are those of a float32 cache after the prompt, without positions.

xKV: decompositions of every layer alone (groups of one) and of larger groups, with at most the bytes of MiniCache with
all layers in pairs, and with shares of the full bytes. Only long prompts pay for the bases of large groups.
CSKV: the three inits against the least possible error on the calibration text; training of the first layers until it
is near that, and of all layers for a few steps.
"""

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging

from ..kv_cache import CSKVConfig, KVCacheConfig, MiniCacheConfig, XKVConfig
from ..kv_cache._calibration import Calibration
from ..kv_cache._channel_factors import factors, least_error, mean_error, projections
from ..kv_cache._cskv_trainer import CSKVTrainer
from ..kv_cache._geometry import Geometry, attention_modules, geometry
from ..kv_cache._low_rank import factor_bytes
from ..kv_cache.cskv import METHOD as CSKV
from ..kv_cache.cskv import input_statistics
from ..kv_cache.xkv import METHOD as XKV
from ..kv_cache.xkv import report
from . import _smollm2
from ._data import wikitext2
from ._kv_protocol import Recording, continuation_nll, perplexity, record, replay
from ._quiet_trainer import Bar
from .kv_quality import CALL, SEGMENT, text_segments

CONTINUED, NEAR = 256, 0.02
# Perplexity of 8 segments with 768 prompt tokens in an earlier study: full, per layer 96 and 144, groups of 5.
KNOWN = {"full cache": 21.408, "per layer, 96 and 144": 22.387, "groups of 5, 480 and 720": 21.402}


@dataclass(kw_only=True)
class Config:
    """
    Args:
        method: `xkv` or `cskv`.
        segments: Text segments of 1024 tokens, 768 of them the prompt; for xkv the check of known values needs 8.
        long_prompt: Tokens of the prompts on which xkv is compared at equal bytes, 0 for those of the segments.
        long_texts: Number of long prompts.
        group_sizes: Layers of a group of xkv that are compared at equal bytes; 1 is added.
        shares: Of the full bytes, at which xkv is compared, besides those of MiniCache; the last is the evidence.
        calibration_tokens: Of the validation file, for cskv.
        density: Of keys and values of cskv.
        train_tokens: Of the calibration text that is trained on, in rows of 512.
        train_layers: First layers that are trained until the error is near the least.
        train_steps: Steps of these.
        all_layers_steps: Steps of the training of all layers, 0 for none.
        learning_rate: Of AdamW, falling as a cosine.
        data_dir: Folder that holds `wikitext2`; `HFEXT_DATA` or `shared/data` beside the checkout when left out.
    """

    method: str
    segments: int = 8
    long_prompt: int = 3072
    long_texts: int = 2
    group_sizes: list[int] = field(default_factory=lambda: [2, 5])
    shares: list[float] = field(default_factory=lambda: [0.25, 0.125])
    calibration_tokens: int = 16384
    density: float = 0.5
    train_tokens: int = 4096
    train_layers: int = 4
    train_steps: int = 400
    all_layers_steps: int = 60
    learning_rate: float = 5e-3
    data_dir: str | None = None

    def __post_init__(self):
        if self.method not in ("xkv", "cskv"):
            raise ValueError(f"method is {self.method!r} but must be xkv or cskv.")
        if not 0 < self.density <= 1:
            raise ValueError(f"density is {self.density} but must be in (0, 1].")
        least = {
            "segments": 1,
            "long_prompt": 0,
            "long_texts": 1,
            "train_layers": 1,
            "train_steps": 1,
        }
        least |= {"calibration_tokens": 512, "train_tokens": 512, "all_layers_steps": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} is {getattr(self, name)} but must be >= {low}.")


def run(config: Config, out: Path) -> dict:
    model, tokenizer = _smollm2.load()
    model.eval()
    folder = wikitext2(config.data_dir)

    def texts(name: str, count: int, tokens: int) -> list[Tensor]:
        parts = -(-tokens // SEGMENT)
        segments = text_segments(tokenizer, folder / f"{name}.txt", count * parts)
        return [torch.cat(segments[i * parts : (i + 1) * parts], 1)[:, :tokens] for i in range(count)]

    return (run_xkv if config.method == "xkv" else run_cskv)(config, model, texts)


Texts = Callable[[str, int, int], list[Tensor]]


def measured(model: PreTrainedModel, config: KVCacheConfig, texts: list[Tensor], prompts: list[Recording]) -> dict:
    """Perplexity after the prompts, and bytes without positions after the first."""
    nll, held, made = [], 0, []
    for ids, prompt in zip(texts, prompts, strict=True):
        cache = config.make_cache(model)
        replay(model, cache, prompt)
        if not held:
            held = cache.nbytes() - cache.shared.nbytes()
            made = report(cache) if config.method == "xkv" else []
        nll.append(continuation_nll(model, cache, ids, prompt.ids.shape[1], CALL))
    return {"perplexity": perplexity(nll), "nll": nll, "bytes": held, "report": made}


# -- xKV


def xkv_within(budget: int, tokens: int, size: int, shape: Geometry) -> XKVConfig:
    """xKV with ranks of keys to values as 2 to 3, whole multiples of the group, within `budget` bytes in float32."""
    groups = XKVConfig(layer_group_size=size).layer_groups(shape)
    best = None
    for each in range(1, 2 * shape.width + 1):
        k, v = 2 * each * size // 5, 3 * each * size // 5
        needs = sum(factor_bytes(tokens, r * len(g) // size, len(g), shape.width, 4) for g in groups for r in (k, v))
        if k and needs <= budget and v <= size * shape.width:
            best = XKVConfig(layer_group_size=size, rank_k=k, rank_v=v, always=True)
    if best is None:
        raise ValueError(f"group_sizes: no rank of groups of {size} fits into {budget} bytes of {tokens} tokens.")
    return best


def run_xkv(config: Config, model: PreTrainedModel, texts: Texts) -> dict:
    shape = geometry(model)
    whole = 2 * 4 * shape.width * len(shape.layers)  # bytes of a token
    short = texts("test", config.segments, SEGMENT)
    prompts = [record(model, ids[:, : SEGMENT - CONTINUED]) for ids in short]
    paper = {
        "full cache": XKVConfig(layer_group_size=1, rank_k=1.0, rank_v=1.0),
        "per layer, 96 and 144": XKVConfig(layer_group_size=1, rank_k=96, rank_v=144, always=True),
        "groups of 5, 480 and 720": XKVConfig(layer_group_size=5, rank_k=480, rank_v=720, always=True),
    }
    known = []
    for name, cache in logging.tqdm(paper.items(), desc="known ranks"):
        found = measured(model, cache, short, prompts)
        row = {
            "method": name,
            "of the bytes": round(found["bytes"] / (whole * (SEGMENT - CONTINUED)), 4),
            "perplexity": round(found["perplexity"], 3),
        }
        if config.segments == 8:
            off = found["perplexity"] / KNOWN[name] - 1
            row |= {"earlier study": KNOWN[name], "off by": f"{off:+.2%}", "met": abs(off) <= NEAR}
        known.append(row)

    some, recorded, tokens = short, prompts, SEGMENT - CONTINUED
    if config.long_prompt:
        tokens = config.long_prompt
        some = texts("test", config.long_texts, tokens + CONTINUED)
        recorded = [record(model, ids[:, :tokens]) for ids in some]
    full = measured(model, paper["full cache"], some, recorded)
    mini = measured(model, MiniCacheConfig(start=0.0), some, recorded)
    budgets = {"minicache": mini["bytes"], **{f"{share:.3g}": int(share * whole * tokens) for share in config.shares}}
    found = {("all", "full cache"): full, ("minicache", "minicache"): mini}
    sizes = [1, *(size for size in config.group_sizes if size != 1)]
    todo = [(label, budget, size) for label, budget in budgets.items() for size in sizes]
    for label, budget, size in logging.tqdm(todo, desc=f"{tokens} tokens, equal bytes"):
        rival = xkv_within(budget, tokens, size, shape)
        name = "per layer" if size == 1 else f"xkv, groups of {size}"
        found[label, name] = {**measured(model, rival, some, recorded), "config": rival}
    rows = [
        {
            "budget": label,
            "method": name,
            "of the bytes": round(result["bytes"] / (whole * tokens), 4),
            "rank_k": "config" in result and result["config"].rank_k or None,
            "rank_v": "config" in result and result["config"].rank_v or None,
            "perplexity": round(result["perplexity"], 3),
        }
        for (label, name), result in found.items()
    ]
    at = {
        label: {name: result["perplexity"] for (key, name), result in found.items() if key == label}
        for label in budgets
    }
    best = {label: min(rivals, key=rivals.get) for label, rivals in at.items()}
    last = list(budgets)[-1]
    ours = min((name for name in at[last] if name.startswith("xkv")), key=at[last].get)
    return {
        "evidence": {
            "claim": XKV.claim,
            "paper": "up to 6.8x more compression than MiniCache at 2.7 % more accuracy (RULER 64k, Llama-3.1-8B)",
            "metric": f"perplexity with {found[last, ours]['bytes'] / (whole * tokens):.1%} of the bytes",
            "setting": f"SmolLM2-135M-Instruct, WikiText-2, {len(some)} texts, {tokens} tokens prefilled, then calls "
            f"of {CALL}",
            "method": "xkv",
            "ours": round(at[last][ours], 3),
            "ours_sd": None,
            "n": 1,
            "baseline_name": "decomposition of every layer alone",
            "baseline": round(at[last]["per layer"], 3),
            "baseline_sd": None,
            "reproduced": best[last] == ours and mini["perplexity"] > at["minicache"]["per layer"],
            "note": f"{ours}; the full cache has {full['perplexity']:.2f}. Reproduced means ahead of a decomposition "
            "of every layer at the smallest budget, and decompositions ahead of MiniCache at its bytes. Best at equal "
            "bytes: " + ", ".join(f"{label}: {name} {at[label][name]:.2f}" for label, name in best.items()) + ".",
        },
        "tables": {
            "Known ranks, 768 prompt tokens": known,
            f"Perplexity at equal bytes, {tokens} prompt tokens": rows,
        },
        "artifacts": [],
    }


# -- CSKV


def first_layers(model: PreTrainedModel, count: int) -> PreTrainedModel:
    """A copy of the model that ends after `count` layers, whose matrices are trained as in the whole one."""
    small = copy.deepcopy(model)
    small.model.layers = small.model.layers[:count]
    small.config.num_hidden_layers = count
    if getattr(small.config, "layer_types", None):
        small.config.layer_types = small.config.layer_types[:count]
    return small


def errors(config: CSKVConfig, model: PreTrainedModel, moments: dict[int, tuple[Tensor, Tensor]]) -> float:
    """The loss of the training on the text of `moments`: errors of keys and values, summed over layers."""
    shape, total = geometry(model), 0.0
    for index in shape.layers:
        for side, (weight, _) in projections(attention_modules(model)[index], shape).items():
            down, up = (config.calibration.layer(index, f"{side}_{part}") for part in ("down", "up"))
            total += mean_error(weight, down, up, moments[index][1])
    return total


def least(config: CSKVConfig, model: PreTrainedModel, moments: dict[int, tuple[Tensor, Tensor]]) -> float:
    """The least that `errors` can be."""
    shape = geometry(model)
    return sum(
        least_error(weight, config.rank(side, shape), moments[index][1])
        for index in shape.layers
        for side, (weight, _) in projections(attention_modules(model)[index], shape).items()
    )


def initial(
    config: CSKVConfig, model: PreTrainedModel, moments: dict[int, tuple[Tensor, Tensor]], tokens: int
) -> CSKVConfig:
    """What `calibrate` gives, from statistics that were gathered once."""
    shape, tensors = geometry(model), {}
    for index in shape.layers:
        size, moment = moments[index]
        for side, (weight, bias) in projections(attention_modules(model)[index], shape).items():
            down, up = factors(weight, config.rank(side, shape), config.init, size, moment, config.alpha)
            tensors |= {f"{index}.{side}_{name}": x for name, x in (("down", down), ("up", up), ("bias", bias))}
    config = copy.copy(config)
    config.calibration = Calibration(tensors, shape.facts, tokens)
    return config


def train(config: CSKVConfig, model: PreTrainedModel, ids: Tensor, steps: int, rate: float) -> CSKVConfig:
    """The config after training on rows [rows, 512], one row a step."""
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=1,
            max_steps=steps,
            learning_rate=rate,
            lr_scheduler_type="cosine",
            adam_beta2=0.95,
            seed=0,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        trainer = CSKVTrainer(model, config, args, train_dataset=[{"input_ids": row} for row in ids])
        trainer.add_callback(Bar(f"training {len(model.model.layers)} layers"))
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return trainer.config


def fp16_share(model: PreTrainedModel, config: CSKVConfig, prompt: Recording) -> float:
    """Bytes that a cache of a bfloat16 model holds after a prompt, over those of a full one."""
    cache = config.make_cache(model)
    replay(model, cache, prompt.to(torch.bfloat16))
    shape = geometry(model)
    return cache.nbytes() / (2 * 2 * shape.width * len(shape.layers) * prompt.ids.shape[1])


def run_cskv(config: Config, model: PreTrainedModel, texts: Texts) -> dict:
    shape = geometry(model)
    ids = torch.cat(texts("valid", config.calibration_tokens // SEGMENT or 1, SEGMENT)).view(-1, 512)
    weights = {i: projections(attention_modules(model)[i], shape) for i in shape.layers}
    moments, tokens = input_statistics(model, ids, shape, weights, True)
    half = {"k_density": config.density, "v_density": config.density}
    inits = {
        name: initial(CSKVConfig(init=name, **half), model, moments, tokens) for name in ("svd", "asvd", "whitened")
    }
    bound = least(inits["asvd"], model, moments)

    rows = ids[: max(1, config.train_tokens // 512)]
    small = first_layers(model, config.train_layers)
    few, seen = input_statistics(small, rows, geometry(small), weights, True)
    start = initial(inits["asvd"], small, few, seen)
    best = least(start, small, few)
    after = train(start, small, rows, config.train_steps, config.learning_rate)
    table = []
    for name, one in (("asvd", start), (f"trained {config.train_steps} steps", after)):
        found = errors(one, small, few)
        table.append({"matrices": name, "loss": found, "least": best, "ratio": round(found / best, 4)})
    ratio = table[-1]["ratio"]
    table[-1]["met"] = 1 - 1e-6 <= errors(after, small, few) / best <= 1 + NEAR

    if config.all_layers_steps:
        name = f"trained, {config.all_layers_steps} steps of {config.train_tokens} tokens"
        inits[name] = train(inits["asvd"], model, rows, config.all_layers_steps, config.learning_rate)
    some = texts("test", config.segments, SEGMENT)
    prompts = [record(model, text[:, : SEGMENT - CONTINUED]) for text in some]
    fifth = {"k_density": 0.2, "v_density": 0.2, "init": "whitened"}
    caches = {f"density {config.density}, {name}": one for name, one in inits.items()} | {
        f"density {config.density}, whitened, 4 bits": _with_bits(inits["whitened"], 4),
        "density 0.2, whitened": initial(CSKVConfig(**fifth), model, moments, tokens),
    }
    caches["density 0.2, whitened, 4 bits"] = _with_bits(caches["density 0.2, whitened"], 4)
    full = measured(model, XKVConfig(layer_group_size=1, rank_k=1.0, rank_v=1.0), some, prompts)
    quality: list[dict[str, Any]] = [{"method": "full cache", "perplexity": round(full["perplexity"], 3)}]
    for name, one in logging.tqdm(caches.items(), desc="perplexity"):
        found = measured(model, one, some, prompts)
        row = {"method": name, "perplexity": round(found["perplexity"], 3)}
        if one.k_density == config.density:
            row["error over the least"] = round(errors(one, model, moments) / bound, 4)
        quality.append(row)

    bf16, long = copy.deepcopy(model).to(torch.bfloat16), prompts[0].resized(4096)
    sizes = []
    for name, limit in (("density 0.2, whitened", 0.22), ("density 0.2, whitened, 4 bits", 0.07)):
        share = fp16_share(bf16, caches[name], long)
        sizes.append({"method": name, "of fp16": round(share, 4), "at most": limit, "met": share <= limit})
    return {
        "evidence": {
            "claim": CSKV.claim,
            "paper": "80 % less memory, 95 % with 4 bits, with the long-context ability kept",
            "metric": "reconstruction loss over the least of its rank",
            "setting": f"SmolLM2-135M-Instruct, first {config.train_layers} layers, density {config.density}, "
            f"{config.train_steps} steps on {seen} tokens of WikiText-2",
            "method": "cskv",
            "ours": ratio,
            "ours_sd": None,
            "n": 1,
            "baseline_name": "asvd, before training",
            "baseline": table[0]["ratio"],
            "baseline_sd": None,
            "reproduced": bool(table[-1]["met"]),
            "note": "Reproduced means at most 2 % above the least and not below it. Perplexity of all layers: "
            + ", ".join(f"{row['method']} {row['perplexity']:.2f}" for row in quality)
            + ".",
        },
        "tables": {
            "Training against the closed form": table,
            f"Perplexity of {config.segments} segments": quality,
            "Bytes of 4096 tokens in bfloat16": sizes,
        },
        "artifacts": [],
    }


def _with_bits(config: CSKVConfig, bits: int) -> CSKVConfig:
    made = copy.copy(config)
    made.bits = bits
    return made
