"""Mean surprise of long texts: Mirostat at several targets, with fixed truncations beside it.

The surprise of a text is measured afterwards, by one forward of the whole text and not by the processor: -log2 p of
each token under the model at temperature 1, without the end token, which is forbidden so that texts have one length.
"""

import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers.utils import logging

from .. import decoding
from ..decoding.mirostat import METHOD
from . import _smollm2
from ._plots import lines

PROMPT = "The old harbour had not changed much since the war. Every morning"


@dataclass(kw_only=True)
class Config:
    """
    Args:
        taus: Targets in bits a token.
        eta: Learning rate.
        versions: Of Mirostat, for every target.
        fixed: Other settings of `generate` that run for contrast, as `top_p=0.9`.
        tokens: Length of a text.
        seeds: Texts of each setting, in one batch.
        window: Tokens over which the plot averages.
        prompt: What all texts begin with.
        bar: Distance in bits from the target that counts as reached.
    """

    taus: list[float] = field(default_factory=lambda: [2.0, 3.0, 4.0])
    eta: float = 1.0
    versions: list[int] = field(default_factory=lambda: [2])
    fixed: list[str] = field(default_factory=lambda: ["top_p=0.9", "top_k=50"])
    tokens: int = 300
    seeds: int = 8
    window: int = 50
    prompt: str = PROMPT
    bar: float = 0.15

    def __post_init__(self):
        if not self.taus or not self.versions:
            raise ValueError(f"taus is {self.taus} and versions {self.versions}, but both must hold something.")
        for name in ("tokens", "seeds", "window"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name} is {getattr(self, name)} but must be at least 2.")
        if self.tokens % self.window:
            raise ValueError(f"window is {self.window} but must divide tokens, {self.tokens}.")
        for text in self.fixed:
            if text.partition("=")[0] not in ("top_p", "top_k", "min_p", "top_h", "top_h_alpha", "top_n_sigma"):
                raise ValueError(f"fixed holds {text!r} but must hold settings such as 'top_p=0.9'.")


def surprises(model, sequences: Tensor, prompt: int, end: list[int]) -> Tensor:
    """-log2 p of the tokens behind the prompt, `[rows, tokens]`, one row after the other."""
    found = []
    for row in sequences:
        with torch.no_grad():
            logits = model(row[None, :-1]).logits[0, prompt - 1 :].double()
        logits[:, end] = -math.inf
        found.append(-logits.log_softmax(dim=-1).gather(1, row[prompt:, None])[:, 0] / math.log(2))
    return torch.stack(found)


def run(config: Config, out: Path) -> dict:
    model, tokenizer = _smollm2.load()
    decoding.enable(model.eval())
    inputs = tokenizer([config.prompt] * config.seeds, return_tensors="pt")
    end = torch.tensor(model.generation_config.eos_token_id).flatten().tolist()
    settings = {
        f"mirostat {v}, tau {tau:g}": (
            tau,
            {"logits_processor": [decoding.MirostatLogitsProcessor(tau, config.eta, version=v)]},
        )
        for tau in config.taus
        for v in config.versions
    }
    for text in config.fixed:
        name, _, value = text.partition("=")
        settings[text] = None, {name: int(value) if name == "top_k" else float(value)}
    rows, series, misses, drifts = [], {}, [], {}
    with logging.tqdm(settings.items(), desc="texts") as bar:
        for name, (tau, options) in bar:
            torch.manual_seed(0)
            length = {"max_new_tokens": config.tokens, "min_new_tokens": config.tokens}
            sequences = model.generate(**inputs, do_sample=True, **{"top_k": 0, **length, **options})
            bits = surprises(model, sequences, inputs["input_ids"].shape[1], end)
            means = bits.mean(dim=1).tolist()
            half = config.tokens // 2
            drifts[name] = float(bits[:, half:].mean() - bits[:, :half].mean())
            miss = None if tau is None else abs(statistics.fmean(means) - tau)
            rows.append(
                {
                    "sampler": name,
                    "target, bits": tau,
                    "mean surprise, bits": round(statistics.fmean(means), 3),
                    "sd of texts": round(statistics.stdev(means), 3),
                    "second half - first half": round(drifts[name], 3),
                    "miss, bits": None if miss is None else round(miss, 3),
                    **({} if miss is None else {"met": miss <= config.bar}),
                }
            )
            if miss is not None:
                misses.append((miss, means))
            windows = bits.view(config.seeds, -1, config.window).mean(dim=2)
            ends = [config.window * (i + 1) for i in range(windows.shape[1])]
            series[name] = ends, windows.mean(dim=0).tolist(), windows.std(dim=0).tolist()
    lines(out / "surprise.png", series, "tokens", "mean surprise, bits", f"windows of {config.window} tokens")
    worst, texts = max(misses, key=lambda found: found[0])
    fixed = max((abs(drifts[name]) for name in config.fixed), default=0.0)
    return {
        "tables": {f"Surprise of {config.seeds} texts of {config.tokens} tokens, SmolLM2-135M": rows},
        "artifacts": ["surprise.png"],
        "evidence": {
            "claim": METHOD.claim,
            "paper": f"{METHOD.headline.metric}: {METHOD.headline.value} ({METHOD.headline.setting})",
            "metric": "largest distance of the mean surprise from its target, bits",
            "setting": (
                f"SmolLM2-135M-Instruct (4-bit weights), {config.tokens} tokens, {config.seeds} seeds, targets "
                f"{', '.join(f'{t:g}' for t in config.taus)} bits, eta {config.eta:g}"
            ),
            "method": "mirostat",
            "ours": round(worst, 3),
            "ours_sd": round(statistics.stdev(texts), 3),
            "n": config.seeds,
            "baseline_name": "drift between halves of the text under top-p and top-k",
            "baseline": round(fixed, 3),
            "baseline_sd": None,
            "reproduced": worst <= config.bar,
            "note": f"Reproduced means at most {config.bar} bits. Spread: of the single texts at that target.",
        },
    }
