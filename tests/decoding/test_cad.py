"""Context-aware decoding: its definition recomputed without any cache, in every mode of `generate`."""

import copy

import numpy as np
import pytest
import torch
import transformers
from transformers import LogitsProcessor

from hfext.decoding._cad_stream import find_parents
from hfext.decoding.cad import ContextAwareLogitsProcessor, cad_scores, generate_cad
from hfext.decoding.pasta import steer_attention
from hfext.experiments import context_conflict

PAD = 0


class BruteForce(LogitsProcessor):
    """p(y|c,x)^(1+alpha) / p(y|x)^alpha, each prompt alone, unpadded, without a cache and in float64."""

    def __init__(self, model, null_prompts, alpha, prompt_length):
        self.model, self.null_prompts, self.alpha, self.prompt_length = model, null_prompts, alpha, prompt_length

    @torch.no_grad()
    def __call__(self, input_ids, scores):
        out = []
        parts = (x.chunk(len(self.null_prompts)) for x in (input_ids, scores))
        for prompt, rows, score in zip(self.null_prompts, *parts, strict=True):
            null = torch.tensor([prompt] * len(rows))
            if self.model.config.is_encoder_decoder:
                logits = self.model(input_ids=null, decoder_input_ids=rows, use_cache=False).logits
            else:
                logits = self.model(torch.cat([null, rows[:, self.prompt_length :]], 1), use_cache=False).logits
            weight = score.double().softmax(-1) ** (1 + self.alpha) / logits[:, -1].double().softmax(-1) ** self.alpha
            out.append((weight / weight.sum(-1, keepdim=True)).log().to(score.dtype))
        return torch.cat(out)


def padded(rows, side="left"):
    """Ids and mask [rows, longest]."""
    width = max(map(len, rows))
    ids, mask = torch.full((2, len(rows), width), PAD)
    for i, row in enumerate(rows):
        where = slice(width - len(row), None) if side == "left" else slice(len(row))
        ids[i, where], mask[i, where] = torch.tensor(row), 1
    return ids, mask


GIVEN = [[5, 17, 33, 90, 12, 61, 7], [44, 3, 99, 8]]
NULL = [[12, 61], [99, 8, 30, 77, 23]]


@pytest.fixture
def build(tiny_llama, tiny_gpt2, tiny_t5):
    """Models whose next token depends much on the prompt, so that a wrong row or cache changes the outcome."""

    def make(name, **fields):
        model = {"llama": tiny_llama, "gpt2": tiny_gpt2, "t5": tiny_t5}[name](**fields)
        with torch.no_grad():
            for p in model.parameters():
                if p.ndim == 2:
                    p.mul_(1.5 if name == "t5" else 6.0)
        model.generation_config.eos_token_id = None
        return model

    return make


def both(model, rows=2, alpha=1.0, seed=0, brute=True, **kwargs):
    """What ours and the brute force, unless it is not asked for, generate from the first `rows` prompts."""
    side = "right" if model.config.is_encoder_decoder else "left"
    ids, mask = padded(GIVEN[:rows], side)
    null, null_mask = padded(NULL[:rows], side)
    out = []
    for processor in (
        ContextAwareLogitsProcessor(model, null, null_mask, alpha=alpha),
        BruteForce(model, NULL[:rows], alpha, ids.shape[1]),
    )[: 1 + brute]:
        torch.manual_seed(seed)
        options = {"max_new_tokens": 6, "output_scores": True, "return_dict_in_generate": True, "pad_token_id": PAD}
        out.append(model.generate(ids, attention_mask=mask, logits_processor=[processor], **options | kwargs))
    return out if brute else out[0]


def assert_same(ours, expected, atol=2e-4):
    assert torch.equal(ours.sequences, expected.sequences)
    for a, b in zip(ours.scores, expected.scores, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=atol)


