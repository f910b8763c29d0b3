"""Draft with superposed decoding: three drafts from one stream, helped by a store of n-grams that is kept."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import decoding, hub
from ._publishing import save_card
from ._smollm2 import MODEL_ID
from ._stage_decode import SENTENCES
from ._stage_teach import check_model, load_language_model, short

FOLDER = "language-learning-ngrams"


@dataclass(kw_only=True)
class Config:
    """
    Args:
        model: `smollm2`, or the folder of a causal language model with its tokenizer.
        prefix: What the drafts continue.
        drafts: How many.
        tokens: Length of a draft.
        seed: Of the sampled drafts beside them.
    """

    model: str = "smollm2"
    prefix: str = "The best way to learn a new language is to"
    drafts: int = 3
    tokens: int = 10
    seed: int = 0

    def __post_init__(self):
        check_model(self.model)
        for name in ("drafts", "tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)} but must be at least 1.")


def run(config: Config, out: Path) -> dict[str, Any]:
    model, tokenizer = load_language_model(config)
    model.eval()
    folder = out / FOLDER
    decoding.NGramStore.build(SENTENCES, tokenizer).save(folder)
    store = decoding.NGramStore.load(folder)
    inputs = tokenizer(config.prefix, return_tensors="pt", return_token_type_ids=False)
    options = {"max_new_tokens": config.tokens, "return_dict_in_generate": True}
    loop = {"custom_generate": decoding.superposed_generate, "num_drafts": config.drafts, "do_sample": False}
    begin = time.process_time()
    found = model.generate(**inputs, **loop, **options, ngram_store=store)
    seconds = time.process_time() - begin
    begin = time.process_time()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        sampled = model.generate(**inputs, **options, do_sample=True, top_p=0.9, num_return_sequences=config.drafts)
    beside = time.process_time() - begin
    rows = [
        {"drafts": name, "rows a model call": width, "CPU s": round(spent, 2), "text": short(text, 90)}
        for name, width, spent, out_ in (
            ("superposed", 1, seconds, found),
            ("sampled, top_p=0.9", config.drafts, beside, sampled),
        )
        for text in tokenizer.batch_decode(out_.sequences, skip_special_tokens=True)
    ]
    known = config.model == "smollm2"
    result = {"metric": "model calls for all drafts", "value": found.num_model_calls, "dataset": "one prefix"}
    hub.save_record(
        folder,
        ["superposed"],
        base_model=MODEL_ID if known else None,
        config={"texts": len(SENTENCES), "num_drafts": config.drafts, "max_new_tokens": config.tokens},
        results=[{**result, "setting": f"{config.drafts} drafts of {config.tokens} tokens"}],
    )
    save_card(folder)
    title = f"draft: {config.drafts} drafts of {config.tokens} tokens, {found.num_model_calls} model calls in all"
    return {"tables": {title: rows}, "artifacts": [FOLDER]}
