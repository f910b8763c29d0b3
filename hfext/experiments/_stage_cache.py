"""Stage `cache` of the quickstart: a long prompt answered with a plain cache and with compressed ones."""

import time
from typing import TYPE_CHECKING

from transformers import DynamicCache

from .. import kv_cache
from ._kv_protocol import held_bytes
from ._stage_teach import load_language_model, short

if TYPE_CHECKING:
    from .quickstart import State

KEY = "48213"
FILLER = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = f" The pass key is {KEY}. Remember it. {KEY} is the pass key."
QUESTION = " What is the pass key? The pass key is"
CACHES = {
    "RotateKV, 4 bits": kv_cache.RotateKVConfig(bits=4),
    "RotateKV, 2 bits, 32 recent tokens whole": kv_cache.RotateKVConfig(bits=2, residual_length=32),
    "StreamingLLM, 64 recent tokens": kv_cache.StreamingLLMConfig(window=64),
}


def long_prompt() -> str:
    return FILLER.strip() + 7 * FILLER + NEEDLE + 8 * FILLER + QUESTION


def cache(state: "State") -> None:
    c = state.config
    model, tokenizer = load_language_model(c)
    model.eval()
    inputs = tokenizer(long_prompt(), return_tensors="pt", add_special_tokens=False, return_token_type_ids=False)
    start = inputs["input_ids"].shape[1]
    rows, plain = [], 0
    for name, config in {"plain": None, **CACHES}.items():
        held = DynamicCache(config=model.config) if config is None else config.make_cache(model)
        begin = time.process_time()
        out = model.generate(**inputs, past_key_values=held, do_sample=False, max_new_tokens=c.cache_tokens)
        seconds, size = time.process_time() - begin, held_bytes(held)
        plain = plain or size
        rows.append(
            {
                "cache": name,
                "KiB": round(size / 1024),
                "of the plain one": round(size / plain, 3),
                "CPU s": round(seconds, 1),
                "The pass key is …": short(tokenizer.decode(out[0, start:], skip_special_tokens=True), 60),
            }
        )
    state.tables[f"cache: {start} tokens of float32 prompt with the pass key {KEY} in the middle"] = rows
