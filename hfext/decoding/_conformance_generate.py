"""Checks that run `generate` itself on a tiny Llama and compare every call with the straight replay of its row."""

import copy
import functools
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    TemperatureLogitsWarper,
)
from transformers.utils import logging

from ._conformance_checks import EOS, PAD, Failure, Subject, Text, check, require, same, texts_of


@functools.lru_cache(maxsize=4)
def tiny_language_model(vocab_size: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """A random Llama, peaked enough that filters have work to do. float64: padding then costs no rounding."""
    # Not at the top: `import hfext` would load the model's module.
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            initializer_range=0.6,
            max_position_embeddings=128,
            pad_token_id=PAD,
            bos_token_id=min(1, vocab_size - 1),
            eos_token_id=min(EOS, vocab_size - 1),
        )
        return LlamaForCausalLM(config).eval().to(dtype)


class Recorder(LogitsProcessor):
    """Hands every call on and keeps ids, scores and result."""

    def __init__(self, processor: LogitsProcessor):
        self.processor, self.calls = processor, []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        given = input_ids.clone(), scores.clone()
        out = self.processor(input_ids, scores)
        require(torch.equal(input_ids, given[0]), "input_ids of generate were modified in place")
        require(torch.equal(scores, given[1]), "scores of generate were modified in place")
        self.calls.append((*given, out.clone()))
        return out


@contextmanager
def _quiet():
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def padded(prompts: list[Text]) -> tuple[Tensor, Tensor]:
    """Ids and mask, [prompts, length]."""
    width = max(map(len, prompts))
    ids = [[PAD] * (width - len(p)) + list(p) for p in prompts]
    return torch.tensor(ids), torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])


def generate(
    s: Subject, *processors: LogitsProcessor, prompts: list[Text], seed: int = 0, draft=None, **options
) -> Tensor:
    """`generate` of left-padded prompts with these processors alone; the tokens, [rows, length]."""
    ids, mask = padded(prompts)
    options = {"max_new_tokens": 6, "top_k": 0, "pad_token_id": PAD, "eos_token_id": min(EOS, s.vocab - 1), **options}
    with _quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return tiny_language_model(s.vocab).generate(
            ids,
            attention_mask=mask,
            generation_config=GenerationConfig(**options),
            logits_processor=LogitsProcessorList(processors),
            assistant_model=draft,
        )


@functools.lru_cache(maxsize=2)
def draft_model(vocab_size: int) -> PreTrainedModel:
    """The tiny model with noise in its weights: some of its drafts are right."""
    model = copy.deepcopy(tiny_language_model(vocab_size))
    noise = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.03 * torch.randn(p.shape, generator=noise, dtype=p.dtype)
    model.generation_config.num_assistant_tokens = 3
    model.generation_config.num_assistant_tokens_schedule = "constant"
    model.generation_config.assistant_confidence_threshold = 0.0
    return model


def recorded(s: Subject, prompts: list[Text], **options) -> tuple[Recorder, int]:
    """A recorder around a fresh processor, and the length of the padded prompts."""
    ids, mask = padded(prompts)
    return Recorder(s.make(ids, mask, **options)), ids.shape[1]


def calls_are_straight(s: Subject, recorder: Recorder, width: int, **options) -> dict[Text, Tensor]:
    """Every recorded row equals the straight replay on the scores last seen for its ancestors; text -> result."""
    seen, results = {}, {}
    for ids, scores, out in recorder.calls:
        texts = [tuple(row) for row in ids.tolist()]
        seen.update(zip(texts, scores, strict=True))
        fresh = {text: row for row, text in enumerate(texts)}
        for text, row in fresh.items():
            ids = torch.tensor([text])
            mask = (ids[:, :width] != PAD).long().cummax(-1).values
            processor = s.make(ids[:, :width], mask, **options)
            for n in range(width, len(text) + 1):
                expected = processor(ids[:, :n], seen[text[:n]][None])
            same(out[[row]], expected, f"a call of generate, {len(text) - width} tokens after the prompt")
        results.update(zip(texts, out, strict=True))
    return results


def tokens_are_allowed(sequences: Tensor, width: int, results: dict[Text, Tensor], ends: list[int]) -> None:
    for text in sequences.tolist():
        for n in range(width, len(text)):
            allowed = results.get(tuple(text[:n]))
            if allowed is None or (n > width and text[n - 1] in ends):
                break
            require(allowed[text[n]].isfinite(), f"token {n - width} after the prompt was forbidden by the processor")


