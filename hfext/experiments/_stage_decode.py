"""Stage `decode` of the quickstart: samplers at a high temperature, and several drafts for the cost of one."""

import time
from typing import TYPE_CHECKING

import torch

from .. import decoding
from ._stage_teach import load_language_model, short

if TYPE_CHECKING:
    from .quickstart import State

SAMPLERS = {
    "temperature alone": {},
    "top_p=0.9": {"top_p": 0.9},
    "top_h_alpha=0.4": {"top_h_alpha": 0.4},
}


def decode(state: "State") -> None:
    c = state.config
    model, tokenizer = load_language_model(c)
    decoding.enable(model.eval())
    chat = [{"role": "user", "content": c.decode_prompt}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False, return_token_type_ids=False)
    start = inputs["input_ids"].shape[1]
    rows = []
    for name, options in SAMPLERS.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(c.seed)
            out = model.generate(
                **inputs,
                do_sample=True,
                temperature=c.decode_temperature,
                top_k=0,
                max_new_tokens=c.decode_tokens,
                return_dict_in_generate=True,
                output_logits=True,
                output_scores=True,
                **options,
            )
        answer = out.sequences[0, start:]
        logits = torch.cat(out.logits)
        nll = -logits.log_softmax(dim=-1).gather(1, answer[:, None]).mean()
        rows.append(
            {
                "sampler": name,
                "NLL at T=1, nats a token": round(float(nll), 2),
                "tokens to choose from": round(
                    float((torch.cat(out.scores) > -torch.inf).sum(dim=-1).float().mean()), 1
                ),
                "text": short(tokenizer.decode(answer, skip_special_tokens=True), 70),
            }
        )
    state.tables[f"decode: the same question at T = {c.decode_temperature:g}"] = rows

    inputs = tokenizer(c.decode_prefix, return_tensors="pt", return_token_type_ids=False)
    begin = time.process_time()
    drafts = model.generate(
        **inputs,
        custom_generate=decoding.superposed_generate,
        num_drafts=3,
        max_new_tokens=c.decode_draft_tokens,
        do_sample=False,
        return_dict_in_generate=True,
    )
    seconds = time.process_time() - begin
    texts = tokenizer.batch_decode(drafts.sequences, skip_special_tokens=True)
    title = f"decode: three superposed drafts, {drafts.num_model_calls} model calls in all, {seconds:.1f} CPU s"
    state.tables[title] = [
        {"draft": i + 1, "score, nats": round(float(score), 2), "text": short(text, 90)}
        for i, (text, score) in enumerate(zip(texts, drafts.sequences_scores, strict=True))
    ]
