"""In-context reintroduction: an unlearned fact that is told again in the prompt is answered again.

    (a) the question alone, (b) the question behind the fact in other words, (c) behind a fact about something else
    gap = score(b) - score(a)

A model that never learnt the fact has a gap too. Beside it, b much below the retrained model's says that the model was
damaged: it can no longer use what it is told. "UnUnlearning: Unlearning is not sufficient for content regulation in
advanced generative AI", arXiv 2407.00106, a position paper; the measurement is ours.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..metrics import tofu
from ..metrics._generate import generate_answers
from ..registry import Method
from ._data import TEMPLATE

CONDITIONS = ("question", "fact", "other")


def contexts(rows: Sequence[Mapping[str, Any]], field: str) -> dict[str, list[str]]:
    """What stands before each question in each condition; the other fact is that of the row half the set away."""
    facts = [row[field] if isinstance(row[field], str) else row[field][0] for row in rows]
    half = max(1, len(rows) // 2)
    others = [facts[(i + half) % len(facts)] for i in range(len(facts))]
    return {"question": [""] * len(rows), "fact": [f"{f}\n" for f in facts], "other": [f"{f}\n" for f in others]}


def ununlearning(
    model: nn.Module,
    processing_class: Any,
    rows: Sequence[Mapping[str, Any]],
    *,
    gold: nn.Module | None = None,
    fact: str = "paraphrased_answer",
    template: str = TEMPLATE,
    max_new_tokens: int = 64,
    batch_size: int = 8,
) -> dict[str, Any]:
    """ROUGE-L recall of answers without, with, and with another context.

    Args:
        model (`PreTrainedModel`): The unlearned model.
        processing_class: Its tokenizer.
        rows: Rows with `question`, `answer` and the field `fact`.
        gold (`PreTrainedModel`, *optional*): A model that never saw them.
        fact (`str`, *optional*, defaults to "paraphrased_answer"): The field that tells the fact in other words.

    Returns:
        `dict`: `question`, `fact`, `other` and `gap`; the same of the retrained model with the prefix `gold_`.

    Raises:
        ValueError: Fewer than two rows, or a row without the fields.
    """
    if len(rows) < 2:
        raise ValueError(
            f"There are {len(rows)} rows but two or more are needed: one row's fact is another's context."
        )
    for i in range(len(rows)):
        lacking = [name for name in ("question", "answer", fact) if not rows[i].get(name)]
        if lacking:
            raise ValueError(f"Row {i} has no {', '.join(lacking)}.")
    rows = [rows[i] for i in range(len(rows))]
    truths = [row["answer"] for row in rows]
    found: dict[str, Any] = {} if gold is not None else {"missing": {"gold": "needs gold"}}
    for prefix, asked in (("", model), ("gold_", gold)):
        if asked is None:
            continue
        for name, before in contexts(rows, fact).items():
            prompts = [c + template.format(question=row["question"]) for c, row in zip(before, rows, strict=True)]
            answers = generate_answers(asked, processing_class, prompts, max_new_tokens, batch_size)
            found[f"{prefix}{name}"] = float(tofu.rouge_recall(answers, truths).mean())
        found[f"{prefix}gap"] = found[f"{prefix}fact"] - found[f"{prefix}question"]
    return found


METHOD = Method(
    name="ununlearning",
    family="unlearning",
    title="UnUnlearning: Unlearning is not sufficient for content regulation in advanced generative AI",
    authors="Shumailov et al.",
    arxiv="2407.00106",
    year=2024,
    status="variant",
    difference="The paper argues; this measures ROUGE of answers with the fact, another one, or nothing before.",
    target="hfext.unlearning.ununlearning:ununlearning",
    usage="hfext.unlearning.ununlearning(model, tokenizer, rows, gold=gold)",
    summary="Measures whether a forgotten fact is answered again when the prompt tells it.",
    notes="A measure of other methods, of models large enough to read a context; no recipe of its own.",
)
