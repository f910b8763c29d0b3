"""GR-KAN: what it begins as, its initialisation, MLPs of models, and what is saved, resumed and refused."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTModel,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from hfext.modules._rational_fit import DENOMINATORS, FUNCTIONS, NAMES, coefficients, second_moment
from hfext.modules._replace_mlp import replace_mlp
from hfext.modules.flashkat import GRKAN, METHOD, GroupRational, ScaledLinear, restore


def ids(n=2, length=10):
    return torch.randint(3, 128, (n, length), generator=torch.Generator().manual_seed(0))


def rational(x, a, b, form):
    """Straight from the paper, in the dtype of x."""
    p = sum(c * x**i for i, c in enumerate(a))
    terms = [c * x**j for j, c in enumerate(b, 1)]
    return p / (1 + (sum(t.abs() for t in terms) if form == "abs_terms" else sum(terms).abs()))


# functions


@pytest.mark.parametrize("form", DENOMINATORS)
@pytest.mark.parametrize(
    "name, error", [("swish", 2e-6), ("sigmoid", 1e-8), ("tanh", 2e-6), ("gelu", 1.6e-3), ("relu", 1.5e-2)]
)
def test_fits_on_the_interval_of_the_paper(name, error, form):
    x = torch.linspace(-3, 3, 1501, dtype=torch.float64)
    a, b = coefficients(name, form)
    error = 1.4e-4 if (name, form) == ("swish", "abs_sum") else error  # the published set was fitted for abs_terms
    assert (rational(x, a, b, form) - FUNCTIONS[name](x)).abs().max() < error


def test_other_orders_are_fitted():
    x = torch.linspace(-3, 3, 301, dtype=torch.float64)
    errors = [
        (rational(x, *coefficients("swish", "abs_terms", m, 4), "abs_terms") - F.silu(x)).abs().max() for m in (3, 5)
    ]
    assert errors[1] < errors[0] < 0.05


def test_gains_are_those_of_the_activations():
    for name, constant in (("identity", 1.0), ("gelu", 2.351716), ("swish", 2.810761)):
        gain = GroupRational(8, init=name).gain()
        assert gain == pytest.approx(constant, rel=2e-3 if name == "gelu" else 1e-5)
    assert 1 / second_moment(F.gelu) == pytest.approx(2.351716, rel=1e-6)


def test_identity_is_exact_and_swish_makes_a_silu_mlp():
    torch.manual_seed(0)
    block = GRKAN(16, 32)
    x = torch.randn(64, 16)
    h = block.fc1(x)
    keep = (h.abs() <= 3).all(-1)
    want = block.fc2(F.silu(h))
    assert torch.equal(block.act1(x), x) and keep.any()
    torch.testing.assert_close(block(x)[keep], want[keep], rtol=2e-6, atol=4e-6)


def test_one_group_is_one_rational_and_gradients_are_those_of_the_formula():
    act = GroupRational(12, groups=3, share_numerator=False, dtype=torch.float64)
    with torch.no_grad():
        for p in act.parameters():
            p.add_(torch.randn_like(p) / 4)
    x = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    y = act(x)
    leaves = [p.detach().clone().requires_grad_() for p in act.parameters()]
    z = x.detach().clone().requires_grad_()
    want = torch.cat([rational(z[:, 4 * i : 4 * i + 4], leaves[0][i], leaves[1][i], "abs_terms") for i in range(3)], 1)
    torch.testing.assert_close(y, want)
    ours = torch.autograd.grad(y.sin().sum(), [x, *act.parameters()])
    for one, two in zip(ours, torch.autograd.grad(want.sin().sum(), [z, *leaves]), strict=True):
        torch.testing.assert_close(one, two)


# initialisation


def test_variance_is_preserved_and_the_reference_is_not():
    torch.manual_seed(0)
    x = torch.randn(2048, 256)
    block = GRKAN(256, 1024, 256)
    h = block.fc1(block.act1(x))
    assert h.var().item() == pytest.approx(1, rel=0.03) and block(x).var().item() == pytest.approx(1, rel=0.05)
    small = GRKAN(256, 1024, 256, init="reference")
    assert small.fc1.weight.std().item() == pytest.approx(0.02, rel=0.01)
    assert small(x).var() < 0.1


class Holder(PreTrainedModel):
    config_class = LlamaConfig

    def __init__(self, config):
        super().__init__(config)
        self.first = nn.Linear(config.hidden_size, config.hidden_size)
        self.block = GRKAN(config.hidden_size, 2 * config.hidden_size)
        self.post_init()

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, (GroupRational, ScaledLinear)):
            module.reset_parameters(missing_only=True)


def test_initialisation_survives_post_init_and_loading(tmp_path):
    config = LlamaConfig(hidden_size=64)
    torch.manual_seed(0)
    model = Holder(config)
    assert model.first.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for again in (False, True):
        if again:
            model.init_weights()
            model.apply(model._init_weights)
        assert model.block.fc1.weight.std().item() == pytest.approx(64**-0.5, rel=0.05)
        assert model.block.fc2.weight.std().item() == pytest.approx((2.81076 / 128) ** 0.5, rel=0.05)
    state = model.state_dict()
    model.save_pretrained(tmp_path / "whole")
    loaded = Holder.from_pretrained(tmp_path / "whole")
    assert all(torch.equal(v, state[k]) for k, v in loaded.state_dict().items())
    # A checkpoint that lacks parts of the block: what is there is kept, the rest gets its own initialisation.
    part = {k: v for k, v in state.items() if k.startswith("first") or k == "block.fc1.weight"}
    model.save_pretrained(tmp_path / "part", state_dict=part)
    partly = Holder.from_pretrained(tmp_path / "part")
    assert torch.equal(partly.block.fc1.weight, state["block.fc1.weight"])
    assert partly.block.fc2.weight.std().item() == pytest.approx((2.81076 / 128) ** 0.5, rel=0.05)
    assert torch.equal(partly.block.act2.numerator_bias, model.block.act2.numerator_bias)


# models


def vit():
    return ViTModel(
        ViTConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=8,
            patch_size=4,
        )
    ).eval(), torch.randn(2, 3, 8, 8)


def bert():
    config = BertConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    return BertModel(config).eval(), ids()


def phi3():
    config = Phi3Config(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    return Phi3ForCausalLM(config).eval(), ids()


@pytest.mark.parametrize("name", ["llama", "gpt2", "vit", "bert", "phi3"])
def test_mlps_of_models_keep_their_weights_and_what_they_compute(name, tiny_llama, tiny_gpt2):
    make = {"llama": lambda: (tiny_llama(), ids()), "gpt2": lambda: (tiny_gpt2(), ids())}
    model, x = (make | {"vit": vit, "bert": bert, "phi3": phi3})[name]()
    before, want = dict(model.named_parameters()), model(x)[0]
    done = replace_mlp(model, GRKAN(groups=4))
    after = dict(model.named_parameters())
    assert len(done.modules) == 2 and all(after[k] is p for k, p in before.items())
    new = [k.split(".")[-1] for k in after.keys() - before.keys()]
    assert sorted(new) == ["denominator_bias"] * 4 + ["numerator_bias"] * 4
    close = 2e-5 if name in ("llama", "phi3") else 5e-3  # SiLU to 1e-6, GELU to 1.5e-3
    assert (model(x)[0] - want).abs().max() < close * want.abs().max()
    model(x)[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for k, p in after.items() if k.endswith("tor_bias"))
    done.undo()
    assert torch.equal(model(x)[0], want) and set(dict(model.named_parameters())) == set(before)
    done.undo()


def test_which_mlps_and_what_it_begins_as(tiny_llama):
    model = tiny_llama()
    replace_mlp(model, GRKAN(activation="gelu", denominator="abs_sum"), target_modules=["layers.1.mlp"])
    assert not isinstance(model.model.layers[0].mlp, GRKAN)
    mlp = model.model.layers[1].mlp
    assert isinstance(mlp.act_fn, GroupRational) and mlp.act_fn.init == "gelu" and mlp.act1.init == "identity"
    other = tiny_llama()
    with replace_mlp(other, GRKAN(), exclude_modules=r".*layers\.0\..*") as done:
        assert list(done.modules) == ["model.layers.1.mlp"]
    assert not any(isinstance(m, GRKAN) for m in other.modules()) and "hfext_gr_kan" not in vars(other.config)


def test_dropout_stands_behind_both_activations():
    block = GRKAN(8, 16, groups=2, dropout=0.5)
    x = torch.ones(400, 8)
    assert torch.equal(block.eval()(x), block(x))
    dropped = block.train().act1(x)
    assert set(dropped.unique().tolist()) == {0.0, 2.0}
    assert (block.act2(torch.ones(400, 16)) == 0).float().mean().item() == pytest.approx(0.5, abs=0.05)


def test_saved_and_restored(tmp_path, tiny_llama):
    model = tiny_llama()
    replace_mlp(model, GRKAN(groups=4, denominator="abs_sum"))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("tor_bias"):
                p.add_(torch.randn_like(p) * 0.1)
    want = model(ids()).logits
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not torch.allclose(loaded(ids()).logits, want)
    restore(loaded, tmp_path)
    assert torch.equal(loaded(ids()).logits, want)
    twin = copy.deepcopy(loaded)
    assert torch.equal(twin(ids()).logits, want)
    with pytest.raises(ValueError, match="has no hfext_gr_kan"):
        restore(tiny_llama(), tmp_path)


SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
SAVED = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SMALL, vocab_size=128)),
    "gpt2": (GPT2LMHeadModel, GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=2, n_positions=32)),
    "vit": (ViTForImageClassification, ViTConfig(**SMALL, image_size=8, patch_size=4)),
    "bert": (BertForSequenceClassification, BertConfig(**SMALL, vocab_size=128)),
}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("kind", SAVED)
def test_every_architecture_is_restored_under_the_names_it_is_saved_by(tmp_path, kind, shards):
    made, config = SAVED[kind]
    model = made(copy.deepcopy(config)).eval()
    replace_mlp(model, GRKAN(groups=4))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("tor_bias"):
                p.add_(torch.randn_like(p) * 0.1)
    x = torch.randn(2, 3, 8, 8) if kind == "vit" else ids()
    want = model(x).logits
    model.save_pretrained(tmp_path, **({} if shards == 1 else {"max_shard_size": "20KB"}))
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == 1 if shards == 1 else len(files) > 2
    loaded = made.from_pretrained(tmp_path)
    restore(loaded, tmp_path)
    assert torch.equal(loaded(x).logits, want)
    # What came from a checkpoint is saved as it came, and comes back again.
    loaded.save_pretrained(tmp_path / "again")
    again = made.from_pretrained(tmp_path / "again")
    restore(again, tmp_path / "again")
    assert torch.equal(again(x).logits, want)


def test_coefficients_that_are_missing_are_named(tmp_path):
    made, config = SAVED["vit"]
    model = made(copy.deepcopy(config))
    model.save_pretrained(tmp_path / "plain")
    replace_mlp(model, GRKAN(groups=4))
    model.save_pretrained(tmp_path / "kan")
    loaded = made.from_pretrained(tmp_path / "kan")
    saved = r"vit.layers.0.mlp.\w+.\w+, saved as vit.encoder.layer.0.mlp.\w+.\w+ \(8 of 8 tensors"
    for _ in range(2):
        with pytest.raises(FileNotFoundError, match=f"has no coefficients for {saved}"):
            restore(loaded, tmp_path / "plain")
        assert not any(isinstance(m, GRKAN) for m in loaded.modules())
    restore(loaded, tmp_path / "kan")


def arguments(folder, **more):
    return TrainingArguments(
        str(folder),
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=0,
        **more,
    )


def test_trainer_gives_no_weight_decay_and_resumes(tmp_path, tiny_llama):
    data = [{"input_ids": row, "labels": row} for row in ids(8)]

    def trainer(**more):
        model = tiny_llama()
        replace_mlp(model, GRKAN(groups=4))
        return Trainer(model, arguments(tmp_path, weight_decay=0.1, **more), train_dataset=data)

    straight = trainer(max_steps=4, save_steps=2)
    decayed = straight.get_decay_parameter_names(straight.model)
    assert not any(name.endswith("tor_bias") for name in decayed)
    assert any(name.endswith("gate_proj.weight") for name in decayed)
    straight.train()
    resumed = trainer(max_steps=4, save_strategy="no")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    moved = straight.model.model.layers[0].mlp.act1.denominator_bias
    assert moved.abs().sum() > 0
    for p, q in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_bf16_and_autocast(tiny_llama):
    model = tiny_llama().to(torch.bfloat16)
    want = model(ids()).logits
    replace_mlp(model, GRKAN(groups=4))
    assert model.model.layers[0].mlp.act1.numerator_bias.dtype == torch.float32
    out = model(ids(), labels=ids())
    assert out.logits.dtype == torch.bfloat16 and (out.logits - want).abs().max() < 0.02 * want.abs().max() + 0.02
    out.loss.backward()
    assert model.model.layers[0].mlp.act1.numerator_bias.grad.dtype == torch.float32
    model.to(torch.bfloat16)(ids())
    full = tiny_llama()
    replace_mlp(full, GRKAN(groups=4))
    with torch.autocast("cpu", torch.bfloat16):
        full(ids(), labels=ids()).loss.backward()


@pytest.mark.parametrize("adapters_first", [True, False])
def test_beside_adapters(adapters_first, tmp_path, tiny_llama):
    lora = LoraConfig(r=2, target_modules=["up_proj", "q_proj"], modules_to_save=None, init_lora_weights=False)
    model = tiny_llama()
    if adapters_first:
        model = get_peft_model(model, lora)
        replace_mlp(model, GRKAN(groups=4))
    else:
        replace_mlp(model, GRKAN(groups=4))
        lora.modules_to_save = ["act1"]
        model = get_peft_model(model, lora)
    mlp = model.base_model.model.model.layers[0].mlp
    assert isinstance(mlp, GRKAN) and "lora_A" in mlp.up_proj._modules
    model.eval()
    before = model(ids()).logits
    model.train()
    model(ids(), labels=ids()).loss.backward()
    trained = {n for n, p in model.named_parameters() if p.grad is not None and n.endswith("tor_bias")}
    assert len(trained) == (8 if adapters_first else 4)
    model.eval()
    if not adapters_first:
        with torch.no_grad():
            mlp.act1.modules_to_save["default"].denominator_bias.add_(0.3)
        before = model(ids()).logits
        model.save_pretrained(tmp_path)
        base = tiny_llama()
        replace_mlp(base, GRKAN(groups=4))
        model = PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(model(ids()).logits, before)


def test_undo_keeps_adapters_that_came_later(tiny_llama):
    model = tiny_llama()
    done = replace_mlp(model, GRKAN(groups=4))
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False)).eval()
    want = wrapped(ids()).logits
    done.undo()
    torch.testing.assert_close(wrapped(ids()).logits, want, rtol=1e-4, atol=1e-4)
    assert "lora_A" in model.model.layers[0].mlp.up_proj._modules


def test_gradient_checkpointing_and_compile(tiny_llama):
    model = tiny_llama()
    replace_mlp(model, GRKAN(groups=4))
    model.train()
    model(ids(), labels=ids()).loss.backward()
    want = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(ids(), labels=ids()).loss.backward()
    assert all(torch.equal(p.grad, want[n]) for n, p in model.named_parameters())
    block = GRKAN(16, 32)
    x = torch.randn(4, 16)
    torch.testing.assert_close(torch.compile(block, fullgraph=True, backend="aot_eager")(x), block(x))


# refusals


def test_bad_options_are_named():
    for options, match in (
        (dict(groups=0), "groups is 0"),
        (dict(denominator="signed"), "denominator is 'signed' but must be one of abs_terms, abs_sum"),
        (dict(orders=(9, 4)), r"orders\[0\] is 9"),
        (dict(orders=(5, 7)), r"orders\[1\] is 7"),
        (dict(activation="selu"), "activation is 'selu'"),
        (dict(dropout=1.0), "dropout is 1"),
        (dict(init="kaiming"), "init is 'kaiming'"),
    ):
        with pytest.raises(ValueError, match=match):
            GRKAN(**options)
    with pytest.raises(ValueError, match="channels is 10, which groups=8 does not divide"):
        GroupRational(10)
    with pytest.raises(ValueError, match="init is 'mish'"):
        GroupRational(8, init="mish")


def test_models_that_do_not_fit_are_refused(tiny_llama):
    with pytest.raises(ValueError, match="layers.0.mlp: channels is 32, which groups=5 does not divide"):
        replace_mlp(tiny_llama(), GRKAN(groups=5))
    opt = OPTModel(OPTConfig(vocab_size=64, hidden_size=32, ffn_dim=64, num_hidden_layers=1, num_attention_heads=4))
    with pytest.raises(ValueError, match="no MLP matches. Found: none"):
        replace_mlp(opt, GRKAN())
    with pytest.raises(ValueError, match="give activation=, one of identity"):
        replace_mlp(tiny_llama(hidden_act="mish"), GRKAN(groups=4))
    replace_mlp(tiny_llama(hidden_act="mish"), GRKAN(groups=4, activation="swish"))
    with pytest.raises(RuntimeError, match="GRKAN has no weights"):
        GRKAN()(torch.zeros(2, 8))
    with pytest.raises(TypeError, match="Linear, which is no MLP"):
        GRKAN().from_dense(nn.Linear(8, 8))


def test_the_record_is_complete():
    assert METHOD.name == "flashkat" and set(NAMES) >= {"swish", "identity"} and METHOD.after_load
