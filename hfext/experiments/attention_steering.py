"""A planted fact among distractors: does steering attention to its sentence make SmolLM2 give the right answer?

Each prompt lists where a number of people live and asks for one of them; the sentence about this person is
highlighted. Heads are profiled on some prompts and measured on others, with other people. Two controls say what the
gain is due to: the same number of random heads, and the same heads steered to the sentence of somebody else. A
highlight that is right is what PASTA supposes; a second table runs AutoPASTA, which has to find the sentence itself.
"""

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..decoding.autopasta import ANSWER, autopasta_generate
from ..decoding.pasta import METHOD, attention_modules, profile_heads, save_heads, span_to_tokens, steer_attention
from . import _smollm2
from ._facts import CITIES, GIVEN


@dataclass(kw_only=True)
class Config:
    """
    Args:
        people: Sentences of a prompt.
        profiled: Prompts on which heads are chosen.
        measured: Prompts on which they are measured.
        layers_top, heads_top: Of `profile_heads`.
        alpha: Weight of what is not highlighted.
        random_sets: Sets of random heads.
        end_to_end: Prompts of the measured ones that AutoPASTA answers.
        batch: Prompts of a forward.
        seed: Of people, places and random heads.
    """

    people: int = 6
    profiled: int = 8
    measured: int = 48
    layers_top: int = 4
    heads_top: int = 12
    alpha: float = 0.01
    random_sets: int = 3
    end_to_end: int = 24
    batch: int = 16
    seed: int = 0

    def __post_init__(self):
        if not 2 <= self.people <= len(GIVEN) // 2:
            raise ValueError(f"people is {self.people} but must be between 2 and {len(GIVEN) // 2}.")
        for name in ("profiled", "measured", "random_sets", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)} but must be >= 1.")
        if not 0 <= self.end_to_end <= self.measured:
            raise ValueError(f"end_to_end is {self.end_to_end} but must be between 0 and {self.measured}, measured.")


@dataclass(frozen=True)
class Prompt:
    """`text` ends where the answer begins, which is the one token of `city`; `other` is about somebody else."""

    context: str
    question: str
    text: str
    sentence: str
    other: str
    city: str
    answer: int


def prompts(
    tokenizer: PreTrainedTokenizerBase, names: list[str], people: int, count: int, rng: random.Random
) -> list[Prompt]:
    """`count` prompts with people of `names`; only cities that are one token."""
    tokens = {city: tokenizer(f" {city}", add_special_tokens=False)["input_ids"] for city in CITIES}
    cities = [city for city, ids in tokens.items() if len(ids) == 1]
    found = []
    for _ in range(count):
        who, where = rng.sample(names, people), rng.sample(cities, people)
        sentences = [f"{name} lives in {city}." for name, city in zip(who, where, strict=True)]
        asked, other = rng.sample(range(people), 2)
        context, question, city = " ".join(sentences), f"Where does {who[asked]} live?", where[asked]
        message = {"role": "user", "content": f"{context}\n\n{question}"}
        text = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
        text += f"{who[asked]} lives in"
        found.append(Prompt(context, question, text, sentences[asked], sentences[other], city, tokens[city][0]))
    return found


