"""SketchTune: tables, codes, exact gradients, and tables saved alone."""

import copy

import pytest
import torch
from quantization_cases import data, llama
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hfext.quantization import quantize, train_grids
from hfext.quantization._affine import round_to_nearest
from hfext.quantization._column_rounding import eliminate, weighted_elimination
from hfext.quantization._quantizer import quantized_layers
from hfext.quantization._sketch_linear import SketchLinear
from hfext.quantization.gptq import gptq
from hfext.quantization.sketchtune import (
    DELTA,
    SketchTuneConfig,
    k_means,
    load_sketch_delta,
    plus_plus,
    round_to_tables,
    save_sketch_delta,
    sketch,
)

IDS = data(rows=2, tokens=24, seed=1)


def gaussian(*sizes, seed=0, dtype=torch.float64):
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def correlated(columns, seed=1, dtype=torch.float64):
    x = gaussian(4 * columns, columns, seed=seed) @ gaussian(columns, columns, seed=seed + 1)
    return (x.T @ x / len(x)).to(dtype)


def config(**options):
    return SketchTuneConfig(**{"dataset": data(), "sequence_length": 40, "groups_per_row": 2, **options})


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def filled(bits=3, rows=12, columns=48, parts=3, bias=True, dtype=torch.float64):
    made = SketchLinear(columns, rows, bits, parts, bias, dtype=dtype, scale_dtype=dtype)
    codes = torch.randint(0, 2**bits - 1, (rows, columns), generator=torch.Generator().manual_seed(3))
    made.store((codes.to(torch.uint8), gaussian(rows, parts, 2**bits)), torch.linspace(-1, 1, rows) if bias else None)
    return made


# -- learning tables and codes


def lloyd(x, weights, k, iterations):
    """One row, point by point."""
    centres = [min(x) + (max(x) - min(x)) * i / (k - 1) for i in range(k)]
    for _ in range(iterations):
        nearest = [min(range(k), key=lambda j: (abs(v - centres[j]), j)) for v in x]
        for j in range(k):
            mine = [i for i, n in enumerate(nearest) if n == j]
            if mine:
                centres[j] = sum(weights[i] * x[i] for i in mine) / sum(weights[i] for i in mine)
    return sorted(centres)


@pytest.mark.parametrize("k", [4, 8])
def test_k_means_is_lloyds_iteration_point_by_point(k):
    x, weights = gaussian(5, 40), gaussian(5, 40, seed=1).abs()
    x[1, :30] += 1000  # most clusters of an even start are empty
    for iterations in (1, 3, 30):
        got = k_means(x, weights, k, iterations, tolerance=0)
        rows = zip(x.tolist(), weights.tolist(), strict=True)
        want = torch.tensor([lloyd(*row, k, iterations) for row in rows], dtype=torch.float64)
        torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-9)


def test_k_means_ends_where_no_centre_moves():
    x, weights = gaussian(6, 200), torch.ones(6, 200)
    done = k_means(x, weights, 16, 500, tolerance=0)
    nearest = (x[:, :, None] - done[:, None]).abs().argmin(-1)
    for row in range(6):
        for j in nearest[row].unique():
            assert done[row, j] == pytest.approx(float(x[row, nearest[row] == j].mean()), abs=1e-9)
    assert torch.equal(done, k_means(x, weights, 16, 500, tolerance=0))
    assert (k_means(x, weights, 16, 500, tolerance=1e-6) - done).abs().max() < 1e-2


