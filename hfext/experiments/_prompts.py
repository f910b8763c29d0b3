"""Prompts for generation: MT-Bench's creative questions where the data is, else a few of our own."""

import json

from ._data import shared_data

# Used where MT-Bench is not at hand, so that a recipe runs everywhere; the result says which prompts it had.
OWN = (
    "Write a short story about a lighthouse keeper who finds a letter from the sea.",
    "Describe a market in a city that was built on the back of a giant turtle.",
    "Invent a holiday and explain how people celebrate it.",
    "Write a review of a restaurant where every dish is blue.",
    "Tell a bedtime story about a robot that is afraid of the dark.",
    "Write a letter from a river to the mountain it comes from.",
    "Describe your favourite season to someone who has never been outside.",
    "Write the opening of a detective novel set in a library.",
    "Explain to a child why the moon changes its shape, as a poem.",
    "Write a conversation between two old trees about the weather.",
)
CREATIVE = ("writing", "roleplay", "humanities")


def creative_prompts(count: int, folder: str | None = None) -> tuple[list[str], str]:
    """`count` questions and the name of their source."""
    file = shared_data("mt_bench/question.jsonl", folder)
    if file is None:
        return [OWN[i % len(OWN)] for i in range(count)], "10 prompts of the recipe"
    questions = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    chosen = [q["turns"][0] for q in questions if q["category"] in CREATIVE]
    if count > len(chosen):
        raise ValueError(f"prompts is {count} but must be at most {len(chosen)}, the creative questions of MT-Bench.")
    return chosen[:count], f"MT-Bench, {', '.join(CREATIVE)}"
