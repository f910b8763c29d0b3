"""How much the final loss depends on the learning rate: small character models over octaves of it.

Every arm trains models of each size at each learning rate and seed, with the stock Trainer on Tiny Shakespeare. An
arm is an optimizer with a remedy: `qk_norm` normalises queries and keys (Qwen3 in place of a Llama of the same shape),
`z_loss` adds 1e-4 (log Z)^2, `qk_norm+z_loss` both, `none` neither. The sensitivity of an arm is the mean over
learning rates of min(held-out loss, loss at initialisation), less the least of them; 0 would be a loss that no
learning rate spoils. `ProxyDiagnostics` tells the largest attention logit and log Z at the end of each run.

For an optimizer of your own: `--optim soap --optim_args ...`, or `--others '[soap, "bisam(rho=0.05)"]'` beside AdamW.
"""

import math
import re
import statistics
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from scipy import stats
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging

from ..training.proxy_diagnostics import METHOD, ProxyDiagnostics, lr_sensitivity
from ..training.z_loss import ZLossConfig, ZLossTrainer
from ._plots import lines
from ._shakespeare import held_out_loss, read_characters, rows_of

REMEDIES = ("none", "qk_norm", "z_loss", "qk_norm+z_loss")
HEAD = 16


@dataclass(kw_only=True)
class Config:
    """
    Args:
        sizes: (hidden, layers) of each model; hidden is a multiple of 16.
        remedies: Arms of `optim`, out of `none`, `qk_norm`, `z_loss`, `qk_norm+z_loss`.
        optim: A name of `TrainingArguments`.
        optim_args: Its options.
        others: Further optimizers, each without a remedy: a name, or `name(option=value, ...)`.
        lrs: Learning rates; evenly spaced in their logarithm, or the mean over them means little.
        seeds: Of initial values and batches.
        steps, rows, length: Of a run and its batches.
        schedule: `lr_scheduler_type`.
        schedule_args: `lr_scheduler_kwargs`.
        warmup: Share of the steps.
        independent_decay: Weight decay that no learning rate multiplies.
        adam_beta2, max_grad_norm: As in `TrainingArguments`.
        z_coefficient: Of the z-loss.
        texts: Held-out windows.
        data_dir: Folder that holds `tinyshakespeare`; `HFEXT_DATA` or `shared/data` beside the checkout when left out.
    """

    sizes: tuple[tuple[int, int], ...] = ((32, 2), (64, 2))
    remedies: tuple[str, ...] = REMEDIES
    optim: str = "adamw_torch"
    optim_args: str | None = None
    others: tuple[str, ...] = ()
    lrs: tuple[float, ...] = tuple(2.0**-i for i in range(9, 1, -1))
    seeds: int = 3
    steps: int = 150
    rows: int = 8
    length: int = 64
    schedule: str = "cosine"
    schedule_args: dict[str, Any] | None = None
    warmup: float = 0.05
    independent_decay: float = 1e-4
    adam_beta2: float = 0.95
    max_grad_norm: float = 1.0
    z_coefficient: float = 1e-4
    texts: int = 64
    data_dir: str | None = None

    def __post_init__(self):
        for name in ("seeds", "steps", "rows", "length", "texts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)} but must be >= 1.")
        for name in self.remedies:
            if name not in REMEDIES:
                raise ValueError(f"remedies has {name!r} but must be out of {', '.join(REMEDIES)}.")
        if not self.sizes or any(hidden < HEAD or hidden % HEAD or layers < 1 for hidden, layers in self.sizes):
            raise ValueError(f"sizes is {list(self.sizes)} but must be pairs (multiple of {HEAD}, layers >= 1).")
        if len(set(self.lrs)) < 2 or min(self.lrs) <= 0:
            raise ValueError(f"lrs is {list(self.lrs)} but must be two learning rates or more, all above 0.")
        if not self.remedies and not self.others:
            raise ValueError("remedies and others are empty: there is nothing to train.")
        ZLossConfig(coefficient=self.z_coefficient)
        for arm in arms(self):
            # A name or an option that is wrong is told before the first run, not after the last.
            arguments(self, arm, self.lrs[0], 0, "unused")


@dataclass(frozen=True)
class Arm:
    name: str
    optim: str
    optim_args: str | None
    remedy: str


