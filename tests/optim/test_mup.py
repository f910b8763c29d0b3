"""muP: shapes, factors, the forward pass, training that is stock's at the base width, and its slopes over width."""

import copy
import json
import math

import pytest
import torch
from optim_training import flat
from torch import nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from hfext.experiments import coordinate_check
from hfext.optim import mup
from hfext.optim.mup import InfShape


class Net(nn.Module):
    def __init__(self, width, seed=0, outputs=5):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.input, self.hidden, self.output = (
                nn.Linear(7, width),
                nn.Linear(width, width),
                nn.Linear(width, outputs),
            )

    def forward(self, x):
        return self.output(self.hidden(self.input(x).relu()).relu())


def llama_config(width, tied=False, head=8, **fields):
    return LlamaConfig(
        vocab_size=128, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=1,
        num_attention_heads=width // head, num_key_value_heads=width // head, max_position_embeddings=64,
        tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2, pad_token_id=0, **fields,
    )  # fmt: skip


def gpt2_config(width, tied=True, heads=4):
    return GPT2Config(
        vocab_size=128, n_embd=width, n_layer=1, n_head=heads, n_positions=64, tie_word_embeddings=tied,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip


IDS = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("shape", "adam", "sgd", "fixed", "fan_in"),
    [
        (InfShape(), 1, 1, 1, 1),
        (InfShape(1, 1.0, 4.0), 1, 4, 1, 1),
        (InfShape(2, 4.0, 4.0), 1 / 4, 1, 1 / 2, 1),
        (InfShape(2, 4.0, 9.0), 1 / 4, 9 / 4, 1 / 2, 1),
        (InfShape(1, 4.0, 1.0), 1 / 4, 1 / 4, 1 / 4, 1 / 2),
        (InfShape(1, 4.0, 1.0, 1 / 4), 1, 4, 1, 2),
    ],
)
def test_the_table_of_factors(shape, adam, sgd, fixed, fan_in):
    assert mup.lr_factor(shape, "adam") == adam
    assert mup.lr_factor(shape, "sgd") == mup.perturbation_factor(shape) == sgd
    assert mup.init_factor(shape, "fixed") == pytest.approx(fixed)
    assert mup.init_factor(shape, "fan_in") == pytest.approx(fan_in)


def test_shapes_of_a_llama_and_a_gpt2_tied_and_untied():
    untied = LlamaForCausalLM(llama_config(32))
    shapes = mup.apply(untied, llama_config(16)).shapes
    assert shapes["model.embed_tokens.weight"] == InfShape(1, 1.0, 2.0)
    assert shapes["model.layers.0.mlp.down_proj.weight"] == InfShape(2, 2.0, 2.0)
    assert shapes["model.norm.weight"] == InfShape(1, 1.0, 2.0)
    assert shapes["lm_head.weight"] == InfShape(1, 2.0, 1.0, 0.5) == untied.lm_head.weight.hf_infshape
    tied = GPT2LMHeadModel(gpt2_config(32))
    shapes = mup.apply(tied, gpt2_config(16)).shapes
    assert shapes["transformer.wte.weight"] == InfShape(1, 1.0, 2.0)
    assert shapes["transformer.h.0.attn.c_attn.weight"] == InfShape(2, 2.0, 2.0)
    # The factors of a tied weight are the same in its two roles.
    for kind in ("adam", "sgd"):
        assert mup.lr_factor(InfShape(1, 1.0, 2.0), kind) == mup.lr_factor(InfShape(1, 2.0, 1.0, 0.5), kind)
    assert mup.init_factor(InfShape(1, 1.0, 2.0), "fixed") == mup.init_factor(InfShape(1, 2.0, 1.0, 0.5), "fixed")


def test_delta_says_which_dimensions_are_infinite():
    model = Net(8)
    with torch.device("meta"):
        base, delta = Net(8), Net(16)
    shapes = mup.set_base_shapes(model, base, delta)
    assert shapes["hidden.weight"] == InfShape(2) and shapes["output.weight"] == InfShape(1)
    assert shapes["output.bias"] == InfShape(0)
    with pytest.raises(ValueError, match="No dimension is infinite"):
        mup.set_base_shapes(model, base, Net(8))
    with pytest.raises(ValueError, match="differs from the base model but is finite"):
        mup.set_base_shapes(Net(16), base, Net(8, outputs=6))


