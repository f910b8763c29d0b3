"""The story of each kind of artifact in five lines, as README tells them: run against the Hub on 127.0.0.1."""

import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers

import hfext

STORIES = {
    "fine-tuned model": """
args = TrainingArguments("out", optim="bisam", optim_args="rho=0.05", hub_model_id="you/bisam")
trainer = Trainer(model, args, train_dataset=rows)
trainer.train()
trainer.push_to_hub()
tuned = AutoModelForCausalLM.from_pretrained("you/bisam")  # ordinary weights: needs no hfext
""",
    "PEFT adapter": """
base = AutoModelForCausalLM.from_pretrained("org/base")
adapter = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]))
Trainer(adapter, TrainingArguments("out", optim="mezo"), train_dataset=rows).train()
hfext.push_to_hub(adapter, "you/adapter", methods=["mezo"])
adapter = AutoPeftModelForCausalLM.from_pretrained("you/adapter")
""",
    "unlearned model": """
args = hfext.UnlearningConfig("out", objective="npo")
hfext.UnlearningTrainer(model, args, forget_dataset=forget, retain_dataset=retain).train()
found = hfext.unlearning.evaluate(model, forget=forget, retain=retain)
hfext.push_to_hub(model, "you/forgot", methods=["npo"], results=found)
forgetful = AutoModelForCausalLM.from_pretrained("you/forgot")
""",
    "quantised model": """
config = hfext.quantization.HQQConfig(bits=4, group_size=16)
coded = AutoModelForCausalLM.from_pretrained("org/base", quantization_config=config)
hfext.push_to_hub(coded, "you/four-bits")
coded = AutoModelForCausalLM.from_pretrained("you/four-bits")  # after `import hfext`
""",
    "calibrated cache": """
config = hfext.RotateKVConfig(bits=4).calibrate(model, ids)
hfext.push_to_hub(config, "you/cache")
config = hfext.kv_cache.KVCacheConfig.from_pretrained(hfext.hub.fetch("you/cache"))
hfext.kv_cache.apply(model, config)
""",
    "predictor of a cache": """
predictor = hfext.kv_cache.KVPredictor(small, model)
hfext.kv_cache.KVPredictionTrainer(predictor, TrainingArguments("out"), train_dataset=rows).train()
hfext.push_to_hub(predictor, "you/predictor")
predictor = hfext.kv_cache.KVPredictor.from_pretrained(hfext.hub.fetch("you/predictor"), base=model)
""",
    "store of n-grams": """
store = hfext.decoding.NGramStore.build(ids, vocab_size=128)
hfext.push_to_hub(store, "you/ngrams", license="cc-by-4.0")
store = hfext.decoding.NGramStore.load(hfext.hub.fetch("you/ngrams"))
""",
    "generation loop": """
hfext.decoding.export_superposed("loop", readme=False)  # push_to_hub writes the card
hfext.push_to_hub("loop", "you/loop")
drafts = model.generate(ids[:1], custom_generate="you/loop", trust_remote_code=True, num_drafts=2)  # needs no hfext
""",
    "kernel": """
hfext.push_to_hub("kernels/hfext-attention", "you/hfext-attention")
sys.path.append(str(hfext.hub.fetch("you/hfext-attention") / "torch-ext"))  # built: kernels.get_kernel(...)
import hfext_attention
""",
    "result of a method": """
hfext.push_to_hub("bisam", "you/bisam-result")
card = ModelCard.load(hfext.hub.fetch("you/bisam-result") / "README.md")
""",
}


KERNELS = Path(__file__).resolve().parents[2] / "kernels"


@pytest.fixture
def names(server, tmp_path, tiny_llama, monkeypatch):
    """What the lines take for granted, in an empty folder beside the kernels of this repository."""
    from huggingface_hub import ModelCard

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    tiny_llama().save_pretrained("base")
    files = {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()}
    server.add("org/base", {**files, "README.md": "---\nlicense: apache-2.0\n---\n"})
    (tmp_path / "kernels").symlink_to(KERNELS)
    rows = [{"input_ids": list(range(n, n + 8)), "labels": list(range(n, n + 8))} for n in (3, 20, 40, 60)]
    names = {**{name: getattr(transformers, name) for name in ("AutoModelForCausalLM", "Trainer")}}
    names |= {name: getattr(peft, name) for name in ("AutoPeftModelForCausalLM", "LoraConfig", "get_peft_model")}
    names |= {"hfext": hfext, "ModelCard": ModelCard, "sys": sys, "rows": rows, "forget": rows[:2], "retain": rows[2:]}
    names["TrainingArguments"] = lambda *args, **given: transformers.TrainingArguments(*args, max_steps=1, **given)
    names["model"] = transformers.AutoModelForCausalLM.from_pretrained("org/base")
    return names | {"small": tiny_llama(seed=1, num_hidden_layers=1), "ids": torch.randint(3, 100, (4, 16))}


@pytest.mark.parametrize("kind", STORIES)
def test_five_lines_are_enough(server, names, kind):
    from huggingface_hub import ModelCard

    assert len(STORIES[kind].strip().splitlines()) <= 5
    exec(compile(STORIES[kind], kind, "exec"), names)
    (made,) = [name for name in server.repos if name.startswith("you/")]
    card = ModelCard(server.files(made)["README.md"].decode())
    assert server.commits(made) == 1 and hfext.hub.problems_of(card) == []
    if kind in ("PEFT adapter", "unlearned model", "quantised model", "fine-tuned model"):
        assert card.data.base_model == "org/base" and card.data.license == "apache-2.0"


def test_the_lines_run_in_order_and_again(server, names):
    model = names["model"]
    for _ in range(2):
        for kind, lines in STORIES.items():
            exec(compile(lines, kind, "exec"), names)
            assert names["model"] is model and all(p.requires_grad for p in model.parameters()), kind
    assert len([name for name in server.repos if name.startswith("you/")]) == len(STORIES)
