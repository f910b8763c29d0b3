"""`evaluate`: what an unlearned model still knows, what it kept, and what an attacker sees, in one dictionary.

| group | numbers | needs |
|---|---|---|
| TOFU | probability, ROUGE-L recall, truth-ratio score of each set; retain or model utility | text rows |
| TOFU | forget quality (Kolmogorov-Smirnov against a retrained model) | `gold`, perturbed answers |
| MUSE | KnowMem of both sets; VerbMem | text rows; `passages` |
| MUSE | PrivLeak | `gold`, `holdout` |
| privacy | AUC of loss, Min-K %, Min-K %++, MaxRenyi between forget and unseen rows | `holdout` |
| memorisation | exact memorisation, extraction strength | |

What could not be computed stands in `missing` with the reason. No number of one group may be read alone: a ruined
model has a good forget quality, and a model that refuses has a good KnowMem.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from ..metrics import extraction, muse, tofu
from ..metrics._generate import ends_of, generate_ids
from ..metrics._membership import auc, loss
from ..metrics._token_scores import TokenScores, score_rows
from ..metrics.min_k import min_k
from ..metrics.min_k_plus_plus import min_k_plus_plus
from ..metrics.renyi import max_renyi
from ._data import TEMPLATE, scores_something, token_row

Rows = Sequence[Mapping[str, Any]]
ORDER = 0.5  # of the Renyi entropy
RENYI_K = 0.1


def evaluate(
    model: nn.Module,
    processing_class: Any = None,
    *,
    forget: Rows,
    retain: Rows | None = None,
    holdout: Rows | None = None,
    real_authors: Rows | None = None,
    world_facts: Rows | None = None,
    passages: Sequence[str] | None = None,
    gold: nn.Module | Mapping[str, Any] | str | Path | None = None,
    template: str = TEMPLATE,
    max_length: int | None = 1024,
    max_new_tokens: int = 64,
    batch_size: int = 8,
    k: float = 0.4,
    tolerance: float = 0.02,
    generate: bool = True,
) -> dict[str, Any]:
    """Measure a model that was asked to forget.

    With several processes each does its share, and all return the same.

    Args:
        model (`PreTrainedModel`): Run in eval mode, which is undone.
        processing_class (*optional*): Its tokenizer; not needed for tokenised rows, which are scored but not answered.
        forget, retain, holdout: Rows as for [`UnlearningTrainer`]: to be forgotten, kept, never seen. Rows of TOFU
            have `paraphrased_answer` and `perturbed_answer` too, from which truth ratios come.
        real_authors, world_facts: The other sets of TOFU.
        passages (`list[str]`, *optional*): Texts whose continuation was memorised, for VerbMem.
        gold (*optional*): A model that never saw the forget rows, or what `evaluate` returned for it, or the path of
            that as JSON.
        template, max_length: As of [`UnlearningConfig`].
        max_new_tokens (`int`, *optional*, defaults to 64): Longest answer.
        batch_size (`int`, *optional*, defaults to 8): Rows of a forward pass.
        k (`float`, *optional*, defaults to 0.4): Share of the tokens in Min-K %.
        tolerance (`float`, *optional*, defaults to 0.02): By how much the forget probability may exceed the retrained
            model's for `matched_utility`.
        generate (`bool`, *optional*, defaults to `True`): Whether answers are generated, which takes most of the time.

    Returns:
        `dict`: Numbers by name; `rows`, what the numbers were made from, and `missing`, reasons by name.
        `matched_utility` orders checkpoints: the utility of those that forgot as much as the retrained model, and
        minus the excess of the forget probability for the others.

    Raises:
        ValueError: Empty data; text rows without a tokenizer.
    """
    seen = _Seen(model, processing_class, template, max_length, max_new_tokens, batch_size, generate)
    gold = _gold(gold, processing_class, {
        "forget": forget, "holdout": holdout, "template": template, "max_length": max_length, "batch_size": batch_size,
        "k": k, "generate": False,
    })  # fmt: skip
    found: dict[str, Any] = {}
    missing: dict[str, str] = {}
    rows: dict[str, Any] = {}
    parts = {"forget": forget, "retain": retain, "real_authors": real_authors, "world_facts": world_facts}
    tofu_parts: dict[str, dict[str, float]] = {}
    scores: dict[str, TokenScores] = {}
    for name, given in parts.items():
        if given is None:
            continue
        scores[name] = seen.scores(name, given, (ORDER,) if name == "forget" else ())
        tofu_parts[name] = _tofu_part(seen, name, given, scores[name], rows, missing)
        found |= {f"{name}_{key}": value for key, value in tofu_parts[name].items()}
    _utility(tofu_parts, found, missing)
    _forget_quality(rows, gold, found, missing)
    _memorised(scores["forget"], found, rows)
    _privacy(seen, scores["forget"], holdout, gold, k, found, missing, rows)
    if passages is None:
        missing["verbmem"] = "needs passages"
    else:
        found["verbmem"] = muse.verbmem(model, processing_class, passages, batch_size=batch_size)["verbmem"]
    _matched(found, gold, tolerance, missing)
    return {**found, "rows": rows, "missing": missing}


class _Seen:
    """A model with all that is needed to score and to ask it."""

    def __init__(self, model, tokenizer, template, max_length, max_new_tokens, batch_size, generate):
        self.model, self.tokenizer, self.template = model, tokenizer, template
        self.max_length, self.max_new_tokens, self.batch_size = max_length, max_new_tokens, batch_size
        self.wanted, self.generate = generate, generate and tokenizer is not None

    def scores(self, name: str, given: Rows, orders: tuple[float, ...] = ()) -> TokenScores:
        if len(given) == 0:
            raise ValueError(f"{name} is empty.")
        made = [token_row(given[i], self.tokenizer, self.template, self.max_length) for i in range(len(given))]
        silent = sum(not scores_something(row) for row in made)
        if silent:
            raise ValueError(f"{name}: {silent} of {len(made)} rows have no token to score.")
        return score_rows(self.model, made, self.batch_size, renyi=orders)

    def losses(self, name: str, given: Rows, field: str) -> list[list[float]] | None:
        """Mean token loss of other answers [rows][answers]; None unless every row has the field."""
        if any(not row.get(field) or "question" not in row for row in map(given.__getitem__, range(len(given)))):
            return None
        answers = [[row[field]] if isinstance(row[field], str) else list(row[field]) for row in given]
        flat = [
            {"question": row["question"], "answer": a} for row, some in zip(given, answers, strict=True) for a in some
        ]
        values = iter(loss(self.scores(f"{name}.{field}", flat).log_p).tolist())
        return [[next(values) for _ in some] for some in answers]

    def answers(self, given: Rows) -> tuple[list[str], list[str]] | None:
        """The greedy answer to each prompt, and the true one; None where rows have no prompt, or nothing is asked."""
        if not self.generate:
            return None
        made = [token_row(given[i], self.tokenizer, self.template, self.max_length) for i in range(len(given))]
        starts = [next(t for t, label in enumerate(row["labels"]) if label != -100) for row in made]
        if not all(starts):
            return None
        prompts = [row["input_ids"][:start] for row, start in zip(made, starts, strict=True)]
        ends = ends_of(self.model, self.tokenizer)
        new = generate_ids(self.model, prompts, self.max_new_tokens, self.batch_size, ends)
        said = [[x for x in row["labels"] if x != -100] for row in made]
        return self._texts(new), self._texts(said)

    def _texts(self, rows: Sequence[Sequence[int]]) -> list[str]:
        return [self.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in rows]


def _tofu_part(seen, name, given, scores, rows, missing) -> dict[str, float]:
    """Probability, ROUGE and truth-ratio score of one set, as far as they can be had."""
    losses = loss(scores.log_p).tolist()
    wrong = seen.losses(name, given, "perturbed_answer")
    shares = wrong if name in ("real_authors", "world_facts") else None
    found = {"probability": float(tofu.probability(losses, shares).mean())}
    rows[f"{name}_loss"] = losses
    paraphrase = seen.losses(name, given, "paraphrased_answer")
    right = losses if paraphrase is None else [row[0] for row in paraphrase]
    if wrong is None:
        missing[f"{name}_truth_ratio_score"] = "needs question, answer and perturbed_answer in every row"
    else:
        # The authors take the arithmetic mean of wrong answers for utility and the geometric one for forget quality.
        of_utility = tofu.truth_ratio(right, wrong, "arithmetic")
        rows[f"{name}_truth_ratio"] = tofu.truth_ratio(right, wrong, "geometric").tolist()
        found["truth_ratio_score"] = tofu.truth_ratio_score(of_utility, forget=name == "forget")
        found["truth_ratio_score_geometric"] = tofu.truth_ratio_score(
            rows[f"{name}_truth_ratio"], forget=name == "forget"
        )
    asked = seen.answers(given)
    if asked is None:
        reason = "needs a tokenizer and rows with a prompt" if seen.wanted else "generate is False"
        missing |= {f"{name}_rouge": reason, f"{name}_knowmem": reason}
    else:
        answers, truths = asked
        rows[f"{name}_answers"] = answers
        found["rouge"] = float(tofu.rouge_recall(answers, truths).mean())
        if name in ("forget", "retain"):
            found["knowmem"] = float(muse.text_f1([muse.cut_answer(a) for a in answers], truths).mean())
    return found


def _utility(parts, found, missing) -> None:
    complete = {name: all(key in part for key in tofu.PARTS) for name, part in parts.items()}
    if complete.get("retain"):
        found["retain_utility"] = tofu.retain_utility(parts["retain"])
    else:
        missing["retain_utility"] = "needs retain rows with perturbed_answer, and generated answers"
    if all(complete.get(name) for name in ("retain", "real_authors", "world_facts")):
        found["model_utility"] = tofu.model_utility(parts["retain"], parts["real_authors"], parts["world_facts"])
    else:
        missing["model_utility"] = "needs retain, real_authors and world_facts"


def _forget_quality(rows, gold, found, missing) -> None:
    if gold is None or "forget_truth_ratio" not in gold["rows"] or "forget_truth_ratio" not in rows:
        missing["forget_quality"] = "needs gold" if gold is None else "needs perturbed_answer in every forget row"
        return
    found |= tofu.forget_quality(rows["forget_truth_ratio"], gold["rows"]["forget_truth_ratio"])


def _memorised(scores: TokenScores, found, rows) -> None:
    found["exact_memorization"] = float(extraction.exact_memorization(scores).mean())
    strength = extraction.extraction_strength(scores)
    found["extraction_strength"] = float(strength.mean())
    rows["forget_extraction_strength"] = strength.tolist()


def _privacy(seen, forget, holdout, gold, k, found, missing, rows) -> None:
    if holdout is None:
        missing |= dict.fromkeys(
            ("auc_loss", "auc_min_k", "auc_min_k_plus_plus", "auc_renyi", "privleak"), "needs holdout"
        )
        return
    unseen = seen.scores("holdout", holdout, (ORDER,))
    attacks: dict[str, Callable[[TokenScores], torch.Tensor]] = {
        "loss": lambda s: loss(s.log_p),
        "min_k": lambda s: min_k(s.log_p, k),
        "min_k_plus_plus": lambda s: min_k_plus_plus(s, k),
        "renyi": lambda s: max_renyi(s.renyi[ORDER], RENYI_K),
    }
    for name, score in attacks.items():
        found[f"auc_{name}"] = auc(score(forget), score(unseen))
    # Near 0 for a model that knows: the other way round than an attack's AUC.
    rows["forget_auc"] = muse.forget_auc(forget.log_p, unseen.log_p, k)
    if gold is None or "forget_auc" not in gold["rows"]:
        missing["privleak"] = "needs gold"
    else:
        found["privleak"] = muse.privleak(rows["forget_auc"], gold["rows"]["forget_auc"])


def _matched(found, gold, tolerance, missing) -> None:
    utility = found.get("model_utility", found.get("retain_utility", found.get("retain_probability")))
    if gold is None or utility is None:
        missing["matched_utility"] = "needs gold" if gold is None else "needs retain"
        return
    excess = found["forget_probability"] - gold["forget_probability"] - tolerance
    found["matched_utility"] = utility if excess <= 0 else -excess


def _gold(gold, tokenizer, options) -> Mapping[str, Any] | None:
    if isinstance(gold, nn.Module):
        return evaluate(gold, tokenizer, **options)
    if isinstance(gold, str | Path):
        gold = json.loads(Path(gold).read_text(encoding="utf-8"))
    if gold is not None and "rows" not in gold:
        raise ValueError("gold is a mapping without `rows`: give what evaluate returned for the retrained model.")
    return gold


class StopWhenForgotten(TrainerCallback):
    """Ends a training at the first evaluation whose `metric` has come down to `at_most`, or whose `utility` has fallen
    below `at_least`: `StopWhenForgotten("forget_knowmem", at_most=gold["forget_knowmem"])`, the rule of MUSE.

    Args:
        metric (`str`): Name in the metrics of `evaluate`, without the prefix.
        at_most (`float`): Where it is low enough.
        utility, at_least (*optional*): The metric that must not fall, and how far it may.
    """

    def __init__(self, metric: str, at_most: float, utility: str | None = None, at_least: float | None = None):
        if (utility is None) != (at_least is None):
            raise ValueError(f"utility is {utility!r} and at_least is {at_least!r}: give both or neither.")
        self.metric, self.at_most, self.utility, self.at_least = metric, at_most, utility, at_least

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        for name, reached in (
            (self.metric, lambda value: value <= self.at_most),
            (self.utility, lambda value: value < self.at_least),
        ):
            if name is None:
                continue
            key = f"eval_{name}"
            if key not in (metrics or {}):
                raise ValueError(f"The evaluation has no {key}: {', '.join(metrics or {})}.")
            if reached(metrics[key]):
                control.should_training_stop = True
