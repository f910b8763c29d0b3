"""Quantised inputs with the first token apart: where it is, what stands for it, and what is left of the others."""

import copy
import json

import peft
import pytest
import torch
from quantization_cases import MODELS, data, llama
from torch import nn
from transformers import AutoModelForCausalLM, StaticCache

import hfext
from hfext.quantization import BOSAwareConfig, GPTQConfig, RTNConfig, SketchTuneConfig, quantize, quantized_layers
from hfext.quantization._activation_linear import ActivationLinear, activation_grid, fake_quantized, first_tokens

BOS = 1
IDS = torch.cat([torch.full((3, 1), BOS), data(rows=3, tokens=15, seed=2)], 1)
OTHER = data(rows=3, tokens=16, seed=3)  # ids from 3 on: no row begins with the first token


def config(bits=8, **options):
    return BOSAwareConfig(quantizer=RTNConfig(bits=bits, group_size=16), dataset=data(), sequence_length=40, **options)


def quantized(make=llama, **options):
    return quantize(make(), config(**options))


@torch.no_grad()
def logits(model, ids=IDS, **more):
    return model(ids, **more).logits


@torch.no_grad()
def outputs(model, ids, names=None, **more):
    """What the named layers give [rows, tokens, out]."""
    seen, hooks = {}, []
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and (names is None or name.endswith(names)):
            note = lambda m, args, out, name=name: seen.__setitem__(name, out.clone())  # noqa: E731
            hooks.append(layer.register_forward_hook(note))
    model(ids, **more)
    for hook in hooks:
        hook.remove()
    return seen


PROTECTED = ("k_proj", "v_proj", "down_proj")


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rounding_of_inputs_is_the_formula(bits, symmetric):
    x = torch.linspace(-1.3, 3.1, 97)
    scale, offset = activation_grid(-1.0, 2.5, bits, symmetric)
    got = fake_quantized(x, torch.tensor([scale]), torch.tensor([offset]), bits, symmetric)
    codes = range(-(2 ** (bits - 1)) + 1, 2 ** (bits - 1)) if symmetric else range(2**bits)
    values = torch.tensor([scale * (code - offset) for code in codes])
    nearest = values[(x[:, None] - values).abs().argmin(1)]
    # Halves may go either way.
    assert ((got - x).abs() <= (nearest - x).abs() + 1e-5).all()
    assert (got[:, None] - values).abs().amin(1).max() < 1e-5
    assert fake_quantized(torch.zeros(1), torch.tensor([scale]), torch.tensor([offset]), bits, symmetric).item() == 0


def test_the_output_at_position_zero_depends_on_the_first_token_alone():
    """So the stored output is exact, and it is that of the plain model."""
    plain, model = llama(), quantized()
    want, got, other = outputs(plain, IDS), outputs(model, IDS), outputs(model, IDS.roll(1, 0).flip(0))
    first = outputs(plain, torch.tensor([[BOS]]))
    for name, layer in quantized_layers(model).items():
        assert layer.protected == name.endswith(PROTECTED)
        if layer.protected:
            torch.testing.assert_close(got[name][:, 0], want[name][:, 0], atol=1e-6, rtol=1e-5)
            assert torch.equal(got[name][:, 0], other[name][:, 0])
            assert all(torch.equal(row, first[name][0, 0]) for row in got[name][:, 0])
        assert not torch.equal(got[name][:, 1:], want[name][:, 1:])


def used(model, ids=IDS, **more):
    """The rows [tokens] whose outputs are the stored ones, marked, in each protected layer."""
    model = copy.deepcopy(model)
    for layer in quantized_layers(model).values():
        if layer.protected:
            layer.bos_out.fill_(1234.5)
    return {name: (out == 1234.5).all(-1) for name, out in outputs(model, ids, PROTECTED, **more).items()}


def exact(model, ids=IDS, **more):
    """Tokens whose inputs the first protected layer does not round."""
    model, seen = copy.deepcopy(model), []
    layer = model.model.layers[0].self_attn.k_proj
    layer.rounded = lambda x: torch.full_like(x, torch.nan)
    layer.register_forward_hook(lambda m, args, out: seen.append(~out.isnan().any(-1)))
    logits(model, ids, **more)
    return seen[0]


