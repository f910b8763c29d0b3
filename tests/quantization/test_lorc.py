import copy

import pytest
import torch
from quantization_cases import data, llama
from transformers import AutoModelForCausalLM

from hfext.quantization import DecoupleQConfig, GPTQConfig, LoRCConfig, RTNConfig, quantize, to_lora, train_grids
from hfext.quantization._quantizer import quantized_layers
from hfext.quantization.lorc import factors, rows_of_bytes

IDS = data(rows=2, tokens=24, seed=1)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def hessian(n, tokens=200, seed=0):
    x = random(tokens, n, seed=seed) @ random(n, n, seed=seed + 1)
    return x.T @ x / tokens


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def rtn(**options):
    return RTNConfig(**{"bits": 2, "group_size": 16, **options})


@pytest.mark.parametrize("rank", [0, 1, 4, 12])
def test_what_is_left_is_the_tail_of_the_singular_values(rank):
    error = random(12, 20)
    u, v = factors(error, rank)
    tail = torch.linalg.svdvals(error)[rank:].square().sum()
    torch.testing.assert_close((error - u @ v).square().sum(), tail, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(u.T @ u, v @ v.T, atol=1e-10, rtol=1e-10)  # the values are shared evenly


def test_with_activations_it_is_the_best_pair_for_the_outputs():
    error, h = random(12, 20), hessian(20)
    left, right = factors(error, 3, h)

    def loss(u, v):
        rest = error - u @ v
        return ((rest @ h) * rest).sum()

    # Eckart-Young in the space of outputs, where H = L L^T by another root.
    root = torch.linalg.cholesky(h)
    tail = torch.linalg.svdvals(error @ root)[3:].square().sum()
    torch.testing.assert_close(loss(left, right), tail, atol=1e-9, rtol=1e-9)
    assert loss(left, right) < loss(*factors(error, 3))
    same = factors(error, 3, 2.5 * torch.eye(20, dtype=torch.float64))
    torch.testing.assert_close(same.u @ same.v, factors(error, 3).u @ factors(error, 3).v, atol=1e-9, rtol=0)


def test_a_singular_hessian_gives_finite_factors():
    h = hessian(20)
    h[3], h[:, 3] = 0, 0
    u, v = factors(random(12, 20), 4, h)
    assert u.isfinite().all() and v.isfinite().all()


def test_bytes_of_rows_are_within_half_a_step_and_zeros_stay():
    x = random(6, 30) * torch.logspace(-6, 3, 6, dtype=torch.float64)[:, None]
    x[2] = 0
    codes, scales = rows_of_bytes(x, torch.float32)
    assert ((codes * scales.double() - x).abs() <= scales.double() / 2 * (1 + 1e-6)).all()
    assert (codes[2] == 0).all() and codes.abs().max() == 127


def test_rank_zero_is_the_quantiser_alone_and_full_rank_restores_the_weights():
    want = logits(quantize(llama(), rtn()))
    assert torch.equal(logits(quantize(llama(), LoRCConfig(quantizer=rtn(), rank=0))), want)
    plain = logits(llama())
    full = quantize(llama(), LoRCConfig(quantizer=rtn(scale_dtype="float32"), rank=1000, factor_bits=16))
    torch.testing.assert_close(logits(full), plain, atol=1e-5, rtol=0)


def test_the_error_never_grows_with_the_rank():
    plain = llama()
    errors = []
    for rank in (0, 2, 8, 32):
        model = quantize(copy.deepcopy(plain), LoRCConfig(quantizer=rtn(), rank=rank, factor_bits=16))
        errors.append(
            [
                (layer.weight - plain.get_submodule(name).weight).norm().item()
                for name, layer in quantized_layers(model).items()
            ]
        )
    for more, less in zip(errors[1:], errors[:-1], strict=True):
        assert all(b <= a * (1 + 1e-3) for a, b in zip(less, more, strict=True))


def test_eight_bit_factors_are_nearly_those_of_sixteen():
    plain = llama()
    one, two = (quantize(llama(), LoRCConfig(quantizer=rtn(), rank=8, factor_bits=bits)) for bits in (8, 16))
    for (name, a), b in zip(quantized_layers(one).items(), quantized_layers(two).values(), strict=True):
        error = (b.weight - plain.get_submodule(name).weight).norm()
        assert (a.weight - b.weight).norm() <= 0.05 * error


@pytest.mark.parametrize("inner", [GPTQConfig, DecoupleQConfig])
def test_around_a_calibrated_quantiser(inner, tmp_path):
    options = dict(bits=2, group_size=16, dataset=data(), sequence_length=40)
    if inner is DecoupleQConfig:
        options["block_epochs"] = 0
    plain = llama()
    hessians = {}
    for activations in (False, True):
        config = LoRCConfig(quantizer=inner(**options), rank=4, activations=activations)
        model = quantize(llama(), config)
        model.save_pretrained(tmp_path / str(activations))
        again = AutoModelForCausalLM.from_pretrained(tmp_path / str(activations))
        assert torch.equal(logits(again), logits(model))
        first = "model.layers.0.self_attn.q_proj"
        hessians[activations] = (model.get_submodule(first).weight - plain.get_submodule(first).weight).norm()
    # The plain correction is the best for weights, so the other must leave more of their error.
    assert hessians[False] < hessians[True]


def test_the_correction_as_an_adapter_keeps_the_outputs_and_trains():
    model = quantize(llama(attention_bias=True), LoRCConfig(quantizer=rtn(), rank=4))
    want = logits(model)
    adapted = to_lora(model)
    torch.testing.assert_close(logits(adapted), want, atol=1e-5, rtol=0)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), logits(quantize(llama(attention_bias=True), rtn())))
    adapted(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for name, p in adapted.named_parameters() if "lora" in name)
    assert model.config.quantization_config.weights.method == "rtn"
    with pytest.raises(ValueError, match="no corrections"):
        to_lora(quantize(llama(), rtn()))


@pytest.mark.parametrize("bits", [8, 16])
def test_trained_grids_and_factors_come_back_bit_equal(bits, tmp_path):
    model = quantize(llama(), LoRCConfig(quantizer=rtn(), rank=4, factor_bits=bits))
    train_grids(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(IDS, labels=IDS).loss.backward()
    layer = model.model.layers[0].mlp.up_proj
    name = "lorc_u_scales" if bits == 8 else "lorc_u"
    before = getattr(layer, name).detach().clone()
    optimizer.step()
    assert not torch.equal(getattr(layer, name), before)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="bits belongs to the config inside"):
        LoRCConfig(quantizer=rtn(), bits=3)
    with pytest.raises(ValueError, match="activations is True, but rtn sees no data"):
        LoRCConfig(quantizer=rtn(), activations=True)
    with pytest.raises(ValueError, match="rank is -1 but must be in"):
        LoRCConfig(quantizer=rtn(), rank=-1)
    with pytest.raises(ValueError, match="must be a config of hfext.quantization"):
        LoRCConfig(quantizer=3)
    with pytest.raises(TypeError, match="quantizer"):
        LoRCConfig(rank=3)
