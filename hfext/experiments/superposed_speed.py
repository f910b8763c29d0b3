"""CPU time and quality of superposed drafts beside nucleus samples, beam search and greedy decoding, on SmolLM2.

Every prefix of 15 tokens is continued by 10 tokens, by all methods in turn, one thread, after one round that is not
counted. Times are CPU seconds a prefix; ratios are of medians over prefixes. Perplexities are of the continuation
under the model itself, so greedy decoding has the lowest by construction; diversity (Self-BLEU) belongs beside it.
"""

import math
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.logging import tqdm

from ..decoding.ngram_store import NGramStore
from ..decoding.superposed import METHOD, superposed_generate
from . import _smollm2
from ._data import shared_data
from ._text_metrics import distinct_n, self_bleu

PROMPTS = (
    "Compose an engaging travel blog post about a recent trip to the islands, highlighting cultural experiences",
    "Imagine you are writing a letter to a friend who has just moved to a large and noisy city",
    "The early history of the railway shows how quickly a new invention can change the life of whole",
    "When the storm reached the coast late in the evening, the fishermen who had stayed at home began",
    "A good explanation of why the sky is blue starts with the way in which small particles scatter",
    "The committee published a report about the quality of the water in the river and asked the local",
    "In the second half of the game the visiting team changed its plan and played with much more",
    "She opened the old wooden box and found a bundle of letters that her grandmother had written during",
)


@dataclass(kw_only=True)
class Config:
    """
    Args:
        prefixes: Texts that are continued.
        prefix_length, new_tokens: In tokens.
        num_drafts: The k that are measured.
        top_p: Of the nucleus samples.
        text: A text file whose lines give the prefixes; by default WikiText-2's `test.txt` of the shared data.
        corpus: A text file for the n-gram store; by default `valid.txt` beside it. Without data there is no store and
            the prefixes are sentences of this module.
        bar_3, bar_8: The most CPU time of k=3 and k=8, as a share of k nucleus samples one after the other.
        seed: Of prefixes and samples.
    """

    prefixes: int = 12
    prefix_length: int = 15
    new_tokens: int = 10
    num_drafts: tuple[int, ...] = (1, 3, 8)
    top_p: float = 0.9
    text: Path | None = None
    corpus: Path | None = None
    bar_3: float = 0.45
    bar_8: float = 0.30
    seed: int = 0

    def __post_init__(self):
        for name in ("prefixes", "prefix_length", "new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)} but must be >= 1.")
        if 3 not in self.num_drafts or min(self.num_drafts) < 1:
            raise ValueError(f"num_drafts is {self.num_drafts} but must hold 3 and nothing below 1.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p} but must be in (0, 1].")
        for name in ("text", "corpus"):
            if getattr(self, name) is not None and not getattr(self, name).is_file():
                raise FileNotFoundError(f"{name} is {getattr(self, name)}, which is no file.")


def paragraphs(path: Path) -> list[str]:
    """Lines of running text; headings begin with `=`."""
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if len(line) > 100 and not line.startswith("=")]


class Meter:
    """Model calls and positions of a model, counted by a hook."""

    def __init__(self, model: PreTrainedModel):
        self.calls = self.positions = 0
        self.handle = model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module, args, kwargs):
        fed = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
        self.calls += 1
        self.positions += fed.shape[0] * fed.shape[1]


def perplexities(model: PreTrainedModel, drafts: Tensor, prefix: int) -> list[float]:
    """Of the tokens after `prefix`, [drafts, length] -> one a draft."""
    with torch.no_grad():
        logits = model(drafts).logits[:, prefix - 1 : -1]
    nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), drafts[:, prefix:], reduction="none")
    return nll.mean(-1).exp().tolist()


def methods(model: PreTrainedModel, store: NGramStore | None, config: Config) -> dict[tuple[str, int], Callable]:
    """(name, k) -> function of a prefix [1, L] that returns the drafts [k, L + new_tokens]."""
    length = {"max_new_tokens": config.new_tokens, "eos_token_id": None, "pad_token_id": 0}
    sampling = {"do_sample": True, "top_p": config.top_p, "top_k": 0, "temperature": 1.0}

    def superposed(k: int, store: NGramStore | None) -> Callable:
        kwargs = {"custom_generate": superposed_generate, "num_drafts": k, "ngram_store": store, "do_sample": False}
        return lambda ids: model.generate(ids, **kwargs, **length)

    def one_by_one(k: int) -> Callable:
        return lambda ids: torch.cat([model.generate(ids, **sampling, **length) for _ in range(k)])

    def batched(k: int) -> Callable:
        return lambda ids: model.generate(ids, num_return_sequences=k, **sampling, **length)

    def beams(k: int) -> Callable:
        kwargs = {"num_beams": k, "num_return_sequences": k, "do_sample": False}
        return lambda ids: model.generate(ids, **kwargs, **length)

    found: dict[tuple[str, int], Callable] = {
        ("greedy", 1): lambda ids: model.generate(ids, do_sample=False, **length)
    }
    for k in config.num_drafts:
        found["superposed", k] = superposed(k, store)
        if store is not None:
            found["superposed, no n-grams", k] = superposed(k, None)
        found["nucleus, one by one", k] = one_by_one(k)
        if k > 1:
            found["nucleus, batch of k", k] = batched(k)
            found["beam search", k] = beams(k)
    return found