MODES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 0, "num_return_sequences": 3},
    "beams": {"num_beams": 4, "num_return_sequences": 2},
    "beam sampling": {"num_beams": 3, "do_sample": True, "top_k": 0},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_every_mode_equals_the_definition_for_unequal_padded_prompts(build, name, mode):
    model = build(name)
    ours, expected = both(model, **MODES[mode])
    assert_same(ours, expected)
    plain = both(model, alpha=0.0, brute=False, **MODES[mode])
    assert not torch.equal(plain.sequences, ours.sequences), "the test would not see a processor that does nothing"


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_beams_reorder_and_drop_rows(build, name):
    """Otherwise the tests above say nothing about reordering; finished beams and long runs are included."""
    model = build(name)
    ours, expected = both(model, num_beams=4, max_new_tokens=12, eos_token_id=[9, 14, 40], num_return_sequences=4)
    assert_same(ours, expected)
    swapped = [i for i in ours.beam_indices[:, 1:].T.tolist() if i != sorted(set(i))]
    assert swapped


def test_beam_scores_add_up_the_log_probabilities_of_the_definition(build):
    model = build("llama")
    ours = both(model, rows=1, num_beams=3, length_penalty=0.0, brute=False)
    prompt = len(GIVEN[0])
    total = 0.0
    for i in range(prompt, ours.sequences.shape[1]):
        given = model(ours.sequences[:, :i]).logits[:, -1]
        null = model(torch.cat([torch.tensor(NULL[:1]), ours.sequences[:, prompt:i]], 1)).logits[:, -1]
        total += cad_scores(given, null, 1.0)[0, ours.sequences[0, i]].item()
    assert ours.sequences_scores[0].item() == pytest.approx(total, abs=1e-3)


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_transformers_guidance_is_the_same_for_one_greedy_row(build, alpha):
    model = build("llama")
    ours = both(model, rows=1, alpha=alpha, max_new_tokens=10, brute=False)
    cfg = model.generate(
        torch.tensor(GIVEN[:1]),
        guidance_scale=1 + alpha,
        negative_prompt_ids=torch.tensor(NULL[:1]),
        max_new_tokens=10,
        output_scores=True,
        return_dict_in_generate=True,
        do_sample=False,
    )
    assert torch.equal(ours.sequences, cfg.sequences)
    for a, b in zip(ours.scores, cfg.scores, strict=True):
        torch.testing.assert_close(a, b.log_softmax(-1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_alpha_zero_is_plain_decoding_without_a_second_forward(build, mode):
    model = build("llama")
    ids, mask = padded(GIVEN)
    calls = count_forwards(model)
    run = dict(attention_mask=mask, max_new_tokens=6, pad_token_id=PAD, **MODES[mode])
    torch.manual_seed(0)
    plain = model.generate(ids, **run)
    base = calls[0]
    torch.manual_seed(0)
    processor = ContextAwareLogitsProcessor(model, *padded(NULL), alpha=0)
    assert torch.equal(model.generate(ids, logits_processor=[processor], **run), plain)
    assert calls[0] == 2 * base
    scores = torch.randn(2, 128)
    assert processor(ids, scores) is scores


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("alpha", [0.5, 3.0])
def test_the_full_prompt_as_null_prompt_is_plain_decoding(build, name, alpha):
    model = build(name)
    ids, mask = padded(GIVEN, "right" if name == "t5" else "left")
    run = dict(attention_mask=mask, max_new_tokens=6, num_beams=3, pad_token_id=PAD)
    processor = ContextAwareLogitsProcessor(model, ids, mask, alpha=alpha)
    assert torch.equal(model.generate(ids, logits_processor=[processor], **run), model.generate(ids, **run))


def count_forwards(model):
    calls = [0]

    def count(*_):
        calls[0] += 1

    model.register_forward_pre_hook(count)
    return calls


@pytest.mark.parametrize("name, options", [("llama", {}), ("llama", {"num_beams": 4}), ("t5", {"num_beams": 2})])
def test_a_step_costs_two_forwards_and_the_second_sees_one_token(build, name, options):
    model = build(name)
    widths = []
    key = "decoder_input_ids" if name == "t5" else "input_ids"
    model.register_forward_pre_hook(lambda m, args, kw: widths.append(kw[key].shape[1]), with_kwargs=True)
    ids, mask = padded(GIVEN)
    processor = ContextAwareLogitsProcessor(model, *padded(NULL))
    model.generate(ids, attention_mask=mask, logits_processor=[processor], max_new_tokens=6, **options)
    # The prompts of both streams, then one token each; an encoder-decoder model begins with its start token.
    first = [1, 1] if name == "t5" else [7, 5]
    assert widths == first + [1] * 10


def test_assisted_decoding_gives_the_greedy_tokens_whatever_the_assistant(build, tiny_llama):
    model = build("llama")
    plain, expected = both(model, rows=1, max_new_tokens=8)
    assert_same(plain, expected)
    for assistant in (build("llama"), tiny_llama(seed=3, num_hidden_layers=1)):
        assistant.generation_config.eos_token_id = None
        assert_same(both(model, rows=1, max_new_tokens=8, assistant_model=assistant, brute=False), expected)
    assert_same(both(model, rows=1, max_new_tokens=8, prompt_lookup_num_tokens=3, brute=False), expected)


def test_drafts_by_early_exit_of_the_same_model_have_a_cache_of_their_own(tiny_llama):
    model = tiny_llama(num_hidden_layers=3, eos_token_id=None)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.mul_(5.0)
    _, expected = both(model, rows=1, max_new_tokens=8)
    assert_same(both(model, rows=1, max_new_tokens=8, assistant_early_exit=1, brute=False), expected)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_scores_are_a_function_of_the_prefix_whatever_was_asked_before(build, name):
    model = build(name)
    ids, _ = padded(GIVEN)
    processor = ContextAwareLogitsProcessor(model, *padded(NULL), alpha=1.0, prompt_length=ids.shape[1])
    brute = BruteForce(model, NULL, 1.0, ids.shape[1])
    generator = torch.Generator().manual_seed(0)

    def ask(rows):
        scores = torch.randn(len(rows), 128, generator=generator)
        torch.testing.assert_close(processor(rows, scores), brute(rows, scores), rtol=1e-4, atol=2e-4)

    def longer(rows, by):
        return torch.cat([rows, torch.randint(3, 128, (len(rows), by), generator=generator)], 1)

    beams = longer(ids.repeat_interleave(3, 0), 2)
    ask(beams)
    ask(longer(beams[[2, 0, 0, 5, 5, 3]], 1))
    ask(longer(beams[[1, 2, 0, 4, 4, 4]], 4))
    ask(beams[[0, 0, 1, 4, 3, 5]][:, :-1])
    ask(beams)
    ask(ids.repeat_interleave(3, 0))
    path = longer(ids.repeat_interleave(3, 0), 4)
    for length in (8, 9, 10, 11):
        ask(path[:, :length])
    # Texts that were asked about go on elsewhere, as after a rejected draft.
    ask(longer(path[[2, 0, 1, 3, 3, 5]][:, :9], 1))
    ask(path[:, :10])
    ask(longer(path[[1, 1, 0, 4, 5, 3]][:, :8], 1))
    ask(longer(ids, 3))
    ask(ids)
    ask(beams[[1, 4]])


def test_the_object_serves_another_generate(build):
    model = build("llama")
    null, null_mask = padded(NULL)
    processor = ContextAwareLogitsProcessor(model, null, null_mask, alpha=1.0)
    for rows, beams in ((GIVEN, 1), (GIVEN, 3), ([[7, 7, 7], [8, 9, 10, 11, 12]], 2), (GIVEN, 1)):
        ids, mask = padded(rows)
        run = dict(attention_mask=mask, max_new_tokens=5, num_beams=beams, pad_token_id=PAD)
        expected = model.generate(ids, logits_processor=[BruteForce(model, NULL, 1.0, ids.shape[1])], **run)
        assert torch.equal(model.generate(ids, logits_processor=[processor], **run), expected)


def from_prompt(model, processor, prompt, steps=5, **kwargs):
    """Tokens and scores that `generate` gives for one prompt."""
    run = dict(do_sample=False, output_scores=True, return_dict_in_generate=True, pad_token_id=PAD)
    ids = torch.tensor([prompt])
    return model.generate(ids, logits_processor=[processor], max_new_tokens=steps, **run | kwargs)


def test_a_prompt_that_begins_with_an_earlier_prompt_is_a_new_one(build):
    """Two turns of a conversation: the second prompt holds the first, its answer and more."""
    model = build("llama")
    processor = ContextAwareLogitsProcessor(model, torch.tensor(NULL[:1]), alpha=1.0)
    first = from_prompt(model, processor, GIVEN[0], steps=3).sequences[0].tolist()
    for prompt in (GIVEN[0] + [9, 8, 7, 33], first + [9, 8], GIVEN[0] + [9, 8]):
        ours = from_prompt(model, processor, prompt)
        assert_same(ours, from_prompt(model, BruteForce(model, NULL[:1], 1.0, len(prompt)), prompt))


def test_prompts_in_another_order_are_new_ones(build):
    model = build("llama")
    processor = ContextAwareLogitsProcessor(model, *padded(NULL), alpha=1.0)
    ids, scores = padded(GIVEN)[0], torch.randn(2, 128)
    processor(ids, scores)
    swapped = torch.cat([ids.flip(0), torch.tensor([[9], [8]])], 1)
    expected = BruteForce(model, NULL, 1.0, 8)(swapped, scores)
    torch.testing.assert_close(processor(swapped, scores), expected, rtol=1e-4, atol=2e-4)


def test_what_counts_as_a_continuation_is_undone_by_reset(build):
    model = build("llama")
    processor = ContextAwareLogitsProcessor(model, torch.tensor(NULL[:1]), alpha=1.0)
    longer = from_prompt(model, processor, GIVEN[0], steps=3).sequences[0].tolist()
    as_continued = from_prompt(model, BruteForce(model, NULL[:1], 1.0, len(GIVEN[0])), longer)
    assert_same(from_prompt(model, processor, longer), as_continued)
    processor.reset()
    as_new = from_prompt(model, BruteForce(model, NULL[:1], 1.0, len(longer)), longer)
    assert_same(from_prompt(model, processor, longer), as_new)


@pytest.mark.parametrize("name, start", [("t5", [0]), ("t5", [0, 9, 8]), ("llama", None)])
def test_another_generate_sees_weights_that_have_changed(build, name, start):
    model = build(name)
    options = {} if start is None else {"decoder_input_ids": torch.tensor([start])}
    processor = ContextAwareLogitsProcessor(model, torch.tensor(NULL[1:]), alpha=1.0)
    from_prompt(model, processor, GIVEN[0], **options)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    ours = from_prompt(model, processor, GIVEN[0], **options)
    assert_same(ours, from_prompt(model, BruteForce(model, NULL[1:], 1.0, len(GIVEN[0])), GIVEN[0], **options))


def test_the_caller_may_write_into_its_ids_afterwards(build):
    model = build("llama")
    processor = ContextAwareLogitsProcessor(model, torch.tensor(NULL[:1]), alpha=1.0)
    ids, scores = torch.tensor([GIVEN[0] + [4]]), torch.randn(1, 128)
    other = torch.tensor([GIVEN[0] + [9]])
    for asked in (ids[:, :7], other, ids):
        processor(asked, scores)
    ids.copy_(other)
    longer = torch.cat([other, other[:, :1]], 1)
    expected = BruteForce(model, NULL[:1], 1.0, 7)(longer, scores)
    torch.testing.assert_close(processor(longer, scores), expected, rtol=1e-4, atol=2e-4)


def test_of_a_failed_forward_nothing_remains(build):
    model = build("llama")
    ids = torch.tensor([GIVEN[0] + [4, 5]])
    processor = ContextAwareLogitsProcessor(model, torch.tensor(NULL[:1]), alpha=1.0)
    scores = torch.randn(1, 128)
    for length in (7, 8):
        processor(ids[:, :length], scores)

    def fail(*_):
        raise RuntimeError("out of memory")

    # The first layer has written its keys by then.
    hook = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        processor(ids, scores)
    hook.remove()
    expected = BruteForce(model, NULL[:1], 1.0, 7)(ids, scores)
    torch.testing.assert_close(processor(ids, scores), expected, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}])
