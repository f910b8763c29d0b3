"""A layer of tokens that grows without changing what it computes. Run with this package on the path."""

import torch
from hfext_pattention import pattention

device = "cuda" if torch.cuda.is_available() else "cpu"
x = torch.randn(64, 256, device=device)
keys = (0.02 * torch.randn(512, 256, device=device)).requires_grad_()
values = torch.randn(512, 256, device=device).requires_grad_()
tau = 512**0.5

y = pattention(x, keys, values, tau)
y.square().mean().backward()
more_keys = torch.cat([keys, torch.zeros(512, 256, device=device)])
more_values = torch.cat([values, torch.randn(512, 256, device=device)])
change = (pattention(x, more_keys, more_values, tau) - y).abs().max().item()
print(f"512 tokens and 1024: the outputs differ by {change:.1e}")  # noqa: T201
