"""Attention on one GPU against SDPA (flash, cuDNN, dense mask) and compiled FlexAttention: one JSON.

    python benchmarks/benchmark.py [--out FILE] [--quick]

bf16, random normal data. Every case is compared with fp64 on a slice first. Then all sides of a case are timed in
turns, 20 rounds, with the L2 cache flushed before each call (`triton.testing.do_bench`); percentiles 20, 50 and 80.
TFLOP/s count 4 M N D H B products forward, 2.5 times that backward, half when causal.
"""

import argparse
import functools
import json
import platform
import sys
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

try:
    import hfext_attention  # noqa: F401
except ImportError:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "torch-ext"))
    import hfext_attention  # noqa: F401
from hfext_attention import PackedStates, _reference, attention, intervals, packed_attention

ROUNDS = 20
SHAPES = ((128, False, 16384), (128, False, 8192), (128, True, 8192), (64, True, 8192), (64, False, 8192))
COPY = 4.3e12  # bytes a second that an H200 reaches in a copy


def timed(sides, rounds):
    """Percentiles 20, 50 and 80 in milliseconds of each side, in turns; a side that cannot run is left out."""
    from triton.testing import do_bench

    times = {}
    for name, run in list(sides.items()):
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


def check(out, q, k, v, **kw):
    """The first rows of the first head against fp64."""
    rows = min(64, q.shape[2])
    parts = q[:1, :1, :rows].double(), k[:1, :1].double(), v[:1, :1].double()
    for name in ("lo", "hi"):
        if name in kw:
            kw[name] = kw[name][:1, :rows]
    if "sink" in kw:
        kw["sink"] = kw["sink"][:1].double()
    if "keys" in kw:
        kw["keys"] = kw["keys"][:1]
    exact = _reference.attention(*parts, q.shape[-1] ** -0.5, **kw)[0]
    error = (out[:1, :rows, :1].double() - exact).abs().max().item()
    if not error < 2e-2:
        raise RuntimeError(f"The kernel is wrong by {error:.1e}.")
    return error


def sdpa(q, k, v, backend=None, **kw):
    if backend is None:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **kw)
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **kw)


def backwards(forward, q, k, v):
    out = forward()
    grad = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, [q, k, v], grad, retain_graph=True)


def plain(rounds):
    """Forward and backward without modifiers against SDPA's own kernels."""
    bars = {("forward", 128, False, 16384): 470, ("forward", 128, True, 8192): 400, ("forward", 64, True, 8192): 330}
    bars[("backward", 128, False, 8192)] = 320
    ratios = {"forward": (1.15, 0.75), "backward": (1.0, 0.6)}
    rows = []
    for D, causal, N in SHAPES:
        rows += plain_shape(D, causal, N, rounds, bars, ratios)
    return rows


def plain_shape(D, causal, N, rounds, bars, ratios):
    H = 2048 // D
    q, k, v = tensors(16384 // N, H, H, N, N, D, learns=True)
    lo, hi = (x.cuda() for x in intervals(N, N, 0, True)) if causal else (None, None)

    def ours():
        return attention(q, k, v, lo=lo, hi=hi)

    error = check(ours().detach(), q, k, v, **({"lo": lo, "hi": hi} if causal else {}))
    forwards = {"ours": ours}
    for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):
        forwards[name] = functools.partial(sdpa, q, k, v, backend, is_causal=causal)
    flops = 4 * q.shape[0] * H * N * N * D / (2 if causal else 1)
    usable = {}
    for name, run in forwards.items():
        try:
            usable[name] = backwards(run, q, k, v)
        except (RuntimeError, NotImplementedError) as failure:
            sys.stderr.write(f"{name} backward: {str(failure)[:200]}\n")
    rows = []
    for direction, runs, work in (("forward", forwards, flops), ("backward", usable, 2.5 * flops)):
        times = timed(runs, rounds)
        speed = {name: work / t[1] / 1e9 for name, t in times.items()}
        case = f"{direction} D{D} {'causal' if causal else 'full'} {N // 1024}k"
        row = {"name": case, "unit": "TFLOP/s", "value": speed["ours"], "bar": bars.get((direction, D, causal, N))}
        rows.append({**row, "ms": times, "all": speed, "error": error})
        for other, bar in zip(("flash", "cudnn"), ratios[direction], strict=True):
            if other in speed:
                value = speed["ours"] / speed[other]
                rows.append({"name": f"{case} against {other}", "unit": "times", "value": value, "bar": bar})
    return rows


