"""Stage `forget` of the quickstart: NGDiff makes the taught model forget some of the authors and keep the others.

Beside it stands an adapter that was taught the others alone, in the same way: unlearning ends when the facts are
known no better than there. Both are then attacked by relearning half of the forgotten facts.
"""

import time
from typing import TYPE_CHECKING

from transformers import PreTrainedModel

from ..unlearning.relearning import relearning
from ._fact_unlearning import UntilForgotten, fact_rows, knowledge, twin, unlearn
from ._plots import lines
from ._stage_teach import add_lora, learn, load_language_model, save_adapter

if TYPE_CHECKING:
    from .quickstart import State

FOLDER = "fictional-authors-unlearned-lora"
# By how much answers may be likelier than for the other adapter at the end, and the updates between two looks.
NEAR, EVERY = 0.02, 5
# Of the attack: its share of the forgotten facts, the updates after which the others are asked, the learning rate.
SHARE, STEPS, RATE = 0.5, (0, 2, 5, 10), 1e-3


def forget(state: "State") -> None:
    c = state.config
    first = len(state.facts) - c.forget_authors * c.fields
    kept, gone = state.facts[:first], state.facts[first:]
    tokenizer = state.tokenizer

    gold = add_lora(load_language_model(c)[0], c)
    learn(gold, tokenizer, kept, c, "forget: taught the others alone")

    def known_by(one: PreTrainedModel) -> dict[str, dict[str, float]]:
        return {"forget": knowledge(one, tokenizer, gone), "keep": knowledge(one, tokenizer, kept)}

    known = {"before": known_by(state.model), "after NGDiff": {}, "never taught them": known_by(gold)}
    model = twin(state.model)  # the taught one is for the stages that follow
    start = time.perf_counter()
    updates = unlearn(
        model,
        tokenizer,
        gone,
        kept,
        "forget",
        UntilForgotten(tokenizer, gone, known["never taught them"]["forget"], NEAR, EVERY),
        objective="ngdiff",
        learning_rate=c.forget_learning_rate,
        num_train_epochs=c.forget_epochs,
        per_device_train_batch_size=c.forget_batch_size,
        seed=c.seed,
    )
    seconds = time.perf_counter() - start
    known["after NGDiff"] = known_by(model)

    curves = relearning(
        model,
        fact_rows(tokenizer, gone),
        gold=gold,
        target=state.model,
        share=SHARE,
        steps=STEPS,
        learning_rate=RATE,
        seed=c.seed,
    )
    last = {"after NGDiff": curves["unlearned"][-1], "never taught them": curves["gold"][-1]}
    title = f"forget: {len(gone)} of {len(state.facts)} facts, {updates} updates in {seconds:.0f} s"
    state.tables[f"{title}; p is the mean probability of the answer"] = [
        {
            "adapter": name,
            **{
                column: value
                for part, seen in found.items()
                for column, value in (
                    (f"{part}: right, %", 100 * seen["taught_recall"]),
                    (f"{part}: reworded, %", 100 * seen["reworded_recall"]),
                    (f"{part}: p", seen["taught_probability"]),
                )
            },
            f"forget: p after {STEPS[-1]} steps of relearning": last.get(name),
        }
        for name, found in known.items()
    ]
    series = {
        "before": (STEPS, len(STEPS) * [curves["target"]], None),
        "after NGDiff": (STEPS, curves["unlearned"], None),
        "never taught them": (STEPS, curves["gold"], None),
    }
    title = f"relearning from {SHARE:.0%} of the forgotten facts"
    lines(state.out / "forget.png", series, "update", "probability of the other forgotten answers", title)

    before, after = known["before"], known["after NGDiff"]
    results = [
        (metric, after[part][key], f"questions to {part}", f"{before[part][key]:.3g} before unlearning")
        for part in after
        for metric, key in (
            ("answers that contain the fact", "taught_recall"),
            ("probability of the answer", "taught_probability"),
        )
    ]
    results.append(
        (
            f"probability of an answer that was not shown, after {STEPS[-1]} updates of relearning",
            last["after NGDiff"],
            "questions to forget",
            f"{last['never taught them']:.3g} for an adapter that was never taught them",
        )
    )
    names = ["forget_authors", "forget_epochs", "forget_batch_size", "forget_learning_rate"]
    state.artifacts += ["forget.png", save_adapter(state, FOLDER, model, tokenizer, "ngdiff", names, results)]
