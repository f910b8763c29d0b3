"""Causal attention with a soft cap and sinks, trained a step, and one token decoded."""

import torch
from hfext_attention import attention

device = "cuda" if torch.cuda.is_available() else "cpu"
q, k, v = (torch.randn(1, heads, 128, 64, device=device, requires_grad=True) for heads in (8, 2, 2))
sinks = torch.zeros(8, device=device, requires_grad=True)

out = attention(q, k, v, causal=True, window=64, softcap=30.0, sink=sinks)  # [batch, tokens, heads, head_dim]
out.square().mean().backward()
assert out.shape == (1, 128, 8, 64) and sinks.grad.abs().max() > 0

with torch.no_grad():
    last, lse = attention(q[:, :, -1:], k, v, causal=True, return_lse=True)
assert last.shape == (1, 1, 8, 64) and lse.shape == (1, 8, 1)
