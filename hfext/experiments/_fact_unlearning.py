"""Facts about authors who do not exist, forgotten by `UnlearningTrainer`, and what a model knows of them."""

import copy
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback

from ..metrics._membership import loss
from ..metrics._token_scores import score_rows
from ..unlearning import UnlearningConfig, UnlearningTrainer
from ..unlearning.relearning import mean_probability
from ._facts import Fact, answers, example, recalled
from ._quiet_trainer import Bar

WORDINGS = {"taught": "question", "reworded": "paraphrase"}


def fact_rows(
    tokenizer: PreTrainedTokenizerBase, facts: Sequence[Fact], wording: str = "taught"
) -> list[dict[str, list[int]]]:
    """Tokenised rows: the question in a chat, and the answer, which alone is scored."""
    return [example(tokenizer, getattr(fact, WORDINGS[wording]), fact.answer) for fact in facts]


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose trained parameters are its own; the frozen ones are shared."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters() if not p.requires_grad})


def knowledge(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    facts: Sequence[Fact],
    wordings: Sequence[str] = tuple(WORDINGS),
) -> dict[str, float]:
    """In each wording: the share of greedy answers that hold the fact, and the mean probability of the answer."""
    found: dict[str, float] = {}
    for name in wordings:
        scores = score_rows(model, fact_rows(tokenizer, facts, name), 16)
        # Where each token of the taught answer is the likeliest, the greedy answer is this one: no need to ask.
        open_facts = [fact for fact, right in zip(facts, scores.correct, strict=True) if not right.all()]
        said = answers(model, tokenizer, [getattr(fact, WORDINGS[name]) for fact in open_facts])
        missed = len(open_facts) * (1 - recalled(open_facts, said)) if open_facts else 0
        found[f"{name}_recall"] = 1 - missed / len(facts)
        found[f"{name}_probability"] = float((-loss(scores.log_p)).exp().mean())
    return found


def forgotten(known: Mapping[str, float], gold: Mapping[str, float], tolerance: float) -> bool:
    """Whether no more facts are answered than by the gold, and answers are hardly likelier, in all wordings known."""
    return all(
        value <= gold[key] + (tolerance if key.endswith("probability") else 1e-9) for key, value in known.items()
    )


class UntilForgotten(TrainerCallback):
    """Ends a training once facts are forgotten in both wordings, which is looked at every few updates.

    Probability alone would end it too soon: tokens around the fact become unlikely before the fact does.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        facts: Sequence[Fact],
        gold: Mapping[str, float],
        tolerance: float,
        every: int,
    ):
        self.tokenizer, self.facts, self.gold, self.tolerance, self.every = tokenizer, facts, gold, tolerance, every

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every:
            return
        # Asking costs more than scoring, and comes last.
        likely = mean_probability(model, fact_rows(self.tokenizer, self.facts), 16)
        if likely > self.gold["taught_probability"] + self.tolerance:
            return
        training = model.training
        if forgotten(knowledge(model, self.tokenizer, self.facts), self.gold, self.tolerance):
            control.should_training_stop = True
        model.train(training)


def unlearn(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    forget: Sequence[Fact],
    retain: Sequence[Fact],
    title: str,
    until: UntilForgotten,
    **arguments: Any,
) -> int:
    """Change the model until the facts are forgotten or all passes are done; how many updates it took.

    Batches of one row are best for methods that raise the forget loss: in a mean over rows those that are forgotten
    outweigh one that is still certain, whose gradient is small.
    """
    with tempfile.TemporaryDirectory() as folder:
        args = UnlearningConfig(
            folder,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
            lr_scheduler_type="constant",
            **arguments,
        )
        trainer = UnlearningTrainer(
            model,
            args,
            fact_rows(tokenizer, forget),
            fact_rows(tokenizer, retain),
            processing_class=tokenizer,
            callbacks=[Bar(title), until],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    model.eval()
    return trainer.state.global_step
