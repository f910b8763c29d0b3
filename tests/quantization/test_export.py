"""Export to compressed-tensors: the library's own reader gets the same integers and the same model."""

import json

import pytest
import torch
from quantization_cases import MODELS, data, llama
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

import hfext
from hfext.quantization import _export
from hfext.quantization._affine import Quantized
from hfext.quantization._export import export_compressed_tensors, words
from hfext.quantization._linear import QuantLinear
from hfext.quantization._quantizer import quantize, quantized_layers
from hfext.quantization.hqq import HQQConfig
from hfext.quantization.lorc import LoRCConfig
from hfext.quantization.rtn import RTNConfig

SYMMETRIC = RTNConfig(group_size=16, symmetric=True)
IDS = data(rows=2, tokens=24, seed=1)
GRIDS = {"int": dict(zero_point="int"), "symmetric": dict(symmetric=True)}


@torch.no_grad()
def logits(model):
    return model(IDS).logits.float()


def model(bits=4, group_size=32, grid="int", kind="biases", **options):
    made = MODELS[kind]() if kind != "wide" else llama(hidden_size=64, intermediate_size=96)
    return quantize(made, RTNConfig(bits=bits, group_size=group_size, **GRIDS[grid], **options))


def test_words_are_the_formula():
    codes = torch.randint(0, 16, (3, 13), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    for bits in (4, 8):
        each = 32 // bits
        for row, got in zip(codes.tolist(), words(codes, bits).tolist(), strict=True):
            row += [0] * (-len(row) % each)
            want = [sum(c << (bits * k) for k, c in enumerate(row[i : i + each])) for i in range(0, len(row), each)]
            assert [word % 2**32 for word in got] == want


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [16, -1])
def test_the_library_reads_the_same_integers_and_the_same_model(grid, bits, group_size, tmp_path):
    library = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    made = model(bits, group_size, grid)
    before = {key: x.clone() for key, x in made.state_dict().items()}
    export_compressed_tensors(made, tmp_path / "out")
    assert all(torch.equal(x, made.state_dict()[key]) for key, x in before.items())
    written = load_file(tmp_path / "out" / "model.safetensors")
    middle = 2 ** (bits - 1)
    for name, layer in quantized_layers(made).items():
        shape = written[f"{name}.weight_shape"]
        assert shape.tolist() == [layer.out_features, layer.in_features]
        codes = library.unpack_from_int32(written[f"{name}.weight_packed"], bits, shape)
        assert torch.equal(codes.int() + middle, layer.codes.int())
        assert torch.equal(library.pack_to_int32(codes, bits), written[f"{name}.weight_packed"])
        points = torch.zeros(layer.scales.shape)
        if grid == "int":
            packed = written[f"{name}.weight_zero_point"]
            points = library.unpack_from_int32(packed, bits, torch.Size(layer.scales.shape), packed_dim=0)
            assert torch.equal(library.pack_to_int32(points, bits, packed_dim=0), packed)
        else:
            assert f"{name}.weight_zero_point" not in written
        scales, points = (t.float().repeat_interleave(layer.group_size, 1) for t in (layer.scales, points))
        rounding = 2**-10 * layer.zeros.abs().max().item()
        torch.testing.assert_close((codes - points) * scales, layer.weight.data, atol=rounding, rtol=0)
    want = logits(made)
    # It rounds weights to the type of the scales, float16.
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, **options)
    assert not any("weight_packed" in key for key in dense.state_dict())
    assert (logits(dense) - want).norm() <= 2e-3 * want.norm()
    if grid == "symmetric":
        packed = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
        assert any("weight_packed" in key for key in packed.state_dict())
        torch.testing.assert_close(logits(packed), want, atol=1e-6, rtol=1e-6)


