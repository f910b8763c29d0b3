"""Families of models that differ in how they call their attention, in the sizes of heads, masks and positions."""

import copy
import pickle
import threading

import peft
import pytest
import torch
import transformers
from kv_cache_cases import MODELS, SIZES, data
from transformers import DynamicCache

from hfext import kv_cache
from hfext.kv_cache import CompressedCache, KIVIConfig, RotateKVConfig, SnapKVConfig, StreamingLLMConfig
from hfext.kv_cache._calibration import watch
from hfext.kv_cache._geometry import geometry
from hfext.kv_cache._install import capture, plug

LOSSLESS = KIVIConfig(bits=16, group_size=4, residual_length=8)


def build(name, config=None, **fields):
    made = config or name.replace("ForCausalLM", "Config").replace("LMHeadModel", "Config")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        settings = getattr(transformers, made)(**{**SIZES, **fields})
        return getattr(transformers, name)(settings).eval()


GPT = dict(n_layer=2, n_head=4)
FAMILIES = {
    "gpt2": lambda: build("GPT2LMHeadModel", n_embd=32, n_positions=256, **GPT),
    "gpt_neox": lambda: build("GPTNeoXForCausalLM"),
    "falcon_multi_query": lambda: build("FalconForCausalLM"),
    "falcon_grouped": lambda: build("FalconForCausalLM", new_decoder_architecture=True, num_kv_heads=2),
    "falcon_alibi": lambda: build("FalconForCausalLM", multi_query=False, alibi=True),
    "bloom": lambda: build("BloomForCausalLM", **GPT),
    "gpt_bigcode": lambda: build("GPTBigCodeForCausalLM", n_embd=32, n_positions=256, **GPT),
    "mpt": lambda: build("MptForCausalLM", d_model=32, n_heads=4, n_layers=2, use_cache=True),
    "smollm3": lambda: build("SmolLM3ForCausalLM", no_rope_layers=[1, 0, 1]),
    "cohere2": lambda: build(
        "Cohere2ForCausalLM", sliding_window=6, layer_types=["full_attention", "sliding_attention", "full_attention"]
    ),
    "llama4": lambda: build(
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        layer_types=["chunked_attention", "chunked_attention", "full_attention"],
        no_rope_layers=[1, 1, 0],
        **LLAMA4,
    ),
}
LLAMA4 = dict(head_dim=8, intermediate_size_mlp=64, num_local_experts=2, attention_chunk_size=6)


def ids(rows=2, tokens=24):
    return torch.randint(3, 120, (rows, tokens), generator=torch.Generator().manual_seed(1))


