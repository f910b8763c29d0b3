"""Time of statistical top-k, Spark attention and the sparse feed-forward path against what they stand in for.

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
from torch.nn import functional as F

try:
    import hfext_spark
except ImportError:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "torch-ext"))
    import hfext_spark
from hfext_spark import _reference, spark_attention, spark_ffn, statistical_topk

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def timed(run) -> dict:
    """Milliseconds: median, 20th and 80th percentile of 20 runs."""
    if DEVICE == "cuda":
        from triton.testing import do_bench

        once = do_bench(run, warmup=5, rep=20, return_mode="median")
        times = do_bench(run, warmup=25, rep=max(1, int(20 * once)), return_mode="all")
    else:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - start))
    cut = statistics.quantiles(times, n=5)
    return {"ms": statistics.median(times), "ms_20": cut[0], "ms_80": cut[-1], "runs": len(times)}


def check(dtype) -> dict:
    """Largest relative errors against float64, outputs and gradients, and whether bits repeat."""
    given = [torch.randn(1, h, 256, 64, device=DEVICE).to(dtype).requires_grad_() for h in (4, 2, 2)]
    do = torch.randn(1, 256, 4, 64, device=DEVICE).to(dtype)
    found = []
    for _ in range(2):
        out = spark_attention(*given, 32, r=32, halves=True, causal=True)
        found.append([out, *torch.autograd.grad(out, given, do)])
    exact = [t.detach().double().requires_grad_() for t in given]
    hi = torch.arange(1, 257, device=DEVICE, dtype=torch.int32)[None]
    out = _reference.attention(*exact, 32, 32, True, True, True, 64**-0.5, torch.zeros_like(hi), hi)
    errors = [
        ((a.double() - b).norm() / b.norm()).item()
        for a, b in zip(found[0], [out, *torch.autograd.grad(out, exact, do.double())], strict=True)
    ]
    same = all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    limit = 1e-4 if dtype == torch.float32 else 3e-2
    if max(errors) > limit or not same:
        raise SystemExit(f"{dtype}: errors {errors} above {limit}, or not the same bits twice ({same}).")
    return {"dtype": str(dtype), "errors of o, dq, dk, dv": errors, "bitwise": same}


def attention(M, N, D, dtype) -> dict:
    q, k, v = (torch.randn(1, h, n, D, device=DEVICE).to(dtype) for h, n in ((16, M), (4, N), (4, N)))
    keys, values = (x.repeat_interleave(4, 1) for x in (k, v))
    causal = M > 1
    row = {"queries, keys, D": (M, N, D), "dtype": str(dtype)}
    row["spark"] = timed(lambda: spark_attention(q, k, v, 256, r=D // 2, halves=True, causal=causal))
    row["topk"] = timed(lambda: spark_attention(q, k, v, 256, gate=False, causal=causal))
    row["sdpa"] = timed(lambda: F.scaled_dot_product_attention(q, keys, values, is_causal=causal))
    if causal:
        leaves = [x.requires_grad_() for x in (q, k, v)]
        o = spark_attention(*leaves, 256, r=D // 2, halves=True, causal=True)
        do = torch.randn_like(o)
        row["spark backward"] = timed(lambda: torch.autograd.grad(o, leaves, do, retain_graph=True))
    return row


def feed_forward(tokens, d, units, dtype) -> dict:
    r, k = d * 4 // 9, round(0.08 * units)
    x, k1, k2, v = (
        torch.randn(s, device=DEVICE).to(dtype) for s in ((tokens, d), (units, r), (units, d - r), (units, d))
    )
    row = {"tokens, d_model, d_ff": (tokens, d, units), "dtype": str(dtype)}
    row["sparse"] = timed(lambda: spark_ffn(x, k1, k2, v, k))
    row["the same, dense"] = timed(lambda: _reference.spark_ffn(x, k1, k2, v, k, True))
    return row


def top(rows, width, dtype) -> dict:
    x = torch.randn(rows, width, device=DEVICE).to(dtype)
    row = {"rows, width": (rows, width), "dtype": str(dtype)}
    row["statistical"] = timed(lambda: statistical_topk(x, 0.08 * width))
    row["torch.topk"] = timed(lambda: x.topk(int(0.08 * width), -1))
    return row


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    out = parser.parse_args().out
    torch.manual_seed(0)
    gpu = DEVICE == "cuda"
    shapes = [(8192, 8192, 128), (4096, 4096, 256), (1, 65536, 128)] if gpu else [(64, 64, 32), (1, 256, 32)]
    layers = [(1, 2304, 13824), (4, 2304, 13824)] if gpu else [(1, 256, 1024)]
    dtypes = (torch.float32, torch.bfloat16)
    result = {
        "device": torch.cuda.get_device_name() if gpu else platform.processor() or "cpu",
        "torch": torch.__version__,
        "triton": getattr(sys.modules.get("triton"), "__version__", None),
        "package": hfext_spark.__name__,
        "checks": [check(dtype) for dtype in dtypes],
        "attention": [attention(*shape, torch.bfloat16) for shape in shapes],
        "feed-forward": [feed_forward(*layer, dtype) for layer in layers for dtype in dtypes],
        "top-k": [top(8192 if gpu else 64, 13824 if gpu else 512, dtype) for dtype in dtypes],
    }
    text = json.dumps(result, indent=1)
    if out:
        out.write_text(text + "\n")
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
