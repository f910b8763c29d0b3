"""Stick-breaking attention on one GPU, against SDPA's flash kernel (softmax) and the formula in plain torch: one JSON.

    python benchmarks/benchmark.py [--out FILE] [--rounds N]

bf16, random normal data. Every case is compared with fp64 on a slice first. Then all sides of a case are timed in
turns, with the L2 cache flushed before each call (`triton.testing.do_bench`); percentiles 20, 50 and 80. TFLOP/s count
4 M N D H B / 2 products forward and 2.5 times that backward, as for causal softmax attention.
"""

import argparse
import json
import platform
import sys
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

try:
    import hfext_stickbreaking  # noqa: F401
except ImportError:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "torch-ext"))
    import hfext_stickbreaking  # noqa: F401
from hfext_stickbreaking import _reference, stickbreaking_attention

ROUNDS = 20
SHAPES = ((64, 2048), (64, 8192), (128, 2048), (128, 8192), (128, 16384))
COPY = 4.3e12  # bytes a second that an H200 reaches in a copy


def timed(sides, rounds):
    """Percentiles 20, 50 and 80 in milliseconds of each side, in turns; a side that cannot run is left out."""
    from triton.testing import do_bench

    times = {}
    for name, run in sides.items():
        try:
            run()
            times[name] = []
        except (RuntimeError, NotImplementedError, ValueError) as error:
            sys.stderr.write(f"{name}: {str(error)[:200]}\n")
    for _ in range(rounds):
        for name in times:
            times[name].append(do_bench(sides[name], warmup=3, rep=10, return_mode="median"))
    cut = torch.tensor([0.2, 0.5, 0.8])
    return {name: torch.tensor(found).quantile(cut).tolist() for name, found in times.items()}


def tensors(B, H, HK, M, N, D, learns=False):
    shape = ((H, M), (HK, N), (HK, N))
    return [torch.randn(B, t, h, D, device="cuda").bfloat16().transpose(1, 2).requires_grad_(learns) for h, t in shape]


def plain(q, k, v):
    n = q.shape[2]
    hi = torch.arange(n, device="cuda", dtype=torch.int32)[None]
    return _reference.stickbreaking(q, k, v, q.shape[-1] ** -0.5, torch.zeros_like(hi), hi)[0]


def check(out, q, k, v, rows):
    """Some last rows of the first head against fp64."""
    parts = q[:1, :1, -rows:].double(), k[:1, :1].double(), v[:1, :1].double()
    n = k.shape[2]
    hi = torch.arange(n - rows, n, device="cuda", dtype=torch.int32)[None]
    exact, _ = _reference.stickbreaking(*parts, q.shape[-1] ** -0.5, torch.zeros_like(hi), hi)
    error = (out[:1, -rows:, :1].double() - exact).abs().max().item()
    if not error < 2e-2:
        raise RuntimeError(f"The kernel is wrong by {error:.1e}.")
    return error


def backwards(forward, leaves):
    out = forward()
    grad = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)


def training(rounds):
    rows = []
    for D, N in SHAPES:
        H = 2048 // D
        q, k, v = tensors(16384 // N, H, H, N, N, D, learns=True)

        def flash(q=q, k=k, v=v):
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        forwards = {"ours": lambda q=q, k=k, v=v: stickbreaking_attention(q, k, v), "softmax, flash": flash}
        if N <= 2048:
            forwards["plain torch"] = lambda q=q, k=k, v=v: plain(q, k, v)
        error = check(forwards["ours"]().detach(), q, k, v, 64)
        flops = 4 * q.shape[0] * H * N * N * D / 2
        both = {name: backwards(run, [q, k, v]) for name, run in forwards.items()}
        for direction, runs, work in (("forward", forwards, flops), ("backward", both, 2.5 * flops)):
            times = timed(runs, rounds)
            speed = {name: work / t[1] / 1e9 for name, t in times.items()}
            case = f"{direction} D{D} causal {N // 1024}k"
            row = {"name": case, "unit": "TFLOP/s", "value": speed["ours"], "ms": times, "all": speed, "error": error}
            rows.append(row)
        del both
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = forwards["ours"]()
        torch.autograd.grad(out, [q, k, v], out.detach())
        peak = (torch.cuda.max_memory_allocated() - before) / 2**20
        rows.append({"name": f"memory, both ways, D{D} {N // 1024}k", "unit": "MiB", "value": peak})
        torch.cuda.empty_cache()
    return rows


def decoding(rounds):
    """One token over 512 MB of keys and values."""
    B, H, HK, D = 8, 32, 8, 128
    N = 512 * 2**20 // (2 * 2 * B * HK * D)
    q, k, v = tensors(B, H, HK, 1, N, D)
    with torch.no_grad():
        error = check(stickbreaking_attention(q, k, v), q, k, v, 1)
        times = timed({"ours": lambda: stickbreaking_attention(q, k, v)}, rounds)
    share = 100 * 2 * k.numel() * 2 / (times["ours"][1] * 1e-3) / COPY
    return [{"name": "decode bf16, 512 MB", "unit": "% of 4.3 TB/s", "value": share, "ms": times, "error": error}]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("The benchmark needs a CUDA device.")
    import triton

    torch.manual_seed(0)
    rows = [{**row, "bar": None} for row in training(options.rounds) + decoding(options.rounds)]
    versions = {"torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version()}
    result = {"device": torch.cuda.get_device_name(), "versions": versions, "rounds": options.rounds, "rows": rows}
    text = json.dumps(result, indent=2)
    if options.out:
        options.out.write_text(text + "\n")
    else:
        print(text)  # noqa: T201


if __name__ == "__main__":
    main()