def modified(rounds):
    """Soft cap, sinks, a window and left padding: against FlexAttention, a dense mask, and our own plain kernel."""
    B, H, HK, N, D, W = 2, 16, 8, 8192, 128, 4096
    q, k, v = tensors(B, H, HK, N, N, D, learns=True)
    start = torch.tensor([0, 1024], device="cuda")
    lo, hi = (x.cuda().expand(B, N) for x in intervals(N, N, 0, True))
    window, _ = (x.cuda().expand(B, N) for x in intervals(N, N, 0, True, W))
    padded = torch.maximum(lo, start[:, None]).int().contiguous()
    sink = torch.zeros(H, device="cuda")
    flex = torch.compile(flex_attention)

    def cap(score, b, h, i, j):
        return 30 * torch.tanh(score / 30)

    def causal_mask(b, h, i, j):
        return j <= i

    def window_mask(b, h, i, j):
        return (j <= i) & (j > i - W)

    def padded_mask(b, h, i, j):
        return (j <= i) & (j >= start[b])

    def block(function):
        return create_block_mask(function, B, None, N, N, device="cuda")

    cases = {
        "plain causal": (dict(lo=lo, hi=hi), None, causal_mask),
        "soft cap": (dict(lo=lo, hi=hi, softcap=30.0), cap, causal_mask),
        "sink": (dict(lo=lo, hi=hi, sink=sink), None, None),
        "window 4096": (dict(lo=window, hi=hi), None, window_mask),
        "left padding": (dict(lo=padded, hi=hi), None, padded_mask),
    }
    rows, per_tile = [], {}
    for name, (kw, score, mask) in cases.items():
        forward = lambda kw=kw: attention(q, k, v, **kw)  # noqa: E731
        check(forward().detach(), q, k, v, **{n: x for n, x in kw.items()})
        runs = {"ours": forward}
        if mask is not None:
            blocks = block(mask)
            runs["flex"] = lambda score=score, blocks=blocks: flex(
                q, k, v, score_mod=score, block_mask=blocks, enable_gqa=True
            )
        times = timed(runs, rounds)
        usable = {}
        for side, run in runs.items():
            if side in times:
                usable[side] = backwards(run, q, k, v)
        back = timed(usable, rounds)
        low = kw["lo"].long()
        tiles = ((kw["hi"].long() - low).clamp(min=0).double().sum() / B).item()
        per_tile[name] = {"forward": times["ours"][1] / tiles, "backward": back["ours"][1] / tiles}
        for direction, found in (("forward", times), ("backward", back)):
            if "flex" in found:
                value = found["flex"][1] / found["ours"][1]
                rows.append({
                    "name": f"{name}, {direction} against FlexAttention", "unit": "times", "value": value, "bar": 1.1,
                    "ms": found,
                })  # fmt: skip
            if name != "plain causal":
                value = 100 * per_tile["plain causal"][direction] / per_tile[name][direction]
                row = {"name": f"{name}, {direction}, per visible pair", "unit": "% of plain", "value": value}
                rows.append({**row, "bar": 85 if direction == "forward" else None})
    # What a padded batch gets from SDPA: the dense mask. Soft cap and sinks need eager attention there.
    dense = (torch.arange(N, device="cuda") <= torch.arange(N, device="cuda")[:, None]) & (
        torch.arange(N, device="cuda") >= start[:, None, None]
    )
    dense = dense[:, None]
    runs = {
        "ours": lambda: attention(q, k, v, lo=padded, hi=hi),
        "dense": lambda: sdpa(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), attn_mask=dense),
    }

    def both(run):
        def step():
            out = run()
            torch.autograd.grad(out, [q, k, v], out)

        return step

    times = timed({name: both(run) for name, run in runs.items()}, rounds)
    rows.append({
        "name": "left padding, both ways, against SDPA with a dense mask", "unit": "times",
        "value": times["dense"][1] / times["ours"][1], "bar": 3.0, "ms": times,
    })  # fmt: skip
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    both(runs["ours"])()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    linear = 8 * sum(x.numel() * x.element_size() for x in (q, k, v)) / 2**20
    rows.append({"name": "left padding, both ways, memory", "unit": "MiB", "value": peak, "most": linear, "bar": None})
    return rows


def decoding(rounds):
    """One token over 512 MB of keys and values, as they are and as codes."""
    B, H, HK, D = 8, 32, 8, 128
    N = 512 * 2**20 // (2 * 2 * B * HK * D)
    q, k, v = tensors(B, H, HK, 1, N, D)
    with torch.no_grad():
        check(attention(q, k, v), q, k, v)
        runs = {"bf16": lambda: attention(q, k, v)}
        for bits in (8, 4, 2):
            sides = [stored(x, bits, along) for x, along in ((k, "tokens"), (v, "channels"))]
            runs[f"{bits} bits"] = lambda sides=sides: packed_attention(q, *sides)
        times = timed(runs, rounds)
    share = 100 * 2 * k.numel() * 2 / (times["bf16"][1] * 1e-3) / COPY
    rows = [{"name": "decode bf16, 512 MB", "unit": "% of 4.3 TB/s", "value": share, "bar": 85, "ms": times}]
    for bits, bar in ((8, None), (4, 2.2), (2, 2.8)):
        value = times["bf16"][1] / times[f"{bits} bits"][1]
        rows.append({"name": f"decode {bits} bits against bf16", "unit": "times", "value": value, "bar": bar})
    return rows


def stored(x, bits, along, group=32):
    """Random codes of x's shape: what is timed is reading them."""
    B, HK, N, D = x.shape
    codes = torch.randint(0, 256, (B, N, HK, D * bits // 8), device=x.device, dtype=torch.uint8)
    shape = (B, N // group, HK, D) if along == "tokens" else (B, N, HK, D // group)
    scale = torch.rand(shape, device=x.device).half() / 2**bits
    return PackedStates(x[:, :, :0], lambda: x, codes, scale, scale.clone(), bits, group, along)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("The benchmark needs a CUDA device.")
    import triton

    torch.manual_seed(0)
    rows = []
    for part in (plain, modified, decoding):
        rows += part(options.rounds)
        torch.cuda.empty_cache()
    for row in rows:
        row["met"] = None if row["bar"] is None else row["value"] >= row["bar"]
    versions = {"torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version()}
    result = {"device": torch.cuda.get_device_name(), "versions": versions, "rounds": options.rounds, "rows": rows}
    text = json.dumps(result, indent=2)
    if options.out:
        options.out.write_text(text + "\n")
    else:
        print(text)  # noqa: T201


if __name__ == "__main__":
    main()
