"""Stage `forget` of the quickstart: NGDiff makes the taught model forget some of the authors and keep the others.

Beside it stands an adapter that was taught the others alone, in the same way: unlearning ends when the answers are as
unlikely as there. Both are then attacked by relearning half of the forgotten facts.
"""

import time
from typing import TYPE_CHECKING

from ..unlearning.relearning import mean_probability, relearning
from ._fact_unlearning import fact_rows, knowledge, twin, unlearn
from ._plots import lines
from ._stage_teach import add_lora, learn, load_language_model, save_adapter

if TYPE_CHECKING:
    from .quickstart import State

FOLDER = "fictional-authors-unlearned-lora"
# By how much the answers may be likelier than for the other adapter when unlearning ends.
NEAR = 0.02
# Of the attack: its share of the forgotten facts, the updates after which the others are asked, the learning rate.
SHARE, STEPS, RATE = 0.5, (0, 2, 5, 10), 1e-3


def forget(state: "State") -> None:
    c = state.config
    first = len(state.facts) - c.forget_authors * c.fields
    kept, gone = state.facts[:first], state.facts[first:]
    tokenizer = state.tokenizer

    gold = add_lora(load_language_model(c)[0], c)
    learn(gold, tokenizer, kept, c, "forget: taught the others alone")
    model = twin(state.model)  # the taught one is for the stages that follow
    start = time.perf_counter()
    updates = unlearn(
        model,
        tokenizer,
        gone,
        kept,
        "forget",
        mean_probability(gold, fact_rows(tokenizer, gone)) + NEAR,
        len(gone) // 2,
        objective="ngdiff",
        learning_rate=c.forget_learning_rate,
        num_train_epochs=c.forget_epochs,
        per_device_train_batch_size=c.forget_batch_size,
        seed=c.seed,
    )
    seconds = time.perf_counter() - start

    models = {"before": state.model, "after NGDiff": model, "never taught them": gold}
    known = {name: knowledge(one, tokenizer, {"forget": gone, "keep": kept}) for name, one in models.items()}
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
