import copy

import pytest
import torch
from quantization_cases import MODELS, data, llama

from hfext.quantization import AWQConfig, RTNConfig, quantize
from hfext.quantization._affine import dequantize, grid, nearest, round_to_nearest
from hfext.quantization._calibration import Block, calibrate
from hfext.quantization._experts import unstack
from hfext.quantization._quantizer import quantized_layers
from hfext.quantization.awq import best_scales, channel_scales, cut, moved, mover, scale_rows

IDS = data(rows=2, tokens=24, seed=1)


def config(**options):
    return AWQConfig(**{"bits": 3, "group_size": 16, "dataset": data(), "sequence_length": 40, **options})


def blocks(model, visit):
    """Call `visit(block)` for each plain block; nothing is quantised."""

    class Visiting(AWQConfig):
        method = ""

        def quantize_block(self, block: Block) -> None:
            visit(block)

    made = Visiting(bits=8, group_size=16, dataset=data(), sequence_length=40)
    unstack(model)
    calibrate(model, made, made.layers(model))


@torch.no_grad()
def logits(model):
    return model(IDS).logits


@pytest.mark.parametrize(
    ("kind", "movable"),
    [
        # Grouped queries: v has fewer outputs than o has inputs. Gemma's norms multiply by 1 + w.
        ("llama", {"q_proj", "gate_proj", "down_proj"}),
        ("mha", {"q_proj", "o_proj", "gate_proj", "down_proj"}),
        ("gemma3", {"q_proj", "gate_proj", "down_proj"}),
        # ReLU(s x) = s ReLU(x) for s > 0.
        ("opt", {"q_proj", "out_proj", "fc1", "fc2"}),
        # The router reads the norm too.
        ("mixtral", {"q_proj"}),
    ],
)
def test_a_scale_is_moved_where_the_block_stays_the_same_and_only_there(kind, movable):
    model = llama(num_key_value_heads=4) if kind == "mha" else MODELS[kind]()
    found = []

    def visit(block):
        for stage in block.stages:
            move = mover(block, stage)
            if move is None:
                continue
            found.append(stage[0].rpartition(".")[2])
            before = block.run(block.samples[0])
            scales = torch.rand(block.weight(stage[0]).shape[1]) + 0.5
            old = block.weight(stage[0])
            move(scales)
            torch.testing.assert_close(block.weight(stage[0]), old * scales)
            torch.testing.assert_close(block.run(block.samples[0]), before, atol=1e-4, rtol=1e-3)

    blocks(model, visit)
    assert set(found) == movable


def test_the_scales_of_a_single_layer_are_the_best_of_an_independent_search():
    seen = []

    def visit(block):
        stage = next(s for s in block.stages if s[0].endswith("down_proj"))
        weight = block.weight(stage[0])
        rows = []
        block.inputs(stage, lambda name, x: rows.append(x))
        x = torch.cat(rows).double()
        size = x.abs().mean(0)
        losses = []
        for i in range(20):
            s = size ** (i / 20)
            s = s.clamp(min=1e-4) / (s.max() * s.min()).sqrt()
            made = round_to_nearest((weight * s).float(), 8, 16, "int").dequantize() / s
            losses.append(((x @ (made - weight).double().T) ** 2).sum().item())
        best = best_scales(config(bits=8), block, stage)
        i = min(range(20), key=losses.__getitem__)
        want = None if i == 0 else channel_scales(size.float(), i / 20)
        assert (best is None) == (want is None)
        if best is not None:
            torch.testing.assert_close(best, want, atol=1e-4, rtol=1e-4)
        seen.append(i)

    blocks(llama(), visit)
    assert len(seen) == 2 and any(seen)


def test_equal_inputs_and_ratio_zero_scale_nothing():
    assert torch.equal(channel_scales(torch.full((8,), 3.7), 0.6).round(decimals=5), torch.ones(8))
    assert torch.equal(channel_scales(torch.rand(8) + 0.1, 0.0), torch.ones(8))


@pytest.mark.parametrize(("zero_point", "symmetric"), [("int", False), ("float", False), ("int", True)])
def test_the_cut_is_the_best_of_ten_by_brute_force(zero_point, symmetric):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 32, generator=generator, dtype=torch.float64) ** 3
    x = torch.randn(100, 32, generator=generator, dtype=torch.float64)
    made = cut(weight, x.T @ x / 100, 3, 16, zero_point, symmetric)
    for r in range(4):
        for g in range(2):
            part, seen = weight[r : r + 1, 16 * g : 16 * g + 16], x[:, 16 * g : 16 * g + 16]
            low, high = part.min().view(1, 1), part.max().view(1, 1)
            if zero_point == "int" or symmetric:
                low, high = low.clamp(max=0), high.clamp(min=0)
            most = max(-low.item(), high.item()) if symmetric or zero_point == "int" else part.abs().max().item()
            losses = []
            for i in range(10):
                limit = most * (1 - i / 20)
                tried = grid(low.clamp(min=-limit), high.clamp(max=limit), 3, zero_point, symmetric)
                error = dequantize(nearest(part, *tried, 3), *tried) - part
                losses.append(((seen @ error.T) ** 2).mean().item())
            got = dequantize(
                nearest(part, made.scales[r : r + 1, g : g + 1], made.zeros[r : r + 1, g : g + 1], 3),
                made.scales[r : r + 1, g : g + 1],
                made.zeros[r : r + 1, g : g + 1],
            )
            assert ((seen @ (got - part).T) ** 2).mean().item() == pytest.approx(min(losses), rel=1e-9)


def test_without_scale_and_cut_it_is_rounding_to_nearest():
    model = quantize(llama(), config(scale=False, clip=False))
    assert torch.equal(logits(model), logits(quantize(llama(), RTNConfig(bits=3, group_size=16, zero_point="int"))))


def test_scales_lower_the_error_of_a_model_with_large_channels():
    plain = llama(seed=3)
    with torch.no_grad():
        for block in plain.model.layers:
            for norm in (block.input_layernorm, block.post_attention_layernorm):
                norm.weight[::8] *= 12
    want = logits(plain)
    errors = {}
    for scale in (False, True):
        model = quantize(copy.deepcopy(plain), config(scale=scale, clip=False))
        errors[scale] = (logits(model) - want).norm().item()
    assert errors[True] < 0.9 * errors[False]


def test_queries_and_keys_are_not_cut():
    model, whole = quantize(llama(), config(scale=False)), quantize(llama(), config(scale=False, clip=False))
    changed = {
        name.rpartition(".")[2]
        for (name, a), b in zip(quantized_layers(model).items(), quantized_layers(whole).values(), strict=True)
        if name.startswith("model.layers.0.self_attn") and not torch.equal(a.scales, b.scales)
    }
    assert changed and not changed & {"q_proj", "k_proj"}


def test_moving_a_scale_by_rows_is_exact():
    def visit(block):
        stage = next(s for s in block.stages if s[0].endswith("down_proj"))
        before = block.run(block.samples[0])
        scales = 2.0 ** torch.randint(-2, 3, (64,))
        moved(block, stage, lambda s: scale_rows(block, "mlp.up_proj", 1 / s), scales)
        assert torch.equal(block.run(block.samples[0]), before)

    blocks(llama(), visit)


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="search_rows is 0 but must be in"):
        config(search_rows=0)