def greedy(model, prompt, **kwargs):
    settings = dict(max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    return model.generate(prompt, **{**settings, **kwargs})


def padded(rows=2, tokens=24):
    mask = torch.ones(rows, tokens, dtype=torch.long)
    mask[1, :5] = 0
    return mask


@pytest.mark.parametrize("family", FAMILIES)
def test_a_lossless_cache_generates_what_the_plain_one_does(family):
    model = FAMILIES[family]()
    want = greedy(model, ids(), attention_mask=padded())
    for config in (LOSSLESS, RotateKVConfig(bits=16, group_size=4)):
        kv_cache.apply(model, config)
        out = greedy(model, ids(), attention_mask=padded(), return_dict_in_generate=True)
        assert isinstance(out.past_key_values, CompressedCache) and torch.equal(out.sequences, want)
        kv_cache.remove(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_calibration_sees_the_keys_that_a_plain_cache_gets(family):
    model = FAMILIES[family]()
    shape, prompt, seen = geometry(model), ids(rows=1), {}
    plain = DynamicCache(config=model.config)
    model(prompt, past_key_values=plain)
    cases = {}
    with capture(model, shape, lambda step, index, *given: cases.update({index: given})) as reported:
        model(prompt, use_cache=False)
    assert reported == set(shape.layers)
    for index, (keys, values) in cases.items():
        assert torch.allclose(keys, plain.layers[index].keys, atol=1e-5)
        assert torch.allclose(values, plain.layers[index].values, atol=1e-5)
        assert keys.shape[1:] == (shape.num_kv_heads, prompt.shape[1], shape.head_dim)
    assert watch(model, prompt, lambda x: seen.update({x.layer: x.keys})) == prompt.numel()
    assert list(seen) == shape.layers


@torch.no_grad()
def test_layers_without_rotary_embedding_are_left_as_they_are():
    model = FAMILIES["smollm3"]()
    shape = geometry(model)
    assert shape.still == {1} and shape.rotary_of(1) is None and shape.rotary_of(0) is shape.rotary
    cache = RotateKVConfig(bits=2, group_size=4).make_cache(model)
    model(ids(), past_key_values=cache)
    keys = torch.randn(2, 2, 24, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(cache.layers[1].unrotated(keys, 0), keys)
    assert not torch.allclose(cache.layers[0].unrotated(keys, 0), keys)
    assert torch.allclose(cache.layers[0].rotated(cache.layers[0].unrotated(keys, 0), 0), keys, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", ["smollm3", "cohere2"])
def test_queries_are_made_again_where_layers_have_no_rotary_embedding(family):
    model = FAMILIES[family]()
    shape, inner = geometry(model), model.model
    queries = {}
    with capture(model, shape, lambda step, index, *given: queries.update({index: step.queries()})):
        inner(ids(), use_cache=False)
    states = inner(ids(), use_cache=False, output_hidden_states=True).hidden_states
    for index in shape.layers:
        layer = inner.layers[index]
        flat = layer.self_attn.q_proj(layer.input_layernorm(states[index])).unflatten(-1, (4, -1)).transpose(1, 2)
        moved = not torch.allclose(queries[index], flat, atol=1e-5)
        assert moved == (shape.rotary_of(index) is not None)


def test_no_layer_with_a_rotary_embedding_is_a_model_without_one():
    model = FAMILIES["cohere2"]()
    assert geometry(model).rotary is None and geometry(model).rotary_problem is None
    with pytest.raises(ValueError, match="no rotary embedding"):
        StreamingLLMConfig(window=4).make_cache(model)


def test_complex_rotary_embedding_is_refused_where_it_must_be_undone():
    model = build("Llama4ForCausalLM", "Llama4TextConfig", **LLAMA4, layer_types=["full_attention"] * 3)
    want = greedy(model, ids())
    assert torch.equal(greedy(model, ids(), past_key_values=LOSSLESS.make_cache(model)), want)
    for config in (RotateKVConfig(), SnapKVConfig()):
        with pytest.raises(ValueError, match="complex"):
            config.make_cache(model)


def test_latent_attention_is_refused():
    sizes = dict(q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, num_key_value_heads=4)
    model = build("DeepseekV3ForCausalLM", v_head_dim=8, first_k_dense_replace=3, **sizes)
    with pytest.raises(ValueError, match="DeepseekV3ForCausalLM .* latent"):
        kv_cache.apply(model, LOSSLESS)
    assert plug(model) is None


def test_looking_at_a_model_changes_nothing():
    model = MODELS["llama"](attention_dropout=0.5).train()
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    geometry(model)
    assert all(module.training for module in model.modules()) and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


@torch.no_grad()
def test_arguments_given_by_place():
    model = MODELS["llama"]()
    want = model.model(ids(), padded(), past_key_values=DynamicCache(config=model.config))[0]
    config = SnapKVConfig(capacity=6, window=2)
    named, placed = config.make_cache(model), config.make_cache(model)
    model.model(input_ids=ids(), attention_mask=padded(), past_key_values=named)
    got = model.model(ids(), padded(), None, placed)[0]
    assert torch.allclose(got[0], want[0], atol=1e-5) and torch.allclose(got[1, 5:], want[1, 5:], atol=1e-5)
    for cache in (named, placed):
        cache.finish_prefill()
    assert torch.equal(named.layers[0].held["kept_index"], placed.layers[0].held["kept_index"])
    kv_cache.apply(model, LOSSLESS)
    assert isinstance(model.model(ids(), padded(), None, None, use_cache=True).past_key_values, CompressedCache)


def gemma3():
    vision = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, image_size=8, patch_size=4
    )
    text = dict(SIZES, head_dim=8, sliding_window=6)
    text["layer_types"] = ["full_attention", "sliding_attention", "full_attention"]
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=127
    )
    return transformers.Gemma3ForConditionalGeneration(config).eval()


def paligemma():
    vision = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, image_size=8, patch_size=4
    )
    text = dict(SIZES, head_dim=8, model_type="gemma")
    config = transformers.PaliGemmaConfig(
        vision_config=dict(vision, model_type="siglip_vision_model", projection_dim=32),
        text_config=text,
        image_token_index=127,
        projection_dim=32,
    )
    return transformers.PaliGemmaForConditionalGeneration(config).eval()


@pytest.mark.parametrize("make", [gemma3, paligemma])
def test_models_whose_outer_part_makes_the_masks(make, monkeypatch):
    model, told, begin = make(), [], CompressedCache.begin
    monkeypatch.setattr(CompressedCache, "begin", lambda self, *args: (told.append(args[1]), begin(self, *args)))
    prompt, mask = ids(), padded()
    prompt[:, 6:10] = 127
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    more = dict(pixel_values=pixels, token_type_ids=(prompt == 127).long(), attention_mask=mask)
    want = greedy(model, prompt, **more)
    alone = greedy(model, prompt[1:, 5:], **{name: x[1:, 5:] if x.dim() == 2 else x[1:] for name, x in more.items()})
    for config in (LOSSLESS, RotateKVConfig(bits=16)):
        kv_cache.apply(model, config)
        out = greedy(model, prompt, **more, return_dict_in_generate=True)
        assert isinstance(out.past_key_values, CompressedCache) and torch.equal(out.sequences, want)
        cache = out.past_key_values
        assert len(told) == 6 and all(torch.equal(real[:, :24], mask.bool()) for real in told)
        if cache.shared.positions is not None:
            assert cache.shared.positions.shape[1] == cache.get_seq_length()
        assert torch.equal(greedy(copy.deepcopy(model), prompt, **more), want)
        told.clear()
        kv_cache.remove(model)
    assert torch.equal(want[1:, 24:], alone[:, 19:])
    hooks = [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]
    assert not hooks
    square = torch.ones(2, 1, 24, 24, dtype=torch.bool).tril()
    with pytest.raises(NotImplementedError, match=r"\[batch, tokens\]"):
        model(prompt, attention_mask=square, past_key_values=LOSSLESS.make_cache(model))


@torch.no_grad()
def test_positions_are_noted_once_in_a_forward():
    model = MODELS["gemma3"](layer_types=["full_attention", "sliding_attention", "full_attention"])
    cache = RotateKVConfig(bits=2, group_size=4).make_cache(model)
    model(ids(), past_key_values=cache)
    assert torch.equal(cache.shared.positions, torch.arange(24, dtype=torch.int32)[None])


@torch.no_grad()
def test_threads_with_caches_of_their_own():
    model = MODELS["llama"]()
    config = RotateKVConfig(bits=2, group_size=8, residual_length=3)
    prompts = [ids(rows=1, tokens=8 + i) + i % 3 for i in range(4)]
    want = [greedy(model, prompt, past_key_values=config.make_cache(model)) for prompt in prompts]
    got, start = {}, threading.Barrier(4)

    def work(i):
        cache = config.make_cache(model)
        start.wait()
        got[i] = greedy(model, prompts[i], past_key_values=cache)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(got[i], want[i]) for i in range(4))


