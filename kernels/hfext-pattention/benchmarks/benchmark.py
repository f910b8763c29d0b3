"""Time and memory of Pattention against the same formula in plain torch operations.

`python benchmark.py [--out FILE]` prints and writes one JSON. Values are compared with float64 before anything is
timed. L2 is flushed before each run; medians and the 20th and 80th percentiles. Without a GPU it times the plain torch
path at small sizes, to show that it runs.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

try:
    import hfext_pattention
except ImportError:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "torch-ext"))
    import hfext_pattention
from hfext_pattention import pattention, pattention_reference

# Rows, tokens, width in, width out: a feed-forward layer and a projection of TokenFormer-150M, and one of the 757M.
SHAPES = ((8192, 3072, 768, 768), (8192, 768, 768, 768), (8192, 7168, 1024, 1024))


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


def inputs(shape, dtype, device):
    rows, tokens, d_in, d_out = shape
    sizes = ((rows, d_in), (tokens, d_in), (tokens, d_out))
    return [torch.randn(size, device=device).to(dtype).requires_grad_() for size in sizes]


def check(dtype, device) -> dict:
    """Largest relative errors of output and gradients against float64."""
    given = inputs((256, 384, 128, 96), dtype, device)
    grad = torch.randn(256, 96, device=device).to(dtype)
    found, errors = [], []
    for _ in range(2):
        out = pattention(*given)
        found.append([out, *torch.autograd.grad(out, given, grad)])
    exact = [t.detach().double().requires_grad_() for t in given]
    out = pattention_reference(*exact)
    for one, two in zip(found[0], [out, *torch.autograd.grad(out, exact, grad.double())], strict=True):
        errors.append(((one.double() - two).abs().max() / two.abs().max()).item())
    same = all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    if max(errors) > limit or not same:
        raise SystemExit(f"{dtype}: errors {errors} above {limit}, or not the same bits twice ({same}).")
    return {"dtype": str(dtype), "errors of o, dx, dk, dv": errors, "bitwise": same}


def memory(run):
    """MiB above what was there before, at the peak of one forward and backward pass."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def compare(shape, dtype, device) -> dict:
    given = inputs(shape, dtype, device)
    row = {"rows, tokens, in, out": shape, "dtype": str(dtype)}
    compiled = torch.compile(pattention_reference) if device == "cuda" else pattention_reference
    for name, function in (("fused", pattention), ("plain", pattention_reference), ("compiled", compiled)):
        out = function(*given)
        grad = torch.randn_like(out)

        def step(function=function, grad=grad):
            return torch.autograd.grad(function(*given), given, grad)

        row[name] = {"forward": timed(lambda function=function: function(*given)), "step": timed(step)}
        row[name]["peak MiB"] = memory(step)
    return row


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    out = parser.parse_args().out
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shapes = SHAPES if device == "cuda" else ((128, 256, 64, 64),)
    torch.manual_seed(0)
    dtypes = (torch.float32, torch.bfloat16)
    result = {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "cpu",
        "torch": torch.__version__,
        "triton": getattr(sys.modules.get("triton"), "__version__", None),
        "package": hfext_pattention.__name__,
        "checks": [check(dtype, device) for dtype in dtypes],
        "times": [compare(shape, dtype, device) for shape in shapes for dtype in dtypes],
    }
    result["rows"] = [
        {
            "name": f"step of {row['rows, tokens, in, out']} {row['dtype']} against compiled torch",
            "value": row["compiled"]["step"]["ms"] / row["fused"]["step"]["ms"],
            "unit": "times",
            "bar": None,
        }
        for row in result["times"]
    ]
    text = json.dumps(result, indent=1)
    if out:
        out.write_text(text + "\n")
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
