"""Ten authors of TOFU for a model that fits a minute: data, tokenizer, model, and the training of target and gold.

Forget: the last two authors of the benchmark (40 questions); retain: the eight before them (160); holdout: the first
two, which no model sees (40). The target learns forget and retain rows by heart, the gold model retain rows alone,
from the same weights with the same schedule.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from ..unlearning._data import collate, token_rows
from ._data import shared_data
from ._quiet_trainer import train

AUTHOR = 20  # questions of one author
FORGOTTEN, KEPT = 2, 8


@dataclass(frozen=True)
class Sets:
    forget: list[dict[str, Any]]
    retain: list[dict[str, Any]]
    holdout: list[dict[str, Any]]


def read(path: Path) -> list[dict[str, Any]]:
    """Rows of a file with one JSON object a line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def tofu_folder(folder: str | None) -> Path:
    found = shared_data("tofu", folder)
    if found is None:
        raise FileNotFoundError("This needs TOFU: set data_dir to a folder that holds tofu/forget10_perturbed.json.")
    return found


def ten_authors(folder: Path) -> Sets:
    """The last ten authors with paraphrased and wrong answers, and the first two."""
    ten = read(folder / "forget10_perturbed.json")[-(FORGOTTEN + KEPT) * AUTHOR :]
    unseen = read(folder / "full.json")[: FORGOTTEN * AUTHOR]
    return Sets(ten[-FORGOTTEN * AUTHOR :], ten[: -FORGOTTEN * AUTHOR], unseen)


def tokenizer_of(folder: Path, size: int = 2048) -> PreTrainedTokenizerFast:
    """Byte-level BPE of the benchmark's text; its padding token is the end of sequence."""
    from tokenizers import ByteLevelBPETokenizer

    made = ByteLevelBPETokenizer(add_prefix_space=False)
    texts = [f"Question: {row['question']}\nAnswer: {row['answer']}" for row in read(folder / "full.json")]
    made.train_from_iterator(texts, vocab_size=size, special_tokens=["<eos>"], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", pad_token="<eos>")


def new_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> PreTrainedModel:
    """A Llama of 0.56 million parameters."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def taught(tokenizer, rows: list[dict], seed: int, title: str, epochs: int = 45) -> PreTrainedModel:
    """A model that learnt the answers of rows by heart."""
    model = new_model(tokenizer, seed)
    data = [{k: row[k] for k in ("input_ids", "labels")} for row in token_rows(title, rows, tokenizer)]
    train(
        model,
        data,
        title,
        data_collator=collate,
        num_train_epochs=epochs,
        per_device_train_batch_size=8,
        learning_rate=4e-3,
        lr_scheduler_type="cosine",
        warmup_steps=50,
        seed=seed,
    )
    return model.eval()


def target_and_gold(folder: Path, tokenizer, sets: Sets, seed: int) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Both models of a seed; they are kept in `folder` and read from there the next time."""
    found = []
    for name, rows in (("target", sets.forget + sets.retain), ("gold", sets.retain)):
        path = folder / f"{name}-{seed}"
        if not (path / "config.json").is_file():
            made = taught(tokenizer, rows, seed, f"{name}, seed {seed}")
            partial = path.with_name(f"{path.name}.partial")
            made.save_pretrained(partial)
            partial.rename(path)
        found.append(LlamaForCausalLM.from_pretrained(path).eval())
    return tuple(found)
