"""Spark FFN: the formula, its sparsity, MLPs of models, what is saved and restored, and what is refused."""

import copy

import pytest
import torch
import transformers as tf
from attention_cases import TEXT, causal
from torch.nn import functional as F

from hfext.modules.spark_ffn import KEY, METHOD, SparkFFN, active_moment, replace_ffn, restore


def ids(n=2, length=10):
    return torch.randint(3, 96, (n, length), generator=torch.Generator().manual_seed(0))


def by_hand(layer, x):
    r = layer.predictor.shape[1]
    a = x[..., :r] @ layer.predictor.T
    level = torch.special.ndtri(torch.tensor(1 - layer.k / a.shape[-1], dtype=torch.float64)).to(a.dtype)
    a = (a - a.mean(-1, keepdim=True) - a.std(-1, keepdim=True) * level).relu()
    return (F.gelu(a) * (x[..., r:] @ layer.gate.T)) @ layer.value


def test_the_formula_with_and_without_gradients():
    layer = SparkFFN(32, 256).double()
    for shape in ((32,), (3, 32), (2, 9, 32)):
        x = torch.randn(shape, dtype=torch.float64)
        want = by_hand(layer, x)
        assert (layer(x) - want).abs().max() <= 1e-12
        with torch.no_grad():
            assert (layer(x) - want).abs().max() <= 1e-12
    assert layer.k == 20 and sum(p.numel() for p in layer.parameters()) == 2 * 32 * 256


def test_all_units_are_a_plain_product_of_two_maps():
    layer, x = SparkFFN(16, 24, density=1.0, r=6), torch.randn(5, 16)
    want = (F.gelu(x[:, :6] @ layer.predictor.T) * (x[:, 6:] @ layer.gate.T)) @ layer.value
    assert (layer(x) - want).abs().max() <= 1e-6
    assert torch.equal(layer.active(x), torch.full((5,), 24))


def test_the_threshold_is_that_of_gemma_3n():
    from hfext_spark import statistical_topk
    from transformers.models.gemma3n.modeling_gemma3n import Gemma3nTextMLP

    config = tf.Gemma3nTextConfig(
        hidden_size=16, intermediate_size=[400], num_hidden_layers=1, layer_types=["full_attention"],
        activation_sparsity_pattern=[0.95], num_kv_shared_layers=0,
    )  # fmt: skip
    mlp, x = Gemma3nTextMLP(config, layer_idx=0), torch.randn(3, 400)
    assert (mlp._gaussian_topk(x) - statistical_topk(x, 20, unbiased=False)).abs().max() <= 2e-6


def test_density_and_the_scale_of_what_comes_out():
    for density in (0.05, 0.08, 0.2):
        layer, x = SparkFFN(256, 1024, density=density), torch.randn(200, 256)
        with torch.no_grad():
            assert layer.active(x).float().mean() / 1024 == pytest.approx(density, rel=0.1)
            assert layer(x).var() == pytest.approx(1.0, rel=0.25)
    assert active_moment(1.0) == pytest.approx(0.4252, abs=1e-3)  # E[gelu(z)^2]


def test_units_that_are_not_active_have_no_gradient():
    layer, x = SparkFFN(16, 100), torch.randn(1, 16)
    layer(x).square().sum().backward()
    idle = layer.gate.grad.abs().sum(-1) == 0
    assert idle.sum() == 100 - layer.active(x).item()
    assert layer.value.grad[idle].abs().max() == 0
    assert layer.predictor.grad[idle].abs().max() > 0  # through mean and deviation


def test_bf16_is_near():
    layer, x = SparkFFN(64, 512), torch.randn(4, 64)
    low = copy.deepcopy(layer).bfloat16()
    with torch.no_grad():
        want = layer(x)
        for y in (low(x.bfloat16()), low(x.bfloat16().expand(3, 4, 64))[0]):
            assert y.dtype == torch.bfloat16 and (y.float() - want).abs().mean() < 0.05
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["Llama", "GPT2", "GPTNeoX", "Phi3", "Arcee"])
def test_it_stands_in_for_mlps_with_as_many_parameters(name):
    model = causal(name, "eager")
    before = model(ids()).logits
    state = {n: t.clone() for n, t in model.state_dict().items()}

    def size(m):
        return sum(p.numel() for n, p in m.named_parameters() if "bias" not in n)

    whole = size(model)
    done = replace_ffn(model, SparkFFN(density=0.1))
    assert len(done.modules) == 2 and size(model) == whole
    assert (model(ids()).logits - before).abs().max() > 1e-4
    done.undo()
    assert torch.equal(model(ids()).logits, before) and KEY not in vars(model.config)
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in state.items())