@torch.no_grad()
def answer_log_probs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: list[Prompt],
    heads: dict[int, list[int]],
    alpha: float,
    batch: int,
    other: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each answer and whether it is the most likely token, both [prompts]."""
    log_probs, right = [], []
    for i in range(0, len(items), batch):
        part = items[i : i + batch]
        texts = [p.text for p in part]
        inputs = tokenizer(texts, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt")
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        place = {"add_special_tokens": False, "padded_length": ids.shape[1]}
        spans = [[span_to_tokens(tokenizer, p.text, p.other if other else p.sentence, **place)] for p in part]
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with steer_attention(model, spans, heads, alpha):
            logits = model(ids, attention_mask=mask, position_ids=positions, logits_to_keep=1).logits[:, -1]
        answers = torch.tensor([p.answer for p in part])
        log_probs.append(logits.log_softmax(-1).gather(1, answers[:, None])[:, 0])
        right.append(logits.argmax(-1) == answers)
    return torch.cat(log_probs).double(), torch.cat(right)


def first_city(answer: str) -> str | None:
    """The city that an answer names first."""
    named = [(answer.find(city), city) for city in CITIES if city in answer]
    return min(named)[1] if named else None


def answered(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: list[Prompt],
    heads: dict[int, list[int]],
    alpha: float,
) -> list[dict[str, object]]:
    """Free answers of the same prompt, greedy, without and with AutoPASTA."""
    plain, steered, found = 0, 0, 0
    options = {"max_new_tokens": 12, "do_sample": False}
    for p in logging.tqdm(items, desc="answers"):
        message = {"role": "user", "content": ANSWER.format(context=p.context, question=p.question)}
        inputs = tokenizer.apply_chat_template([message], add_generation_prompt=True, return_tensors="pt")
        out = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
        plain += first_city(tokenizer.decode(out)) == p.city
        auto = autopasta_generate(
            model, tokenizer, p.context, p.question, heads, alpha=alpha, chat=True, quote_tokens=24, **options
        )
        steered += first_city(auto.answer) == p.city
        found += auto.sentence == p.sentence
    percent = 100 / len(items)
    return [
        {"answer": "plain", "n": len(items), "right, %": round(percent * plain, 1), "sentence found, %": None},
        {
            "answer": "AutoPASTA",
            "n": len(items),
            "right, %": round(percent * steered, 1),
            "sentence found, %": round(percent * found, 1),
        },
    ]


def random_heads(model: PreTrainedModel, count: int, rng: random.Random) -> dict[int, list[int]]:
    per_layer = model.config.num_attention_heads
    chosen = rng.sample([(k, h) for k in attention_modules(model) for h in range(per_layer)], count)
    return {layer: sorted(h for k, h in chosen if k == layer) for layer in sorted({k for k, _ in chosen})}


def run(config: Config, out: Path) -> dict:
    model, tokenizer = _smollm2.load()
    model.eval()
    rng = random.Random(config.seed)
    names = rng.sample(GIVEN, len(GIVEN))
    half = len(names) // 2
    profiled = prompts(tokenizer, names[:half], config.people, config.profiled, rng)
    measured = prompts(tokenizer, names[half:], config.people, config.measured, rng)

    def measure(items: list[Prompt], heads: dict[int, list[int]], other: bool = False) -> tuple[Tensor, Tensor]:
        return answer_log_probs(model, tokenizer, items, heads, config.alpha, config.batch, other)

    heads = profile_heads(
        model,
        lambda chosen: measure(profiled, chosen)[0].mean().item(),
        layers_top=config.layers_top,
        heads_top=config.heads_top,
    )
    save_heads(heads, out / "heads.json")
    runs = {
        "no steering": ({}, False),
        "profiled heads": (heads, False),
        "profiled heads, another sentence": (heads, True),
    }
    for i in range(config.random_sets):
        runs[f"random heads, set {i + 1}"] = (random_heads(model, config.heads_top, rng), False)
    found = {name: measure(measured, *args) for name, args in logging.tqdm(runs.items(), desc="measured")}
    plain, steered = found["no steering"][0], found["profiled heads"][0]
    rows = [
        {
            "attention": name,
            "log-probability of the answer": round(log_probs.mean().item(), 3),
            "higher than without, %": round(100 * (log_probs > plain).double().mean().item(), 1),
            "most likely token, %": round(100 * right.double().mean().item(), 1),
        }
        for name, (log_probs, right) in found.items()
    ]
    gain = steered - plain
    error = (gain.std() / len(gain) ** 0.5).item()
    chosen = ", ".join(f"{layer}: {hs}" for layer, hs in heads.items())
    tables = {"A planted fact among distractors, SmolLM2-135M-Instruct": rows}
    if config.end_to_end:
        items = measured[: config.end_to_end]
        tables["The model finds the sentence itself"] = answered(model, tokenizer, items, heads, config.alpha)
    return {
        "tables": tables,
        "evidence": {
            "claim": METHOD.claim,
            "paper": "+22 % average accuracy of LLaMA-7B on four tasks (abstract)",
            "metric": "mean log-probability of the right answer, nats",
            "setting": f"{config.people} sentences, {config.heads_top} heads profiled on {config.profiled} prompts, "
            f"alpha {config.alpha:g}, SmolLM2-135M-Instruct",
            "method": "pasta",
            "ours": round(steered.mean().item(), 4),
            "ours_sd": None,
            "n": len(gain),
            "baseline_name": "no steering",
            "baseline": round(plain.mean().item(), 4),
            "baseline_sd": None,
            "reproduced": gain.mean().item() > 3 * error,
            "note": f"Gain {gain.mean().item():.3f} with a standard error of {error:.3f} over other people than those "
            "profiled; reproduced above 3 of these. The right sentence is highlighted. "
            f"Heads by layer: {chosen}.",
        },
        "artifacts": ["heads.json"],
    }
