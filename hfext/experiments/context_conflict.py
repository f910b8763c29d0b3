"""Context against memory: does SmolLM2 give the answer of its context, with and without context-aware decoding?

Two sets of questions whose context contradicts what the model has memorised. `Facts`: "In this story the capital of
France is Rome." and the like, made here. MemoTrap (2022): a proverb is to end in another word, or a changed proverb is
to be translated; the instruction is the context and the beginning of the proverb the query.

An answer's score is the log-probability of all its tokens under log softmax((1 + alpha) l - alpha l_null). An answer
is given when it scores higher than the memorised one.
"""

import ast
import csv
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..decoding.cad import METHOD, cad_scores
from . import _smollm2
from ._data import shared_data

logger = logging.get_logger(__name__)

# What, the true answer, the answer of the context.
FACTS = """
    the capital of France | Paris | Rome
    the capital of Italy | Rome | Madrid
    the capital of Germany | Berlin | Vienna
    the capital of Japan | Tokyo | Paris
    the capital of Russia | Moscow | London
    the capital of Spain | Madrid | Berlin
    the capital of Egypt | Cairo | Athens
    the capital of England | London | Dublin
    the capital of Greece | Athens | Cairo
    the capital of Austria | Vienna | Moscow
    the largest planet of the solar system | Jupiter | Mars
    the planet closest to the Sun | Mercury | Neptune
    the colour of the sky on a clear day | blue | green
    the colour of fresh snow | white | red
    the colour of grass | green | blue
    the colour of blood | red | yellow
    the colour of a ripe banana | yellow | purple
    the first month of the year | January | August
    the last month of the year | December | June
    the day after Monday | Tuesday | Saturday
    the day before Sunday | Saturday | Wednesday
    the opposite of hot | cold | loud
    the opposite of left | right | green
    the opposite of day | night | water
    the animal that barks | the dog | the horse
    the animal that gives us milk | the cow | the tiger
    the largest ocean | the Pacific | the Arctic
    the season after winter | spring | autumn
    the language of Brazil | Portuguese | Russian
    the language of Mexico | Spanish | Chinese
"""
WORDINGS = {
    "statement": ("In this story {what} is {new}. They all know that {what} is", "They all know that {what} is"),
    "question": (
        "In this story {what} is {new}.\nQuestion: What is {what}?\nAnswer: It is",
        "Question: What is {what}?\nAnswer: It is",
    ),
}
MEMO_TRAP = {"proverb ending": "1-proverb-ending.csv", "proverb translation": "2-proverb-translation.csv"}


@dataclass(kw_only=True)
class Config:
    """
    Args:
        alphas: Strengths; the first is 0, the last is that of the evidence.
        rows: Rows of each MemoTrap file, evenly spread; 0 leaves it out.
        data_dir: The folder that holds `memo_trap`; by default the environment's HFEXT_DATA, or `shared/data` beside
            the checkout. MemoTrap is left out, with a note, where there is none.
        p_value: Of the one-sided sign test on the questions whose outcome changes, below which it counts.
    """

    alphas: list[float] = (0.0, 0.5, 1.0)
    rows: int = 240
    data_dir: Path | None = None
    p_value: float = 0.01

    def __post_init__(self):
        if len(self.alphas) < 2 or self.alphas[0] != 0 or list(self.alphas) != sorted(set(self.alphas)):
            raise ValueError(f"alphas is {list(self.alphas)} but must rise from 0, two or more.")
        if self.rows < 0:
            raise ValueError(f"rows is {self.rows} but must be >= 0.")
        if not 0 < self.p_value < 1:
            raise ValueError(f"p_value is {self.p_value} but must be in (0, 1).")


@dataclass(frozen=True)
class Question:
    """`answers` are (that of the context, the memorised one)."""

    given: str
    null: str
    answers: tuple[str, str]


def facts() -> dict[str, list[Question]]:
    """The made-up questions by wording."""
    rows = [[part.strip() for part in line.split("|")] for line in FACTS.strip().splitlines()]
    return {
        name: [
            Question(given.format(what=what, new=new), null.format(what=what), (f" {new}.", f" {true}."))
            for what, true, new in rows
        ]
        for name, (given, null) in WORDINGS.items()
    }


