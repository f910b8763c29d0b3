"""TokenFormer: the layer and its growth in float64, the model with caches, padding, saving, and what is refused."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, Trainer, TrainingArguments

from hfext.modules import replace
from hfext.modules.tokenformer import METHOD, Pattention, TauWarmup, TokenFormerConfig, TokenFormerForCausalLM, grow


def make(seed=0, **fields):
    fields = (
        dict(
            vocab_size=128,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_qkv_tokens=24,
            num_proj_tokens=16,
            num_ffn_tokens=40,
            max_position_embeddings=128,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
        | fields
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(TokenFormerConfig(**fields)).eval()
    with torch.no_grad():  # so that layers do something
        for module in model.modules():
            if isinstance(module, Pattention):
                module.values.mul_(3)
    return model


def ids(n=2, length=10):
    return torch.randint(3, 128, (n, length), generator=torch.Generator().manual_seed(0))


def layer_by_hand(x, keys, values, tau):
    """One row of input in Python's order of the formula."""
    a = torch.stack([(x * k).sum() for k in keys])
    u = a * tau / a.square().sum().sqrt()
    return sum(0.5 * s * (1 + torch.erf(s / 2**0.5)) * v for s, v in zip(u, values, strict=True))


# the layer


def test_the_layer_by_hand():
    layer = Pattention(5, 3, tokens=7).double()
    x = torch.randn(4, 5, dtype=torch.float64)
    want = torch.stack([layer_by_hand(row, layer.keys, layer.values, 7**0.5) for row in x])
    torch.testing.assert_close(layer(x), want)


def test_new_layers_give_outputs_of_variance_one():
    for mode, near in (("l2_norm_gelu", 0.1), ("gelu_l2_norm", 0.1)):
        out = Pattention(64, 256, tokens=512, mode=mode)(torch.randn(512, 64))
        assert out.var().item() == pytest.approx(1, abs=near)


def test_linear_layers_are_replaced_and_come_back(tiny_llama):
    model = tiny_llama()
    want = model(ids()).logits
    done = replace(model, Pattention(tokens=12), target_modules=["gate_proj", "down_proj"])
    layer = model.model.layers[0].mlp.down_proj
    assert isinstance(layer, Pattention) and layer.keys.shape == (12, 64) and layer.values.shape == (12, 32)
    assert not torch.allclose(model(ids()).logits, want)
    model(ids(), labels=ids()).loss.backward()
    assert layer.keys.grad.abs().sum() > 0
    done.undo()
    assert torch.equal(model(ids()).logits, want)
    with pytest.raises(RuntimeError, match="Pattention has no tokens"):
        Pattention()(torch.zeros(2, 3))


def test_conv1d_layers_are_turned(tiny_gpt2):
    model = tiny_gpt2()
    replace(model, Pattention(tokens=6), target_modules=["c_fc"])
    assert model.transformer.h[0].mlp.c_fc.values.shape == (6, 128)
    model(ids())


def test_dropout_only_while_training():
    layer = Pattention(4, 4, tokens=32, dropout=0.5)
    x = torch.randn(3, 4)
    assert torch.equal(layer.eval()(x), layer(x))
    assert not torch.equal(layer.train()(x), layer(x))


# growth


@pytest.mark.parametrize("mode", ["l2_norm_gelu", "gelu_l2_norm"])
def test_growth_changes_nothing(mode):
    model = make(mode=mode).double()
    before = model(ids()).logits
    sizes = grow(model, 9)
    assert set(sizes.values()) == {33, 25, 49}
    assert (model(ids()).logits - before).abs().max() < 1e-13
    again = grow(model, {"mlp": 5, "o_proj": 1})
    assert set(again.values()) == {33, 26, 54} and (model(ids()).logits - before).abs().max() < 1e-13
    assert (model.config.num_qkv_tokens, model.config.num_proj_tokens, model.config.num_ffn_tokens) == (33, 26, 54)
    assert model.model.layers[0].mlp.tau.item() == pytest.approx(40**0.5)


def test_the_authors_growth_changes_the_function():
    layer = Pattention(8, 8, tokens=16).double()
    x = torch.randn(5, 8, dtype=torch.float64)
    before = layer(x)
    random, scaled = copy.deepcopy(layer), copy.deepcopy(layer)
    grow(random, 16, key_init="normal")
    grow(scaled, 16, keep_tau=False)
    assert scaled.tau.item() == pytest.approx(32**0.5) and random.tau.item() == 4.0
    assert not torch.allclose(random(x), before, rtol=1e-2) and not torch.allclose(scaled(x), before, rtol=1e-2)
    want = torch.stack([layer_by_hand(row, scaled.keys, scaled.values, 32**0.5) for row in x])
    torch.testing.assert_close(scaled(x), want)


