"""Does H(q) <= alpha H(p) hold? Random rows of many kinds, sizes and temperatures, checked in float64."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import LogitsProcessor, TopHLogitsWarper
from transformers.utils import logging

from ..decoding.top_h import TopHLogitsProcessor

KINDS = ("normal", "peaked", "zipf", "flat", "masked", "bfloat16")


@dataclass(kw_only=True)
class Config:
    """
    Args:
        rows: How many rows in all.
        batch: Rows that share kind, size, alpha and temperature.
        others: The other two rules see every so-manieth batch.
        vocab: Largest vocabulary; sizes are log-uniform from 2.
        seed: Of everything.
        tolerance: Relative, for rounding.
    """

    rows: int = 1_000_000
    batch: int = 20
    others: int = 10
    vocab: int = 150_000
    seed: int = 0
    tolerance: float = 1e-6

    def __post_init__(self):
        if self.batch < 1 or self.rows < self.batch:
            raise ValueError(f"batch is {self.batch} but must be from 1 to rows, {self.rows}.")
        if self.others < 1:
            raise ValueError(f"others is {self.others} but must be at least 1.")
        if self.vocab < 2:
            raise ValueError(f"vocab is {self.vocab} but must be at least 2.")


def draw(kind: str, rows: int, vocab: int, generator: torch.Generator) -> Tensor:
    """Logits `[rows, vocab]` of one kind."""
    x = torch.randn(rows, vocab, generator=generator)
    match kind:
        case "normal":
            return x * 4 * torch.rand(rows, 1, generator=generator)
        case "peaked":
            return x * 15
        case "zipf":
            order = torch.randperm(vocab, generator=generator)
            slope = 0.8 + 1.5 * torch.rand(rows, 1, generator=generator)
            return -slope * torch.arange(1.0, vocab + 1)[order].log() + 0.3 * x
        case "flat":
            return x * 1e-3
        case "masked":
            masked = torch.rand(rows, vocab, generator=generator) < 0.9
            masked[:, 0] = False
            return (x * 3).masked_fill(masked, -torch.inf)
    return (x * 5).bfloat16().float()


def exact(tempered: Tensor) -> tuple[Tensor, Tensor]:
    """p and -p log p in float64, `[rows, vocab]` each."""
    log_p = tempered.double().log_softmax(dim=-1)
    p = log_p.exp()
    return p, log_p.clamp_(min=-1e6).mul_(p).neg_()


def run(config: Config, out: Path) -> dict:
    generator = torch.Generator().manual_seed(config.seed)
    makers: dict[str, Callable[[float], LogitsProcessor]] = {
        "top_h": TopHLogitsProcessor,
        "top_h, authors' code": lambda alpha: TopHLogitsProcessor(alpha, mode="reference"),
        "top_h in transformers": TopHLogitsWarper,
    }
    count = {(name, kind): 0 for name in makers for kind in KINDS}
    seen, worst = dict.fromkeys(makers, 0), dict.fromkeys(makers, 0.0)
    with logging.tqdm(total=config.rows, desc="rows") as bar:
        for number in range(-(-config.rows // config.batch)):
            rows = min(config.batch, config.rows - number * config.batch)
            u = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
            kind = KINDS[int(torch.randint(len(KINDS), (), generator=generator))]
            vocab = int(2 * (config.vocab / 2) ** u[0])
            alpha, temperature = 0.05 + 0.95 * u[1], 10 ** (2 * u[2] - 1)
            # The scores are tempered, as behind the temperature warper.
            scores = draw(kind, rows, vocab, generator) / temperature
            p, terms = exact(scores)
            limit = alpha * terms.sum(dim=-1)
            for name, make in makers.items():
                if name == "top_h" or number % config.others == 0:
                    kept = make(alpha)(None, scores) > -torch.inf
                    mass = (p * kept).sum(dim=-1)
                    entropy = mass.log() + (terms * kept).sum(dim=-1) / mass
                    over = entropy > limit * (1 + config.tolerance) + 1e-15
                    count[name, kind] += int(over.sum())
                    worst[name] = max(
                        worst[name], float((entropy / limit.clamp(min=1e-12)).masked_fill(~over, 0).max())
                    )
                    seen[name] += rows
            bar.update(rows)
    table = []
    for name in makers:
        found = [count[name, kind] for kind in KINDS]
        row = {"rule": name, "rows": seen[name], "violations": sum(found), "share": round(sum(found) / seen[name], 4)}
        row |= dict(zip(KINDS, found, strict=True)) | {"worst H(q) / (alpha H(p))": round(worst[name], 3)}
        table.append(row | ({"met": not any(found)} if name == "top_h" else {}))
    title = f"Rows with H(q) > alpha H(p), by kind of row (alpha 0.05 to 1, T 0.1 to 10, V 2 to {config.vocab})"
    return {"tables": {title: table}}