def test_the_stored_output_is_used_for_exactly_this_token_at_the_start():
    model = quantized()
    at_start = torch.zeros(3, 16, dtype=torch.bool)
    at_start[:, 0] = True
    assert all(torch.equal(x, at_start) for x in used(model).values())
    mixed = torch.cat([IDS[:1], OTHER[1:]])
    assert all(x.sum() == 1 and x[0, 0] for x in used(model, mixed).values())
    assert torch.equal(exact(model, mixed), at_start)
    inside = OTHER.clone()
    inside[:, 5] = BOS
    for ids in (OTHER, inside):
        assert not any(x.any() for x in used(model, ids).values())
        assert torch.equal(exact(model, ids), at_start)
    embeds = model.get_input_embeddings()(IDS)
    with torch.no_grad():
        torch.testing.assert_close(model(inputs_embeds=embeds).logits, logits(model), atol=2e-2, rtol=0)
    assert not any(x.any() for x in used(model, None, inputs_embeds=embeds).values())


def test_padding_on_the_left_moves_the_first_token_and_never_takes_the_stored_output():
    model = quantized()
    padded = torch.cat([torch.zeros(3, 2, dtype=torch.long), IDS], 1)
    mask = (torch.arange(18) >= 2).long().repeat(3, 1)
    mask[0] = 1
    padded[0, :16], padded[0, 16:] = IDS[0], 5
    found = used(model, padded, attention_mask=mask)
    assert all(x.sum() == 1 and x[0, 0] for x in found.values())
    where = torch.zeros(3, 18, dtype=torch.bool)
    where[0, 0] = where[1:, 2] = True
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    assert torch.equal(exact(model, padded, attention_mask=mask) & mask.bool(), where)
    alone = quantized(bos_token_id=2)  # a first token that does not occur: computed in floating point there too
    got = logits(alone, padded[1:], attention_mask=mask[1:], position_ids=positions[1:])[:, 2:]
    torch.testing.assert_close(got, logits(alone, IDS[1:]), atol=1e-5, rtol=1e-5)


def test_where_first_tokens_are():
    def found(seen=0, mask=None, positions=None, shape=(2, 4)):
        starts, at = first_tokens(shape, seen, mask, positions, torch.device("cpu"))
        return starts.int().tolist(), at.int().tolist()

    front, none, whole = [[1, 0, 0, 0]] * 2, [[0] * 4] * 2, [[1] * 4] * 2
    assert found() == (front, front)
    assert found(seen=3) == (none, none)
    left = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    assert found(mask=left) == ([[0] * 4, front[0]], [[0, 1, 0, 0], front[0]])
    # A second chunk: nothing, unless the first one was padding only.
    later = torch.tensor([[1] * 7, [0] * 5 + [1] * 2])
    assert found(seen=3, mask=later) == (none, [[0] * 4, [0, 0, 1, 0]])
    packed = torch.tensor([[0, 1, 0, 1], [0, 1, 2, 3]])
    assert found(positions=packed) == (front, [[1, 0, 1, 0], front[0]])
    assert found(positions=torch.arange(5, 9)[None]) == (none, front)
    unknown = torch.ones(2, 1, 4, 4)
    assert found(mask=unknown) == (none, whole)
    assert found(mask=unknown, positions=packed) == (none, [[1, 0, 1, 0], front[0]])
    assert found(mask={"full_attention": unknown}, seen=3) == (none, whole)


@pytest.mark.parametrize("ids", [IDS, OTHER], ids=["stored", "floating"])
def test_cached_chunked_and_whole_calls_agree(ids):
    model = quantized()
    want = logits(model, ids)
    for cut in (1, 7):
        with torch.no_grad():
            first = model(ids[:, :cut], use_cache=True)
            parts, cache = [first.logits], first.past_key_values
            for i in range(cut, 16):
                parts.append(model(ids[:, i : i + 1], past_key_values=cache).logits)
            torch.testing.assert_close(torch.cat(parts, 1), want, atol=1e-5, rtol=1e-5)
            chunks = model(ids[:, :cut], use_cache=True)
            rest = model(ids[:, cut:], past_key_values=chunks.past_key_values).logits
            torch.testing.assert_close(torch.cat([chunks.logits, rest], 1), want, atol=1e-5, rtol=1e-5)
    cache = StaticCache(config=model.config, max_cache_len=32)
    torch.testing.assert_close(logits(model, ids, past_key_values=cache), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}])
def test_generation_with_and_without_a_cache_agree(options):
    model = quantized()
    settings = dict(max_new_tokens=8, do_sample=False, eos_token_id=None, **options)
    got = model.generate(IDS, **settings)
    ids = IDS
    if "num_beams" in options:
        assert torch.equal(got, model.generate(IDS, **settings, use_cache=False))
        return
    for _ in range(8):
        ids = torch.cat([ids, logits(model, ids)[:, -1:].argmax(-1)], 1)
    assert torch.equal(got, ids)


