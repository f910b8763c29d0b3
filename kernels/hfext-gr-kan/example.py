"""A group-rational activation that begins as SiLU and learns. Run with this package on the path."""

import torch
from hfext_gr_kan import rational

device = "cuda" if torch.cuda.is_available() else "cpu"
swish = [3.0548797e-07, 0.50000079, 0.24999783, 0.053266283, 0.0058030346, 0.0002751961]
below = [-4.111555e-06, 0.10652899, -1.2690007e-06, 0.00055023313]
numerator = torch.tensor([swish], device=device, requires_grad=True)  # one for all groups
denominator = torch.tensor([below] * 8, device=device, requires_grad=True)  # one for each of 8 groups

x = torch.randn(64, 768, device=device)
y = rational(x, numerator, denominator)
error = (y - torch.nn.functional.silu(x)).abs().max().item()
y.square().mean().backward()
print(f"largest distance to SiLU {error:.1e}, gradient of the numerator {numerator.grad[0].tolist()}")  # noqa: T201
