"""Packed linear layers against torch's bf16 product, on one GPU: one JSON on standard output.

    python benchmarks/benchmark.py [--rounds 20] [--out FILE]

Every case is first compared with float64. Then both sides are timed in turns with the L2 cache flushed before each
call (`triton.testing.do_bench`); figures are percentiles 20, 50 and 80 over `rounds` turns. The rows with a bar are
those of one token at 4096 x 14336.
"""

import argparse
import json
import platform
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "torch-ext"))
BARS = {(4, 1): 3.0, (2, 1): 5.0}
CASES = [  # bits, outputs, inputs, tokens
    *((bits, 4096, 14336, 1) for bits in (2, 3, 4, 8)),
    *((bits, 14336, 4096, 1) for bits in (2, 4)),
    *((4, 4096, 14336, tokens) for tokens in (2, 4, 8, 16, 64, 512, 2048)),
    *((2, 4096, 14336, tokens) for tokens in (4, 16, 2048)),
]
GROUP = 64


def case(bits, rows, inputs, tokens, device):
    from hfext_lowbit._reference import packed_width

    g = torch.Generator(device).manual_seed(0)
    qweight = torch.randint(0, 256, (rows, packed_width(inputs, bits)), dtype=torch.uint8, device=device, generator=g)
    scales = (torch.rand(rows, inputs // GROUP, device=device, generator=g) / 2**bits).half()
    zeros = (-0.5 * torch.rand(rows, inputs // GROUP, device=device, generator=g)).half()
    x = torch.randn(tokens, inputs, device=device, generator=g).bfloat16()
    return x, qweight, scales, zeros, bits, GROUP


def measured(args, rounds):
    """The correctness of a case, then milliseconds of both sides, backward too where there are many tokens."""
    from hfext_lowbit import dequantize, functional, quantized_linear
    from triton.testing import do_bench

    x, qweight, scales, zeros, bits, group = args
    inputs = x.shape[1]
    exact = x.double() @ dequantize(qweight, scales, zeros, bits, group, inputs, torch.float64).mT
    error = ((quantized_linear(*args).double() - exact).abs().max() / exact.abs().max()).item()
    if error > 1e-2:
        raise RuntimeError(f"The kernel is wrong by {error:.1e} of the largest output.")
    weight = dequantize(qweight, scales, zeros, bits, group, inputs, torch.bfloat16)
    dy = torch.randn(x.shape[0], qweight.shape[0], device=x.device).bfloat16()
    sides = {
        "kernel": lambda: quantized_linear(*args),
        "bf16": lambda: torch.nn.functional.linear(x, weight),
    }
    if x.shape[0] >= 512:
        sides["kernel, gradient"] = lambda: functional._linear_grad(dy, qweight, scales, zeros, bits, group, inputs)
        sides["bf16, gradient"] = lambda: dy @ weight
    times = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            times[name].append(do_bench(run, warmup=5, rep=20, return_mode="median"))
    quantiles = torch.tensor([0.2, 0.5, 0.8])
    return error, {name: torch.tensor(t).quantile(quantiles).tolist() for name, t in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("The benchmark needs a CUDA device.")
    import triton

    rows = []
    for bits, outputs, inputs, tokens in CASES:
        args = case(bits, outputs, inputs, tokens, "cuda")
        error, times = measured(args, options.rounds)
        read = sum(t.nbytes for t in args[1:4]) + args[0].nbytes + 2 * tokens * outputs
        ratio = times["bf16"][1] / times["kernel"][1]
        bar = BARS.get((bits, tokens)) if (outputs, inputs) == (4096, 14336) else None
        rows.append({
            "name": f"W{bits} at {outputs} x {inputs}, {tokens} tokens, against bf16", "value": ratio, "unit": "times",
            "bits": bits, "group": GROUP, "outputs": outputs, "inputs": inputs, "tokens": tokens, "error": error,
            "ms (20, 50, 80 %)": times, "TB/s": read / times["kernel"][1] / 1e9,
            "TFLOP/s": 2 * tokens * outputs * inputs / times["kernel"][1] / 1e9,
            "bar": bar, "met": None if bar is None else ratio >= bar,
        })  # fmt: skip
    result = {
        "device": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version()},
        "rounds": options.rounds,
        "rows": rows,
    }
    text = json.dumps(result, indent=2)
    if options.out:
        options.out.write_text(text + "\n")
    else:
        print(text)  # noqa: T201


if __name__ == "__main__":
    main()
