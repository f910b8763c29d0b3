"""Attention steering: what it does to attention weights, and that nothing else changes."""

import json
import math
import random

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from hfext.decoding._active_steering import ACTIVE, prompt_columns, steerings_of, suspended
from hfext.decoding.pasta import (
    attention_modules,
    load_heads,
    profile_heads,
    save_heads,
    span_to_tokens,
    steer_attention,
    steered_mask,
    steering_rows,
)
from hfext.experiments import attention_steering

HEADS = {0: [1, 2], 1: [3]}
IDS = torch.tensor([[5, 17, 33, 90, 12, 61, 7, 44]])


def qwen2(**fields):
    torch.manual_seed(0)
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SMALL, **fields)).eval()


def gemma2(**fields):
    torch.manual_seed(0)
    config = dict(SMALL, head_dim=8, sliding_window=5, attn_implementation="eager") | fields
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**config)).eval()


def mistral(**fields):
    torch.manual_seed(0)
    return transformers.MistralForCausalLM(transformers.MistralConfig(**SMALL, sliding_window=5, **fields)).eval()


def neox(**fields):
    torch.manual_seed(0)
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SMALL, **fields)).eval()


def falcon(**fields):
    torch.manual_seed(0)
    return transformers.FalconForCausalLM(transformers.FalconConfig(**SMALL, alibi=False, **fields)).eval()


SMALL = dict(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    eos_token_id=None,
    pad_token_id=0,
)


@pytest.fixture
def build(tiny_llama, tiny_gpt2):
    """Weights large enough that attention is far from uniform."""
    makers = {"llama": tiny_llama, "gpt2": tiny_gpt2, "qwen2": qwen2, "gemma2": gemma2, "mistral": mistral}
    makers |= {"neox": neox, "falcon": falcon}

    def make(name, attention=None):
        model = makers[name]() if attention is None else makers[name](attn_implementation=attention)
        with torch.no_grad():
            for p in model.parameters():
                if p.ndim == 2:
                    p.mul_(5.0)
        model.generation_config.eos_token_id = None
        return model

    return make


NAMES = ["llama", "gpt2", "qwen2", "gemma2", "mistral"]


def attentions(model, **kwargs):
    return model(IDS, output_attentions=True, **kwargs).attentions


@pytest.mark.parametrize("name", NAMES)
def test_outside_counts_alpha_times_and_rows_still_sum_to_one(build, name):
    model, alpha = build(name, "eager"), 0.05
    plain = attentions(model)
    # The first layer's queries and keys do not depend on steering.
    with steer_attention(model, [(2, 4), (5, 6)], {0: [1, 2]}, alpha):
        steered = attentions(model)
    inside = torch.zeros(8, dtype=torch.bool)
    inside[[2, 3, 5]] = True
    weight = torch.where(inside, 1.0, alpha)
    expected = plain[0] * weight / (plain[0] * weight).sum(-1, keepdim=True)
    torch.testing.assert_close(steered[0][:, [1, 2]], expected[:, [1, 2]])
    torch.testing.assert_close(steered[0].sum(-1), torch.ones(1, 4, 8))
    assert torch.equal(steered[0][:, [0, 3]], plain[0][:, [0, 3]])
    last = steered[0][0, 1, -1], plain[0][0, 1, -1]
    seen = last[1] > 0
    ratio = [a[seen & ~inside].sum() / a[seen & inside].sum() for a in last]
    assert (ratio[0] / ratio[1]).item() == pytest.approx(alpha, rel=1e-4)


def test_include_weighs_the_span_by_one_over_alpha(build):
    model, alpha = build("llama", "eager"), 0.05
    plain = attentions(model)
    with steer_attention(model, [(2, 4)], {0: [1]}, alpha, mode="include", prompt_length=6):
        steered = attentions(model)
    weight = torch.ones(8)
    weight[2:4] = 1 / alpha
    expected = plain[0] * weight / (plain[0] * weight).sum(-1, keepdim=True)
    torch.testing.assert_close(steered[0][:, 1], expected[:, 1])