def test_new_tokens_learn():
    model = make()
    grow(model, 8)
    model(ids(), labels=ids()).loss.backward()
    layer = model.model.layers[0].mlp
    assert (layer.keys.grad[-8:].norm(dim=1) > 0).all() and not layer.values.grad[-8:].any()


def test_the_optimizer_keeps_what_it_knew():
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step():
        optimizer.zero_grad()
        model(ids(), labels=ids()).loss.backward()
        optimizer.step()

    step()
    layer = model.model.layers[1].self_attn.q_proj
    parameter, kept = layer.keys, {k: v.clone() for k, v in optimizer.state[layer.keys].items()}
    grow(model, 8, optimizer=optimizer)
    state = optimizer.state[layer.keys]
    assert layer.keys is parameter and layer.keys.grad is None
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(state[name][:24], kept[name]) and not state[name][24:].any() and len(state[name]) == 32
    assert state["step"] == kept["step"]
    step()
    assert (layer.keys[24:].norm(dim=1) > 0).all()
    factored = torch.optim.Adafactor(model.parameters())
    model(ids(), labels=ids()).loss.backward()
    factored.step()
    before = {n: p.shape for n, p in model.named_parameters()}
    with pytest.raises(NotImplementedError, match="growth of Adafactor is not known"):
        grow(model, 8, optimizer=factored)
    assert before == {n: p.shape for n, p in model.named_parameters()}


def test_tau_moves_evenly_and_only_up_to_its_step(tmp_path):
    model = make()
    grow(model, 24)
    layer, seen = model.model.layers[0].self_attn.q_proj, []
    layer.register_forward_hook(lambda module, args, out: seen.append(module.tau.item()))
    data = [{"input_ids": row, "labels": row} for row in ids(6)]
    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=1, max_steps=6, report_to="none", use_cpu=True, disable_tqdm=True,
        dataloader_pin_memory=False, save_strategy="no",
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=data, callbacks=[TauWarmup(4)]).train()
    start, end = 24**0.5, 48**0.5
    want = [start + (end - start) * min(1, i / 4) for i in range(1, 7)]
    assert seen == pytest.approx(want, rel=1e-6)
    with pytest.raises(ValueError, match="steps is 0"):
        TauWarmup(0)


def test_bad_growth_is_refused():
    model = make()
    with pytest.raises(ValueError, match="both zeros"):
        grow(model, 8, value_init="zeros")
    with pytest.raises(ValueError, match="tokens is -1"):
        grow(model, -1)
    with pytest.raises(ValueError, match="adds none to the 10"):
        grow(model, {"gate": 4})
    with pytest.raises(ValueError, match="Linear has no Pattention layer, so nothing can grow: make a TokenFormer"):
        grow(nn.Linear(3, 3), 4)
    with pytest.raises(ValueError, match=r"would have \[24, 28\] tokens"):
        grow(model, {"q_proj": 4})
    with pytest.raises(ValueError, match="key_init is 'ones'"):
        grow(model, 4, key_init="ones")
    assert model.config.num_qkv_tokens == 24 and model.model.layers[0].self_attn.q_proj.tokens == 24
    layer = Pattention(4, 4, tokens=8, mode="softmax")
    with pytest.raises(NotImplementedError, match="keys of zeros take weight"):
        grow(layer, 4)
    assert grow(layer, 4, key_init="normal") == {"": 12}


# the model


def test_the_model_by_hand():
    """One layer, one head, no rotation: the block written out with the formula of the layer."""
    model = make(num_hidden_layers=1, num_attention_heads=1, rotary_pct=0.0).double()
    x = model.model.embed_tokens(ids(1, 4))[0]
    block = model.model.layers[0]

    def norm(x):
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()

    def run(layer, x):
        return torch.stack([layer_by_hand(row, layer.keys, layer.values, len(layer.keys) ** 0.5) for row in x])

    attn = block.self_attn
    q, k, v = (run(f, norm(x)) for f in (attn.q_proj, attn.k_proj, attn.v_proj))
    scores = (q @ k.t() / 32**0.5).masked_fill(torch.ones(4, 4).triu(1).bool(), float("-inf"))
    h = x + run(attn.o_proj, scores.softmax(-1) @ v)
    h = h + run(block.mlp, norm(h))
    torch.testing.assert_close(model(ids(1, 4)).logits[0], norm(h) @ model.lm_head.weight.t())