def test_k_means_plus_plus_draws_by_weight_and_squared_distance():
    """The chance of a pair of first centres, counted over seeds."""
    x, weights = torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64), torch.tensor([1.0, 2.0, 1.0]).double()
    drawn = torch.cat([plus_plus(x[None], weights[None], 2, seed) for seed in range(4000)])
    for pair, (i, j) in {(0.0, 1.0): (0, 1), (0.0, 3.0): (0, 2), (1.0, 3.0): (1, 2)}.items():
        chance = 0.0
        for a, b in ((i, j), (j, i)):
            far = weights * (x - x[a]) ** 2
            chance += float(weights[a] / weights.sum() * far[b] / far.sum())
        share = (drawn == torch.tensor(pair, dtype=torch.float64)).all(1).double().mean()
        assert share == pytest.approx(chance, abs=0.03)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_few_different_weights_are_kept_exactly(bits):
    values = gaussian(6, 2**bits if bits < 8 else 40)
    picked = torch.randint(0, values.shape[1], (6, 64), generator=torch.Generator().manual_seed(0))
    weight = values.gather(1, picked)
    codes, tables = sketch(weight, correlated(64), bits)
    assert torch.equal(tables[:, 0].gather(1, codes.long()), weight)


def by_inverse(weight, hessian, tables, order):
    """The recursion with the factor of the inverse, weight by weight, pushing every error to the later columns."""
    columns, width = weight.shape[1], weight.shape[1] // tables.shape[1]
    hessian = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian[order][:, order]), upper=True)
    moved, codes = weight[:, order].clone(), torch.zeros(weight.shape, dtype=torch.uint8)
    for j in range(columns):
        for row in range(len(weight)):
            table = tables[row, int(order[j]) // width]
            code = int((table - moved[row, j]).abs().argmin())
            codes[row, order[j]] = code
            moved[row, j:] -= (moved[row, j] - table[code]) / upper[j, j] * upper[j, j:]
    return codes, upper.diagonal()


@pytest.mark.parametrize("act_order", [False, True])
def test_codes_are_those_of_the_recursion_with_the_inverse(act_order):
    weight, hessian = gaussian(5, 48), correlated(48)
    codes, tables = sketch(weight, hessian, 3, 16, act_order=act_order)
    elimination, weights = weighted_elimination(hessian, act_order)
    want, upper = by_inverse(weight, hessian, tables, elimination.order)
    assert torch.equal(codes, want)
    torch.testing.assert_close(weights[elimination.order], upper**-2)
    assert torch.equal(elimination.feedback, eliminate(hessian, act_order).feedback)
    parts = weight.view(5, 3, 16).flatten(0, 1)
    shares = torch.empty(48, dtype=torch.float64).index_copy_(0, elimination.order, upper**-4)
    shares = shares.view(3, 16).repeat(5, 1)
    torch.testing.assert_close(tables.flatten(0, 1), k_means(parts, shares, 8), atol=1e-6, rtol=0)


@pytest.mark.parametrize("bits", [3, 4])
def test_rows_do_not_know_each_other(bits):
    weight, hessian = gaussian(9, 48), correlated(48)
    weight[4] *= 1000
    whole = sketch(weight, hessian, bits, 24)
    for rows in (slice(0, 4), slice(4, 9)):
        for got, want in zip(sketch(weight[rows], hessian, bits, 24), whole, strict=True):
            assert torch.equal(got, want[rows])


def test_the_speed_block_changes_no_code():
    weight, hessian = gaussian(7, 40), correlated(40)
    _, tables = sketch(weight, hessian, 4, 20)
    elimination = eliminate(hessian)
    assert torch.equal(
        round_to_tables(weight, tables, elimination, 1), round_to_tables(weight, tables, elimination, 64)
    )


def test_tables_lose_less_than_a_uniform_grid_of_the_same_codes():
    weight, hessian = gaussian(32, 64, seed=4) ** 3, correlated(64)

    def loss(approximate):
        difference = approximate - weight
        return float(((difference @ hessian) * difference).sum())

    for bits in (2, 3, 4):
        codes, tables = sketch(weight, hessian, bits)
        ours = tables[:, 0].gather(1, codes.long())
        nearest = tables[:, 0].gather(1, (weight[:, :, None] - tables).abs().argmin(-1))
        assert loss(ours) < min(loss(nearest), 0.75 * loss(gptq(weight, hessian, bits, -1).dequantize()))


def test_dead_inputs_and_flat_rows_are_harmless():
    weight, hessian = gaussian(6, 32), correlated(32)
    hessian[:, 5] = hessian[5] = 0
    weight[2] = 0.25
    for bits in (2, 4):
        codes, tables = sketch(weight, hessian, bits, 16)
        assert tables.isfinite().all()
        assert torch.equal(tables[2].gather(1, codes[2].long().view(2, 16)), weight[2].view(2, 16))
    codes, tables = sketch(weight, torch.zeros_like(hessian), 3)
    assert torch.equal(codes, (weight[:, :, None] - tables).abs().argmin(-1).to(torch.uint8))


# -- the layer


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gradients_equal_those_through_a_gather(bits):
    made = filled(bits)
    made.requires_grad_(True)
    x = gaussian(2, 5, 48, seed=9).requires_grad_()
    table, bias, x2 = (t.detach().clone().requires_grad_() for t in (made.sketch, made.bias, x))
    weight = torch.gather(table, 2, made.codes.view(12, 3, 16).long()).flatten(1)
    want = F.linear(x2, weight, bias)
    torch.testing.assert_close(made(x), want, atol=1e-12, rtol=0)
    want.sin().sum().backward()
    made(x).sin().sum().backward()
    for got, expected in ((x, x2), (made.sketch, table), (made.bias, bias)):
        torch.testing.assert_close(got.grad, expected.grad, atol=1e-10, rtol=0)
    used = torch.zeros_like(table).scatter_(2, made.codes.view(12, 3, 16).long(), 1.0).bool()
    assert (~used).any() and (made.sketch.grad[~used] == 0).all()
    before = made.sketch.detach().clone()
    torch.optim.AdamW([made.sketch], lr=0.1, weight_decay=0.0).step()
    assert torch.equal(made.sketch[~used], before[~used])
    assert not torch.equal(made.sketch[used], before[used])


def test_as_many_entries_as_columns_is_full_fine_tuning():
    weight = gaussian(6, 24)
    codes, tables = sketch(weight, correlated(24), 3, 8)
    assert all(len(row.unique()) == 8 for row in codes.view(-1, 8))
    made = SketchLinear(24, 6, 3, 3, dtype=torch.float64, scale_dtype=torch.float64)
    made.store((codes, tables))
    plain = nn.Linear(24, 6, bias=False, dtype=torch.float64)
    plain.weight.data.copy_(weight)
    x = gaussian(7, 24, seed=5)
    for layer, parameter in ((made, made.sketch), (plain, plain.weight)):
        parameter.requires_grad_(True)
        optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            layer(x).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(made.weight.data, plain.weight.data, atol=1e-12, rtol=0)


def test_the_backward_keeps_no_weight():
    made = filled(2, 64, 256, 1, bias=False)
    made.sketch.requires_grad_(True)
    kept = []
    x = gaussian(1, 4, 256).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        made(x).sum()
    assert sum(kept) <= x.numel() + made.sketch.numel()


def test_half_precision_sums_gradients_in_fp32():
    made = filled(2, 4, 512, 1, bias=False, dtype=torch.float32)
    made.sketch.requires_grad_(True)
    exact = filled(2, 4, 512, 1, bias=False)
    exact.sketch.requires_grad_(True)
    x = gaussian(8, 512).bfloat16()
    made(x).float().sum().backward()
    exact(x.double()).sum().backward()
    assert made.sketch.grad.dtype == torch.float32
    assert (made.sketch.grad - exact.sketch.grad).norm() < 5e-3 * exact.sketch.grad.norm()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert made(x.float()).dtype == torch.bfloat16


def test_an_affine_grid_is_a_table_of_its_levels():
    weight = gaussian(6, 32, dtype=torch.float32)
    for group, parts in ((8, 4), (-1, 4), (32, 1)):
        made = SketchLinear(32, 6, 3, parts, scale_dtype=torch.float32)
        result = round_to_nearest(weight, 3, group)
        made.store(result)
        torch.testing.assert_close(made.weight.data, result.dequantize(), atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="too large for float16"):
        SketchLinear(32, 6, 3, 4).store(round_to_nearest(1e6 * weight, 3, 8))


# -- models


def test_parts_of_a_row_by_number_or_by_size():
    by_number, by_size = (
        quantize(llama(), config(bits=3)),
        quantize(llama(), config(group_size=16, groups_per_row=None)),
    )
    assert {layer.parts for layer in quantized_layers(by_number).values()} == {2}
    assert {layer.group_size for layer in quantized_layers(by_size).values()} == {16}
    assert SketchTuneConfig().parts(64) == 4
    with pytest.raises(ValueError, match="groups_per_row is 2 and group_size 16"):
        config(group_size=16)
    with pytest.raises(ValueError, match=r"mlp\.down_proj: groups_per_row is 3 but must divide the 64 inputs"):
        quantize(llama(hidden_size=48, num_attention_heads=4, head_dim=12), config(groups_per_row=3))
    for wrong in ({"groups_per_row": 0}, {"exponent": -1.0}, {"damp": -0.1}, {"iterations": -1}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} is .* but must be in"):
            config(**wrong)


def test_the_trainer_tunes_tables_and_they_are_saved_alone(tmp_path):
    model = quantize(llama(), config(bits=2))
    model.save_pretrained(tmp_path / "base")
    layers = quantized_layers(model)
    codes = {name: layer.qweight.clone() for name, layer in layers.items()}
    assert train_grids(model, norms=False) == sum(layer.out_features * 2 * 2**2 for layer in layers.values())
    rows = [{"input_ids": row, "labels": row} for row in data(rows=8, tokens=16)]
    args = TrainingArguments(
        tmp_path / "out", max_steps=4, learning_rate=1e-2, per_device_train_batch_size=4, report_to=[],
        save_strategy="no", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    others = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    Trainer(model, args, train_dataset=rows).train()
    assert all(torch.equal(codes[name], layer.qweight) for name, layer in layers.items())
    assert all(torch.equal(others[name], p) for name, p in model.named_parameters() if name in others)
    path = save_sketch_delta(model, tmp_path / "delta")
    assert set(load_file(path)) == {f"{name}.sketch" for name in layers}
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert not torch.equal(logits(base), logits(model))
    load_sketch_delta(base, tmp_path / "delta")
    assert torch.equal(logits(base), logits(model))
    base.save_pretrained(tmp_path / "tuned")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")), logits(model))


def test_tables_of_another_base_or_damaged_ones_are_refused(tmp_path):
    model = quantize(llama(), config(bits=2))
    path = save_sketch_delta(model, tmp_path)
    want = logits(model)
    for other in (quantize(llama(seed=1), config(bits=2)), quantize(llama(), config(bits=3))):
        with pytest.raises(ValueError, match="belongs to the base"):
            load_sketch_delta(other, tmp_path)
    changed = copy.deepcopy(model)
    changed.model.norm.weight.data[0] += 1
    with pytest.raises(ValueError, match="belongs to the base"):
        load_sketch_delta(changed, tmp_path)
    with pytest.raises(ValueError, match="no layers of SketchTune"):
        save_sketch_delta(llama(), tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=DELTA):
        load_sketch_delta(model, tmp_path / "none")
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="damaged"):
        load_sketch_delta(model, tmp_path)
    path.write_bytes(whole)
    tensors = load_file(path)
    name = next(iter(tensors))
    import safetensors

    with safetensors.safe_open(path, framework="pt") as file:
        about = file.metadata()
    tensors[name][0, 0, 0] = torch.nan
    save_file(tensors, path, metadata=about)
    with pytest.raises(ValueError, match=f"damaged: {name} is"):
        load_sketch_delta(model, tmp_path)
    assert torch.equal(logits(model), want)
