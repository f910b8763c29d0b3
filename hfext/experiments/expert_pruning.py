"""Experts of a small Mixtral pruned for one of the two texts it has read: by the task, by both texts, at random.

The model learns the bytes of Tiny Shakespeare and of WikiText-2, half of every batch each. Then experts are removed
for one text: those that the text uses least (task), those that both texts together use least (agnostic), random ones
(mean of several draws), and those that the other text uses least. Held-out loss of the text, in nats a byte. No model
is trained after its experts were removed.
"""

import copy
import statistics
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from scipy import stats
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM, Trainer
from transformers.utils import logging

from ..modules._experts import calibrate, find_blocks
from ..modules.uncurl import METHOD, UncurlConfig, highest, reduce_to, uncurl
from ._data import shared_data, wikitext2
from ._shakespeare import held_out_loss, quiet_trainer, rows_of

TASK, MERGED, AGNOSTIC, RANDOM, OTHER = "task", "task, merged", "agnostic", "random", "the other task"


@dataclass(kw_only=True)
class Config:
    """
    Args:
        hidden, layers, intermediate: Size of the model; `intermediate` is that of an expert.
        experts: Numbers of experts, each a model of its own.
        top_k: Active experts of a token.
        aux_loss: Weight of the load-balancing loss in training.
        length, rows: Of a batch.
        steps, lr: Of the training.
        reductions: Factors by which experts are reduced; rounded to a number of experts, at least `top_k`.
        about: The factor that the evidence is about.
        score: What ranks experts.
        calibration: Training rows of each text for calibration.
        draws: Random choices of experts.
        tolerance: Rise of the loss, in nats a byte, up to which quality counts as kept.
        seeds: Models of each number of experts.
        texts: Held-out windows.
        data_dir: Folder with `tinyshakespeare` and `wikitext2`; found by itself beside a checkout.
    """

    hidden: int = 64
    layers: int = 2
    intermediate: int = 64
    experts: list[int] = field(default_factory=lambda: [8, 16])
    top_k: int = 2
    aux_loss: float = 0.01
    length: int = 64
    rows: int = 16
    steps: int = 1000
    lr: float = 4e-3
    reductions: list[float] = field(default_factory=lambda: [1.0, 1.33, 2.0, 2.67, 4.0])
    about: float = 2.0
    score: str = "gate_mass"
    calibration: int = 128
    draws: int = 5
    tolerance: float = 0.05
    seeds: int = 4
    texts: int = 256
    data_dir: str | None = None

    def __post_init__(self):
        names = ("hidden", "layers", "intermediate", "top_k", "length", "steps", "calibration", "draws", "seeds")
        for name in names:
            if vars(self)[name] < 1:
                raise ValueError(f"{name} is {vars(self)[name]} but must be >= 1.")
        if self.rows < 2 or self.rows % 2:
            raise ValueError(f"rows is {self.rows} but must be even: half of a batch is of each text.")
        if not self.experts or min(self.experts) < self.top_k:
            raise ValueError(f"experts is {self.experts} but must hold numbers >= top_k, {self.top_k}.")
        if not self.reductions or min(self.reductions) < 1 or self.about not in self.reductions:
            raise ValueError(f"reductions is {self.reductions} but must hold factors >= 1, `about` among them.")
        UncurlConfig(score=self.score)


def read_bytes(data_dir: str | None) -> dict[str, tuple[Tensor, Tensor]]:
    """By text, bytes to train on and held-out ones."""
    folder = shared_data("tinyshakespeare", data_dir)
    if folder is None:
        raise FileNotFoundError("tinyshakespeare (input.txt) was not found: set data_dir or HFEXT_DATA.")
    plays = ids_of(folder / "input.txt")
    cut = len(plays) * 9 // 10
    articles = wikitext2(data_dir)
    return {
        "Shakespeare": (plays[:cut], plays[cut:]),
        "WikiText": (ids_of(articles / "valid.txt"), ids_of(articles / "test.txt")),
    }


def ids_of(path: Path) -> Tensor:
    return torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8).long()