def test_an_attention_steering_leaves_the_second_stream_alone(build, options):
    """Spans belong to the prompt with the context."""
    model = build("llama")
    unsteered = copy.deepcopy(model)
    ours, expected = (
        lambda m: ContextAwareLogitsProcessor(m, torch.tensor(NULL[:1]), alpha=1.0),
        lambda m: BruteForce(unsteered, NULL[:1], 1.0, len(GIVEN[0])),
    )
    with steer_attention(model, [(2, 4)], {0: [0, 1], 1: [2]}, 0.01):
        steered = from_prompt(model, ours(model), GIVEN[0], **options)
        assert_same(steered, from_prompt(model, expected(model), GIVEN[0], **options))
    plain = from_prompt(model, ours(model), GIVEN[0], **options)
    assert (steered.scores[0] - plain.scores[0]).abs().max() > 1e-2


def test_a_batch_gives_what_its_rows_give_alone(build):
    model = build("gpt2")
    batch = both(model, num_beams=3, brute=False)
    for i in range(2):
        null = torch.tensor([NULL[i]])
        alone = model.generate(
            torch.tensor([GIVEN[i]]),
            logits_processor=[ContextAwareLogitsProcessor(model, null, alpha=1.0)],
            num_beams=3,
            max_new_tokens=6,
            pad_token_id=PAD,
        )
        assert torch.equal(alone[0, len(GIVEN[i]) :], batch.sequences[i, max(map(len, GIVEN)) :])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_bfloat16_agrees_within_its_precision(build, name):
    model = build(name).to(torch.bfloat16)
    ours, expected = both(model, num_beams=2, max_new_tokens=1)
    torch.testing.assert_close(ours.scores[0], expected.scores[0], rtol=0.05, atol=0.3)
    scores = torch.randn(2, 128, dtype=torch.bfloat16)
    assert cad_scores(scores, scores, 1.0).dtype == torch.bfloat16