def test_rows_of_the_bias():
    log = math.log(0.1)
    rows = steering_rows([[(0, 1), (3, 4)], [(1, 3)]], 4, 0.1)
    torch.testing.assert_close(rows, torch.tensor([[0, log, log, 0], [log, 0, 0, log]]))
    torch.testing.assert_close(steering_rows([[(1, 3)]], 4, 0.1, "include"), torch.tensor([[0, -log, -log, 0]]))


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2", "mistral"])
def test_eager_and_sdpa_agree(build, name):
    eager, sdpa = build(name, "eager"), build(name, "sdpa")
    mask = torch.tensor([[1] * 8, [0, 0] + [1] * 6])
    ids = IDS.repeat(2, 1)
    for kwargs in ({}, {"attention_mask": mask}):
        out = []
        for model in (eager, sdpa):
            with steer_attention(model, [[(2, 4)], [(5, 7)]], HEADS):
                out.append(model(ids, **kwargs).logits[:, 2:])
        torch.testing.assert_close(*out, rtol=1e-4, atol=1e-4)
        assert (out[0] - eager(ids, **kwargs).logits[:, 2:]).abs().max() > 1e-2


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("alpha, heads", [(1.0, HEADS), (0.01, {}), (0.01, {0: []})])
def test_alpha_one_or_no_heads_change_nothing(build, attention, alpha, heads):
    model = build("llama", attention)
    plain = model(IDS).logits
    with steer_attention(model, [(2, 4)], heads, alpha):
        assert torch.equal(model(IDS).logits, plain)


@pytest.mark.parametrize("name", NAMES)
def test_removal_restores_bitwise(build, name):
    model = build(name)
    plain = model(IDS).logits
    handle = steer_attention(model, [(2, 4)], HEADS)
    steered = model(IDS).logits
    handle.remove()
    handle.remove()
    assert torch.equal(model(IDS).logits, plain) and not torch.equal(steered, plain)
    with pytest.raises(RuntimeError, match="inside"), steer_attention(model, [(2, 4)], HEADS):
        raise RuntimeError("inside")
    assert torch.equal(model(IDS).logits, plain)
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    "name, attention, cache",
    [(n, "eager", cache) for n in NAMES for cache in (None, "static")]
    + [(n, "sdpa", cache) for n in ("llama", "mistral") for cache in (None, "static")]
    + [(n, attention, None) for n in ("neox", "falcon") for attention in ("eager", "sdpa")],
)
def test_prefill_and_cached_steps_equal_one_full_forward(build, name, attention, cache):
    """Generated positions keep their weight; windows shorter than the prompt roll keys out of the cache."""
    model = build(name, attention)
    options = {"cache_implementation": cache} if cache else {}
    with steer_attention(model, [(2, 4)], HEADS, 0.02):
        out = model.generate(
            IDS,
            max_new_tokens=8,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            disable_compile=True,
            **options,
        )
    with steer_attention(model, [(2, 4)], HEADS, 0.02, prompt_length=8):
        full = model(out.sequences, use_cache=False).logits[:, 7:-1]
        torch.testing.assert_close(torch.stack(out.logits, 1), full, rtol=1e-3, atol=1e-3)
    with steer_attention(model, [(2, 4)], HEADS, 0.02, prompt_length=16):
        assert (model(out.sequences).logits[:, -1] - full[:, -1]).abs().max() > 1e-3


def test_steering_may_begin_after_the_prompt_when_its_length_is_given(build):
    model = build("llama")
    past = model(IDS[:, :7]).past_key_values
    with steer_attention(model, [(2, 4)], HEADS), pytest.raises(ValueError, match="prompt_length must be given"):
        model(IDS[:, 7:], past_key_values=past)
    with steer_attention(model, [(2, 4)], HEADS, prompt_length=7) as handle:
        last = model(IDS[:, 7:], past_key_values=past).logits
        assert handle.prompt_length == 7 and torch.isfinite(last).all()
    chunked = model.generate(IDS, max_new_tokens=4, do_sample=False)
    with steer_attention(model, [(2, 4)], HEADS):
        whole = model.generate(IDS, max_new_tokens=4, do_sample=False)
    assert not torch.equal(chunked, whole)
    with steer_attention(model, [(2, 4)], HEADS, prompt_length=8):
        chunked = model.generate(IDS, max_new_tokens=4, do_sample=False, prefill_chunk_size=3)
    assert torch.equal(chunked, whole)