def run(config: Config, out: Path) -> dict:
    model, tokenizer = _smollm2.load()
    model.eval()
    text, corpus = (
        config.text or shared_data("wikitext2/test.txt"),
        config.corpus or shared_data("wikitext2/valid.txt"),
    )
    texts = paragraphs(text) if text else list(PROMPTS)
    rows = [ids for ids in tokenizer(texts)["input_ids"] if len(ids) >= config.prefix_length]
    rows = random.Random(config.seed).sample(rows, min(config.prefixes, len(rows)))
    prefixes = [torch.tensor([ids[: config.prefix_length]]) for ids in rows]
    store = NGramStore.build(paragraphs(corpus), tokenizer, corpus=corpus.parent.name) if corpus else None

    called = methods(model, store, config)
    meter = Meter(model)
    seconds: dict = {key: [] for key in called}
    drafts: dict = {key: [] for key in called}
    work: dict = {}
    with torch.random.fork_rng(devices=[]), tqdm(total=(len(prefixes) + 1) * len(called), desc="drafts") as bar:
        torch.manual_seed(config.seed)
        for i, ids in enumerate([prefixes[0], *prefixes]):
            for key, generate in called.items():
                meter.calls = meter.positions = 0
                start = time.process_time()
                found = generate(ids)
                spent = time.process_time() - start
                work[key] = (meter.calls, meter.positions)
                if i:
                    seconds[key].append(spent)
                    drafts[key].append(found)
                bar.update()
    meter.handle.remove()

    middle = {key: statistics.median(values) for key, values in seconds.items()}
    scored = {key: [perplexities(model, d, config.prefix_length) for d in found] for key, found in drafts.items()}
    batch_ratio = middle["nucleus, batch of k", 3] / middle["superposed", 3]
    table = [_row(key, middle, work, drafts[key], scored[key], config) for key in called]
    share = {k: middle["superposed", k] / middle["nucleus, one by one", k] for k in config.num_drafts}
    bars = [
        {"k": k, "share of k nucleus samples": round(share[k], 3), "bar": f"<= {bar}", "met": share[k] <= bar}
        for k, bar in ((3, config.bar_3), (8, config.bar_8))
        if k in share
    ]
    ratios = [b / a for a, b in zip(seconds["superposed", 3], seconds["nucleus, one by one", 3], strict=True)]
    return {
        "tables": {
            f"Ten-token drafts, {len(prefixes)} prefixes, one CPU thread": table,
            "Perplexity of the superposed drafts by rank": _by_rank(scored, config),
            "CPU time against k nucleus samples one by one": bars,
        },
        "evidence": {
            "claim": METHOD.claim,
            "paper": METHOD.headline.value,
            "metric": METHOD.headline.metric,
            "setting": f"SmolLM2-135M, {text.parent.name if text else 'own prompts'}, {config.prefix_length}-token "
            f"prefixes, {config.new_tokens} tokens, batch 1, one CPU thread",
            "method": METHOD.name,
            "ours": round(1 / share[3], 3),
            "ours_sd": round(statistics.stdev(ratios), 3) if len(ratios) > 1 else None,
            "n": len(prefixes),
            "baseline_name": "nucleus samples, one by one",
            "baseline": 1.0,
            "baseline_sd": None,
            "reproduced": share[3] <= config.bar_3,
            "note": f"Reproduced means at most {config.bar_3} of the CPU time of 3 samples one by one. Against a "
            f"batch of 3 samples the speed-up is {batch_ratio:.2f}; drafts are more alike than samples (Self-BLEU).",
        },
    }


def _row(key: tuple, middle: dict, work: dict, drafts: list[Tensor], scored: list, config: Config) -> dict:
    name, k = key
    flat = [p for group in scored for p in group]
    tails = [group[:, config.prefix_length :].tolist() for group in drafts]
    baseline = middle.get(("nucleus, one by one", k))
    return {
        "method": name,
        "k": k,
        "CPU ms": round(1e3 * middle[key], 1),
        "of k samples": round(middle[key] / baseline, 3) if baseline else None,
        "model calls": work[key][0],
        "tokens processed": work[key][1],
        "perplexity, mean": round(statistics.fmean(flat), 2),
        "geometric": round(math.exp(statistics.fmean(map(math.log, flat))), 2),
        "best of k": round(statistics.fmean(map(min, scored)), 2),
        "Self-BLEU-4": round(statistics.fmean(map(self_bleu, tails)), 3) if k > 1 else None,
        "distinct-2": round(statistics.fmean(distinct_n(tail, 2) for tail in tails), 3),
    }


def _by_rank(scored: dict, config: Config) -> list[dict]:
    rows = []
    for (name, k), groups in scored.items():
        if name.startswith("superposed") and k == 3:
            means = [statistics.fmean(group[i] for group in groups) for i in range(k)]
            logs = [statistics.fmean(math.log(group[i]) for group in groups) for i in range(k)]
            row = {f"draft {i + 1}, mean (geometric)": f"{means[i]:.2f} ({math.exp(logs[i]):.2f})" for i in range(k)}
            rows.append({"method": name, **row})
    return rows
