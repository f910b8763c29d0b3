"""MixDQ: its integer program against brute force, its metrics by hand, and the scan on a model."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch

from hfext.quantization import RTNConfig, dequantize, quantize
from hfext.quantization._allocation import allocate
from hfext.quantization._modules import quantizable
from hfext.quantization._sensitivity import layers_of, measuring, quantizer
from hfext.quantization.mixdq import (
    FAMILIES,
    METRICS,
    MixDQConfig,
    Outputs,
    families_of,
    family_program,
    input_scores,
    mixed_allocation,
    negative_kl,
    negative_nsr,
    scores,
    splits,
    sqnr,
)

IDS = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(0))


def parts(model):
    return layers_of(quantizable(model)), list(IDS[:, None])


@pytest.mark.parametrize("seed", range(8))
def test_the_program_of_a_family_is_brute_force(seed):
    rng = np.random.default_rng(seed)
    layers, bits = 2 + seed % 6, (2, 4, 8)
    score = np.sort(rng.normal(size=(layers, 3)) * 10, axis=1)
    sizes = rng.integers(1, 20, layers)
    for mean in (2.5, 3.7, 5.0):
        best = None
        for options in itertools.product(range(3), repeat=layers):
            found = sum(bits[p] * n for p, n in zip(options, sizes, strict=True)) / sizes.sum()
            value = score[range(layers), options].sum()
            if abs(found - mean) <= 0.2 + 1e-9 and (best is None or value > best[0]):
                best = (value, list(options))
        assert family_program(score, sizes, bits, mean, 0.2) == (best and best[1])


def test_a_window_that_nothing_fits_gives_nothing():
    assert family_program(np.zeros((2, 2)), [1, 1], (2, 8), 3.0, 0.02) is None
    assert family_program(np.zeros((2, 2)), [1, 1], (2, 8), 5.0, 0.02) is not None


def test_splits_keep_the_mean_and_the_ratio():
    for k, (content, quality) in zip((0.46, 1.36), splits(3.0, [60, 20], (0.46, 1.36)), strict=True):
        r = 60 / 20
        assert quality == pytest.approx(3.0 * (1 + r) / (k * r + 1))
        assert content == pytest.approx(k * quality)
    three = splits(3.0, [5, 7, 11], (0.5, 1.5))
    assert len(three) == 4
    assert all((5 * a + 7 * b + 11 * c) / 23 == pytest.approx(3.0) for a, b, c in three)
    assert splits(3.0, [5], (0.5, 1.5)) == [(3.0,)]


def test_metrics_by_hand():
    y, logits = torch.randn(5, 3), torch.randn(5, 4)
    a, b = Outputs(logits, y), Outputs(torch.randn(5, 4), 1.1 * y)
    assert sqnr(a, b) == pytest.approx(20.0, abs=1e-4)
    assert negative_nsr(a, b) == pytest.approx(-0.01, rel=1e-4)
    kl = torch.nn.functional.kl_div(b.logits.log_softmax(-1), a.logits.softmax(-1), reduction="batchmean")
    assert negative_kl(a, b) == pytest.approx(-kl.item(), rel=1e-5)
    assert sqnr(a, a) == pytest.approx(150.0) and negative_kl(a, a) == pytest.approx(0.0, abs=1e-7)


def test_families_are_the_first_expression_that_fits(tiny_llama):
    names = list(quantizable(tiny_llama()))
    content, quality = families_of(names, list(FAMILIES)).values()
    assert [names[i].split(".")[3] for i in content] == ["mlp"] * 6
    assert [names[i].split(".")[3] for i in quality] == ["self_attn"] * 8
    with pytest.raises(ValueError, match="layers.0.self_attn.q_proj is in no family"):
        families_of(names, ["mlp"])


def test_a_score_is_that_of_a_model_with_one_layer_changed(tiny_llama):
    model = tiny_llama()
    layers, batches = parts(model)
    chosen = {0: sqnr, 4: negative_kl}
    with measuring(model):
        found = scores(model, [layers[0], layers[4]], batches, {0: (2, 4), 1: (2, 4)}, {0: sqnr, 1: negative_kl},
                       quantizer(None, 16))  # fmt: skip
    with torch.no_grad():
        for row, (i, metric) in zip(found.values(), chosen.items(), strict=True):
            for value, b in zip(row, (2, 4), strict=True):
                bits = {layer.name: 16 for layer in layers} | {layers[i].name: b}
                config = RTNConfig(bits=bits, group_size=16, scale_dtype="float32")
                other = dequantize(quantize(copy.deepcopy(model), config))
                pair = [m(IDS, output_hidden_states=True) for m in (model, other)]
                pair = [Outputs(o.logits.flatten(0, 1), o.hidden_states[-1].flatten(0, 1)) for o in pair]
                assert value == pytest.approx(metric(*pair), rel=1e-2, abs=1e-6)
    assert all(row[0] < row[1] for row in found.values())


def test_every_candidate_is_measured_and_the_best_is_kept(tiny_llama):
    model = tiny_llama()
    layers, batches = parts(model)[0], [IDS]
    of = quantizer(None, 16)
    config = MixDQConfig(budgets=3, window=0.05)
    found = mixed_allocation(model, layers, batches, 3.0, (2, 3, 4, 8), of, config)
    assert found.loss == min(loss for _, loss in found.measured) and (found.bits, found.loss) in found.measured
    assert len(found.measured) > 1 and len({tuple(b) for b, _ in found.measured}) == len(found.measured)
    sizes = [layer.size for layer in layers]
    for bits, _ in found.measured:
        assert 2.65 <= sum(b * n for b, n in zip(bits, sizes, strict=True)) / sum(sizes) <= 3.0
    bits = {layer.name: b for layer, b in zip(layers, found.bits, strict=True)}
    rounded = quantize(copy.deepcopy(model), RTNConfig(bits=bits, group_size=16, scale_dtype="float32"))
    with torch.no_grad():
        logits = dequantize(rounded)(IDS).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten()).item()
    assert found.loss == pytest.approx(loss, abs=1e-5)


def test_one_family_reaches_the_budget_within_the_window(tiny_llama):
    found = allocate(
        tiny_llama(), IDS, "mixdq", 3.0, group_size=16, batch_size=2, families={"": "nsr"}, below=0.02, budgets=1
    )
    assert 3.0 - 0.02 - 0.02 <= found.average_bits <= 3.0


def test_families_metrics_and_their_bits_can_be_chosen(tiny_llama):
    model, seen = tiny_llama(), []

    def metric(reference, other):
        seen.append(reference.hidden.shape)
        return -(reference.logits - other.logits).abs().max().item()

    families = {r"self_attn\.[qk]_proj": metric, "self_attn": "sqnr", "mlp": "kl"}
    found = allocate(
        model, IDS, "mixdq", 3.5, group_size=16, families=families, family_bits={"mlp": (2, 8)}, budgets=2,
        ratios=(0.9, 1.1), window=0.3, batch_size=2,
    )  # fmt: skip
    assert {b for name, b in found.items() if "mlp" in name} <= {2, 8}
    assert len(seen) == 4 * 4 and set(seen) == {(24, 32)}
    assert set(found.sensitivities["model.layers.0.mlp.up_proj"]) == {2, 8}


def test_the_layers_whose_inputs_are_most_sensitive_are_protected(tiny_llama):
    model = tiny_llama()
    with torch.no_grad():
        # One input of 40 times the others' size costs an 8-bit grid for the whole tensor its small values.
        model.model.layers[1].post_attention_layernorm.weight[0] = 300.0
    options = {"bits": (2, 4), "group_size": 16, "batch_size": 2, "budgets": 1, "ratios": (1.0,), "window": 0.3}
    found = allocate(model, IDS, "mixdq", 3.0, protect=0.3, **options)
    mlp = [name for name in found.protected if "mlp" in name]
    assert len(mlp) == round(0.3 * 6) and len(found.protected) == len(mlp) + round(0.3 * 8)
    assert set(mlp) <= {f"model.layers.1.mlp.{x}_proj" for x in ("gate", "up", "down")}
    assert allocate(model, IDS, "mixdq", 3.0, **options).protected == []
    layers, batches = parts(model)
    with measuring(model):
        fine = input_scores(model, layers, batches, dict.fromkeys(range(14), sqnr), bits=8)
        rough = input_scores(model, layers, batches, dict.fromkeys(range(14), sqnr), bits=3)
    assert all(fine[i] > rough[i] for i in fine) and all(math.isfinite(v) for v in fine.values())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"families": {}}, "families is empty"),
        ({"families": {"": "ssim"}}, "one of kl, sqnr, nsr"),
        ({"family_bits": {"attn": (2,)}}, "family_bits has"),
        ({"ratios": ()}, "ratios"),
        ({"ratios": (0.5, -1.0)}, "ratios"),
        ({"window": -0.1}, "window is -0.1"),
        ({"budgets": 0}, "budgets 0"),
        ({"protect": 1.5}, "protect is 1.5"),
    ],
)
def test_bad_options_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        MixDQConfig(**options)


def test_a_scan_without_an_allocation_says_what_is_attainable(tiny_llama):
    with pytest.raises(ValueError, match="attainable: 2 to 8"):
        allocate(tiny_llama(), IDS, "mixdq", 2.5, bits=(2, 8), group_size=16, ratios=(50.0,), budgets=1)


def test_metrics_have_names():
    assert set(METRICS) == {"kl", "sqnr", "nsr"}
