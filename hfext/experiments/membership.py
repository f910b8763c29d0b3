"""Who was in the training data: small Llamas trained on half of some passages of Shakespeare's, and eight scores.

All passages are drawn from the same text without overlap; a coin decides for every seed which half is trained on, so
that no property of the text tells them apart. A score sees the model's distribution at each character; AUC 0.5 is
chance. The untrained model's AUC stands beside it as a check of the coin.
"""

import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, get_cosine_schedule_with_warmup
from transformers.utils import logging

from ..metrics._membership import auc, loss, reference_score, tpr_at_fpr, zlib_score
from ..metrics._token_scores import TokenScores, score_rows
from ..metrics.min_k import METHOD as MIN_K
from ..metrics.min_k import min_k
from ..metrics.min_k_plus_plus import min_k_plus_plus
from ..metrics.renyi import METHOD as RENYI
from ..metrics.renyi import max_renyi, min_renyi, modified_score
from ._data import shared_data
from ._shakespeare import make_llama

ORDERS = (0.5, 1.0, 2.0, math.inf)


@dataclass(kw_only=True)
class Config:
    """
    Args:
        method: Whose claim is checked.
        seeds: Models, each with members of its own.
        passages: Of which half are members.
        length: Characters of a passage.
        epochs: Over the members, growing; the scores are taken after each of these, the evidence after the last.
        learning_rate: Peak; it falls to zero.
        k: Share of the tokens of Min-K %, and of the positions of MaxRenyi-K %.
        data_dir: Folder that holds `tinyshakespeare`; `HFEXT_DATA` or `shared/data` beside the checkout when left out.
    """

    method: Literal["min_k", "renyi"] = "min_k"
    seeds: int = 4
    passages: int = 512
    length: int = 96
    epochs: list[int] | None = None
    learning_rate: float = 3e-3
    k: float = 0.2
    data_dir: str | None = None

    def __post_init__(self):
        self.epochs = [10, 20, 40] if self.epochs is None else self.epochs
        if self.seeds < 2 or self.passages < 8 or self.passages % 2 or self.length < 16:
            raise ValueError("seeds must be >= 2, passages even and >= 8, length >= 16.")
        if not self.epochs or self.epochs[0] < 1 or sorted(set(self.epochs)) != self.epochs:
            raise ValueError(f"epochs is {self.epochs} but must be growing numbers >= 1.")


def run(config: Config, out: Path) -> dict:
    folder = shared_data("tinyshakespeare", config.data_dir)
    if folder is None:
        raise FileNotFoundError("tinyshakespeare (input.txt) was not found: set data_dir or HFEXT_DATA.")
    text = (folder / "input.txt").read_text(encoding="utf-8")
    ids = {c: i for i, c in enumerate(sorted(set(text)))}
    found: dict[int, dict[str, list[tuple[float, float]]]] = {epoch: {} for epoch in (0, *config.epochs)}
    losses: dict[int, list[tuple[float, float]]] = {epoch: [] for epoch in found}
    for seed in logging.tqdm(range(config.seeds), desc="models"):
        texts = passages(text, config, seed)
        rows = [[ids[c] for c in t] for t in texts]
        rows = [{"input_ids": row, "labels": row} for row in rows]
        half = len(rows) // 2
        model = make_llama(seed, len(ids), 64, 2, config.length)
        untrained = None
        for epoch in train(model, torch.tensor([row["input_ids"] for row in rows[:half]]), config, seed):
            if epoch not in found:
                continue
            now = score_rows(model, rows, batch_size=64, renyi=ORDERS, modified=ORDERS[:3])
            untrained = now if untrained is None else untrained
            for name, score in scores(config.k).items():
                values = score(now, untrained, texts)
                members, others = values[:half], values[half:]
                found[epoch].setdefault(name, []).append((auc(members, others), tpr_at_fpr(members, others, 0.05)))
            values = loss(now.log_p)
            losses[epoch].append((values[:half].mean().item(), values[half:].mean().item()))
    return report(config, found, losses)


def passages(text: str, config: Config, seed: int) -> list[str]:
    """Different pieces of the text in a random order; the first half are the members."""
    pieces = len(text) // config.length
    if pieces < config.passages:
        raise ValueError(
            f"passages is {config.passages} but the text has only {pieces} of {config.length} characters."
        )
    chosen = torch.randperm(pieces, generator=torch.Generator().manual_seed(seed))[: config.passages].tolist()
    return [text[i * config.length : (i + 1) * config.length] for i in chosen]


