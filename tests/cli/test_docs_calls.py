"""The call that the page of a method shows, run as it stands there with small data of its own."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from tiny_chat import save_tiny_chat

import hfext
from hfext import registry
from hfext.cli._site_method import example

# Slow or deep models only where the call asks for them.
DEEP = {"rmu": 8, "rocr": 6, "s3t": 4, "autopasta": 6, "layered_prefill": 4}
SLOW = {
    "a2ats", "adaquant", "awq", "bos_aware", "cskv", "decoupleq", "dp2", "gptq", "hawq2", "mixdq", "ofa", "relearning",
    "s3t", "sketchtune", "tokenformer", "worst_case",
}  # fmt: skip


class Data(dict):
    """What calls leave to the user, made when it is asked for."""

    def __init__(self, folder, method):
        super().__init__()
        self.folder, self.method = folder, method

    def __missing__(self, name):
        if name not in MADE:
            raise KeyError(f"The call of {self.method} takes `{name}`, which is new: add a small value to MADE.")
        self[name] = MADE[name](self)
        return self[name]


def _path(d):
    sizes = dict(hidden_size=128, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2)
    sizes |= dict(num_hidden_layers=DEEP.get(d.method, 2), max_position_embeddings=8192)

    def llama(**more):
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **more))

    return save_tiny_chat(d.folder / "model", llama)


def _model(d):
    size = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    if d.method == "saf":
        return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=64, num_labels=4, **size))
    if d.method == "uncurl":
        size |= dict(vocab_size=64, num_local_experts=6, num_key_value_heads=2)
        return transformers.MixtralForCausalLM(transformers.MixtralConfig(**size))
    if d.method in ("mup", "mup_sam"):
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, **{**size, "hidden_size": 128}))
    return transformers.AutoModelForCausalLM.from_pretrained(d["path"])


def _data(d):
    if d.method in ("hawq2", "mixdq"):
        return d["ids"][:, :32]
    if d.method == "saf":
        return [{"input_ids": list(range(5, 13)), "labels": i % 4} for i in range(8)]
    return d["rows"]


def _rows(d):
    """Questions where a call needs a tokenizer, or else token ids."""
    if d.method in ("dpo", "idk", "ununlearning", "relearning"):
        row = {"question": "Where was Amara", "answer": "born in Dakar", "paraphrased_answer": "Dakar it was"}
        return [{**row, "perturbed_answer": ["born in Lima"]}] * 8
    ids = torch.randint(4, 60, ({"worst_case": 44, "s3t": 20}.get(d.method, 8), 16)).tolist()
    return [{"input_ids": row, "labels": row, "attention_mask": 16 * [1]} for row in ids]


def _unet(d):
    attention = torch.nn.ModuleDict({"to_k": torch.nn.Linear(8, 6), "to_v": torch.nn.Linear(8, 6)})
    return torch.nn.ModuleDict({"attn2": attention})


def _args(d):
    kind = hfext.UnlearningConfig if d.method in ("dmm", "prune_then_unlearn") else transformers.TrainingArguments
    return kind("out", max_steps=2, per_device_train_batch_size=4, report_to="none")


MADE = {
    "path": _path,
    "model": _model,
    "tokenizer": lambda d: transformers.AutoTokenizer.from_pretrained(d["path"]),
    "texts": lambda d: ["Where was the author Amara Narcott born? " * 40] * 4,
    "ids": lambda d: torch.randint(4, 60, (1, 6000) if d.method == "a2ats" else (4, 128)),
    "rows": _rows,
    "args": _args,
    "data": _data,
    "base_config": lambda d: transformers.LlamaConfig(**{**d["model"].config.to_dict(), "hidden_size": 64}),
    "config": lambda d: d["model"].config,
    "batches": lambda d: [torch.randint(4, 60, (2, 32))],
    "student": lambda d: transformers.AutoModelForCausalLM.from_pretrained(d["path"]),
    "trainer": lambda d: transformers.Trainer(d["model"], d["args"], train_dataset=d["rows"]),
    # unlearning
    "rows_with_segments": lambda d: [{**row, "segment_mask": 8 * [1] + 8 * [0]} for row in d["rows"]],
    "layer": lambda d: 1,
    "dim": lambda d: 3,
    "f_hat": lambda d: [0.0] * 8,
    "r_hat": lambda d: [1.0] * 8,
    "unet": _unet,
    "erase": lambda d: torch.randn(2, 8),
    "preserve": lambda d: torch.randn(3, 8),
    "target": lambda d: torch.randn(2, 8),
    "gold": lambda d: transformers.AutoModelForCausalLM.from_pretrained(d["path"]),
    "before": lambda d: [1.0, 1.0] if d.method == "ort" else d["gold"],
    # caches
    "aux": lambda d: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{**d["model"].config.to_dict(), "num_hidden_layers": 1})
    ),
    "base": lambda d: d["model"],
    "input_ids": lambda d: d["ids"][:1],
    # decoding
    "inputs": lambda d: {"input_ids": torch.randint(4, 60, (1, 8)), "attention_mask": torch.ones(1, 8).long()},
    "context": lambda d: "Amara Narcott was born in Dakar.",
    "question": lambda d: "Where was Amara Narcott born?",
    "query": lambda d: "Where was Amara Narcott",
    "spans": lambda d: [(1, 3)],
    "heads": lambda d: {1: [0, 2]},
    "store": lambda d: hfext.decoding.NGramStore.build(d["texts"], d["tokenizer"]),
    # metrics
    "embeddings": lambda d: torch.randn(5, 32),
    "sequences": lambda d: d["ids"][:, :12],
    "prompt_length": lambda d: 8,
    "token_ids": lambda d: d["ids"][:2, :16].tolist(),
    "unlearned_margins": lambda d: torch.randn(6, 4),
    "oracle_margins": lambda d: torch.randn(6, 4),
    "forget": lambda d: -torch.rand(6, 12),
    "holdout": lambda d: -torch.rand(6, 12),
    "auc_gold": lambda d: 0.5,
    "after": lambda d: [0.0, 1.0],
    "probes": lambda d: [SimpleNamespace(form="question"), SimpleNamespace(form="cloze")],
    "answers": lambda d: ["I cannot say.", "In Dakar."],
    "ratios": lambda d: [0.2, 0.5, 0.9],
    "gold_ratios": lambda d: [0.3, 0.4, 0.8],
}
for _name in ("f", "r", "d", "forget_rows", "all_rows", "harmful_rows"):
    MADE[_name] = MADE["rows"]

CALLS = [
    pytest.param(method, id=method.name, marks=[pytest.mark.slow] * (method.name in SLOW))
    for method in registry.methods()
]


@pytest.mark.parametrize("method", CALLS)
def test_the_call_runs(method, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, own = example(method)
    data = Data(tmp_path, method.name)
    names = {name: data[name] for name in own}
    if method.name == "dp2":
        pytest.importorskip("dp_accounting")
    exec(compile(code, method.name, "exec"), names)