def test_sizes_of_gated_and_plain_mlps():
    assert [len(f.value) for f in replace_ffn(causal("Llama", "eager"), SparkFFN()).modules.values()] == [72, 72]
    assert [len(f.value) for f in replace_ffn(causal("Phi3", "eager"), SparkFFN()).modules.values()] == [72, 72]
    assert [len(f.value) for f in replace_ffn(causal("GPT2", "eager"), SparkFFN()).modules.values()] == [128, 128]


def test_generation_is_that_of_whole_sequences():
    model = causal("Llama", "eager")
    replace_ffn(model, SparkFFN())
    kw = dict(max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0, output_logits=True)
    out = model.generate(ids(1), return_dict_in_generate=True, **kw)  # one token at a time: the sparse path
    with torch.enable_grad():
        whole = model(out.sequences).logits[:, 9:-1]
    assert (torch.stack(out.logits, 1) - whole).abs().max() <= 1e-5


def test_training_with_checkpointing_and_saving(tmp_path):
    model = causal("Llama", "eager").train()
    replace_ffn(model, SparkFFN(density=0.1, r=10), ["layers.1.mlp"])
    model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = model(ids(), labels=ids(), use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    model.eval()
    model.save_pretrained(tmp_path)
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    done = restore(again, tmp_path)
    assert list(done.modules) == ["model.layers.1.mlp"]
    with torch.no_grad():
        assert torch.equal(again(ids()).logits, model(ids()).logits)
    with pytest.raises(ValueError, match="no hfext_spark_ffn"):
        restore(causal("Llama", "eager"), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no weights for model.layers.1.mlp"):
        restore(tf.LlamaForCausalLM(again.config), tmp_path)


def test_every_option_is_saved(tmp_path):
    model = causal("Llama", "eager")
    options = dict(density=0.2, r=10, unbiased=False)
    replace_ffn(model, SparkFFN(**options))
    model.save_pretrained(tmp_path)
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    layers = restore(again, tmp_path).modules.values()
    assert all(vars(layer.config) == options and layer.unbiased is False for layer in layers)
    with torch.no_grad():
        assert torch.equal(again(ids()).logits, model(ids()).logits)


@pytest.mark.parametrize("size", ["1GB", "20KB"])
def test_a_vit_is_restored_under_the_names_it_is_saved_by(tmp_path, size):
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    model = tf.ViTForImageClassification(tf.ViTConfig(**sizes, image_size=8, patch_size=4)).eval()
    replace_ffn(model, SparkFFN(density=0.2))
    model.save_pretrained(tmp_path, max_shard_size=size)
    loaded = tf.ViTForImageClassification.from_pretrained(tmp_path)
    restore(loaded, tmp_path)
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(loaded(x).logits, model(x).logits)


def test_bad_input():
    for call, error, match in (
        (lambda: SparkFFN(density=0.0), ValueError, r"density is 0.0 but must be in \(0, 1\]"),
        (lambda: SparkFFN(density=1.5), ValueError, "density is 1.5"),
        (lambda: SparkFFN(r=0), ValueError, "r is 0"),
        (lambda: SparkFFN(16, r=16), ValueError, r"r is 16 but must be in \[1, 15\]"),
        (lambda: SparkFFN()(torch.randn(2, 4)), RuntimeError, "no weights"),
        (lambda: replace_ffn(torch.nn.Linear(2, 2), SparkFFN()), ValueError, "no MLP matches"),
        (lambda: replace_ffn(causal("Llama", "eager"), SparkFFN(8)), TypeError, "options alone"),
        (
            lambda: replace_ffn(causal("Llama", "eager"), SparkFFN(), "attention"),
            ValueError,
            "Found: model.layers.0.mlp",
        ),
        (lambda: SparkFFN().from_dense(torch.nn.Linear(2, 2), "x"), TypeError, "x is a Linear"),
        (lambda: SparkFFN(8)(torch.randn(2, 8).long()), TypeError, "must share one of"),
    ):
        with pytest.raises(error, match=match):
            call()


def test_the_record():
    assert METHOD.name == "spark_ffn" and TEXT["intermediate_size"] * 3 // 2 == 72