@pytest.mark.parametrize("tied", [False, True])
def test_the_forward_pass_divides_the_readout_and_the_attention_logits(tied):
    model = GPT2LMHeadModel(gpt2_config(32, tied)).eval()
    plain = copy.deepcopy(model)
    mup.apply(model, gpt2_config(16, tied))
    # Heads grow from 4 to 8: q.k * sqrt(4) / 8.
    assert model.transformer.h[0].attn.scaling == pytest.approx(math.sqrt(4) / 8)
    with torch.no_grad():
        for name, p in plain.named_parameters():
            p.mul_(2**-0.5 if p.dim() == 2 and name.split(".")[-2].startswith("c_") else 1.0)
        plain.transformer.h[0].attn.scaling = 0.25
        expected = plain(IDS).logits / 2
        assert torch.allclose(model(IDS).logits, expected, atol=1e-6)


def test_remove_gives_the_model_back():
    model = GPT2LMHeadModel(gpt2_config(32, tied=False)).eval()
    before = copy.deepcopy(model)
    mup.apply(model, gpt2_config(16, tied=False)).remove()
    assert torch.allclose(model(IDS).logits, before(IDS).logits, atol=1e-6)
    assert model.config.to_dict() == before.config.to_dict()
    mup.apply(model, gpt2_config(16, tied=False))


def train(model, groups_of, tmp_path, lr=1e-2):
    args = TrainingArguments(output_dir=str(tmp_path), max_steps=4, report_to=[], save_strategy="no", use_cpu=True,
                             disable_tqdm=True, learning_rate=lr, per_device_train_batch_size=2)  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in IDS.repeat(4, 1)]
    optimizer = torch.optim.AdamW(groups_of(model), lr=lr, weight_decay=0.1)
    Trainer(model=model, args=args, train_dataset=data, optimizers=(optimizer, None)).train()
    return flat(model)


def test_at_the_base_width_training_is_stocks_bit_for_bit(tmp_path):
    torch.manual_seed(0)
    plain = GPT2LMHeadModel(gpt2_config(16))
    ours = copy.deepcopy(plain)
    rng = torch.get_rng_state()
    mup.apply(ours, gpt2_config(16))
    assert torch.equal(rng, torch.get_rng_state())
    stock = train(plain, lambda m: m.parameters(), tmp_path)
    moved = train(ours, lambda m: mup.param_groups(m, lr=1e-2, weight_decay=0.1), tmp_path)
    assert torch.equal(stock, moved)


def stock(model, tmp_path, optim="adamw_torch", **options):
    """The stock Trainer, with the optimizer of its arguments."""
    own = {k: options.pop(k) for k in ("optimizers", "optimizer_cls_and_kwargs") if k in options}
    args = TrainingArguments(output_dir=str(tmp_path), max_steps=3, report_to=[], save_strategy="no", use_cpu=True,
                             disable_tqdm=True, learning_rate=1e-2, per_device_train_batch_size=2, weight_decay=0.1,
                             optim=optim, **options)  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in IDS.repeat(4, 1)]
    job = Trainer(model=model, args=args, train_dataset=data, **own)
    job.train()
    return job


def wide(**fields):
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config(32, **fields))
    mup.apply(model, llama_config(16, **fields))
    return model