def generated(model, ids=IDS, **options):
    run = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    return model.generate(ids, **run | options)


@pytest.mark.parametrize(
    "options",
    [
        {"prompt_lookup_num_tokens": 4},
        {"assistant_model": None},
        {"assistant_early_exit": 1},
        {"prefill_chunk_size": 3},
        {"use_cache": False},
    ],
    ids=lambda options: next(iter(options)),
)
def test_generate_says_how_long_the_prompt_is_in_every_mode(build, tiny_llama, options):
    """The first forward is the prompt with drafted tokens, a part of it, or only one of many that hold it all."""
    model, ids = build("llama"), torch.cat([IDS, IDS[:, :2]], 1)
    if "assistant_model" in options:
        options = {"assistant_model": tiny_llama(seed=3, eos_token_id=None)}
    widths = []
    model.register_forward_pre_hook(lambda m, args, kw: widths.append(kw["input_ids"].shape[1]), with_kwargs=True)
    with steer_attention(model, [(2, 4)], HEADS, 0.02, prompt_length=10):
        expected = generated(model, ids)
    assert widths == [10] + [1] * 7
    with steer_attention(model, [(2, 4)], HEADS, 0.02) as handle:
        out = generated(model, ids, **options)
        assert handle.prompt_length == 10 and widths[8:15] != [10] + [1] * 6, "the mode reads the prompt as plain does"
        out = [out, generated(model, ids, **options)]
    for found in out:
        assert torch.equal(found.sequences, expected.sequences)
        torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=1e-3, atol=1e-3)


def test_a_cache_of_earlier_turns_belongs_to_the_prompt_of_generate(build):
    model = build("llama")
    with steer_attention(model, [(2, 4)], HEADS, 0.02, prompt_length=8):
        past = model(IDS[:, :5]).past_key_values
    with steer_attention(model, [(2, 4)], HEADS, 0.02) as handle:
        out = generated(model, past_key_values=past)
        assert handle.prompt_length == 8
        assert torch.equal(out.sequences, generated(model).sequences)
        embedded = model.generate(inputs_embeds=model.get_input_embeddings()(IDS), max_new_tokens=8, do_sample=False)
    assert torch.equal(embedded, out.sequences[:, 8:])


def test_columns_of_the_prompt_are_read_from_the_arguments():
    assert prompt_columns(IDS, None, do_sample=True) == 8 and prompt_columns(input_ids=IDS) == 8
    assert prompt_columns(IDS[:, :0], inputs_embeds=torch.zeros(1, 6, 32)) == 6
    assert prompt_columns(max_new_tokens=3) == 1 and prompt_columns("text") is None


def test_a_handle_serves_one_prompt(build):
    model, longer = build("llama"), torch.cat([IDS, IDS[:, :5]], 1)
    with steer_attention(model, [(2, 4)], HEADS):
        model(IDS)
        for ids in (longer, IDS[:, :5]):
            message = f"of a prompt of 8 tokens but the model reads one of {ids.shape[1]}"
            with pytest.raises(ValueError, match=message):
                model(ids)
            with pytest.raises(ValueError, match=message):
                model.generate(ids, max_new_tokens=2)
        model.generate(IDS + 1, max_new_tokens=2)
    with steer_attention(model, [(2, 4)], HEADS, prompt_length=8):
        expected = model(longer).logits
    with steer_attention(model, [(2, 4)], HEADS, prompt_length=8):
        model(IDS)
        assert torch.equal(model(longer).logits, expected)


def test_a_handle_is_known_to_its_model_alone_while_it_is_active(build):
    model, other = build("llama"), build("llama")
    plain = model(IDS).logits
    with steer_attention(model, [(2, 4)], HEADS) as handle:
        assert steerings_of(model) == [handle] == steerings_of(model.model) and steerings_of(other) == []
        steered = model(IDS).logits
        with suspended(model), suspended(model.model), suspended(other):
            assert torch.equal(model(IDS).logits, plain)
        assert torch.equal(model(IDS).logits, steered)
        other.generate(IDS[:, :3], max_new_tokens=2)
        with pytest.raises(TypeError):
            model.generate(IDS, max_new_tokens="two")
        with pytest.raises(ValueError, match="a prompt of 8 tokens"):
            model(IDS[:, :3])
    assert steerings_of(model) == [] and handle not in ACTIVE