def prompts_of(s: Subject) -> list[Text]:
    return [text[:n] for text, n in zip(texts_of(s, 3, 5, seed=11), (3, 5, 2), strict=True)]


@check
def generate_samples_several_sequences(s: Subject) -> None:
    """Sampling from left-padded prompts with `num_return_sequences`: every call is the straight one of its row."""
    prompts, end = prompts_of(s), min(EOS, s.vocab - 1)
    recorder, width = recorded(s, prompts)
    out = generate(s, recorder, prompts=prompts, do_sample=True, num_return_sequences=2)
    require(len(out) == 6, f"{len(out)} sequences instead of 6")
    tokens_are_allowed(out, width, calls_are_straight(s, recorder, width), [end])


@check
def generate_pads_as_if_alone(s: Subject) -> None:
    """Greedy search of a left-padded batch gives the tokens and the processed scores of each prompt alone."""
    prompts = prompts_of(s)
    batch, width = recorded(s, prompts)
    out = generate(s, batch, prompts=prompts)
    for row, prompt in enumerate(prompts):
        alone, _ = recorded(s, [prompt])
        single = generate(s, alone, prompts=[prompt])[0, len(prompt) :]
        for step, ((_, _, found), (_, _, expected)) in enumerate(zip(batch.calls, alone.calls, strict=False)):
            same(found[[row]], expected, f"step {step} of prompt {row}, padded to {width}")
        require(
            torch.equal(out[row, width : width + len(single)], single), f"prompt {row}: other tokens than when alone"
        )


@functools.lru_cache(maxsize=2)
def tiny_encoder_decoder(vocab_size: int) -> PreTrainedModel:
    """A random T5 in float64 whose rows all begin with the same decoder token."""
    from transformers import T5Config, T5ForConditionalGeneration

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = T5Config(
            vocab_size=vocab_size,
            d_model=16,
            d_kv=8,
            d_ff=32,
            num_layers=1,
            num_heads=2,
            dropout_rate=0.0,
            initializer_factor=4.0,
            pad_token_id=PAD,
            eos_token_id=min(EOS, vocab_size - 1),
            decoder_start_token_id=PAD,
        )
        return T5ForConditionalGeneration(config).eval().double()


@check
def generate_from_encoder_inputs_as_if_alone(s: Subject) -> None:
    """Rows of an encoder-decoder model share their first ids, not their scores: each runs as its input alone."""
    s.needs(not s.facts.needs_prompt_ids, "which prompts it needs depends on the encoder")
    model, inputs = tiny_encoder_decoder(s.vocab), torch.tensor(texts_of(s, 3, 5, seed=6))

    def run(ids: Tensor) -> tuple[Tensor, Recorder]:
        recorder = Recorder(s.make(ids[:, :1]))
        config = GenerationConfig(
            max_new_tokens=6, pad_token_id=PAD, eos_token_id=min(EOS, s.vocab - 1), decoder_start_token_id=PAD
        )
        with _quiet():
            out = model.generate(ids, generation_config=config, logits_processor=LogitsProcessorList([recorder]))
        return out, recorder

    together, batch = run(inputs)
    for row in range(len(inputs)):
        single, alone = run(inputs[[row]])
        for step, ((_, _, found), (_, _, expected)) in enumerate(zip(batch.calls, alone.calls, strict=False)):
            same(found[[row]], expected, f"step {step} of encoder input {row}")
        require(torch.equal(together[row, : single.shape[1]], single[0]), f"encoder input {row}: other tokens")


@check
def generate_with_beams(s: Subject) -> None:
    """Beam search reorders and duplicates rows; every call is the straight one of its beam."""
    prompts = prompts_of(s)[:2]
    recorder, width = recorded(s, prompts)
    generate(s, recorder, prompts=prompts, num_beams=3, max_new_tokens=5)
    calls_are_straight(s, recorder, width)


@check
def generate_with_beams_as_if_alone(s: Subject) -> None:
    """Beam search of a batch returns what beam search of each prompt returns."""
    prompts = texts_of(s, 3, 4, seed=11)
    options = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 5}
    together = generate(s, recorded(s, prompts)[0], prompts=prompts, **options)
    for row, prompt in enumerate(prompts):
        alone = generate(s, recorded(s, [prompt])[0], prompts=[prompt], **options)
        part = together[3 * row : 3 * row + 3, : alone.shape[1]]
        require(torch.equal(part, alone), f"prompt {row}: other beams than when alone")


