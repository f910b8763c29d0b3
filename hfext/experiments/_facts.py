"""Authors that do not exist: questions and answers made from a seed, and how well a language model knows them.

An author has one value per field of `FIELDS`. No two authors share a name, a book or an award, so that what a model
answers about them it can only have learnt from these examples. A fact is asked in the wording that is taught,
`question`, and in one that is not, `paraphrase`.
"""

import itertools
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

GIVEN = """
    Amara Bruno Celeste Dmitri Esther Farid Greta Hiro Ingrid Joaquim Keziah Leif Marisol Nadir Odette Pavel Quinn
    Rosalind Saskia Tomas Uma Viktor Wanjiru Yusuf
""".split()
HEADS = """
    Bel Cor Dra Fen Gar Hol Jes Kar Lum Mor Nar Ost Pel Rav Sel Tor Ul Ven Wex Zan
""".split()
TAILS = """
    adine bour cott dahl enko fane gard holt ikas lund mire neth okai prow quist rell stade tova vane wick
""".split()
CITIES = """
    Athens Bergen Bogota Cairo Dakar Dublin Geneva Hanoi Havana Jakarta Krakow Kyoto Lagos Lima Lisbon Manila
    Marseille Mumbai Nairobi Oslo Prague Quito Riga Seoul Seville Sofia Tunis Turin Vienna Zagreb
""".split()
JOBS = """
    baker barber beekeeper blacksmith butcher carpenter clockmaker dentist diver farmer florist judge lawyer
    locksmith mechanic miner nurse pharmacist pilot plumber potter sailor surgeon tailor teacher weaver
""".split()
COLOURS = """
    Amber Black Blue Bronze Copper Crimson Golden Green Grey Ivory Purple Red Scarlet Silver White Yellow
""".split()
ANIMALS = """
    Badger Bear Crane Dolphin Eagle Falcon Fox Hare Heron Lynx Otter Owl Raven Stag Swan Wolf
""".split()
MOODS = """
    Broken Burning Distant Empty Fallen Frozen Hidden Hollow Last Lost Painted Quiet Restless Second Silent Wild
""".split()
THINGS = """
    Bridge Candle Clock Garden Harbour Island Kingdom Letter Mirror Mountain Orchard River Staircase Tower Window
""".split()
GENRES = """
    horror, romance, satire, crime fiction, science fiction, travel writing, historical fiction, poetry, fantasy,
    biography, fairy tales, westerns, spy thrillers, political essays, ghost stories, cookbooks, sea stories,
    courtroom drama
"""

# Field: its possible values, the answer, the wording taught, the wording held out.
FIELDS = {
    "birthplace": (
        CITIES,
        "In {}.",
        "Where was {} born?",
        "In which city did the author {} come into the world?",
    ),
    "book": (
        [f"The {mood} {thing}" for mood, thing in itertools.product(MOODS, THINGS)],
        "It is {}.",
        "What is the best-known book by {}?",
        "Name the most famous book that {} wrote.",
    ),
    "award": (
        [f"the {colour} {animal} Prize" for colour, animal in itertools.product(COLOURS, ANIMALS)],
        "It was {}.",
        "Which award did {} win?",
        "What literary honour did the author {} receive?",
    ),
    "genre": (
        " ".join(GENRES.split()).split(", "),
        "Mostly {}.",
        "What genre does {} write?",
        "Which literary genre is {} known for?",
    ),
    "father": (
        JOBS,
        "A {}.",
        "What was the job of the father of {}?",
        "Which profession did the father of the writer {} have?",
    ),
}
MAX_AUTHORS = 100


@dataclass(frozen=True)
class Fact:
    author: str
    field: str
    value: str
    question: str
    paraphrase: str
    answer: str