def arms(config: Config) -> list[Arm]:
    """One for each remedy of the optimizer, then one for each other optimizer."""
    several = bool(config.others)
    found = [
        Arm(f"{config.optim}, {r}" if several else r, config.optim, config.optim_args, r) for r in config.remedies
    ]
    for entry in config.others:
        match = re.fullmatch(r"\s*([a-z_0-9]+)\s*(?:\((.*)\))?\s*", entry)
        if match is None:
            raise ValueError(f"others: {entry!r} is not of the form name or name(option=value, ...).")
        found.append(Arm(entry, match[1], match[2] or None, "none"))
    return found


def arguments(config: Config, arm: Arm, lr: float, seed: int, folder: str) -> TrainingArguments:
    return TrainingArguments(
        folder,
        optim=arm.optim,
        optim_args=arm.optim_args,
        learning_rate=lr,
        weight_decay=config.independent_decay / lr,
        adam_beta2=config.adam_beta2,
        max_grad_norm=config.max_grad_norm,
        lr_scheduler_type=config.schedule,
        lr_scheduler_kwargs=config.schedule_args,
        warmup_steps=math.ceil(config.warmup * config.steps),
        max_steps=config.steps,
        per_device_train_batch_size=config.rows,
        seed=seed,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )


def make_model(arm: Arm, size: tuple[int, int], vocab: int, length: int, seed: int) -> torch.nn.Module:
    """Untied embeddings and no biases; with q/k norms the same shape is a Qwen3."""
    kind, made = (Qwen3Config, Qwen3ForCausalLM) if "qk_norm" in arm.remedy else (LlamaConfig, LlamaForCausalLM)
    shape = kind(
        vocab_size=vocab,
        hidden_size=size[0],
        intermediate_size=3 * size[0],
        num_hidden_layers=size[1],
        num_attention_heads=size[0] // HEAD,
        num_key_value_heads=size[0] // HEAD,
        head_dim=HEAD,
        max_position_embeddings=length,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return made(shape)


def train(config: Config, arm: Arm, size: tuple[int, int], lr: float, seed: int, text: tuple) -> dict[str, float]:
    """Held-out loss before and after, and the attention logit and log Z of the last step."""
    rows, held_out, vocab = text
    model = make_model(arm, size, vocab, config.length, seed)
    first = held_out_loss(model, held_out, config.length, config.texts)
    z_loss = ZLossConfig(coefficient=config.z_coefficient if "z_loss" in arm.remedy else 0.0)
    with tempfile.TemporaryDirectory() as folder:
        args = arguments(config, arm, lr, seed, folder)
        trainer = ZLossTrainer(model, args, train_dataset=rows, z_loss=z_loss)
        trainer.remove_callback(PrinterCallback)
        last = max(1, config.steps - 1)
        # The limits are infinite: high learning rates are here to be seen, not to be warned of.
        limits = {"attention_limit": math.inf, "log_z_limit": math.inf, "eps_margin": 0.0}
        trainer.add_callback(ProxyDiagnostics(trainer, every=last, gradients=False, **limits))
        trainer.train()
    seen: dict[str, float] = {}
    for row in trainer.state.log_history:
        seen |= {k: row[k] for k in ("attention_logit_max", "output_log_z") if k in row}
    loss = held_out_loss(model, held_out, config.length, config.texts)
    size_of = sum(p.numel() for p in model.parameters())
    return {"arm": arm.name, "hidden": size[0], "layers": size[1], "parameters": size_of, "lr": lr, "seed": seed} | {
        "first": first,
        "loss": loss,
        **seen,
    }


def sensitivities(runs: Iterable[dict[str, Any]]) -> list[float]:
    """Of each seed."""
    by_seed: dict[int, list[dict[str, Any]]] = {}
    for run in runs:
        by_seed.setdefault(run["seed"], []).append(run)
    return [lr_sensitivity([r["loss"] for r in rows], rows[0]["first"]) for rows in by_seed.values()]


def _kept(run: dict[str, Any]) -> float:
    return min(run["loss"], run["first"]) if math.isfinite(run["loss"]) else run["first"]


def _spread(values: list[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def run(config: Config, out: Path) -> dict[str, Any]:
    ids, held_out, vocab = read_characters(config.data_dir)
    text = (rows_of(ids, config.length), held_out, vocab)
    todo = [
        (arm, size, lr, seed)
        for size in config.sizes
        for arm in arms(config)
        for lr in sorted(config.lrs)
        for seed in range(config.seeds)
    ]
    runs = [train(config, *job, text) for job in logging.tqdm(todo, desc="learning rates")]
    names, lrs = [arm.name for arm in arms(config)], sorted(config.lrs)
    summary, artifacts = [], []
    for size in config.sizes:
        of_size = [r for r in runs if (r["hidden"], r["layers"]) == size]
        by_arm = {name: [r for r in of_size if r["arm"] == name] for name in names}

        def curve(rows, value):
            at = [[value(r) for r in rows if r["lr"] == lr] for lr in lrs]
            return lrs, [statistics.fmean(x) for x in at], ([min(x) for x in at], [max(x) for x in at])

        title = f"{size[0]}x{size[1]}, {of_size[0]['parameters']:,} parameters"
        for what, value, label in (
            ("loss", _kept, "held-out loss, nats a character"),
            ("attention", lambda r: r.get("attention_logit_max", math.nan), "largest attention logit"),
        ):
            artifacts.append(f"{what}-{size[0]}x{size[1]}.png")
            series = {name: curve(rows, value) for name, rows in by_arm.items()}
            lines(out / artifacts[-1], series, "learning rate", label, title, logx=True, logy=what == "attention")
        for name, rows in by_arm.items():
            found = sensitivities(rows)
            mean = {lr: statistics.fmean(_kept(r) for r in rows if r["lr"] == lr) for lr in lrs}
            best = min(mean, key=mean.get)
            top = [r for r in rows if r["lr"] == lrs[-1]]
            summary.append(
                {
                    "size": f"{size[0]}x{size[1]}",
                    "arm": name,
                    "sensitivity": round(statistics.fmean(found), 4),
                    "sd": _spread(found),
                    "best loss": round(mean[best], 4),
                    "best lr": best,
                    "loss at the highest lr": round(mean[lrs[-1]], 4),
                    "attention logit at best lr": _mean(r for r in rows if r["lr"] == best),
                    "at the highest lr": _mean(top),
                    "|log Z| at the highest lr": _mean(top, "output_log_z"),
                }
            )
    every = [{k: v for k, v in r.items() if k != "parameters"} for r in runs]
    result = {
        "tables": {"Sensitivity of the final loss to the learning rate": summary},
        "runs": every,
        "artifacts": artifacts,
    }
    plain, remedied = (next((a for a in arms(config) if a.remedy == r), None) for r in ("none", "qk_norm"))
    if plain is None or remedied is None:
        return result
    return result | {"evidence": _evidence(config, runs, plain, remedied)}


def _mean(runs: Iterable[dict[str, Any]], key: str = "attention_logit_max") -> float:
    return round(statistics.fmean(abs(r.get(key, math.nan)) for r in runs), 2)


def _evidence(config: Config, runs: list[dict[str, Any]], plain: Arm, remedied: Arm) -> dict[str, Any]:
    by_arm = {
        arm.name: [
            x
            for size in config.sizes
            for x in sensitivities(r for r in runs if r["arm"] == arm.name and (r["hidden"], r["layers"]) == size)
        ]
        for arm in (plain, remedied)
    }
    ours, theirs = by_arm[remedied.name], by_arm[plain.name]
    p = float(stats.ttest_rel(ours, theirs, alternative="less").pvalue) if len(ours) > 1 else float("nan")
    lower = statistics.fmean(ours) < statistics.fmean(theirs)
    logits = {
        lr: _mean(r for r in runs if r["arm"] == plain.name and r["lr"] == lr)
        for lr in (min(config.lrs), max(config.lrs))
    }
    sizes = ", ".join(f"{h}x{n}" for h, n in config.sizes)
    return {
        "claim": METHOD.claim,
        "paper": METHOD.headline.value,
        "metric": "mean over learning rates of min(loss, loss at initialisation), less the best; nats a character",
        "setting": f"Tiny Shakespeare, {sizes}, {config.optim}, {len(config.lrs)} learning rates from "
        f"{min(config.lrs):.2g} to {max(config.lrs):.2g}, {config.steps} steps",
        "method": "q/k norms",
        "ours": round(statistics.fmean(ours), 4),
        "ours_sd": _spread(ours),
        "n": len(ours),
        "baseline_name": "without",
        "baseline": round(statistics.fmean(theirs), 4),
        "baseline_sd": _spread(theirs),
        "reproduced": bool(lower and p < 0.05),
        "note": f"Reproduced means lower with p < 0.05, one-sided, paired by size and seed; p = {p:.3g}. Without the "
        "norms the largest attention logit at the end is "
        + ", ".join(f"{value:.3g} at lr {lr:.2g}" for lr, value in logits.items())
        + ".",
    }