def test_a_batch_equals_its_rows_and_padded_prompts_equal_plain_ones():
    model = quantized(bos_token_id=2)
    settings = dict(max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    rows = [model.generate(row[None], **settings) for row in IDS]
    assert torch.equal(model.generate(IDS, **settings), torch.cat(rows))
    padded = torch.cat([torch.zeros(3, 3, dtype=torch.long), IDS], 1)
    mask = (torch.arange(19) >= 3).long().repeat(3, 1)
    assert torch.equal(model.generate(padded, attention_mask=mask, **settings)[:, 3:], torch.cat(rows))


def test_ranges_are_those_of_the_data_with_and_without_the_first_token():
    big = llama()
    with torch.no_grad():
        big.model.embed_tokens.weight[BOS] *= 300
    ids = torch.cat([torch.full((6, 1), BOS), data(tokens=39)], 1)
    made = {
        aware: quantize(copy.deepcopy(big), BOSAwareConfig(
            quantizer=RTNConfig(bits=8, group_size=16), dataset=ids, sequence_length=40, bos_aware=aware, batch_size=6
        )) for aware in (True, False)
    }  # fmt: skip
    for name, layer in quantized_layers(made[False]).items():
        assert not layer.protected and layer.bos_out is None
        if name.startswith("model.layers.0.") and name.endswith(("k_proj", "v_proj")):
            x = big.model.layers[0].input_layernorm(big.model.embed_tokens(ids)).detach()
            for aware, seen in ((True, x[:, 1:]), (False, x)):
                scale, offset = activation_grid(float(seen.min()), float(seen.max()), 8, False)
                found = made[aware].get_submodule(name)
                assert found.act_scale.item() == pytest.approx(scale, rel=1e-5)
                assert found.act_offset.item() == offset
    x = made[True].model.layers[0].self_attn.q_proj
    assert x.act_scale.item() == pytest.approx(made[False].model.layers[0].self_attn.q_proj.act_scale.item())


def test_many_bits_are_the_quantised_weights_alone():
    model, weights = quantized(activation_bits=16), quantize(llama(), RTNConfig(bits=8, group_size=16))
    # Ranges are those of the calibration data, so its own rows are judged.
    ids = data()
    torch.testing.assert_close(logits(model, ids), logits(weights, ids), atol=2e-4, rtol=0)
    no_inputs = quantized(activation_bits=None)
    assert torch.equal(logits(no_inputs, ids), logits(weights, ids))
    assert not any(isinstance(layer, ActivationLinear) for layer in quantized_layers(no_inputs).values())


@pytest.mark.parametrize(
    "options", [{}, {"bos_aware": False}, {"activation_range": "symmetric", "activation_bits": 6}]
)
def test_saving_and_loading_is_bit_equal_twice(options, tmp_path):
    model = quantized(**options)
    want, other = logits(model), logits(model, OTHER)
    for i in "12":
        model.save_pretrained(tmp_path / i)
        model, info = AutoModelForCausalLM.from_pretrained(tmp_path / i, output_loading_info=True)
        assert not any(info.values()), info
        assert torch.equal(logits(model), want) and torch.equal(logits(model, OTHER), other)
    hfext.quantization.check_folder(tmp_path / "2")
    copied = copy.deepcopy(model)
    watch = {id(m.first_tokens) for m in quantized_layers(copied).values() if m.protected}
    assert watch.isdisjoint({id(m.first_tokens) for m in quantized_layers(model).values()})
    assert torch.equal(logits(copied), want)


def test_from_pretrained_equals_quantize_and_interrupted_runs_go_on(tmp_path, monkeypatch):
    llama().save_pretrained(tmp_path / "plain")
    want = logits(quantized(bits=3))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=config(bits=3))
    assert torch.equal(logits(loaded), want)
    whole, calls = BOSAwareConfig.quantize_block, []

    def failing(self, block):
        calls.append(block.index)
        if len(calls) == 2:
            raise KeyboardInterrupt
        whole(self, block)

    monkeypatch.setattr(BOSAwareConfig, "quantize_block", failing)
    options = dict(bits=3, resume_from=str(tmp_path / "run"))
    with pytest.raises(KeyboardInterrupt):
        quantized(**options)
    assert torch.equal(logits(quantized(**options)), want)
    assert calls == [0, 1, 1]