def test_positions_are_relative():
    model = make(rotary_pct=0.5)
    shifted = torch.arange(10)[None] + 17
    torch.testing.assert_close(model(ids(), position_ids=shifted).logits, model(ids()).logits, rtol=1e-4, atol=1e-5)
    order = ids().flip(1)
    last = [model(x).logits[:, -1] for x in (ids(), torch.cat([order[:, 1:], ids()[:, -1:]], 1))]
    assert not torch.allclose(*last, atol=1e-3)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_caches_padding_and_implementations_agree(attention):
    model = make()
    model.set_attn_implementation(attention)
    want = make()(ids()).logits
    torch.testing.assert_close(model(ids()).logits, want, rtol=1e-4, atol=1e-5)
    first = model(ids()[:, :6], use_cache=True)
    rest = model(ids()[:, 6:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(rest, want[:, 6:], rtol=1e-4, atol=1e-5)
    padded = F.pad(ids(), (3, 0))
    mask = (padded != 0).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    left = model(padded, attention_mask=mask, position_ids=positions).logits[:, 3:]
    torch.testing.assert_close(left, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_equals_the_plain_loop(cache):
    model = make()
    x = ids()
    mask = torch.ones_like(x)
    found = model.generate(
        x, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, do_sample=False, cache_implementation=cache
    )
    want = x
    for _ in range(6):
        scores = model(want).logits[:, -1].clone()
        scores[:, 2] = float("-inf")
        want = torch.cat([want, scores.argmax(-1, keepdim=True)], 1)
    assert torch.equal(found, want)


def test_saved_and_loaded_after_growth(tmp_path):
    model = make()
    grow(model, 8)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, TokenFormerForCausalLM) and loaded.config.num_ffn_tokens == 48
    assert torch.equal(loaded(ids()).logits, model(ids()).logits)
    assert loaded.model.layers[0].mlp.tau.item() == pytest.approx(40**0.5)
    body = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(body.embed_tokens.weight, model.model.embed_tokens.weight)
    assert AutoConfig.from_pretrained(tmp_path).mode == "l2_norm_gelu"
    low = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert low.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(low.model.layers[0].mlp.tau, model.model.layers[0].mlp.tau)  # float32 still
    assert (low(ids()).logits.float() - model(ids()).logits).abs().max() < 0.1


def test_missing_layers_begin_as_they_should(tmp_path):
    model = make(hidden_size=64)
    state = {k: v for k, v in model.state_dict().items() if ".mlp." not in k}
    model.save_pretrained(tmp_path, state_dict=state)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    layer = loaded.model.layers[0].mlp
    assert layer.tau.item() == pytest.approx(40**0.5)
    assert layer.keys.std().item() == pytest.approx(0.02, rel=0.1)
    assert layer.values.std().item() == pytest.approx(2 / (2 * 8), rel=0.1)
    assert torch.equal(loaded.model.layers[0].self_attn.q_proj.values, model.model.layers[0].self_attn.q_proj.values)


def test_initial_weights():
    torch.manual_seed(0)
    model = TokenFormerForCausalLM(
        TokenFormerConfig(vocab_size=64, hidden_size=64, num_hidden_layers=4, num_attention_heads=4)
    )
    layer = model.model.layers[3].mlp
    assert layer.keys.std().item() == pytest.approx(0.02, rel=0.02)
    assert layer.values.std().item() == pytest.approx(2 / (4 * 8), rel=0.02)
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert [n for n, _ in model.model.layers[0].named_parameters()][0] == "self_attn.q_proj.keys"


def test_gradient_checkpointing_hidden_states_and_trainer(tmp_path):
    model = make().train()
    model(ids(), labels=ids()).loss.backward()
    want = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(ids(), labels=ids()).loss.backward()
    assert all(torch.equal(p.grad, want[n]) for n, p in model.named_parameters())
    model.gradient_checkpointing_disable()
    model.set_attn_implementation("eager")
    out = model.eval()(ids(), output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == 3 and out.attentions[0].shape == (2, 2, 10, 10)
    data = [{"input_ids": row, "labels": row} for row in ids(8)]

    def trainer(**more):
        arguments = TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=2,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
            max_steps=4,
            **more,
        )
        return Trainer(make(), arguments, train_dataset=data)

    straight, resumed = trainer(save_steps=2), trainer(save_strategy="no")
    straight.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for p, q in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_compile_and_adapters():
    layer = Pattention(8, 8, tokens=16)
    x = torch.randn(3, 8)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
    model = get_peft_model(make(), LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
    before = model(input_ids=ids()).logits
    grow(model, 4)
    torch.testing.assert_close(model(input_ids=ids()).logits, before)


@pytest.mark.parametrize(
    "fields, match",
    [
        (dict(hidden_size=30, num_attention_heads=4), "hidden_size is 30"),
        (dict(mode="relu"), "mode is 'relu'"),
        (dict(hidden_size=24, num_attention_heads=2, rotary_pct=0.25), "turn an even part of heads of 12"),
    ],
)
def test_bad_configs_are_named(fields, match):
    with pytest.raises(Exception, match=match):
        TokenFormerConfig(**fields)


def test_bad_layers_are_named():
    for options, match in (
        (dict(tokens=0), "tokens is 0"),
        (dict(mode="x"), "mode is 'x'"),
        (dict(dropout=1.0), "dropout is 1"),
    ):
        with pytest.raises(ValueError, match=match):
            Pattention(**options)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        make()()
    assert METHOD.name == "tokenformer"