def test_sliding_windows_and_rows_without_a_cache_are_recomputed(build):
    gemma = transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(
            vocab_size=128,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            sliding_window=4,
            eos_token_id=None,
        )
    ).eval()
    mamba = transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2, state_size=4, eos_token_id=None)
    ).eval()
    ours, expected = both(gemma, num_beams=3)
    assert_same(ours, expected)
    ours, expected = both(mamba, rows=1)
    assert_same(ours, expected)
    ids = torch.tensor(GIVEN[:1])
    processor = ContextAwareLogitsProcessor(gemma, torch.tensor(NULL[:1]), alpha=1.0, prompt_length=7)
    brute = BruteForce(gemma, NULL[:1], 1.0, 7)
    text = torch.cat([ids, torch.arange(20, 28)[None]], 1)
    # Step by step beyond the window, then back to a text that was asked about, and once more with another token.
    for length in (*range(7, 16), 12, 13, 10):
        rows, scores = text[:, :length].clone(), torch.randn(1, 128)
        rows[0, -1] += length == 10
        torch.testing.assert_close(processor(rows, scores), brute(rows, scores), rtol=1e-4, atol=2e-4)


def test_adapters_take_part_in_both_streams(build):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        build("gpt2"), LoraConfig(init_lora_weights=False, target_modules=["c_attn"], fan_in_fan_out=True)
    )
    ours, expected = both(model, num_beams=2)
    assert_same(ours, expected)


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig", "PromptEncoderConfig"])
def test_adapters_with_virtual_tokens_are_refused(build, kind):
    import peft

    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(NotImplementedError, match="adapters, whose virtual tokens .* use LoRA"):
        ContextAwareLogitsProcessor(peft.get_peft_model(build("gpt2"), config), torch.tensor(NULL[:1]))


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prompt_length": 7}])
def test_rows_without_context_are_not_shared_among_prompts_silently(build, options):
    model, options = build("llama"), dict(options)
    length = {"prompt_length": options.pop("prompt_length", None)}
    for prompts, null in ((GIVEN, NULL[:1]), (GIVEN + [[100, 101, 4], GIVEN[0]], NULL)):
        ids, mask = padded(prompts)
        run = dict(attention_mask=mask, max_new_tokens=4, pad_token_id=PAD, **options)
        processor = ContextAwareLogitsProcessor(model, *padded(null), **length)
        message = f"no_context_ids has {len(null)} rows .* at least {len(prompts)}: repeat the row"
        with pytest.raises(ValueError, match=message):
            model.generate(ids, logits_processor=[processor], **run)
        repeated = [row for row in null for _ in range(len(prompts) // len(null))]
        ours = ContextAwareLogitsProcessor(model, *padded(repeated), alpha=1.0, **length)
        brute = BruteForce(model, repeated, 1.0, ids.shape[1])
        out = [model.generate(ids, logits_processor=[processor], **run) for processor in (ours, brute)]
        assert torch.equal(*out)


def test_a_row_that_continues_nothing_beside_rows_that_do_is_named(build):
    processor = ContextAwareLogitsProcessor(build("llama"), *padded(NULL))
    ids, scores = padded(GIVEN)[0], torch.zeros(2, 128)
    processor(ids, scores)
    more = torch.cat([ids, ids[:, :1]], 1)
    more[1, 3] = 9
    with pytest.raises(ValueError, match=r"row 1 continues no prompt .* reset\(\)"):
        processor(more, scores)
    other = torch.cat([ids[:1], more[1:, :-1]])
    processor(other, scores)
    processor.reset()
    processor(more, scores)


def test_numbers_of_numpy_and_torch_are_numbers(build):
    model, null = build("llama"), torch.tensor(NULL[:1])
    for alpha in (np.float32(0.5), np.int64(1), torch.tensor(0.5)):
        assert ContextAwareLogitsProcessor(model, null, alpha=alpha).alpha == float(alpha)
    with pytest.raises(TypeError, match="alpha"):
        ContextAwareLogitsProcessor(model, null, alpha=torch.tensor([0.5, 1.0]))


def test_the_model_is_left_as_it_was(build):
    model = build("llama")
    model.train()
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    both(model, num_beams=2)
    assert model.training and all(not m._forward_pre_hooks and not m._forward_hooks for m in model.modules())
    assert all(torch.equal(v, weights[k]) and not v.requires_grad for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_closed_form_and_what_is_forbidden():
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.8, 0.1, 0.1]])
    # 0.5^2/0.8, 0.25^2/0.1, 0.25^2/0.1 = 0.3125, 0.625, 0.625
    expected = torch.tensor([[0.2, 0.4, 0.4]])
    before = p.log() + 3
    scores = before.clone()
    torch.testing.assert_close(cad_scores(scores, q.log() - 7, 1.0).exp(), expected)
    assert torch.equal(scores, before)
    inf = float("inf")
    scores = torch.tensor([[-inf, 1.0, 2.0], [-inf, -inf, -inf], [0.0, 1.0, 2.0]])
    null = torch.tensor([[-inf, -inf, 0.0], [0.0, 0.0, 0.0], [-inf, 0.0, 3.0]])
    out = cad_scores(scores, null, 1.0)
    assert torch.equal(out == -inf, scores == -inf) and not out.isnan().any() and (out < inf).all()
    finite = torch.tensor([[0.0, 0.0, 3.0]])
    torch.testing.assert_close(out[2:], cad_scores(scores[2:], finite, 1.0))


