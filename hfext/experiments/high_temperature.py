"""Samplers at rising temperature: how likely their text is to the model itself, how varied, and what they kept.

All numbers come from what `generate` returns: the raw logits, and the scores after the sampler. NLL is that of the
drawn tokens under the model at temperature 1; pool, mass and entropies are those of the tempered distribution.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import LogitsProcessor
from transformers.utils import logging

from .. import decoding
from ..decoding.top_h import METHOD
from . import _smollm2
from ._plots import lines
from ._prompts import creative_prompts
from ._text_metrics import distinct_n

# Arguments of `generate`, and the processors that have no field; top_k=0 switches the default of 50 off.
SAMPLERS: dict[str, Callable[[float, float], dict]] = {
    "temperature": lambda t, a: {},
    "top_p 0.9": lambda t, a: {"top_p": 0.9},
    "min_p 0.1": lambda t, a: {"min_p": 0.1},
    "top_k 50": lambda t, a: {"top_k": 50},
    "eta 2e-4": lambda t, a: {"eta_cutoff": 2e-4},
    "top_n_sigma 1": lambda t, a: {"top_n_sigma": 1.0},
    "mirostat 3": lambda t, a: {"mirostat_tau": 3.0, "mirostat_eta": 1.0},
    "top_h in transformers": lambda t, a: {"top_h": a},
    "top_h, authors' code": lambda t, a: {"logits_processor": [_top_h(a, t, mode="reference")]},
    "top_h": lambda t, a: {"top_h_alpha": a},
    "top_h, skip": lambda t, a: {"logits_processor": [_top_h(a, t, solver="skip")]},
}


def _top_h(alpha: float, temperature: float, **options: str) -> LogitsProcessor:
    return decoding.TopHLogitsProcessor(alpha, temperature=temperature, **options)


@dataclass(kw_only=True)
class Config:
    """
    Args:
        samplers: Which samplers run.
        temperatures: Each sampler runs at each, in rising order.
        alpha: Of top-H.
        prompts: How many prompts, one answer each.
        tokens: Length of an answer.
        seed: Of the draws, the same for all samplers.
        data_dir: Where `mt_bench/` lies; without it, prompts of our own where the shared data is missing.
    """

    samplers: list[str] = field(default_factory=lambda: list(SAMPLERS))
    temperatures: list[float] = field(default_factory=lambda: [1.0, 1.5, 2.0])
    alpha: float = 0.4
    prompts: int = 10
    tokens: int = 48
    seed: int = 0
    data_dir: str | None = None

    def __post_init__(self):
        for name in self.samplers:
            if name not in SAMPLERS:
                raise ValueError(f"samplers: there is no {name!r}. Known: {', '.join(SAMPLERS)}.")
        if not self.temperatures or any(t <= 0 for t in self.temperatures):
            raise ValueError(f"temperatures is {self.temperatures} but must hold numbers above 0.")
        if not 0 < self.alpha <= 1:
            raise ValueError(f"alpha is {self.alpha} but must be in (0, 1].")
        if self.prompts < 1 or self.tokens < 2:
            raise ValueError(f"prompts is {self.prompts} and tokens {self.tokens}, but must be >= 1 and >= 2.")


def entropies(log_p: Tensor) -> Tensor:
    """Shannon entropy in nats over the last axis; -inf has no share."""
    return -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0)).sum(dim=-1)


def step_facts(logits: Tensor, scores: Tensor, temperature: float) -> dict[str, Tensor]:
    """Facts of one step, `[rows]` each, from raw logits and what the sampler left of them, both `[rows, vocab]`."""
    log_p = (logits.double() / temperature).log_softmax(dim=-1)
    kept = scores > -torch.inf
    mass = log_p.exp().mul(kept).sum(dim=-1)
    ratio = entropies((log_p - mass.log()[:, None]).masked_fill(~kept, -torch.inf)) / entropies(log_p)
    return {"pool": kept.sum(dim=-1).double(), "mass": mass, "ratio": ratio}


def run_one(model, inputs: dict, name: str, temperature: float, config: Config) -> dict:
    """One sampler at one temperature: a row of the table, and the NLL of each answer."""
    torch.manual_seed(config.seed)
    options = {"top_k": 0, **SAMPLERS[name](temperature, config.alpha)}
    out = model.generate(
        **inputs,
        do_sample=True,
        temperature=temperature,
        max_new_tokens=config.tokens,
        return_dict_in_generate=True,
        output_logits=True,
        output_scores=True,
        **options,
    )
    answers = out.sequences[:, inputs["input_ids"].shape[1] :]
    alive = torch.ones(len(answers), dtype=torch.bool)
    ends = torch.tensor(model.generation_config.eos_token_id).flatten()
    facts = {"nll": [], "pool": [], "mass": [], "ratio": []}
    rows = [[] for _ in answers]
    texts = [[] for _ in answers]
    for step, (logits, scores) in enumerate(zip(out.logits, out.scores, strict=True)):
        chosen = answers[:, step]
        found = step_facts(logits, scores, temperature)
        found["nll"] = -logits.double().log_softmax(dim=-1).gather(1, chosen[:, None])[:, 0]
        for row in alive.nonzero()[:, 0].tolist():
            for key, values in facts.items():
                values.append(float(found[key][row]))
            rows[row].append(float(found["nll"][row]))
            texts[row].append(int(chosen[row]))
        alive &= ~torch.isin(chosen, ends)
    return {
        "answers": [statistics.fmean(row) for row in rows],
        "row": {
            "sampler": name,
            "T": temperature,
            "NLL, nats": round(statistics.fmean(facts["nll"]), 2),
            "distinct-1": round(distinct_n(texts, 1), 3),
            "distinct-2": round(distinct_n(texts, 2), 3),
            "mean pool": round(statistics.fmean(facts["pool"]), 1),
            "mean mass": round(statistics.fmean(facts["mass"]), 3),
            "mean H(q)/H(p)": round(statistics.fmean(facts["ratio"]), 3),
            "violations": round(sum(r > config.alpha * (1 + 1e-6) for r in facts["ratio"]) / len(facts["ratio"]), 4),
        },
    }


def run(config: Config, out: Path) -> dict:
    model, tokenizer = _smollm2.load()
    decoding.enable(model.eval())
    prompts, source = creative_prompts(config.prompts, config.data_dir)
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    tokenizer.padding_side = "left"
    inputs = dict(tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False))
    results = {}
    with logging.tqdm(total=len(config.samplers) * len(config.temperatures), desc="samplers") as bar:
        for temperature in config.temperatures:
            for name in config.samplers:
                results[name, temperature] = run_one(model, inputs, name, temperature, config)
                bar.update()
    for label, key in (("NLL, nats", "nll"), ("distinct-2", "distinct"), ("mean pool", "pool")):
        series = {
            name: (config.temperatures, [results[name, t]["row"][label] for t in config.temperatures], None)
            for name in config.samplers
        }
        lines(out / f"{key}.png", series, "temperature", label, "SmolLM2-135M", logy=label == "mean pool")
    title = (
        f"Samplers on SmolLM2-135M, {config.prompts} prompts ({source}), {config.tokens} tokens, alpha {config.alpha}"
    )
    result = {
        "tables": {title: [found["row"] for found in results.values()]},
        "artifacts": ["nll.png", "distinct.png", "pool.png"],
    }
    hottest = config.temperatures[-1]
    if {"top_h", "top_p 0.9"} <= set(config.samplers):
        ours, theirs = results["top_h", hottest], results["top_p 0.9", hottest]
        violations = sum(results["top_h", t]["row"]["violations"] for t in config.temperatures)
        result["evidence"] = {
            "claim": METHOD.claim,
            "paper": f"{METHOD.headline.metric}: {METHOD.headline.value} against {METHOD.headline.baseline}",
            "metric": f"the model's own NLL of the text at T = {hottest:g}, nats a token",
            "setting": f"SmolLM2-135M-Instruct (4-bit weights), {config.prompts} prompts, {config.tokens} tokens",
            "method": "top_h",
            "ours": round(statistics.fmean(ours["answers"]), 3),
            "ours_sd": round(statistics.stdev(ours["answers"]), 3) if config.prompts > 1 else None,
            "n": config.prompts,
            "baseline_name": "top_p 0.9",
            "baseline": round(statistics.fmean(theirs["answers"]), 3),
            "baseline_sd": round(statistics.stdev(theirs["answers"]), 3) if config.prompts > 1 else None,
            "reproduced": max(ours["answers"]) < min(theirs["answers"]) and violations == 0,
            "note": (
                "Reproduced means that every answer of top-H is likelier than every answer of top-p, and no step is "
                f"above the bound at any temperature. Spread over prompts.{_beside(results, hottest)}"
            ),
        }
    return result


def _beside(results: dict, temperature: float) -> str:
    found = results.get(("min_p 0.1", temperature))
    return f" min-p 0.1 in the same run: {found['row']['NLL, nats']}." if found else ""