def memo_trap(path: Path) -> list[Question]:
    """A file of MemoTrap: the query is the last line of the prompt, or what follows the instruction's colon."""
    questions = []
    with open(path, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            head, mark, query = row["prompt"].rpartition("\n" if "\n" in row["prompt"] else '": ')
            classes, right = ast.literal_eval(row["classes"]), int(row["answer_index"])
            if not head or len(classes) != 2:
                raise ValueError(f"{path.name}: {row['prompt']!r} is no prompt of MemoTrap.")
            questions.append(Question(head + mark + query, query, (classes[right], classes[1 - right])))
    return questions


def answer_logits(model: PreTrainedModel, prompt: list[int], answers: list[list[int]]) -> list[Tensor]:
    """For each answer the logits of its tokens, [tokens, vocab]; the prompt is run once."""
    out = model(torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
    cache, first = out.past_key_values, out.logits[0]
    width = max(len(answer) for answer in answers) - 1
    if not width:
        return [first] * len(answers)
    cache.batch_repeat_interleave(len(answers))
    # Padding on the right: later positions do not reach back.
    rows = [answer[:-1] + [0] * (width + 1 - len(answer)) for answer in answers]
    rest = model(torch.tensor(rows), past_key_values=cache).logits
    return [torch.cat([first, rest[i, : len(answer) - 1]]) for i, answer in enumerate(answers)]


@torch.no_grad()
def gaps(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: list[Question], alphas: list[float]
) -> Tensor:
    """log p(answer of the context) - log p(memorised answer), [questions, alphas]."""
    found = torch.zeros(len(questions), len(alphas), dtype=torch.float64)
    for i, question in enumerate(logging.tqdm(questions, desc="questions")):
        answers = [tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in question.answers]
        given = answer_logits(model, tokenizer(question.given)["input_ids"], answers)
        null = answer_logits(model, tokenizer(question.null)["input_ids"], answers)
        for j, alpha in enumerate(alphas):
            scores = [
                cad_scores(g, n, alpha).gather(1, torch.tensor(a)[:, None]).sum().item()
                for g, n, a in zip(given, null, answers, strict=True)
            ]
            found[i, j] = scores[0] - scores[1]
    return found


def sign_test(gained: int, lost: int) -> float:
    """The probability of at least `gained` of all changes when both directions are equally likely."""
    n = gained + lost
    return sum(math.comb(n, k) for k in range(gained, n + 1)) / 2**n


def run(config: Config, out: Path) -> dict:
    alphas = list(config.alphas)
    sets = facts()
    folder, note = shared_data("memo_trap", config.data_dir), ""
    if folder is None or not config.rows:
        note = " MemoTrap is left out: no folder memo_trap." if config.rows else ""
    else:
        for name, file in MEMO_TRAP.items():
            questions = memo_trap(folder / file)
            step = max(1, len(questions) // config.rows)
            sets[f"MemoTrap, {name}"] = questions[::step][: config.rows]
    model, tokenizer = _smollm2.load()
    model.eval()
    rows, found = [], {}
    for name, questions in sets.items():
        gap = found[name] = gaps(model, tokenizer, questions, alphas)
        for j, alpha in enumerate(alphas):
            before, after = gap[:, 0] > 0, gap[:, j] > 0
            gained, lost = int((after & ~before).sum()), int((before & ~after).sum())
            rows.append(
                {
                    "questions": name,
                    "n": len(gap),
                    "alpha": alpha,
                    "answer of the context, %": round(100 * after.double().mean().item(), 1),
                    "gained": gained,
                    "lost": lost,
                    "mean gap, nats": round(gap[:, j].mean().item(), 2),
                    "gap rose, %": round(100 * (gap[:, j] > gap[:, max(j - 1, 0)]).double().mean().item(), 1)
                    if j
                    else None,
                }
            )
    memo = [name for name in found if name.startswith("MemoTrap")]
    gap = torch.cat([found[name] for name in memo or found])
    before, after = gap[:, 0] > 0, gap[:, -1] > 0
    gained, lost = int((after & ~before).sum()), int((before & ~after).sum())
    p = sign_test(gained, lost)
    return {
        "tables": {"Answer of the context against the memorised one, SmolLM2-135M-Instruct": rows},
        "evidence": {
            "claim": METHOD.claim,
            "paper": "higher accuracy than plain decoding on knowledge conflicts (tables not re-checked)",
            "metric": "answers of the context, %",
            "setting": f"{'MemoTrap' if memo else 'made-up conflicts'}, SmolLM2-135M-Instruct, alpha {alphas[-1]:g}",
            "method": "cad",
            "ours": round(100 * after.double().mean().item(), 2),
            "ours_sd": None,
            "n": len(gap),
            "baseline_name": "plain decoding",
            "baseline": round(100 * before.double().mean().item(), 2),
            "baseline_sd": None,
            "reproduced": gained > lost and p < config.p_value,
            "note": f"{gained} questions gained, {lost} lost; one-sided sign test p = {p:.2g}, "
            f"reproduced below {config.p_value:g}.{note}",
        },
    }
