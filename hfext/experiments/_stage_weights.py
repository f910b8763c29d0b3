"""Stage `weights` of the quickstart: the language model at 3 bits, saved and loaded again, beside the original.

The text is that of the help topics which every Python installation brings along, so no data set is needed.
"""

import math
import time
from typing import TYPE_CHECKING

import torch
from transformers import AutoModelForCausalLM

from .. import hub, quantization
from . import _smollm2
from ._publishing import save_card
from ._stage_teach import load_language_model, short
from .weight_quality import packed_bytes, window_nll

if TYPE_CHECKING:
    from .quickstart import State

FOLDER = "smollm2-3bit"
WIDTH = 256


def weights(state: "State") -> None:
    c = state.config
    model, tokenizer = load_language_model(c)
    rows = help_text(tokenizer, c.weights_rows + c.weights_windows)
    calibration, held_out = rows[: c.weights_rows], rows[c.weights_rows :]
    before = judged(state, model, tokenizer, held_out)

    group_size = min(64, model.config.hidden_size)
    options = {"bits": 3, "group_size": group_size, "max_iter_num": 2, "clip": "group", "block_epochs": 0}
    config = quantization.DecoupleQConfig(**options, dataset=calibration, batch_size=2)
    start = time.perf_counter()
    quantization.quantize(model, config)
    seconds = time.perf_counter() - start
    folder = state.out / FOLDER
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    del model
    again = AutoModelForCausalLM.from_pretrained(folder)
    held, half = packed_bytes(again)
    after = judged(state, again, tokenizer, held_out)
    known = c.model == "smollm2"
    hub.save_record(
        folder,
        ["decoupleq"],
        base_model=_smollm2.MODEL_ID if known else None,
        relation="quantized" if known else None,
        config=options,
        results=[
            {
                "metric": "perplexity",
                "value": after["perplexity"],
                "dataset": "Python help topics",
                "split": f"{len(held_out)} windows of {WIDTH} tokens",
                "setting": f"{before['perplexity']:.3g} before",
            }
        ],
    )
    save_card(folder)
    parameter = next(p for name, p in again.named_parameters() if "norm" in name)
    state.tables[f"weights: reload at 3 bits, quantised by decoupleQ in {seconds:.0f} s"] = [
        {"model": "original", "MB of the layers": half * parameter.element_size() / 2 / 1e6, **before},
        {"model": "3 bits, loaded again", "MB of the layers": held / 1e6, **after},
    ]
    state.artifacts.append(FOLDER)


def help_text(tokenizer, count: int) -> torch.Tensor:
    """The first rows [count, 256] of Python's help topics in alphabetical order."""
    from pydoc_data.topics import topics

    # Four letters a token and more, so this is enough.
    text = "\n".join(topics[name] for name in sorted(topics))[: count * WIDTH * 8]
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False)["input_ids"][0]
    return ids[: count * WIDTH].view(count, WIDTH)


def judged(state: "State", model, tokenizer, rows: torch.Tensor) -> dict[str, object]:
    """Perplexity on held-out rows, and the start of a greedy answer."""
    nll = window_nll(model, rows)
    prompt = [{"role": "user", "content": "What is the capital of France, and what is it known for?"}]
    inputs = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**inputs, do_sample=False, max_new_tokens=state.config.weights_tokens)
    said = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return {"perplexity": math.exp(sum(nll) / len(nll)), "says": short(said, 70)}
