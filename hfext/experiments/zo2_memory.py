"""Device memory and speed of ZO2 on a decoder too large to train otherwise, against MeZO with everything resident.

A Llama of random weights in bfloat16, made in host memory; random tokens. Needs a GPU: without one the table says "not
measured". The smaller model is trained by both, so that there is a ratio of speeds in one run.
"""

import gc
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from ..optim import ZO2, MeZO

logger = logging.get_logger(__name__)


@dataclass(kw_only=True)
class Config:
    """
    Args:
        large: Hidden size, width of the MLP, blocks, heads of the large model; about 10.6 billion weights.
        small: The same of the model that MeZO trains too.
        vocab: Tokens.
        rows, length: Of a batch.
        updates: Timed updates, after one that is not.
        most: Bar for the large model, in GB of device memory.
    """

    large: tuple[int, int, int, int] = (4096, 14336, 48, 32)
    small: tuple[int, int, int, int] = (2048, 8192, 24, 16)
    vocab: int = 32000
    rows: int = 4
    length: int = 512
    updates: int = 5
    most: float = 8.0

    def __post_init__(self):
        for name in ("vocab", "rows", "length", "updates", "most"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)!r} but must be above 0.")
        for name in ("large", "small"):
            size = getattr(self, name)
            if len(size) != 4 or min(size) <= 0 or size[0] % size[3]:
                raise ValueError(f"{name} is {size} but must be hidden, MLP, blocks, heads, with hidden % heads = 0.")


def make(size: tuple[int, int, int, int], vocab: int, length: int) -> LlamaForCausalLM:
    """Random weights in bfloat16 in host memory, eight query heads for each key."""
    hidden, wide, layers, heads = size
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=wide, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=max(1, heads // 8), max_position_embeddings=length,
        pad_token_id=0,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def measured(model: nn.Module, optimizer: torch.optim.Optimizer, config: Config) -> dict:
    """Tokens a second and the most device memory."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(1, config.vocab, (config.rows, config.length), generator=draw).cuda()

    def closure():
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    torch.cuda.reset_peak_memory_stats()
    optimizer.step(closure)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(config.updates):
        optimizer.step(closure)
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - start) / config.updates
    return {
        "weights": f"{sum(p.numel() for p in model.parameters()) / 1e9:.2f} billion",
        # Blocks that wait for an event to be used again count: they are reserved.
        "device GB": round(torch.cuda.max_memory_reserved() / 1e9, 2),
        "seconds an update": round(seconds, 3),
        "tokens a second": round(ids.numel() / seconds),
    }


def run(config: Config, out: Path) -> dict:
    title = f"ZO2, bfloat16, {config.rows} x {config.length} tokens an update"
    if not torch.cuda.is_available():
        logger.warning("There is no GPU: memory and speed of ZO2 are not measured.")
        return {"tables": {title: [{"optimizer": "ZO2 and MeZO", "device GB": "not measured"}]}}
    rows = []
    for name, size in (("ZO2", config.small), ("MeZO", config.small), ("ZO2", config.large)):
        model = make(size, config.vocab, config.length)
        optimizer = ZO2(model.parameters(), streamed=model) if name == "ZO2" else MeZO(model.cuda().parameters())
        row = {"optimizer": name, **measured(model, optimizer, config)}
        row["blocks on the device"] = optimizer.offload.peak_blocks if name == "ZO2" else size[2]
        if size == config.large:
            row |= {"bar GB": config.most, "met": row["device GB"] <= config.most}
        rows.append(row)
        del model, optimizer
        gc.collect()
        torch.cuda.empty_cache()
    speeds = [row["tokens a second"] for row in rows[:2]]
    return {"tables": {title: rows, "same model, same run": [{"tokens a second, ZO2 / MeZO": speeds[0] / speeds[1]}]}}
