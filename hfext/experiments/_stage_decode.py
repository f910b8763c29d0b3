"""Stage `decode` of the quickstart: samplers at a high temperature, and several drafts for the cost of one."""

import time
from typing import TYPE_CHECKING

import torch

from .. import decoding
from ._stage_teach import load_language_model, short

if TYPE_CHECKING:
    from .quickstart import State

# Of the kind that is continued: what the n-gram store is built from.
SENTENCES = (
    "The best way to learn a new language is to practice it every day with people who speak it.",
    "The best way to learn is to make mistakes and to try again.",
    "To learn a new language, immerse yourself in the culture and listen to native speakers.",
    "If you want to learn a language, start with the words that you use every day.",
    "It is easier to learn a language when you read books and watch films in it.",
    "Practice speaking as often as you can, and do not be afraid of mistakes.",
    "A good way to remember new words is to use them in sentences of your own.",
    "Learning a new language takes time, so it is important to be patient.",
    "You can learn a lot by listening to music and by writing a few lines every day.",
    "The first step is to learn the sounds of the language and its most common words.",
    "Find a partner to speak with, and immerse yourself in the language as much as possible.",
    "It is a good idea to learn with other people, because you can help each other.",
)
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

    store = decoding.NGramStore.build(SENTENCES, tokenizer)
    inputs = tokenizer(c.decode_prefix, return_tensors="pt", return_token_type_ids=False)
    begin = time.process_time()
    drafts = model.generate(
        **inputs,
        custom_generate=decoding.superposed_generate,
        num_drafts=3,
        ngram_store=store,
        max_new_tokens=c.decode_draft_tokens,
        do_sample=False,
        return_dict_in_generate=True,
    )
    seconds = time.process_time() - begin
    texts = tokenizer.batch_decode(drafts.sequences, skip_special_tokens=True)
    title = f"decode: three superposed drafts (n-grams of {len(SENTENCES)} sentences), {drafts.num_model_calls} model "
    title += f"calls in all, {seconds:.1f} CPU s"
    state.tables[title] = [{"draft": i + 1, "text": short(text, 90)} for i, text in enumerate(texts)]