def test_parents_are_looked_for_in_the_own_group_only():
    old = torch.tensor([[1, 2], [1, 3], [1, 2], [1, 4]])
    assert find_parents(old, torch.tensor([[1, 3], [1, 2]]), groups=2).tolist() == [1, 2]
    assert find_parents(old, torch.tensor([[1, 3], [1, 3]]), groups=2) is None
    assert find_parents(old, torch.tensor([[1, 3], [1, 3], [1, 4], [1, 2]]), groups=2).tolist() == [1, 1, 3, 2]


@pytest.fixture
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = "pad eos France Paris Rome capital of is the In story What A Q :".split()
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="pad"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="pad",
        eos_token="eos",
        unk_token="pad",
        chat_template="{% for m in messages %}Q : {{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %} A :{% endif %}",
    )


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("template", [("In story {context} Q {query} A :", "Q {query} A :"), "chat"])
def test_texts_become_the_two_prompts_of_the_template(build, tokenizer, name, template):
    model = build(name)
    contexts, queries = ["capital of France is Rome", "Rome"], ["What is the capital of France", "Paris is"]
    run = dict(alpha=1.0, num_beams=3, num_return_sequences=2, max_new_tokens=5, pad_token_id=PAD)
    ours = generate_cad(model, contexts, queries, tokenizer=tokenizer, template=template, **run)
    del run["alpha"]
    if template == "chat":
        given = [f"Q : {c} {q} A :" for c, q in zip(contexts, queries, strict=True)]
        null = [f"Q : {q} A :" for q in queries]
    else:
        given = [f"In story {c} Q {q} A :" for c, q in zip(contexts, queries, strict=True)]
        null = [f"Q {q} A :" for q in queries]
    given, null = tokenizer(given)["input_ids"], tokenizer(null)["input_ids"]
    ids, mask = padded(given, "right" if name == "t5" else "left")
    brute = BruteForce(model, null, 1.0, ids.shape[1])
    expected = model.generate(ids, attention_mask=mask, logits_processor=[brute], **run)
    assert torch.equal(ours, expected)
    null_ids, null_mask = padded(null, "right" if name == "t5" else "left")
    tokens = dict(input_ids=ids, attention_mask=mask, no_context_ids=null_ids, no_context_mask=null_mask)
    assert torch.equal(generate_cad(model, alpha=1.0, **tokens, **run), expected)
    single = generate_cad(model, contexts[0], queries[0], tokenizer=tokenizer, template=template, max_new_tokens=3)
    assert len(single) == 1


