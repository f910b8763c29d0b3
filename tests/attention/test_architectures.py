"""`hfext_triton` in models of many kinds: logits, tokens and gradients of eager attention, with padding and caches."""

import copy

import pytest
import torch
from attention_cases import CAUSAL, OTHERS, causal, other

import hfext  # noqa: F401

PAD = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 10, [0, 1, 1, 1, 1, 1, 1, 1, 1, 1]])
SLIDING = ["Mistral", "Gemma2", "Gemma3", "GptOss", "Cohere2", "Exaone4", "Starcoder2", "VaultGemma", "Llama4"]
# Not every architecture twice: those whose attention has something of its own.
BY_KERNEL = ["Gemma2", "GptOss", "DeepseekV3"]


def pair(make, name):
    eager, ours = make(name, "eager"), make(name, "hfext_triton")
    ours.load_state_dict(eager.state_dict())
    assert ours.config._attn_implementation == "hfext_triton"
    return eager, ours


def inputs():
    torch.manual_seed(2)
    return torch.randint(3, 96, PAD.shape) * PAD, PAD


def real_labels(ids, mask):
    """No label where the token or the one before it, which predicts it, is padding."""
    before = torch.nn.functional.pad(mask[:, :-1], (1, 0))
    return ids.masked_fill((mask * before) == 0, -100)


def compare_gradients(eager, ours, loss):
    losses = [loss(model) for model in (eager, ours)]
    assert abs(losses[0] - losses[1]) <= 1e-5
    for value in losses:
        value.backward()
    count = 0
    for (name, a), b in zip(eager.named_parameters(), ours.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            scale = max(1.0, a.grad.abs().max().item())
            assert (a.grad - b.grad).abs().max() <= 1e-5 * scale, name
            count += 1
    assert count > 4


@pytest.mark.parametrize("name", CAUSAL)
def test_a_language_model(name):
    eager, ours = pair(causal, name)
    ids, mask = inputs()
    with torch.no_grad():
        for padding in (mask, mask.flip(1), torch.ones_like(mask), None):
            logits = [model(ids, attention_mask=padding).logits for model in (eager, ours)]
            real = torch.ones_like(mask) if padding is None else padding
            assert (logits[0] - logits[1])[real.bool()].abs().max() <= 1e-5
    tokens = [
        model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
        for model in (eager, ours)
    ]
    assert torch.equal(*tokens)

    labels = real_labels(ids, mask)
    compare_gradients(eager, ours, lambda m: m(ids, attention_mask=mask, labels=labels).loss)
    if name == "GptOss":
        assert all(layer.self_attn.sinks.grad.abs().max() > 0 for layer in ours.model.layers)


@pytest.mark.parametrize("name", CAUSAL)
def test_a_static_cache(name):
    eager, ours = pair(causal, name)
    ids, mask = inputs()
    kw = dict(max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0, cache_implementation="static")
    for padding in (mask, torch.ones_like(mask)):
        assert torch.equal(*(model.generate(ids, attention_mask=padding, **kw) for model in (eager, ours)))


@pytest.mark.parametrize("name", SLIDING)
def test_windows_that_have_moved_on(name):
    eager, ours = pair(causal, name)
    ids, mask = inputs()
    kw = dict(max_new_tokens=14, do_sample=False, eos_token_id=None, pad_token_id=0, output_logits=True)
    kw["return_dict_in_generate"] = True
    first, second = (model.generate(ids, attention_mask=mask, **kw) for model in (eager, ours))
    assert torch.equal(first.sequences, second.sequences)
    for a, b in zip(first.logits, second.logits, strict=True):
        assert (a - b).abs().max() <= 1e-5


def test_beams_and_assisted_decoding():
    eager, ours = pair(causal, "Gemma2")
    ids, mask = inputs()
    kw = dict(max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(*(m.generate(ids, attention_mask=mask, num_beams=3, **kw) for m in (eager, ours)))
    draft = copy.deepcopy(ours)
    assert torch.equal(eager.generate(ids[1:2], **kw), ours.generate(ids[1:2], assistant_model=draft, **kw))


def test_packed_sequences_do_not_see_each_other():
    eager, ours = pair(causal, "Mistral")
    torch.manual_seed(3)
    ids = torch.randint(3, 96, (1, 14))
    places = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2, 0, 1, 2, 3, 4]])
    with torch.no_grad():
        packed = [model(ids, position_ids=places, use_cache=False).logits for model in (eager, ours)]
        apart = torch.cat([ours(ids[:, a:b]).logits for a, b in ((0, 6), (6, 9), (9, 14))], 1)
    assert (packed[0] - packed[1]).abs().max() <= 1e-5 and (packed[1] - apart).abs().max() <= 1e-5