def test_the_config_is_what_the_library_writes(tmp_path):
    library = pytest.importorskip("compressed_tensors.quantization")
    made = model(bits=4, group_size=16)
    export_compressed_tensors(made, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    weights = library.QuantizationArgs(num_bits=4, symmetric=False, strategy="group", group_size=16)
    scheme = library.QuantizationScheme(targets=["Linear"], weights=weights, format="pack-quantized")
    theirs = library.QuantizationConfig(
        config_groups={"group_0": scheme},
        format="pack-quantized",
        quantization_status="compressed",
        ignore=["lm_head"],
    ).to_dict()
    known = {key: theirs[key] for key in written}
    assert written == json.loads(json.dumps(known))
    assert not {key for key, value in theirs.items() if key not in written and value is not None}


def test_widths_by_layer_are_groups_of_the_config(tmp_path):
    pytest.importorskip("compressed_tensors")
    plain = llama(tie_word_embeddings=True)
    names = list(quantized_layers(quantize(llama(), RTNConfig(group_size=16))))
    bits = {name: 8 if "mlp" in name else 4 for name in names} | {names[0]: 16}
    made = quantize(plain, RTNConfig(bits=bits, group_size=16, symmetric=True))
    export_compressed_tensors(made, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert {g["weights"]["num_bits"] for g in written["config_groups"].values()} == {4, 8}
    assert set(written["ignore"]) == {names[0], "lm_head"}
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(logits(theirs), logits(made), atol=1e-5, rtol=1e-5)


def test_only_the_whole_folder_appears(tmp_path, monkeypatch):
    made = model(group_size=16)
    monkeypatch.setattr(_export, "quantization_config", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_compressed_tensors(made, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    (tmp_path / "out").mkdir()
    export_compressed_tensors(made, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors"} <= names
    with pytest.raises(ValueError, match="exists already"):
        export_compressed_tensors(made, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_tokenizer_is_saved_beside(tmp_path):
    class Tokenizer:
        def save_pretrained(self, folder):
            (folder / "tokenizer.json").write_text("{}")

    export_compressed_tensors(model(group_size=16), tmp_path / "out", tokenizer=Tokenizer())
    assert (tmp_path / "out" / "tokenizer.json").is_file()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16", "float32"])
def test_zero_points_of_stored_numbers_are_those_of_the_method(bits, scale_dtype):
    generator = torch.Generator().manual_seed(bits)
    points = torch.randint(0, 2**bits, (32, 4), generator=generator)
    if scale_dtype == "bfloat16" and bits == 8:
        points = points // 4  # beyond, neighbours round to the same number
    scales = torch.rand(32, 4, generator=generator) * 10.0 ** torch.randint(-5, 1, (32, 4), generator=generator) + 2e-5
    layer = QuantLinear(64, 32, bits, 16, scale_dtype=getattr(torch, scale_dtype))
    layer.store(Quantized(torch.zeros(32, 64, dtype=torch.uint8), scales, -scales * points))
    if scale_dtype == "float16":
        scales.clamp_(min=1e-3)
        layer.store(Quantized(torch.zeros(32, 64, dtype=torch.uint8), scales, -scales * points))
    assert torch.equal(_export.zero_points(layer, "x").long(), points)
    layer.zeros.data += 0.3 * layer.scales.data
    with pytest.raises(ValueError, match='zero_point="int" or symmetric=True'):
        _export.zero_points(layer, "x")


def test_what_cannot_be_exported_is_named(tmp_path):
    out = tmp_path / "out"
    for made, error, problem in (
        (llama(), ValueError, "no layers that hfext has quantised"),
        (quantize(llama(), RTNConfig(group_size=16, zero_point="float")), ValueError, "or symmetric=True"),
        (quantize(llama(), HQQConfig(group_size=16)), ValueError, 'zero_point="int" or symmetric=True'),
        (model(bits=2, group_size=16), ValueError, "2 bits, but 4 and 8"),
        (model(kind="mixtral", group_size=16), NotImplementedError, "Stacked experts"),
        (model(kind="mixtral", group_size=16, modules_to_not_convert=["experts"]), NotImplementedError, "Stacked"),
        (quantize(llama(), LoRCConfig(quantizer=SYMMETRIC)), NotImplementedError, "LoRCLinear"),
    ):
        with pytest.raises(error, match=problem):
            export_compressed_tensors(made, out)
    cached = quantize(llama(), RTNConfig(group_size=16, symmetric=True))
    hfext.compression.adopt(cached, hfext.kv_cache.KIVIConfig(group_size=4))
    with pytest.raises(NotImplementedError, match="compressed cache"):
        export_compressed_tensors(cached, out)
    assert not list(tmp_path.iterdir())