def test_own_processors_follow_and_output_options_pass(build, tokenizer):
    class Only(LogitsProcessor):
        def __call__(self, input_ids, scores):
            self.sums = scores.exp().sum(-1)
            return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([77]), 0.0)

    only = Only()
    out = generate_cad(
        build("llama"),
        "Rome",
        "Paris",
        tokenizer=tokenizer,
        logits_processor=[only],
        max_new_tokens=3,
        return_dict_in_generate=True,
    )
    assert out.sequences[0, -3:].tolist() == [77] * 3
    torch.testing.assert_close(only.sums, torch.ones(1))


def test_bad_input_is_named(build, tokenizer):
    model, ids = build("llama"), torch.tensor(GIVEN[:1])

    def make(null=ids, mask=None, **kwargs):
        return ContextAwareLogitsProcessor(model, null, mask, **kwargs)

    for alpha in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="alpha is .* >= 0"):
            make(alpha=alpha)
    with pytest.raises(TypeError, match="alpha"):
        make(alpha="high")
    with pytest.raises(TypeError, match="model is a str"):
        ContextAwareLogitsProcessor("gpt2", ids)
    with pytest.raises(ValueError, match="no_context_ids is None"):
        make(null=None)
    with pytest.raises(TypeError, match="no_context_ids"):
        make(null=[[1, 2]])
    with pytest.raises(TypeError, match="no_context_ids"):
        make(null=torch.randn(1, 3))
    for bad in (torch.tensor([1, 2]), torch.zeros(1, 0, dtype=torch.long)):
        with pytest.raises(ValueError, match="no_context_ids has the shape"):
            make(null=bad)
    with pytest.raises(ValueError, match="no_context_mask has the shape"):
        make(mask=torch.ones(1, 2))
    with pytest.raises(ValueError, match="on the left"):
        make(mask=torch.tensor([[1, 1, 1, 1, 1, 1, 0]]))
    with pytest.raises(ValueError, match="without any token"):
        make(mask=torch.zeros(1, 7))
    with pytest.raises(ValueError, match="prompt_length"):
        make(prompt_length=8)(ids, torch.zeros(1, 128))
    with pytest.raises(ValueError, match="no_context_ids has 2 rows"):
        make(null=padded(NULL)[0])(ids, torch.zeros(1, 128))
    with pytest.raises(ValueError, match="NaN"):
        make()(ids, torch.full((1, 128), float("nan")))
    with pytest.raises(ValueError, match="same vocabulary"):
        make()(ids, torch.zeros(1, 64))
    assert make().supports_continuous_batching is False