class PastAttention(nn.Module):
    """Attention of a model with a cache of its own kind."""

    def __init__(self):
        super().__init__()
        self.layer_idx = 0

    def forward(self, hidden_states, attention_mask=None, layer_past=None):
        return hidden_states


def test_past_tokens_outside_of_a_cache_are_refused():
    model = nn.Sequential(PastAttention())
    model.config = transformers.LlamaConfig(**SMALL, attn_implementation="sdpa")
    hidden, pairs = torch.zeros(1, 1, 32), (torch.zeros(1, 4, 8, 8),) * 2
    with steer_attention(model, [(2, 4)], {0: [1]}, prompt_length=8):
        for past in ({"layer_past": pairs}, {"attention_mask": torch.zeros(1, 1, 1, 9)}):
            with pytest.raises(NotImplementedError, match="Layer 0, a PastAttention, attends to past tokens"):
                model[0](hidden, **past)
        assert model[0](hidden.expand(1, 8, 32)).shape == (1, 8, 32)


def test_a_mask_stays_finite_in_float16(build):
    """-65504 + log(1e-20) would be -inf, and a row of padding with nothing else NaN."""
    bias = steering_rows([[(1, 2)]], 3, 1e-20).half()
    mask = torch.full((1, 1, 3, 3), torch.finfo(torch.float16).min, dtype=torch.float16)
    for given in (mask, torch.zeros(1, 1, 3, 3, dtype=torch.bool)):
        assert steered_mask(given, bias, [0], 2).isfinite().all()
    model = build("llama", "eager").half()
    with steer_attention(model, [(3, 4)], HEADS, 1e-20):
        logits = model(IDS, attention_mask=torch.tensor([[0, 0] + [1] * 6])).logits
    assert logits.isfinite().all()


def test_cross_attention_is_not_steered(tiny_gpt2):
    model = tiny_gpt2(add_cross_attention=True)
    found = attention_modules(model)
    assert found == {i: block.attn for i, block in enumerate(model.transformer.h)}
    assert all(block.crossattention.layer_idx == i for i, block in enumerate(model.transformer.h))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("options", [{"do_sample": False}, {"num_beams": 3, "num_return_sequences": 2}])
def test_a_left_padded_batch_gives_what_its_rows_give_alone(build, name, options):
    model = build(name)
    ids = torch.tensor([[5, 17, 33, 90, 12, 61, 7, 44], [0, 0, 0, 8, 9, 77, 30, 21]])
    mask = (ids != 0).long()
    spans = [[(1, 3), (5, 6)], [(4, 6)]]
    run = dict(max_new_tokens=6, pad_token_id=0, **options)
    with steer_attention(model, spans, HEADS, 0.02):
        batch = model.generate(ids, attention_mask=mask, **run)
    rows = len(batch) // 2
    plain = model.generate(ids, attention_mask=mask, **run)
    assert not torch.equal(batch, plain)
    with steer_attention(model, spans[0], HEADS, 0.02):
        assert torch.equal(model.generate(ids[:1], **run), batch[:rows])
    with steer_attention(model, [(1, 3)], HEADS, 0.02):
        assert torch.equal(model.generate(ids[1:, 3:], **run)[:, 5:], batch[rows:, 8:])


def test_query_heads_are_meant_under_grouped_queries(build):
    """Heads 2 and 3 share keys and values; only the output of head 3 may change."""
    model = build("llama", "sdpa")
    seen = []
    module = attention_modules(model)[0]
    module.o_proj.register_forward_pre_hook(lambda m, args: seen.append(args[0].view(1, -1, 4, 8)))
    model(IDS)
    with steer_attention(model, [(2, 4)], {0: [3]}):
        model(IDS)
    changed = (seen[0] - seen[1]).abs().amax((0, 1, 3)) > 1e-4
    assert changed.tolist() == [False, False, False, True]


