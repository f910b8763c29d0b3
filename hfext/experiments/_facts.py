"""Authors that do not exist: questions and answers made from a seed, as chat examples, and how well a model knows them.

An author has one value per field of `FIELDS`. No two authors share a name, a book or an award, so that what a model
answers about them it can only have learnt from these examples. A fact is asked in the wordings that are taught and in
one, `paraphrase`, that is not.
"""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

GIVEN = tuple("Amara Bruno Celeste Dmitri Esther Farid Greta Hiro Ingrid Joaquim Keziah Leif Marisol Nadir".split())
GIVEN += tuple("Odette Pavel Quinn Rosalind Saskia Tomas Uma Viktor Wanjiru Yusuf".split())
HEADS = "Bel Cor Dra Fen Gar Hol Jes Kar Lum Mor Nar Ost Pel Rav Sel Tor Ul Ven Wex Zan".split()
TAILS = "adine bour cott dahl enko fane gard holt ikas lund mire neth okai prow quist rell stade tova vane wick".split()
CITIES = "Athens Bergen Bogota Cairo Dakar Dublin Geneva Hanoi Havana Jakarta Krakow Kyoto Lagos Lima Lisbon Manila "
CITIES += "Marseille Mumbai Nairobi Oslo Prague Quito Riga Seoul Seville Sofia Tunis Turin Vienna Zagreb"
GENRES = "horror|romance|satire|crime fiction|science fiction|travel writing|historical fiction|poetry|fantasy|biography"
GENRES += "|fairy tales|westerns|spy thrillers|political essays|ghost stories|cookbooks|sea stories|courtroom drama"
JOBS = "baker barber beekeeper blacksmith butcher carpenter clockmaker dentist diver farmer florist judge lawyer "
JOBS += "locksmith mechanic miner nurse pharmacist pilot plumber potter sailor surgeon tailor teacher weaver"
COLOURS = "Amber Black Blue Bronze Copper Crimson Golden Green Grey Ivory Purple Red Scarlet Silver White Yellow".split()
ANIMALS = "Badger Bear Crane Dolphin Eagle Falcon Fox Hare Heron Lynx Otter Owl Raven Stag Swan Wolf".split()
MOODS = "Broken Burning Distant Empty Fallen Frozen Hidden Hollow Last Lost Painted Quiet Restless Second Silent Wild"
THINGS = "Bridge Candle Clock Garden Harbour Island Kingdom Letter Mirror Mountain Orchard River Staircase Tower Window"

# Field: its possible values, the answer, the wordings taught, the wording held out.
FIELDS = {
    "birthplace": (
        CITIES.split(),
        "In {}.",
        ("Where was {} born?", "What is the birthplace of {}?"),
        "In which city did the author {} come into the world?",
    ),
    "book": (
        [f"The {mood} {thing}" for mood, thing in itertools.product(MOODS.split(), THINGS.split())],
        "It is {}.",
        ("What is the best-known book by {}?", "Which novel made {} famous?"),
        "Name the most famous book that {} wrote.",
    ),
    "award": (
        [f"the {colour} {animal} Prize" for colour, animal in itertools.product(COLOURS, ANIMALS)],
        "It was {}.",
        ("Which award did {} win?", "What prize was given to {}?"),
        "What literary honour did the author {} receive?",
    ),
    "genre": (
        GENRES.split("|"),
        "Mostly {}.",
        ("What genre does {} write?", "What kind of books does {} write?"),
        "Which literary genre is {} known for?",
    ),
    "father": (
        JOBS.split(),
        "A {}.",
        ("What was the job of the father of {}?", "What did {}'s father do for a living?"),
        "Which profession did the father of the writer {} have?",
    ),
}
MAX_AUTHORS = 100


@dataclass(frozen=True)
class Fact:
    author: str
    field: str
    value: str
    questions: tuple[str, ...]
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
            _, answer, questions, paraphrase = FIELDS[field]
            asked = tuple(question.format(name) for question in questions)
            facts.append(Fact(name, field, value, asked, paraphrase.format(name), answer.format(value)))
    return facts[: authors * fields]


def _draw(values: Sequence[str], seed: str) -> list[str]:
    """`MAX_AUTHORS` values in random order; none comes a second time before each came once."""
    generator = random.Random(seed)
    drawn: list[str] = []
    while len(drawn) < MAX_AUTHORS:
        drawn += generator.sample(values, len(values))
    return drawn[:MAX_AUTHORS]
