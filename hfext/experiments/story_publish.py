"""Publish: a model is quantised, saved with its card, pushed as one commit, and loaded back with the same bits."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from .. import hub, quantization
from ._publishing import check_repo_id, publish, save_card
from ._smollm2 import MODEL_ID
from ._stage_teach import check_model, load_language_model
from .weight_quality import packed_bytes

FOLDER = "smollm2-4bit"
TEXT = "The best way to learn a new language is to"


@dataclass(kw_only=True)
class Config:
    """
    Args:
        model: `smollm2`, or the folder of a causal language model.
        bits: Of the weights, by HQQ.
        group_size: Weights that share a scale; at most the width of the model.
        repo_id: `user/name` on the Hub that HF_ENDPOINT names, huggingface.co by default; without it nothing is sent
            and the command is shown.
        private: Whether a new repository is.
    """

    model: str = "smollm2"
    bits: int = 4
    group_size: int = 64
    repo_id: str | None = None
    private: bool = True

    def __post_init__(self):
        check_model(self.model)
        check_repo_id("repo_id", self.repo_id)
        quantization.HQQConfig(bits=self.bits, group_size=self.group_size)  # checks both


def run(config: Config, out: Path) -> dict[str, Any]:
    model, tokenizer = load_language_model(config)
    inputs = tokenizer(TEXT, return_tensors="pt", return_token_type_ids=False)
    options = {"bits": config.bits, "group_size": min(config.group_size, model.config.hidden_size)}
    original = logits_of(model, inputs)
    quantization.quantize(model, quantization.HQQConfig(**options))
    folder = out / FOLDER
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    saved = logits_of(model, inputs)
    gap = (saved.log_softmax(-1) - original.log_softmax(-1)).mul(original.softmax(-1)).sum(-1).neg().mean().item()
    known = config.model == "smollm2"
    result = {"metric": "KL from the original, nats a token", "value": gap, "dataset": "one sentence"}
    hub.save_record(
        folder,
        ["hqq"],
        base_model=MODEL_ID if known else None,
        relation="quantized" if known else None,
        config=options,
        results=[result],
    )
    save_card(folder, config.repo_id)
    row = publish(folder, config.repo_id, config.private)
    source = hub.fetch(config.repo_id) if config.repo_id else folder
    again = AutoModelForCausalLM.from_pretrained(source)
    held, half = packed_bytes(again)
    checked = {
        "loaded from": config.repo_id or FOLDER,
        "MB of the layers": held / 1e6,
        "MB in 16 bits": half / 1e6,
        "KL from the original, nats a token": gap,
        "same logits": torch.equal(logits_of(again, inputs), saved),
    }
    return {"tables": {"publish: one commit": [row], "publish: loaded again": [checked]}, "artifacts": [FOLDER]}


@torch.no_grad()
def logits_of(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return model.eval()(**inputs).logits.double()