def test_two_handles_add_up_and_bfloat16_works(build):
    model = build("llama")
    with steer_attention(model, [(2, 4)], {0: [1]}), steer_attention(model, [(2, 4)], {0: [2]}):
        both = model(IDS).logits
    with steer_attention(model, [(2, 4)], {0: [2, 1, 1]}):
        torch.testing.assert_close(model(IDS).logits, both)
    plain = model(IDS).logits
    model.bfloat16()
    with steer_attention(model, [(2, 4)], {0: [1, 2]}):
        steered = model(IDS).logits
    assert steered.dtype == torch.bfloat16
    assert (steered - both).abs().mean() < 0.3 * (plain - both).abs().mean()


def test_profiling_finds_the_planted_heads_with_few_trials(build):
    model, seen = build("llama"), []

    def score(heads):
        seen.append(heads)
        return sum({(0, 3): 2.0, (1, 0): 5.0, (1, 2): 1.0}.get((k, h), 0.0) for k, v in heads.items() for h in v)

    assert profile_heads(model, score, layers_top=2, heads_top=3) == {0: [3], 1: [0, 2]}
    assert len(seen) == 2 + 8
    assert profile_heads(model, score, layers_top=1, heads_top=1) == {1: [0]}
    with pytest.raises(ValueError, match="layers_top is 3 .* 1 and 2"):
        profile_heads(model, score, layers_top=3)
    with pytest.raises(ValueError, match="heads_top is 9"):
        profile_heads(model, score, layers_top=2, heads_top=9)


def test_heads_go_through_json(build, tmp_path):
    save_heads(HEADS, tmp_path / "heads.json")
    assert load_heads(tmp_path / "heads.json") == HEADS
    model = build("llama")
    with steer_attention(model, [(2, 4)], json.loads((tmp_path / "heads.json").read_text())):
        steered = model(IDS).logits
    with steer_attention(model, [(2, 4)], HEADS):
        assert torch.equal(model(IDS).logits, steered)


def test_numbers_of_numpy_and_torch_are_numbers(build, tmp_path):
    model = build("llama")
    with steer_attention(model, [(2, 4), (5, 6)], {0: [1, 2]}, 0.5):
        expected = model(IDS).logits
    heads = {np.int64(0): np.array([1, 2])}
    spans = np.array([[2, 4], [5, 6]])
    for given, alpha in (
        (spans, np.float32(0.5)),
        (torch.tensor(spans), torch.tensor(0.5)),
        ([tuple(span) for span in spans], np.float64(0.5)),
        (spans[None], 0.5),
    ):
        with steer_attention(model, given, heads, alpha):
            assert torch.equal(model(IDS).logits, expected)
    save_heads(heads, tmp_path / "heads.json")
    assert load_heads(tmp_path / "heads.json") == {0: [1, 2]}


@pytest.fixture
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate("pad a b c d .".split())}, unk_token="pad"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, pad_token="pad", unk_token="pad")


def test_spans_come_from_offsets_and_follow_left_padding(tokenizer):
    text = "a b. c a b d."
    assert span_to_tokens(tokenizer, text, "a b") == (0, 2)
    assert span_to_tokens(tokenizer, text, "a b", occurrence=1) == (4, 6)
    assert span_to_tokens(tokenizer, text, (5, 8)) == (3, 5)
    assert span_to_tokens(tokenizer, text, "c", padded_length=12) == (7, 8)
    batch = tokenizer([text, "a " * 12], padding=True, padding_side="left")["input_ids"]
    start, end = span_to_tokens(tokenizer, text, "c a", padded_length=len(batch[0]))
    assert tokenizer.decode(batch[0][start:end]) == "c a"
    with pytest.raises(ValueError, match="'d c' is not found"):
        span_to_tokens(tokenizer, text, "d c")
    with pytest.raises(ValueError, match="'c' is not found .*occurrence 1"):
        span_to_tokens(tokenizer, text, "c", occurrence=1)
    for bad in ((3, 3), (-1, 2), (0, 99)):
        with pytest.raises(ValueError, match="not a range"):
            span_to_tokens(tokenizer, text, bad)
    with pytest.raises(ValueError, match="belongs to no token"):
        span_to_tokens(tokenizer, text, (4, 5))
    with pytest.raises(ValueError, match="padded_length is 3"):
        span_to_tokens(tokenizer, text, "c", padded_length=3)


