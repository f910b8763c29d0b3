"""Stick-breaking attention, trained a step, and one token decoded."""

import torch
from hfext_stickbreaking import stickbreaking_attention

device = "cuda" if torch.cuda.is_available() else "cpu"
q, k, v = (torch.randn(1, heads, 128, 64, device=device, requires_grad=True) for heads in (8, 2, 2))

out, rest = stickbreaking_attention(q, k, v, attend_current=True, return_remainder=True)
out.square().mean().backward()
assert out.shape == (1, 128, 8, 64) and rest.shape == (1, 8, 128) and q.grad.abs().max() > 0

with torch.no_grad():
    last = stickbreaking_attention(q[:, :, -1:], k, v, attend_current=True)
assert (last - out[:, -1:]).abs().max() < 1e-5
