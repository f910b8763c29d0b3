"""Models and calls that are not the plain case: PEFT, encoder-decoders, sliding windows, offload, explicit caches."""

import copy
import pickle

import peft
import pytest
import torch
import transformers
from kv_cache_cases import MODELS
from transformers import DynamicCache, EncoderDecoderCache

from hfext import kv_cache
from hfext.kv_cache import CompressedCache, KIVIConfig, RotateKVConfig
from hfext.kv_cache._cache import read_tensors, write_tensors
from hfext.kv_cache._geometry import attention_modules, decoder_layers, geometry

LOSSLESS = KIVIConfig(bits=16, group_size=4, residual_length=8)


def ids(rows=2, tokens=40):
    return torch.randint(3, 128, (rows, tokens), generator=torch.Generator().manual_seed(1))


def greedy(model, prompt, **kwargs):
    settings = dict(max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=0)
    return model.generate(prompt, **{**settings, **kwargs})


def test_peft_model():
    model = peft.get_peft_model(MODELS["llama"](), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3)
    want = greedy(model, ids())
    assert kv_cache.apply(model, LOSSLESS) is model
    out = greedy(model, ids(), return_dict_in_generate=True)
    assert isinstance(out.past_key_values, CompressedCache) and torch.equal(out.sequences, want)
    model.disable_adapter_layers()
    assert not torch.equal(greedy(model, ids()), want)
    kv_cache.remove(model)
    assert type(greedy(model, ids(), return_dict_in_generate=True).past_key_values) is DynamicCache


@pytest.mark.parametrize("kind", ["t5", "bart"])
@pytest.mark.parametrize("beams", [1, 3])
def test_self_attention_of_an_encoder_decoder(kind, beams, tiny_t5):
    if kind == "t5":
        model = tiny_t5()
    else:
        sizes = dict(encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4)
        config = transformers.BartConfig(
            vocab_size=128, d_model=32, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=128, **sizes
        )
        model = transformers.BartForConditionalGeneration(config).eval()
    prompt, mask = ids(), torch.ones(2, 40, dtype=torch.long)
    mask[1, 30:] = 0
    settings = dict(attention_mask=mask, num_beams=beams, max_new_tokens=24, min_new_tokens=24)
    want = greedy(model, prompt, **settings)
    kv_cache.apply(model, RotateKVConfig(bits=16, sink_topk=0))
    out = greedy(model, prompt, **settings, return_dict_in_generate=True)
    assert isinstance(out.past_key_values, EncoderDecoderCache)
    assert isinstance(out.past_key_values.self_attention_cache, CompressedCache)
    assert out.past_key_values.self_attention_cache.get_seq_length() == out.sequences.shape[1] - 1
    assert torch.equal(out.sequences, want)


def test_only_full_attention_layers_are_compressed():
    model = MODELS["gemma3"]()
    cache = KIVIConfig(bits=2, group_size=4, residual_length=8).make_cache(model)
    kinds = [type(layer).__name__ for layer in cache.layers]
    assert kinds == ["KIVILayer", "DynamicSlidingWindowLayer", "KIVILayer"]
    with pytest.raises(ValueError, match="no full-attention layer"):
        KIVIConfig().make_cache(MODELS["gemma3"](layer_types=["sliding_attention"] * 3))


def test_modules_are_found():
    model = MODELS["gemma3"]()
    assert list(attention_modules(model)) == [0, 1, 2]
    layers = decoder_layers(model)
    assert all(layers[i] is model.model.layers[i] for i in range(3))
    shape = geometry(model)
    assert (shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.layers) == (4, 2, 8, [0, 2])


def test_a_cache_given_by_the_caller_wins():
    model = kv_cache.apply(MODELS["llama"](), KIVIConfig(bits=2, group_size=4, residual_length=8))
    plain = DynamicCache(config=model.config)
    out = greedy(model, ids(), past_key_values=plain, return_dict_in_generate=True)
    assert out.past_key_values is plain
    static = greedy(model, ids(), cache_implementation="static", return_dict_in_generate=True, disable_compile=True)
    assert type(static.past_key_values).__name__ == "StaticCache"
    assert greedy(model, ids(), use_cache=False, return_dict_in_generate=True).past_key_values is None
    assert model(ids(), use_cache=False).past_key_values is None


def test_an_explicit_cache_needs_no_apply():
    model = MODELS["llama"]()
    want = greedy(model, ids())
    cache = LOSSLESS.make_cache(model)
    assert torch.equal(greedy(model, ids(), past_key_values=cache), want)
    assert cache.get_seq_length() == 49
    assert type(model(ids(), use_cache=True).past_key_values) is DynamicCache


def test_generation_continues_in_the_same_cache():
    model = MODELS["llama"]()
    whole = greedy(model, ids(), max_new_tokens=14)
    cache = LOSSLESS.make_cache(model)
    first = greedy(model, ids(), past_key_values=cache, max_new_tokens=6)
    assert torch.equal(greedy(model, first, past_key_values=cache, max_new_tokens=8), whole)