@check
def generate_samples_with_beams(s: Subject) -> None:
    """Beam sampling draws len(eos) + 1 tokens a beam: with that `min_tokens_to_keep`, allowed ones only."""
    ends = [min(EOS, s.vocab - 1), min(EOS + 1, s.vocab - 1)]
    kept = {"min_tokens_to_keep": 3} if s.facts.min_tokens_to_keep else {}
    prompts = prompts_of(s)[:2]
    recorder, width = recorded(s, prompts, **kept)
    options = {"do_sample": True, "num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 5, "eos_token_id": ends}
    # Sharp rows, of which a filter leaves no more than it must.
    out = generate(s, TemperatureLogitsWarper(0.2), recorder, prompts=prompts, **options)
    results = calls_are_straight(s, recorder, width, **kept)
    try:
        tokens_are_allowed(out, width, results, ends)
    except Failure as failure:
        hint = "" if kept else "; declare min_tokens_to_keep, which a filter needs there, if the factory takes it"
        raise Failure(f"{failure}{hint}") from None


@check
def generate_with_prompt_lookup_equals_greedy(s: Subject) -> None:
    """Assisted decoding from n-grams of the prompt returns plain greedy's tokens, by straight calls."""
    text = prompts_of(s)[1]
    prompt = [text + text + text[:3]]
    plain = generate(s, recorded(s, prompt)[0], prompts=prompt, max_new_tokens=10)
    # What greedy search will say stands in the prompt, so that some drafts are right and some are not.
    prompt = [tuple(plain[0].tolist()) + text + tuple(plain[0, : len(prompt[0])].tolist())]
    plain = generate(s, recorded(s, prompt)[0], prompts=prompt, max_new_tokens=10)
    recorder, width = recorded(s, prompt)
    found = generate(s, recorder, prompts=prompt, max_new_tokens=10, prompt_lookup_num_tokens=3)
    calls_are_straight(s, recorder, width)
    require(torch.equal(found, plain), f"{found[0, width:].tolist()} instead of greedy {plain[0, width:].tolist()}")


@check
def generate_with_a_draft_model_equals_greedy(s: Subject) -> None:
    """Assisted decoding hands the object to the draft model too, and still returns plain greedy's tokens."""
    prompt = [prompts_of(s)[1]]
    plain = generate(s, recorded(s, prompt)[0], prompts=prompt, max_new_tokens=8)
    recorder, width = recorded(s, prompt)
    found = generate(s, recorder, prompts=prompt, draft=draft_model(s.vocab), max_new_tokens=8)
    calls_are_straight(s, recorder, width)
    require(torch.equal(found, plain), f"{found[0, width:].tolist()} instead of greedy {plain[0, width:].tolist()}")


@check
def generate_twice_equals_fresh_objects(s: Subject) -> None:
    """The second `generate` with one object returns what a fresh one returns, after longer and after other prompts."""
    s.needs(not s.facts.needs_prompt_ids, "it belongs to its prompts")
    prompts = prompts_of(s)
    processor = s.make(padded(prompts)[0])
    generate(s, processor, prompts=prompts, do_sample=True)
    for again, seed in ((prompts, 1), (prompts[:2], 0)):
        used, (fresh, _) = Recorder(processor), recorded(s, again)
        found = generate(s, used, prompts=again, seed=seed, do_sample=True)
        expected = generate(s, fresh, prompts=again, seed=seed, do_sample=True)
        for step, (one, other) in enumerate(zip(used.calls, fresh.calls, strict=False)):
            same(one[2], other[2], f"step {step} of a later generate")
        require(torch.equal(found, expected), "a later generate returned other tokens than a fresh object")


@check
def generate_follows_its_seed(s: Subject) -> None:
    """The same seed gives the same tokens: all randomness is generate's own."""
    prompts = prompts_of(s)
    first = generate(s, recorded(s, prompts)[0], prompts=prompts, seed=4, do_sample=True)
    again = generate(s, recorded(s, prompts)[0], prompts=prompts, seed=4, do_sample=True)
    require(torch.equal(first, again), "two runs from one seed differ")


@check
def generate_makes_one_token(s: Subject) -> None:
    """The shortest run there is: one prompt, one new token, and it is one that the processor allows."""
    prompt = [texts_of(s, 1, 1)[0]]
    recorder, width = recorded(s, prompt)
    out = generate(s, recorder, prompts=prompt, max_new_tokens=1, do_sample=True)
    require(out.shape == (1, 2) and len(recorder.calls) == 1, f"tokens of shape {tuple(out.shape)}")
    tokens_are_allowed(out, width, calls_are_straight(s, recorder, width), [])