def test_bad_texts_are_named(build, tokenizer):
    model, ids = build("llama"), torch.tensor(GIVEN[:1])
    with pytest.raises(ValueError, match="context has 2 texts but query 1"):
        generate_cad(model, ["a", "b"], "c", tokenizer=tokenizer)
    with pytest.raises(TypeError, match="query"):
        generate_cad(model, "a", tokenizer=tokenizer)
    with pytest.raises(TypeError, match="context"):
        generate_cad(model, [1], ["a"], tokenizer=tokenizer)
    with pytest.raises(ValueError, match="tokenizer"):
        generate_cad(model, "a", "b")
    for template in ("{context}{query}", ("{query}", "{query}"), ("{context} {query}", "{context}"), ("{context}",)):
        with pytest.raises(ValueError, match="template"):
            generate_cad(model, "a", "b", tokenizer=tokenizer, template=template)
    with pytest.raises(ValueError, match="no_context_ids is None"):
        generate_cad(model, input_ids=ids)
    with pytest.raises(ValueError, match="beside"):
        generate_cad(model, "a", "b", input_ids=ids, no_context_ids=ids)
    with pytest.raises(ValueError, match="without input_ids"):
        generate_cad(model, no_context_ids=ids)
    with pytest.raises(ValueError, match="no_context_ids has 2 rows but input_ids has 1"):
        generate_cad(model, input_ids=ids, no_context_ids=padded(NULL)[0])
    with pytest.raises(ValueError, match="guidance_scale"):
        generate_cad(model, "a", "b", tokenizer=tokenizer, guidance_scale=1.5)
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="pad token"):
        generate_cad(model, ["a", "b"], ["c", "d"], tokenizer=tokenizer)


