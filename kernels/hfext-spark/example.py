"""A layer that uses 8 % of its units, and attention to about 32 of 512 keys. Run with this package on the path."""

import torch
from hfext_spark import spark_attention, spark_ffn, statistical_topk

device = "cuda" if torch.cuda.is_available() else "cpu"
x = torch.randn(4, 256, device=device)
predictor, gate = torch.randn(1024, 128, device=device), torch.randn(1024, 128, device=device)
value = torch.randn(1024, 256, device=device) / 32

used = (statistical_topk(x[:, :128] @ predictor.T, 82) > 0).sum(-1)
y = spark_ffn(x, predictor, gate, value, k=82)
print(f"units that four tokens use, of 1024: {used.tolist()}; output {tuple(y.shape)}")  # noqa: T201

q, k, v = (torch.randn(1, heads, 512, 64, device=device, requires_grad=True) for heads in (4, 2, 2))
o = spark_attention(q, k, v, 32, r=32, causal=True)
o.square().mean().backward()
print(f"attention {tuple(o.shape)}, gradient of the keys {k.grad.norm().item():.2e}")  # noqa: T201