@pytest.mark.parametrize("kind", ["adam", "sgd"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_stock_trainer_finds_the_learning_rates(kind, tied, tmp_path):
    """By name alone, as with groups that were made by hand; without them it would train differently."""
    model, by_hand, plain = wide(tied=tied), wide(tied=tied), wide(tied=tied)
    no_decay = {name for name, _ in model.named_parameters() if "norm" in name}
    groups = mup.param_groups(by_hand, kind, lr=1e-2, weight_decay=0.1, no_decay=no_decay)
    optimizer = torch.optim.AdamW(groups, lr=1e-2) if kind == "adam" else torch.optim.SGD(groups, lr=1e-2)
    name = "adamw_torch" if kind == "adam" else "sgd"
    job = stock(model, tmp_path, name)
    stock(by_hand, tmp_path, optimizers=(optimizer, None))
    assert torch.equal(flat(model), flat(by_hand))
    plain_optimizer = (torch.optim.AdamW if kind == "adam" else torch.optim.SGD)(plain.parameters(), lr=1e-2)
    stock(plain, tmp_path, optimizers=(plain_optimizer, None))
    assert not torch.allclose(flat(plain), flat(model), atol=1e-4)
    assert {round(g["initial_lr"] / 1e-2, 6) for g in job.optimizer.param_groups} == (
        {1.0, 0.5} if kind == "adam" else {1.0, 2.0}
    )


def test_two_pass_optimizers_and_classes_of_the_user_get_them_too(tmp_path):
    base = wide()
    stock(base, tmp_path)
    sam = wide()
    stock(sam, tmp_path, "sam", optim_args="rho=0")
    assert torch.equal(flat(base), flat(sam))
    own = wide()
    stock(own, tmp_path, optimizer_cls_and_kwargs=(torch.optim.AdamW, {"lr": 1e-2}))
    assert torch.equal(flat(base), flat(own))


def test_with_base_shapes_the_stock_trainer_is_stock(tmp_path):
    plain, ours = (LlamaForCausalLM(llama_config(16)) for _ in range(2))
    ours.load_state_dict(plain.state_dict())
    mup.apply(ours, llama_config(16))
    jobs = [stock(model, tmp_path) for model in (plain, ours)]
    assert torch.equal(flat(plain), flat(ours))
    assert [len(job.optimizer.param_groups) for job in jobs] == [2, 2]
    other = LlamaForCausalLM(llama_config(16))
    other.load_state_dict(LlamaForCausalLM(llama_config(16)).state_dict())
    assert len(stock(other, tmp_path).optimizer.param_groups) == 2


def test_an_optimizer_whose_rates_are_not_known_is_refused(tmp_path):
    with pytest.raises(NotImplementedError, match="how its step scales is not known.*adamw_torch or sgd"):
        stock(wide(), tmp_path, optimizer_cls_and_kwargs=(torch.optim.LBFGS, {"lr": 1e-2}))
    with pytest.raises(NotImplementedError, match="groups of its own"):
        kwargs = {"lr": 1e-2, "params": []}
        stock(wide(), tmp_path, optimizer_cls_and_kwargs=(torch.optim.AdamW, kwargs))
    with pytest.raises(NotImplementedError, match="learning rates optim='frugal' would not have"):
        stock(wide(), tmp_path, optim="frugal")


def test_adapters_on_a_model_in_mup_keep_the_given_rate(tmp_path, monkeypatch):
    from peft import LoraConfig, get_peft_model

    said = []
    monkeypatch.setattr("hfext.optim.mup.logger.warning_once", said.append)
    job = stock(get_peft_model(wide(), LoraConfig(r=4, target_modules=["q_proj"])), tmp_path)
    assert {g["initial_lr"] for g in job.optimizer.param_groups} == {1e-2}
    assert len(said) == 1 and "adapters" in said[0]


def test_abc_symmetry():
    """A readout stored with a = 1/r and one stored as it is are the same training, step for step."""
    x, y = torch.randn(32, 7, dtype=torch.float64), torch.randint(0, 5, (32,))
    stored = Net(16).double()
    mup.apply(stored, Net(4))
    folded = Net(16).double()
    folded.load_state_dict(stored.state_dict())
    with torch.no_grad():
        folded.output.weight.mul_(1 / 4)
    mup.set_base_shapes(folded, Net(4))
    for kind, make in (("sgd", torch.optim.SGD), ("adam", lambda g: torch.optim.AdamW(g, eps=1e-30))):
        pair = [copy.deepcopy(stored), copy.deepcopy(folded)]
        curves = []
        for model in pair:
            optimizer = make(mup.param_groups(model, kind, lr=0.05, weight_decay=0.1))
            losses = []
            for _ in range(10):
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
            curves.append(losses)
        assert curves[0][-1] < curves[0][0] - 0.01
        assert curves[0] == pytest.approx(curves[1], abs=1e-10)


def test_param_groups_keep_lr_times_decay_and_cover_each_parameter_once():
    model = LlamaForCausalLM(llama_config(32))
    mup.apply(model, llama_config(16))
    model.model.norm.weight.requires_grad_(False)
    groups = mup.param_groups(
        model, "adam", lr=0.1, weight_decay=0.2, no_decay={"model.layers.0.input_layernorm.weight"}
    )
    assert groups[0]["lr"] == 0.1
    assert {round(g["lr"] * g["weight_decay"], 12) for g in groups} == {0.02, 0.0}
    params = [id(p) for g in groups for p in g["params"]]
    assert sorted(params) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    independent = mup.param_groups(model, "adam", lr=0.1, weight_decay=0.2, independent_decay=True)
    assert {g["weight_decay"] for g in independent} == {0.2}


def test_saved_and_loaded_it_is_the_same_function(tmp_path):
    model = LlamaForCausalLM(llama_config(32, head=16)).eval()
    handle = mup.apply(model, llama_config(16))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["hfext_mup"]["base_config"]["hidden_size"] == 16
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="rescale=False"):
        mup.apply(loaded)
    assert mup.apply(loaded, rescale=False).shapes == handle.shapes
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    loaded.save_pretrained(tmp_path / "again")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "again")
    mup.apply(again, rescale=False)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(IDS).logits, model(IDS).logits)
    assert mup.infshapes(twin.parameters(), twin) == mup.infshapes(model.parameters())