def trained(config: Config, experts: int, seed: int, texts: dict[str, tuple[Tensor, Tensor]]) -> MixtralForCausalLM:
    c = config
    size = MixtralConfig(
        vocab_size=256,
        hidden_size=c.hidden,
        intermediate_size=c.intermediate,
        num_hidden_layers=c.layers,
        num_attention_heads=max(1, c.hidden // 32),
        num_key_value_heads=max(1, c.hidden // 32),
        max_position_embeddings=c.length,
        num_local_experts=experts,
        num_experts_per_tok=c.top_k,
        router_aux_loss_coef=c.aux_loss,
        output_router_logits=True,
        tie_word_embeddings=True,
        sliding_window=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MixtralForCausalLM(size)
    generator = torch.Generator().manual_seed(seed)
    each = [rows_of(train, c.length) for train, _ in texts.values()]
    data = []
    for _ in range(c.steps):
        for rows in each:
            data += [rows[i] for i in torch.randint(len(rows), (c.rows // 2,), generator=generator).tolist()]
    options = dict(max_steps=c.steps, learning_rate=c.lr, weight_decay=0.1, warmup_steps=max(1, c.steps // 20))
    with tempfile.TemporaryDirectory() as folder:
        # The sampler keeps the order, so that half of every batch is of each text.
        shared = dict(
            per_device_train_batch_size=c.rows, adam_beta2=0.95, seed=seed, train_sampling_strategy="sequential"
        )
        quiet_trainer(Trainer, model, data, folder, **options, **shared).train()
    model.config.output_router_logits = False
    return model.eval()


def batches(ids: Tensor, config: Config) -> list[Tensor]:
    return list(ids[: config.calibration * config.length].view(-1, config.length).split(32))


def at_random(model: torch.nn.Module, keep: int, seed: int, batch: Tensor) -> None:
    """Experts that stay are drawn anew in every layer."""
    generator = torch.Generator().manual_seed(seed)
    blocks = find_blocks(model)
    routings = calibrate(model, blocks, [batch])
    kept = {b.name: highest(torch.rand(b.count, generator=generator), keep) for b in blocks}
    reduce_to(model, blocks, routings, kept, UncurlConfig(keep=keep))


def one_model(
    config: Config, experts: int, seed: int, texts: dict[str, tuple[Tensor, Tensor]]
) -> dict[tuple[str, int, str], float]:
    """Held-out losses by (text, experts kept, how they were chosen)."""
    model = trained(config, experts, seed, texts)
    calibration = {name: batches(train, config) for name, (train, _) in texts.items()}
    both = [batch for part in calibration.values() for batch in part]
    found = {}

    def loss(pruned: torch.nn.Module, name: str) -> float:
        return held_out_loss(pruned, texts[name][1], config.length, config.texts)

    for keep in kept_counts(config, experts):
        choices = {(AGNOSTIC, "prune"): both}
        for name, part in calibration.items():
            choices |= {(name, "prune"): part, (name, "merge"): part}
        made = {}
        for (what, method), data in choices.items():
            made[what, method] = copy.deepcopy(model)
            uncurl(made[what, method], data, keep=keep, method=method, score=config.score)
        drawn = []
        for draw in range(config.draws):
            drawn.append(copy.deepcopy(model))
            at_random(drawn[-1], keep, 1000 * seed + draw, both[0])
        for name in texts:
            other = next(n for n in texts if n != name)
            found[name, keep, TASK] = loss(made[name, "prune"], name)
            found[name, keep, MERGED] = loss(made[name, "merge"], name)
            found[name, keep, AGNOSTIC] = loss(made[AGNOSTIC, "prune"], name)
            found[name, keep, OTHER] = loss(made[other, "prune"], name)
            found[name, keep, RANDOM] = statistics.fmean(loss(pruned, name) for pruned in drawn)
    return found


def kept_counts(config: Config, experts: int) -> list[int]:
    return sorted({max(config.top_k, round(experts / r)) for r in config.reductions}, reverse=True)


def run(config: Config, out: Path) -> dict:
    texts = read_bytes(config.data_dir)
    todo = [(experts, seed) for experts in config.experts for seed in range(config.seeds)]
    found = {key: one_model(config, *key, texts) for key in logging.tqdm(todo, desc="models")}
    ways = (TASK, MERGED, AGNOSTIC, RANDOM, OTHER)

    def column(experts: int, keep: int, way: str) -> list[float]:
        """By seed, the mean over the texts."""
        return [
            statistics.fmean(found[experts, seed][name, keep, way] for name in texts) for seed in range(config.seeds)
        ]

    tables, thresholds = {}, {}
    for experts in config.experts:
        rows, whole = [], statistics.fmean(column(experts, experts, TASK)) if 1.0 in config.reductions else None
        for keep in kept_counts(config, experts):
            row = {"kept": keep, "reduction": round(experts / keep, 2)}
            for way in ways:
                row[way] = round(statistics.fmean(column(experts, keep, way)), 4)
            for rival in (AGNOSTIC, RANDOM):
                less = [a - b for a, b in zip(column(experts, keep, TASK), column(experts, keep, rival), strict=True)]
                row[f"task minus {rival}, each seed"] = " ".join(f"{x:+.4f}" for x in less)
            rows.append(row)
            if whole is not None and row[TASK] - whole <= config.tolerance:
                thresholds[experts] = row["reduction"]
        tables[f"{experts} experts, {config.top_k} active: held-out nats a byte, mean of the texts"] = rows
        for name in texts:
            tables[f"{experts} experts, {name}"] = [
                {
                    "kept": keep,
                    **{w: round(statistics.fmean(found[experts, s][name, keep, w] for s in range(config.seeds)), 4)
                       for w in ways},
                }
                for keep in kept_counts(config, experts)
            ]  # fmt: skip
    keeps = {experts: max(config.top_k, round(experts / config.about)) for experts in config.experts}
    ours, rivals = ([x for e in config.experts for x in column(e, keeps[e], way)] for way in (TASK, AGNOSTIC))
    drawn = [x for e in config.experts for x in column(e, keeps[e], RANDOM)]
    p = {
        name: float(stats.ttest_rel(ours, theirs, alternative="less").pvalue) if len(ours) > 1 else float("nan")
        for name, theirs in ((AGNOSTIC, rivals), (RANDOM, drawn))
    }
    sizes = " and ".join(map(str, config.experts))
    drops = bool(thresholds) and all(
        any(experts / keep > thresholds.get(experts, 0) for keep in kept_counts(config, experts))
        for experts in config.experts
    )
    return {
        "tables": tables,
        "evidence": {
            "claim": METHOD.claim,
            "paper": METHOD.headline.value,
            "metric": "held-out cross-entropy of the task, nats a byte",
            "setting": f"Mixtral {config.hidden}x{config.layers} with {sizes} experts of {config.intermediate}, "
            f"{config.steps} steps on Tiny Shakespeare and WikiText-2 bytes; experts reduced by {config.about:g}, no "
            "training afterwards",
            "method": f"pruned by the task's {config.score}",
            "ours": round(statistics.fmean(ours), 4),
            "ours_sd": statistics.stdev(ours) if len(ours) > 1 else None,
            "n": len(ours),
            "baseline_name": "pruned by both texts' routing",
            "baseline": round(statistics.fmean(rivals), 4),
            "baseline_sd": statistics.stdev(rivals) if len(rivals) > 1 else None,
            "reproduced": bool(max(p.values()) < 0.05 and drops),
            "note": f"Reproduced means lower than both rivals with p < 0.05, one-sided, paired by model (agnostic "
            f"p = {p[AGNOSTIC]:.3g}, random p = {p[RANDOM]:.3g}; random has {statistics.fmean(drawn):.4f}), and a "
            f"reduction beyond which the loss has risen by more than {config.tolerance:g}. The largest reduction "
            f"within it: {', '.join(f'{thresholds.get(e, 0):g} of {e} experts' for e in config.experts)}. "
            "The paper fine-tunes after the reduction and its models are far larger.",
        },
    }