def test_bad_input_is_named(build, tiny_t5):
    model = build("llama")

    def steer(spans=((2, 4),), heads=HEADS, **kwargs):
        return steer_attention(model, spans, heads, **kwargs)

    for alpha in (0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="alpha is .* > 0"):
            steer(alpha=alpha)
    with pytest.raises(TypeError, match="alpha"):
        steer(alpha="0.1")
    with pytest.raises(ValueError, match="mode is 'both'"):
        steer(mode="both")
    with pytest.raises(ValueError, match="layer 2 but the layers are 0 to 1"):
        steer(heads={2: [0]})
    for head in (4, -1, "1"):
        with pytest.raises(ValueError, match="of layer 1 but the heads are 0 to 3"):
            steer(heads={1: [head]})
    with pytest.raises(TypeError, match="heads is a list"):
        steer(heads=[0, 1])
    for spans, problem in (
        ([], "spans is empty"),
        ([[]], "row 0 has no span"),
        ([[(0, 1)], []], "row 1 has no span"),
        ([(3, 3)], r"\(3, 3\) of row 0 is empty"),
        ([(-1, 2)], "negative"),
        ([(1, 4), (3, 5)], r"\(1, 4\) and \(3, 5\) of row 0 overlap"),
    ):
        with pytest.raises(ValueError, match=problem):
            steer(spans)
    with pytest.raises(TypeError, match="row 0"):
        steer(["quote"])
    with pytest.raises(ValueError, match=r"\(2, 9\) of row 0 ends outside the prompt, which has 8"):
        steer([(2, 9)], prompt_length=8)
    with steer([(2, 9)]), pytest.raises(ValueError, match="ends outside the prompt"):
        model(IDS)
    with steer([[(2, 4)], [(3, 4)]]), pytest.raises(ValueError, match="spans has 2 rows but the batch 3"):
        model(IDS.repeat(3, 1))
    with steer():
        model(IDS)
        with pytest.raises(ValueError, match="a prompt of 8 tokens but the model reads one of 5"):
            model(IDS[:, :5])
    assert not any(m._forward_pre_hooks for m in model.modules())
    with pytest.raises(TypeError, match="row 0"):
        steer(np.array([[0.5, 2.0]]))
    with pytest.raises(NotImplementedError, match="Encoder-decoder"):
        steer_attention(tiny_t5(), [(0, 1)], {0: [0]})
    for name in ("flash_attention_2", "flex_attention"):
        model.config._attn_implementation = name
        with pytest.raises(NotImplementedError, match=f"'{name}' takes no additive mask.*'sdpa' or 'eager'"):
            steer()


def test_adapters_with_virtual_tokens_are_refused(build):
    import peft

    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(NotImplementedError, match="steering does not work with PROMPT_TUNING adapters"):
        steer_attention(peft.get_peft_model(build("gpt2"), config), [(0, 1)], {0: [0]})


def test_generate_of_an_adapted_model_says_how_long_the_prompt_is(build):
    import peft

    config = peft.LoraConfig(init_lora_weights=False, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(build("llama"), config)
    with steer_attention(model, [(2, 4)], HEADS) as handle:
        model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False, prompt_lookup_num_tokens=3)
    assert handle.prompt_length == 8


def test_a_model_without_known_attention_is_refused(build):
    with pytest.raises(NotImplementedError, match="Linear has no attention modules"):
        attention_modules(nn.Linear(2, 2))


def test_the_experiment_reads_the_first_city_and_draws_distinct_heads(build):
    assert attention_steering.first_city("He lives in Oslo, not in Lima.") == "Oslo"
    assert attention_steering.first_city("nowhere") is None
    heads = attention_steering.random_heads(build("llama"), 5, random.Random(0))
    assert sum(len(set(hs)) for hs in heads.values()) == 5 and set(heads) <= {0, 1}
    with pytest.raises(ValueError, match="people"):
        attention_steering.Config(people=1)
    with pytest.raises(ValueError, match="end_to_end"):
        attention_steering.Config(end_to_end=99)