@pytest.mark.parametrize("kind", ["biases", "opt", "gemma3", "mixtral", "gpt_oss"])
def test_other_models(kind):
    options = {"protected": ["k_proj", "v_proj"]}
    model, want = quantized(MODELS[kind], **options), logits(MODELS[kind]())
    got = logits(model)
    assert ((got - want).norm(dim=-1) / want.norm(dim=-1)).median() <= 0.1
    names = [name for name, layer in quantized_layers(model).items() if layer.protected]
    assert len(names) == 4
    first, plain = outputs(model, IDS, PROTECTED[:2]), outputs(MODELS[kind](), IDS, PROTECTED[:2])
    for name in names:
        torch.testing.assert_close(first[name][:, 0], plain[name][:, 0], atol=1e-5, rtol=1e-4)
    settings = dict(max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert torch.equal(model.generate(IDS, **settings), model.generate(IDS, use_cache=False, **settings))


def test_half_precision_keeps_ranges():
    plain = llama().to(torch.bfloat16)
    model = quantize(copy.deepcopy(plain), config())
    want = outputs(plain, IDS, PROTECTED)
    for name, out in outputs(model, IDS, PROTECTED).items():
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out[:, 0], want[name][:, 0], atol=1e-2, rtol=1e-2)
        layer = model.get_submodule(name)
        assert layer.act_scale.dtype == torch.float32
    before = logits(model)
    assert torch.equal(logits(model.to(torch.float32).to(torch.bfloat16)), before)


def test_gradients_and_adapters_compute_the_first_token():
    model = quantized()
    stored = {id(m): m.bos_out.clone() for m in quantized_layers(model).values() if m.protected}
    for m in quantized_layers(model).values():
        if m.protected:
            m.bos_out.fill_(torch.nan)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    )
    loss = adapted(IDS, labels=IDS).loss
    loss.backward()
    grads = [p.grad for p in adapted.parameters() if p.requires_grad]
    assert loss.isfinite() and all(g.isfinite().all() and g.abs().sum() > 0 for g in grads)
    assert logits(adapted).isfinite().all()
    assert stored


def test_calibrated_quantisers_inside_share_the_data():
    inner = GPTQConfig(bits=3, group_size=16, dataset=data(), sequence_length=40)
    made = BOSAwareConfig(quantizer=inner)
    assert made.dataset is inner.dataset and made.sequence_length == 40 and made.bits == 3
    model = quantize(llama(), made)
    weights = quantize(llama(), inner)
    first = "model.layers.0.self_attn.q_proj"
    assert torch.equal(model.get_submodule(first).codes, weights.get_submodule(first).codes)
    written = json.loads(json.dumps(made.to_dict()))
    again = BOSAwareConfig.from_dict(written)
    assert again.to_dict() == made.to_dict() and type(again.quantizer) is GPTQConfig
    assert "dataset" not in json.dumps(written)
    assert "tensor" not in repr(made)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"activation_bits is 1 but must be in \[2, 16\]"):
        BOSAwareConfig(activation_bits=1)
    with pytest.raises(ValueError, match="bits belongs to the config inside"):
        BOSAwareConfig(bits=3)
    with pytest.raises(NotImplementedError, match="layers are of their own kind"):
        BOSAwareConfig(quantizer=SketchTuneConfig())
    with pytest.raises(NotImplementedError, match="layers are of their own kind"):
        BOSAwareConfig(quantizer=BOSAwareConfig())
    with pytest.raises(ValueError, match="names no first token"):
        quantized(lambda: llama(bos_token_id=None))
    with pytest.raises(ValueError, match=r"bos_token_id is 500 but must be in \[0, 127\]"):
        quantized(bos_token_id=500)
    assert quantized(lambda: llama(bos_token_id=None), bos_aware=False)
    with pytest.raises(NotImplementedError, match="does not get whole rows"):
        quantized(MODELS["mixtral"], protected=[r".*down_proj_of_expert\.e\d+"])


@pytest.mark.slow
@pytest.mark.real_model
def test_the_first_token_of_a_real_model_no_longer_widens_the_range():
    """SmolLM2: steps without the first token are smaller where it stands out, and its stored outputs are the plain
    model's."""
    smollm2 = pytest.importorskip("hfext.experiments._smollm2")
    model, tokenizer = smollm2.load()
    text = "The river runs from the hills to the sea, and along it stand three old mills that nobody uses any more. "
    ids = torch.tensor([[model.config.bos_token_id, *tokenizer(text * 3)["input_ids"][:63]]])
    want = outputs(model, ids[:, :1], PROTECTED)
    steps = {}
    for aware in (False, True):
        made = BOSAwareConfig(quantizer=RTNConfig(bits=8), dataset=ids, bos_aware=aware)
        found = quantize(smollm2.load()[0], made)
        steps[aware] = {n: layer.act_scale.item() for n, layer in quantized_layers(found).items() if "down" in n}
    assert all(steps[True][f"model.layers.{i}.mlp.down_proj"] < 0.5 * steps[False][f"model.layers.{i}.mlp.down_proj"]
               for i in (11, 28, 29))  # fmt: skip
    for name, out in outputs(found, ids, PROTECTED).items():
        assert torch.equal(out[:, 0], want[name][:, 0])