def test_offload_and_prefetch_move_everything():
    model = MODELS["llama"]()
    cache = RotateKVConfig(bits=2, group_size=8).make_cache(model)
    model(ids(), past_key_values=cache)
    layer = cache.layers[0]
    layer.device = torch.device("meta")
    layer.prefetch()
    assert layer.held and all(x.device.type == "meta" for x in layer.held.values())


def test_positions_are_held_once():
    model = MODELS["llama"]()
    cache = RotateKVConfig(bits=2, group_size=8).make_cache(model)
    model(ids(), past_key_values=cache)
    assert cache.shared.nbytes() == 40 * 4
    cache.crop(-7)
    assert cache.shared.positions.shape == (1, 33)


def test_cache_of_another_model_or_method_is_not_loaded(tmp_path):
    model = MODELS["llama"]()
    cache = LOSSLESS.make_cache(model)
    model(ids(), past_key_values=cache)
    cache.save(tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match="another model"):
        LOSSLESS.load_cache(MODELS["llama"](num_key_value_heads=4), tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match="another config"):
        KIVIConfig(bits=8, group_size=4, residual_length=8).load_cache(model, tmp_path / "c.safetensors")
    (tmp_path / "other.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a whole"):
        LOSSLESS.load_cache(model, tmp_path / "other.safetensors")


def test_mask_that_does_not_say_what_is_padding_is_refused():
    model = MODELS["llama"]()
    cache = LOSSLESS.make_cache(model)
    square = torch.ones(2, 1, 40, 40, dtype=torch.bool).tril()
    with pytest.raises(NotImplementedError, match=r"\[batch, tokens\]"):
        model(ids(), attention_mask=square, past_key_values=cache)


@torch.no_grad()
def test_an_interrupted_forward_leaves_the_next_one_right():
    model = MODELS["llama"]()
    cache = LOSSLESS.make_cache(model)
    model(ids(), past_key_values=cache)
    kept = copy.deepcopy(cache)
    handle = model.model.layers[0].register_forward_pre_hook(lambda m, a: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        model(ids(tokens=1), past_key_values=cache)
    handle.remove()
    a, b = (model(ids(tokens=1), past_key_values=c).logits for c in (cache, kept))
    assert torch.equal(a, b)


def test_inputs_embeds():
    model = MODELS["llama"]()
    embeds = model.get_input_embeddings()(ids())
    want = model.generate(inputs_embeds=embeds, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    kv_cache.apply(model, LOSSLESS)
    got = model.generate(inputs_embeds=embeds, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(got, want)


def test_assistant_with_a_compressed_cache():
    model, assistant = MODELS["llama"](), MODELS["llama"](num_hidden_layers=2)
    want = greedy(model, ids(rows=1))
    kv_cache.apply(model, LOSSLESS)
    kv_cache.apply(assistant, KIVIConfig(bits=2, group_size=4, residual_length=8))
    assert torch.equal(greedy(model, ids(rows=1), assistant_model=assistant), want)


def test_early_exit_of_the_model_itself():
    model = MODELS["llama"]()
    want = greedy(model, ids(rows=1))
    kv_cache.apply(model, LOSSLESS)
    assert torch.equal(greedy(model, ids(rows=1), assistant_early_exit=2), want)


def test_pickle():
    model = kv_cache.apply(MODELS["llama"](), KIVIConfig(bits=2, group_size=4, residual_length=8))
    again = pickle.loads(pickle.dumps(model))
    out = greedy(again, ids(), return_dict_in_generate=True)
    assert isinstance(out.past_key_values, CompressedCache) and torch.equal(out.sequences, greedy(model, ids()))


def test_a_saved_cache_of_another_dtype_or_not_whole_is_refused(tmp_path):
    model = MODELS["llama"]()
    cache = LOSSLESS.make_cache(model)
    model(ids(), past_key_values=cache)
    cache.save(tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match="torch.float32, and this one is in torch.bfloat16"):
        LOSSLESS.load_cache(MODELS["llama"]().to(torch.bfloat16), tmp_path / "c.safetensors")
    tensors, about = read_tensors(tmp_path / "c.safetensors")
    del tensors["1.key_scale"]
    write_tensors(tmp_path / "d.safetensors", tensors, about)
    with pytest.raises(ValueError, match="lacks 1.key_scale"):
        LOSSLESS.load_cache(model, tmp_path / "d.safetensors")


def test_vision_language_model():
    text = dict(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    vision = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=8, patch_size=4
    )
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**text),
        vision_config=transformers.CLIPVisionConfig(**vision),
        image_token_index=127,
        vision_feature_layer=-1,
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    prompt = ids()
    prompt[prompt == 127] = 5
    prompt[:, 3:7] = 127
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    want = greedy(model, prompt, pixel_values=pixels)
    kv_cache.apply(model, RotateKVConfig(bits=16))
    out = greedy(model, prompt, pixel_values=pixels, return_dict_in_generate=True)
    assert isinstance(out.past_key_values, CompressedCache) and torch.equal(out.sequences, want)
