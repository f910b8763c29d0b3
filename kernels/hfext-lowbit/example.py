"""A linear layer of 4096 x 14336 with random weights of 4 bits in groups of 64, one token.

PYTHONPATH=torch-ext python example.py
"""

import torch
from hfext_lowbit import dequantize, quantized_linear

device = "cuda" if torch.cuda.is_available() else "cpu"
rows, inputs, bits, group = 4096, 14336, 4, 64
generator = torch.Generator().manual_seed(0)
qweight = torch.randint(0, 256, (rows, inputs * bits // 8), dtype=torch.uint8, generator=generator).to(device)
scales = (torch.rand(rows, inputs // group, generator=generator) / 2**bits).half().to(device)
zeros = (-0.5 * torch.rand(rows, inputs // group, generator=generator)).half().to(device)
x = torch.randn(1, inputs, generator=generator).bfloat16().to(device)

y = quantized_linear(x, qweight, scales, zeros, bits, group)
wanted = x.double() @ dequantize(qweight, scales, zeros, bits, group, inputs, torch.float64).mT
error = (y.double() - wanted).abs().max() / wanted.abs().max()
print(f"{tuple(x.shape)} -> {tuple(y.shape)} on {device}, largest error {error:.1e} of the largest output")  # noqa: T201
