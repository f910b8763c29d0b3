"""Compress and serve: weights at 3 bits are saved and loaded, and answer a long prompt from a cache of 4 bits."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from .. import hub, kv_cache
from . import quickstart
from ._kv_protocol import held_bytes
from ._publishing import save_card
from ._smollm2 import MODEL_ID
from ._stage_cache import long_prompt
from ._stage_teach import short
from ._stage_weights import FOLDER


@dataclass(kw_only=True)
class Config:
    """
    Args:
        model: `smollm2`, or the folder of a causal language model with its tokenizer.
        rows: Rows of 256 tokens to calibrate the weights on.
        windows: Rows of 256 tokens to judge them by.
        cache_bits: Of keys and values, by RotateKV.
        tokens: Length of an answer.
        threads: Of torch; chosen by a short measurement by default.
    """

    model: str = "smollm2"
    rows: int = 8
    windows: int = 4
    cache_bits: int = 4
    tokens: int = 16
    threads: int | None = None

    def __post_init__(self):
        self.first_stage()  # checks what it takes
        kv_cache.RotateKVConfig(bits=self.cache_bits)

    def first_stage(self) -> quickstart.Config:
        sizes = {"weights_rows": self.rows, "weights_windows": self.windows, "weights_tokens": self.tokens}
        return quickstart.Config(stages=["weights"], model=self.model, threads=self.threads, **sizes)


def run(config: Config, out: Path) -> dict[str, Any]:
    made = quickstart.run(config.first_stage(), out)
    folder = out / FOLDER
    with quickstart.threads(made["threads"]):
        rows = served(config, folder)
    return {**made, "tables": {**made["tables"], "serve: a long prompt, answered by the 3-bit model": rows}}


def served(config: Config, folder: Path) -> list[dict[str, Any]]:
    """The prompt answered with a plain cache and with the compressed one, which then is part of the saved model."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(long_prompt(), return_tensors="pt", add_special_tokens=False, return_token_type_ids=False)
    start, rows = inputs["input_ids"].shape[1], []
    for name in ("plain", f"RotateKV, {config.cache_bits} bits"):
        if name != "plain":
            kv_cache.apply(model, kv_cache.RotateKVConfig(bits=config.cache_bits))
            model.save_pretrained(folder)
            model = AutoModelForCausalLM.from_pretrained(folder)
        options = {"do_sample": False, "max_new_tokens": config.tokens, "return_dict_in_generate": True}
        begin = time.process_time()
        found = model.generate(**inputs, **options)
        seconds = time.process_time() - begin
        said = tokenizer.decode(found.sequences[0, start:], skip_special_tokens=True)
        size = round(held_bytes(found.past_key_values) / 1024)
        rows.append({"cache": name, "KiB": size, "CPU s": round(seconds, 1), "answer": short(said, 60)})
    record = hub.read_record(folder)
    known = config.model == "smollm2"
    size = {"metric": "size of the cache, KiB", "dataset": "pass key", "setting": f"{start} tokens, {{}}"}
    hub.save_record(
        folder,
        ["decoupleq", "rotatekv"],
        base_model=MODEL_ID if known else None,
        relation="quantized" if known else None,
        config={**record["config"], "cache_bits": config.cache_bits},
        results=record["results"]
        + [{**size, "value": row["KiB"], "setting": size["setting"].format(row["cache"])} for row in rows],
    )
    save_card(folder)
    return rows
