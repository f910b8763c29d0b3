"""Quantised models through the kernels of hfext_lowbit, in Triton's interpreter: a process of its own, as Triton reads
the variable when it is imported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hfext.quantization import _cpu_kernels

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("triton")

SCRIPT = """
import copy, json, sys
import torch
from torch.nn import functional as F
sys.path.insert(0, "tests")
from quantization_cases import llama
from hfext.quantization import set_kernel
from hfext.quantization._quantizer import quantize, quantized_layers
from hfext.quantization.rtn import RTNConfig

assert not [name for name in sys.modules if name.startswith("hfext_lowbit")], "import hfext must stay cheap"
ids = torch.tensor([[0, 0, 5, 9, 23, 4, 7], [3, 14, 15, 92, 6, 5, 3]])
mask = (ids != 0).long()
found = {}
for bits in (2, 3, 4, 8):
    model = quantize(llama(), RTNConfig(bits=bits, group_size=16))
    layers = len(quantized_layers(model))
    set_kernel(model, "dequantize")
    with torch.no_grad():
        wanted = model(input_ids=ids, attention_mask=mask).logits
    options = dict(attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    tokens = model.generate(ids, **options)
    set_kernel(model, "auto")
    from hfext_lowbit._launch import launches
    launches.clear()
    with torch.no_grad():
        got = model(input_ids=ids, attention_mask=mask).logits
    count = launches["gemm_kernel"]
    launches.clear()
    same = torch.equal(model.generate(ids, **options), tokens)
    found[bits] = dict(
        error=((got - wanted)[mask.bool()].abs().max() / wanted.abs().max()).item(),
        layers=layers, launched=count, same_tokens=same, decoded=launches["gemv_kernel"],
    )

model = quantize(llama(), RTNConfig(bits=4, group_size=16))
layer = next(iter(quantized_layers(model).values()))
x = torch.randn(2, layer.in_features)
launches.clear()
layer(x.requires_grad_()).sum().backward()
found["gradient"] = dict(launched=sum(launches.values()), error=(
    x.grad - torch.ones(2, layer.out_features) @ layer.dequantized(torch.float32)).abs().max().item())
with torch.no_grad():
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    wanted = F.linear(x, layer.dequantized(torch.float32))
    found["compiled"] = dict(launched=launches["gemv_kernel"], error=(compiled - wanted).abs().max().item())
    launches.clear()
    layer(x.double())
    half = layer(x.bfloat16())
    found["types"] = dict(launched=launches["gemv_kernel"], error=(half - wanted).abs().max().item())
print("FOUND " + json.dumps(found))
"""


@pytest.fixture(scope="module")
def found():
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, cwd=ROOT, env=env)
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert lines, done.stderr[-3000:]
    return json.loads(lines[0].removeprefix("FOUND "))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_logits_and_tokens_are_those_of_dequantised_weights(found, bits):
    case = found[str(bits)]
    assert case["launched"] == case["layers"] > 0
    assert case["decoded"] >= 3 * case["layers"]
    assert case["error"] < 2e-6
    assert case["same_tokens"]


def test_training_keeps_its_own_path(found):
    assert found["gradient"]["launched"] == 0 and found["gradient"]["error"] < 1e-5


def test_it_compiles_without_graph_breaks(found):
    assert found["compiled"]["launched"] == 1 and found["compiled"]["error"] < 1e-5


def test_half_types_take_the_kernel_and_float64_does_not(found):
    assert found["types"]["launched"] == 1 and found["types"]["error"] < 0.05


def test_without_the_package_weights_are_dequantised(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "hfext_lowbit", None)
    _cpu_kernels._has_lowbit.cache_clear()
    try:
        assert not _cpu_kernels.has_lowbit()
    finally:
        _cpu_kernels._has_lowbit.cache_clear()


def test_on_the_cpu_nothing_is_imported(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(_cpu_kernels, "has_lowbit", lambda: pytest.fail("asked for the kernels"))
    from hfext.quantization import QuantLinear

    with torch.no_grad():
        assert QuantLinear(32, 16, 4, 16)(torch.ones(1, 32)).shape == (1, 16)