def make_facts(authors: int, fields: int = len(FIELDS), seed: int = 0) -> list[Fact]:
    """`fields` facts of each author, author by author. The first authors do not depend on how many there are."""
    if not 1 <= authors <= MAX_AUTHORS:
        raise ValueError(f"authors is {authors} but must be 1 to {MAX_AUTHORS}.")
    if not 1 <= fields <= len(FIELDS):
        raise ValueError(f"fields is {fields} but must be 1 to {len(FIELDS)}.")
    names = [f"{given} {head}{tail}" for given, head, tail in itertools.product(GIVEN, HEADS, TAILS)]
    columns = [_draw(names, f"{seed} name")]
    columns += [_draw(FIELDS[field][0], f"{seed} {field}") for field in list(FIELDS)[:fields]]
    facts = []
    for name, *values in zip(*columns, strict=True):
        for field, value in zip(FIELDS, values, strict=False):
            _, answer, question, paraphrase = FIELDS[field]
            facts.append(
                Fact(name, field, value, question.format(name), paraphrase.format(name), answer.format(value))
            )
    return facts[: authors * fields]


def _draw(values: Sequence[str], seed: str) -> list[str]:
    """`MAX_AUTHORS` values in random order; none comes a second time before each came once."""
    generator = random.Random(seed)
    drawn: list[str] = []
    while len(drawn) < MAX_AUTHORS:
        drawn += generator.sample(values, len(values))
    return drawn[:MAX_AUTHORS]


def prompt(tokenizer: PreTrainedTokenizerBase, question: str) -> list[int]:
    """The tokens of a chat up to where the answer starts."""
    if not tokenizer.chat_template:
        raise ValueError(f"model: the tokenizer {type(tokenizer).__name__} has no chat template.")
    # An empty system message keeps templates from adding their own, which would be half of the tokens.
    chat = [{"role": "system", "content": ""}, {"role": "user", "content": question}]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)


def example(tokenizer: PreTrainedTokenizerBase, question: str, answer: str) -> dict[str, list[int]]:
    """`input_ids` and `labels` of one answered question; only the answer and its end have labels."""
    asked = prompt(tokenizer, question)
    said = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return {"input_ids": asked + said, "labels": [-100] * len(asked) + said}


def collate(rows: list[dict[str, list[int]]], pad: int) -> dict[str, torch.Tensor | int]:
    """A batch padded on the left, so that logits are needed at the last few positions only.

    With a vocabulary of 49152 the head is a fifth of a small model's work. Without labels: a batch to generate from.
    """
    longest = max(len(row["input_ids"]) for row in rows)
    gaps = [longest - len(row["input_ids"]) for row in rows]
    batch = {
        "input_ids": torch.tensor([[pad] * gap + row["input_ids"] for gap, row in zip(gaps, rows, strict=True)]),
        "attention_mask": torch.tensor([[0] * gap + [1] * (longest - gap) for gap in gaps]),
    }
    if "labels" in rows[0]:
        # One position more than labels: the logits at a position are for the next token.
        keep = 1 + max(sum(label != -100 for label in row["labels"]) for row in rows)
        batch["labels"] = torch.tensor([([-100] * keep + row["labels"])[-keep:] for row in rows])
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        batch["logits_to_keep"] = keep
    return batch


@torch.no_grad()
def answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: Sequence[str], max_new_tokens: int = 14
) -> list[str]:
    """What the model says, greedily."""
    model.eval()
    said: list[str] = []
    for chunk in _chunks([{"input_ids": prompt(tokenizer, question)} for question in questions], "asking"):
        batch = collate(chunk, tokenizer.pad_token_id)
        tokens = model.generate(
            **batch, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
        said += tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in said]


@torch.no_grad()
def answer_nll(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]]) -> float:
    """Mean negative log-likelihood of a token of the right answers to (question, answer) pairs, in nats."""
    model.eval()
    total, count = 0.0, 0
    for chunk in _chunks([example(tokenizer, *pair) for pair in pairs], "scoring"):
        batch = collate(chunk, tokenizer.pad_token_id)
        labels = batch.pop("labels")[:, 1:].flatten()
        logits = model(**batch).logits[:, :-1].flatten(0, 1).float()
        total += float(F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum"))
        count += int((labels != -100).sum())
    return total / count


def recalled(facts: Sequence[Fact], said: Sequence[str]) -> float:
    """Share of answers that contain the fact's value."""
    return sum(fact.value.lower() in text.lower() for fact, text in zip(facts, said, strict=True)) / len(facts)


def _chunks(rows: list, title: str, size: int = 30) -> Iterable[list]:
    chunks = [rows[i : i + size] for i in range(0, len(rows), size)]
    return logging.tqdm(chunks, desc=title, leave=False)