def test_activations_move_alike_at_every_width(tmp_path):
    config = coordinate_check.Config(widths=(64, 128, 256), seeds=4, llama=False)
    record = coordinate_check.run(config, tmp_path)
    for row in next(iter(record["tables"].values())):
        assert abs(row["muP"]) <= 0.1
    assert record["evidence"]["reproduced"] and record["evidence"]["baseline"] > 0.4


class Raw(nn.Module):
    def __init__(self, width, leading=3, both=False):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(2 * width if both else leading, width))


class Cube(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, width, width))


def test_parameters_whose_fan_in_cannot_be_seen():
    with pytest.raises(ValueError, match="roles"):
        mup.set_base_shapes(Raw(8), Raw(4))
    assert mup.set_base_shapes(Raw(8), Raw(4), roles={"table": "input"})["table"] == InfShape(1, 1.0, 2.0)
    assert mup.set_base_shapes(Raw(8), Raw(4), roles={"table": "output"})["table"] == InfShape(1, 2.0, 1.0)
    assert mup.set_base_shapes(Raw(8, leading=1), Raw(4, leading=1))["table"] == InfShape(1, 1.0, 2.0)
    assert mup.set_base_shapes(Raw(8, both=True), Raw(4, both=True))["table"] == InfShape(2, 2.0, 2.0)


def test_bad_input():
    with pytest.raises(ValueError, match="3 infinite dimensions"):
        mup.set_base_shapes(Cube(8), Cube(4))
    with pytest.raises(ValueError, match="differ in width alone"):
        mup.set_base_shapes(Raw(8), Net(4))
    with pytest.raises(ValueError, match="wrong: tabel"):
        mup.set_base_shapes(Raw(8), Raw(4), roles={"tabel": "input"})
    model = Net(8)
    mup.apply(model, Net(4))
    with pytest.raises(ValueError, match="already"):
        mup.apply(model, Net(4))
    with pytest.raises(ValueError, match="base_config is missing"):
        mup.apply(LlamaForCausalLM(llama_config(32)))
    with pytest.raises(TypeError, match="LlamaConfig, got BertConfig"):
        mup.apply(LlamaForCausalLM(llama_config(32)), BertConfig())
    with pytest.raises(TypeError, match="got Net"):
        mup.apply(LlamaForCausalLM(llama_config(32)), Net(4))
    with pytest.raises(ValueError, match="init is 'normal'"):
        mup.apply(Net(8), Net(4), init="normal")
    with pytest.raises(ValueError, match="optimizer_kind is 'sgdm'"):
        mup.param_groups(model, "sgdm", lr=0.1)
    with pytest.raises(
        ValueError, match="No base shapes are known for input.weight, input.bias, hidden.weight and 3 more"
    ):
        mup.param_groups(Net(8), lr=0.1)
    t5 = dict(vocab_size=32, d_kv=4, num_layers=1, num_heads=2, d_ff=16, decoder_start_token_id=0)
    with pytest.raises(ValueError, match="has no `initializer_range`"):
        mup.apply(T5ForConditionalGeneration(T5Config(d_model=16, **t5)), T5Config(d_model=8, **t5))


def test_weights_that_were_loaded_are_not_rescaled(tmp_path):
    GPT2LMHeadModel(gpt2_config(32)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="loaded from a checkpoint"):
        mup.apply(GPT2LMHeadModel.from_pretrained(tmp_path), gpt2_config(16))
    # Fresh weights with a loaded config are fresh.
    mup.apply(GPT2LMHeadModel(GPT2Config.from_pretrained(tmp_path)), gpt2_config(16))
