"""Bandwidth of the kernels and time of a ViT-B MLP step: `python benchmark.py [--out FILE]`, one JSON.

Values are compared with a float64 reference before anything is timed. L2 is flushed before each of the runs; medians
and the 20th and 80th percentiles. Without a GPU it times the plain torch path at small sizes, to show that it runs.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

try:
    import hfext_gr_kan
except ImportError:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "torch-ext"))
    import hfext_gr_kan
from hfext_gr_kan import rational, rational_reference

PEAK = 4.3e12  # bytes a second that an H200 reaches in a copy
ROWS, CHANNELS, GROUPS = 128 * 196, 3072, 8
BARS = {("forward", "float32"): 0.85, ("forward", "bfloat16"): 0.80}
BARS |= {("backward", "float32"): 0.65, ("backward", "bfloat16"): 0.40}


def timed(run) -> dict:
    """Milliseconds: median, 20th and 80th percentile of 20 runs."""
    if torch.cuda.is_available():
        from triton.testing import do_bench

        run()
        once = do_bench(run, warmup=5, rep=20, return_mode="median")
        times = do_bench(run, warmup=25, rep=max(1, int(20 * once)), return_mode="all")
    else:
        times = []
        for _ in range(3):
            start = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - start))
    cut = statistics.quantiles(times, n=5) if len(times) > 1 else times * 4
    return {"ms": statistics.median(times), "ms_20": cut[0], "ms_80": cut[-1], "runs": len(times)}


def coefficients(device):
    a = torch.randn(1, 6, device=device) / 4
    b = torch.randn(GROUPS, 4, device=device) / 4
    return a.requires_grad_(), b.requires_grad_()


def check(dtype, device) -> dict:
    """Largest relative errors of value and gradients against float64, on 1024 rows."""
    x = torch.randn(1024, CHANNELS, device=device).to(dtype).requires_grad_()
    a, b = coefficients(device)
    grad = torch.randn(x.shape, device=device).to(dtype)
    y = rational(x, a, b)
    ours = [y, *torch.autograd.grad(y, (x, a, b), grad)]
    again = torch.autograd.grad(rational(x, a, b), (x, a, b), grad)
    exact = [t.detach().double().requires_grad_() for t in (x, a, b)]
    z = rational_reference(*exact)
    theirs = [z, *torch.autograd.grad(z, exact, grad.double())]
    errors = [((p.double() - q).abs().max() / q.abs().max()).item() for p, q in zip(ours, theirs, strict=True)]
    limits = [2e-6, 5e-6, 1e-5, 1e-5] if dtype == torch.float32 else [2**-8, 2**-8, 1e-5, 1e-5]
    same = all(torch.equal(p, q) for p, q in zip(ours[1:], again, strict=True))
    if not same or any(e > limit for e, limit in zip(errors, limits, strict=True)):
        raise SystemExit(f"{dtype}: errors {errors} above {limits}, or not the same bits twice ({same}).")
    return {"dtype": str(dtype), "errors of y, dx, da, db": errors, "bitwise": same}


def bandwidth(dtype, rows, device) -> list:
    x = torch.randn(rows, CHANNELS, device=device).to(dtype).requires_grad_()
    a, b = coefficients(device)
    grad = torch.randn(x.shape, device=device).to(dtype)
    y = rational(x, a, b)
    name = str(dtype).replace("torch.", "")
    found = []
    for op, tensors, run in (
        ("forward", 2, lambda: rational(x.detach(), a.detach(), b.detach())),
        ("backward", 3, lambda: torch.autograd.grad(y, (x, a, b), grad, retain_graph=True)),
        ("GELU forward", 2, lambda: F.gelu(x.detach())),
    ):
        row = timed(run)
        speed = tensors * x.nbytes / row["ms"] * 1e3
        bar = BARS.get((op, name))
        found.append({"op": op, "dtype": name, **row, "GB/s": speed / 1e9, "of_peak": speed / PEAK, "bar": bar})
    return found


class RationalMLP(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        for i, first in enumerate((0.0, 0.5)):
            setattr(self, f"a{i}", nn.Parameter(torch.tensor([[first, 1 - first, 0.0, 0.0, 0.0, 0.0]])))
            setattr(self, f"b{i}", nn.Parameter(torch.zeros(GROUPS, 4)))

    def forward(self, x):
        return self.fc2(rational(self.fc1(rational(x, self.a0, self.b0)), self.a1, self.b1))


def mlp_step(rows, width, dtype, device) -> dict:
    """Forward and backward of one MLP of ViT-B, with GELU and with two rational activations."""
    x = torch.randn(rows, width, device=device, dtype=dtype, requires_grad=True)
    dense = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)).to(device, dtype)
    ours = RationalMLP(width).to(device, dtype)
    row = {}
    for name, model in (("GELU", dense), ("GR-KAN", ours)):
        row[name] = timed(lambda model=model: model(x).sum().backward())
    return {**row, "ratio": row["GR-KAN"]["ms"] / row["GELU"]["ms"], "bar": 1.15, "dtype": str(dtype)}


def summary(bandwidth, step) -> list:
    """What `hfext bench kernels` shows: a name, a value, its unit and bar, and whether it is met."""
    rows = []
    for row in bandwidth:
        value, bar = 100 * row["of_peak"], row["bar"] and 100 * row["bar"]
        met = None if bar is None else value >= bar
        rows.append(
            {"name": f"{row['op']} {row['dtype']}", "value": value, "unit": "% of 4.3 TB/s", "bar": bar, "met": met}
        )
    name = "ViT-B MLP step against GELU"
    met = step["ratio"] <= step["bar"]
    return [*rows, {"name": name, "value": step["ratio"], "unit": "times, at most", "bar": step["bar"], "met": met}]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    out = parser.parse_args().out
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = ROWS if device == "cuda" else 128
    torch.manual_seed(0)
    dtypes = (torch.float32, torch.bfloat16)
    result = {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "cpu",
        "torch": torch.__version__,
        "triton": getattr(sys.modules.get("triton"), "__version__", None),
        "package": hfext_gr_kan.__name__,
        "shape": [rows, CHANNELS],
        "checks": [check(dtype, device) for dtype in dtypes],
        "bandwidth": [row for dtype in dtypes for row in bandwidth(dtype, rows, device)],
        "mlp_step": mlp_step(rows, 768, torch.bfloat16, device),
    }
    result["rows"] = summary(result["bandwidth"], result["mlp_step"])
    text = json.dumps(result, indent=1)
    if out:
        out.write_text(text + "\n")
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