def test_a_plug_is_copied_and_pickled_without_what_is_under_way():
    model = kv_cache.apply(MODELS["llama"](), LOSSLESS)
    want = greedy(model, ids())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert plug(other) is not plug(model) and plug(other).facts == plug(model).facts
        assert torch.equal(greedy(other, ids()), want)


@pytest.mark.parametrize("fields", [dict(num_hidden_layers=2), dict(num_hidden_layers=4), dict(num_key_value_heads=4)])
def test_cache_of_another_model_is_refused(fields):
    model, other = MODELS["llama"](), MODELS["llama"](**fields)
    LOSSLESS.make_cache(model)
    cache = LOSSLESS.make_cache(other)
    with pytest.raises(ValueError, match="another model .*(layers|kv_heads)"):
        model(ids(), past_key_values=cache)
    assert cache.get_seq_length() == 0


def test_prompt_tuning_works_and_prefix_tuning_is_refused():
    task = dict(task_type="CAUSAL_LM", num_virtual_tokens=4)
    prompted = peft.get_peft_model(MODELS["llama"](), peft.PromptTuningConfig(**task)).eval()
    more = dict(input_ids=ids(), attention_mask=padded(), max_new_tokens=6, do_sample=False, pad_token_id=0)
    want = prompted.generate(**more)
    for config in (LOSSLESS, RotateKVConfig(bits=16)):
        kv_cache.apply(prompted, config)
        out = prompted.generate(**more, return_dict_in_generate=True)
        assert isinstance(out.past_key_values, CompressedCache) and torch.equal(out.sequences, want)
        kv_cache.remove(prompted)
    model = MODELS["llama"]()
    prefixed = peft.get_peft_model(model, peft.PrefixTuningConfig(**task)).eval()
    for use in (lambda: kv_cache.apply(prefixed, LOSSLESS), lambda: LOSSLESS.make_cache(prefixed)):
        with pytest.raises(NotImplementedError, match="PREFIX_TUNING .* LoRA"):
            use()
    assert plug(model) is None
    kv_cache.apply(model, LOSSLESS)
    with pytest.raises(NotImplementedError, match="PREFIX_TUNING"):
        prefixed.generate(**more)


@pytest.mark.parametrize("family", ["bloom", "mpt"])
def test_a_cache_that_forgets_is_refused_where_positions_are_added_to_scores(family):
    model = FAMILIES[family]()
    with pytest.raises(NotImplementedError, match="ALiBi"):
        greedy(model, ids(), past_key_values=StreamingLLMConfig(window=4, reposition=False).make_cache(model))


def test_calibrated_configs_fit_what_the_layers_give():
    model = FAMILIES["falcon_multi_query"]()
    config = RotateKVConfig(bits=4, group_size=8).calibrate(model, data(rows=1))
    assert greedy(model, ids(), past_key_values=config.make_cache(model)).shape == (2, 30)