def test_the_experiment_scores_answers_as_one_forward_of_the_whole_text_does(build, tokenizer):
    model = build("llama")
    prompt, answers = [5, 17, 33], [[9, 8, 7], [4], [6, 2]]
    for answer, logits in zip(answers, context_conflict.answer_logits(model, prompt, answers), strict=True):
        whole = model(torch.tensor([prompt + answer])).logits[0, 2:-1]
        torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-4)
    question = context_conflict.Question("capital of France is Rome What", "What", ("Paris Rome", "Paris"))
    gap = context_conflict.gaps(model, tokenizer, [question], [0.0, 1.0])
    given, null = (tokenizer(text)["input_ids"] for text in (question.given, question.null))
    brute = BruteForce(model, [null], 1.0, len(given))
    score = brute(torch.tensor([given + [3]]), model(torch.tensor([given + [3]])).logits[:, -1])
    assert gap[0, 1].item() == pytest.approx(score[0, 4].item(), abs=1e-3), "the answers differ in the last token"


def test_the_experiment_reads_memo_trap(tmp_path):
    (tmp_path / "x.csv").write_text(
        "prompt,classes,answer_index\n"
        '"Write a quote that ends in the word ""heavy"": Absence makes","[\' heavy.\', \' fonder.\']",0\n'
        '"Translate:\nxyz\nto:\nLong absent","[\' a.\', "" b.""]",1\n'
    )
    first, second = context_conflict.memo_trap(tmp_path / "x.csv")
    assert first.given == 'Write a quote that ends in the word "heavy": Absence makes'
    assert (first.null, first.answers) == ("Absence makes", (" heavy.", " fonder."))
    assert (second.null, second.answers) == ("Long absent", (" b.", " a."))
    assert context_conflict.sign_test(3, 1) == pytest.approx(5 / 16)
    with pytest.raises(FileNotFoundError, match="data_dir"):
        context_conflict.shared_data("memo_trap", tmp_path)
    with pytest.raises(ValueError, match="alphas"):
        context_conflict.Config(alphas=[0.5, 1.0])
    assert all(len(questions) >= 24 for questions in context_conflict.facts().values())