def train(model: LlamaForCausalLM, data: Tensor, config: Config, seed: int) -> Iterator[int]:
    """Yields the epochs done, from 0, the model in eval mode."""
    steps = config.epochs[-1] * -(-len(data) // 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    generator = torch.Generator().manual_seed(seed)
    yield 0
    for epoch in range(config.epochs[-1]):
        model.train()
        for batch in data[torch.randperm(len(data), generator=generator)].split(16):
            model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        model.eval()
        yield epoch + 1


Score = Callable[[TokenScores, TokenScores, list[str]], Tensor]


def scores(k: float) -> dict[str, Score]:
    """Name to a function of the model's scores, the untrained model's, and the texts."""
    found: dict[str, Score] = {
        "loss": lambda s, _, t: loss(s.log_p),
        "zlib": lambda s, _, t: zlib_score(s.log_p, t),
        "loss - untrained": lambda s, ref, t: reference_score(s.log_p, ref.log_p),
        f"Min-{k:.0%}": lambda s, _, t: min_k(s.log_p, k),
        f"Min-{k:.0%}++": lambda s, _, t: min_k_plus_plus(s, k),
    }
    for a in ORDERS:
        for share in (0.0, k, 1.0):
            found[f"MaxRenyi-{share:.0%}, order {a:g}"] = lambda s, _, t, a=a, share=share: max_renyi(
                s.renyi[a], share
            )
        found[f"MinRenyi-{k:.0%}, order {a:g}"] = lambda s, _, t, a=a: min_renyi(s.renyi[a], k)
    for a in ORDERS[:3]:
        found[f"modified Renyi, order {a:g}"] = lambda s, _, t, a=a: modified_score(s.modified[a])
    return found


def report(config: Config, found: dict[int, dict], losses: dict[int, list]) -> dict:
    last = config.epochs[-1]
    aucs = {epoch: {name: [x for x, _ in pairs] for name, pairs in one.items()} for epoch, one in found.items()}
    rows = [
        {
            "score": name,
            **{f"AUC, {epoch} epochs": round(statistics.mean(one[name]), 4) for epoch, one in aucs.items()},
            "sd": round(statistics.stdev(values), 4),
            "TPR at 5 % FPR": round(statistics.mean(rate for _, rate in found[last][name]), 4),
            "above loss": f"{wins(values, aucs[last]['loss'])} of {config.seeds}",
        }
        for name, values in aucs[last].items()
    ]
    fits = [
        {
            "epochs": epoch,
            "loss of members": round(statistics.mean(a for a, _ in pairs), 4),
            "loss of others": round(statistics.mean(b for _, b in pairs), 4),
        }
        for epoch, pairs in losses.items()
    ]
    if config.method == "min_k":
        record, name, rival = MIN_K, f"Min-{config.k:.0%}", "loss"
        ours, base = aucs[last][name], aucs[last]["loss"]
        above = {epoch: wins(one[name], one["loss"]) for epoch, one in aucs.items() if epoch}
        reproduced = above[last] == config.seeds
        note = "Models for which it is above the loss: " + ", ".join(
            f"{n} of {config.seeds} after {epoch} epochs" for epoch, n in above.items()
        )
        note += ". Members and others are drawn from one text; the paper's differ in date as well."
    else:
        record, name, rival = RENYI, "MaxRenyi-100%, order 0.5", "untrained"
        ours, base = aucs[last][name], aucs[0][name]
        gap, error = statistics.mean(ours) - 0.5, statistics.stdev(ours) / math.sqrt(config.seeds)
        reproduced = min(ours) > 0.5 and gap > 2 * error
        note = (
            f"Reproduced means above 0.5 for every model and by two standard errors: {gap:.4f} against {error:.4f}. "
            f"The loss, which sees the targets, has {statistics.mean(aucs[last]['loss']):.4f}."
        )
    return {
        "tables": {f"Members against others (sd, TPR and wins after {last} epochs)": rows, "Fit": fits},
        "evidence": {
            "claim": record.claim,
            "paper": f"{record.headline.value} {record.headline.metric} ({record.headline.setting})",
            "metric": "AUC of members against others",
            "setting": f"2-layer Llama (hidden 64), {last} epochs on {config.passages // 2} passages of "
            f"{config.length} characters of tinyshakespeare",
            "method": name,
            "ours": round(statistics.mean(ours), 4),
            "ours_sd": round(statistics.stdev(ours), 4),
            "n": config.seeds,
            "baseline_name": rival,
            "baseline": round(statistics.mean(base), 4),
            "baseline_sd": round(statistics.stdev(base), 4),
            "reproduced": reproduced,
            "note": note,
        },
    }


def wins(ours: list[float], theirs: list[float]) -> int:
    return sum(a > b for a, b in zip(ours, theirs, strict=True))