@pytest.mark.parametrize("name", OTHERS)
def test_an_encoder(name):
    eager, ours = pair(other, name)
    ids, mask = inputs()
    if hasattr(eager, "generate") and name != "whisper":
        labels = ids.flip(1)
        call = dict(input_ids=ids, attention_mask=mask, labels=labels.masked_fill(labels == 0, -100))
    elif name == "whisper":
        call = dict(input_features=torch.randn(2, 8, 32), labels=torch.randint(3, 96, (2, 7)))
    elif name == "wav2vec2":
        call = dict(input_values=torch.randn(2, 400), attention_mask=torch.tensor([[1] * 400, [1] * 250 + [0] * 150]))
    elif name in ("vit", "siglip", "clip", "dinov2"):
        call = dict(pixel_values=torch.randn(2, 3, 16, 16))
    else:
        call = dict(input_ids=ids.clamp(min=1), attention_mask=mask.flip(1))

    def result(model):
        out = model(**call)
        return out.logits if "logits" in out else out.last_hidden_state

    with torch.no_grad():
        a, b = result(eager), result(ours)
    if "logits" not in eager(**call) and "attention_mask" in call and a.shape[1] == call["attention_mask"].shape[1]:
        real = call["attention_mask"].bool()
        a, b = a[real], b[real]
    elif name == "wav2vec2":
        a, b = a[:1], b[:1]
    assert (a - b).abs().max() <= 1e-5

    torch.manual_seed(4)
    weights = torch.randn_like(a)

    def loss(model):
        model.eval()
        out = result(model)
        if out.shape != weights.shape:
            out = out[call["attention_mask"].bool()] if "attention_mask" in call and name != "wav2vec2" else out[:1]
        return (out * weights).mean()

    compare_gradients(eager, ours, loss)
    if name in ("t5", "bart", "whisper"):
        kw = dict(max_new_tokens=6, do_sample=False)
        first = {key: value for key, value in call.items() if key != "labels"}
        assert torch.equal(*(model.generate(**first, **kw) for model in (eager, ours)))


def test_a_vision_language_model():
    import transformers as tf
    from attention_cases import TEXT, VISION

    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**VISION), text_config=tf.LlamaConfig(**TEXT), image_token_index=90,
        vision_feature_layer=-1,
    )  # fmt: skip
    models = []
    for implementation in ("eager", "hfext_triton"):
        torch.manual_seed(0)
        models.append(tf.LlavaForConditionalGeneration._from_config(config, attn_implementation=implementation).eval())
    ids = torch.tensor([[1, 5, 90, 90, 90, 90, 7, 8, 9]])
    call = dict(input_ids=ids, pixel_values=torch.randn(1, 3, 16, 16), attention_mask=torch.ones_like(ids))
    with torch.no_grad():
        a, b = (model(**call).logits for model in models)
    assert (a - b).abs().max() <= 1e-5
    kw = dict(max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(*(model.generate(**call, **kw) for model in models))


@pytest.mark.parametrize("name", BY_KERNEL)
def test_the_kernels_themselves_in_a_model(name, monkeypatch):
    from hfext_attention._launch import launches

    eager, ours = pair(causal, name)
    ids, mask = inputs()
    labels = real_labels(ids, mask)
    kw = dict(max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    before = launches.copy()
    compare_gradients(eager, ours, lambda m: m(ids, attention_mask=mask, labels=labels).loss)
    assert torch.equal(*(model.generate(ids, attention_mask=mask, **kw) for model in (eager, ours)))
    ran = launches - before
    layers = ours.config.num_hidden_layers
    assert ran["attention_key_gradient"] == layers and ran["attention_decode"] >= 3 * layers


@pytest.mark.parametrize("name", ["Bloom", "Mpt"])
def test_models_that_ask_no_attention_implementation_are_refused(name):
    import transformers as tf

    sizes = {"Bloom": dict(n_layer=2, n_head=4, hidden_size=32), "Mpt": dict(d_model=32, n_heads=4, n_layers=2)}[name]
    config = getattr(tf, name + "Config")(**sizes, vocab_size=96, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model = getattr(tf, name + "ForCausalLM")._from_config(config, attn_implementation="hfext_triton")
    with pytest.raises(NotImplementedError, match=f"{name}Model computes attention in its own code"):
        model(torch.ones(1, 4, dtype=torch.long))
