"""`python -m hfext_lowbit.tune`: time candidates on this GPU and write `configs/device_name=<name>.json`."""

from __future__ import annotations

import argparse
import itertools
import json

import torch

from . import functional
from ._launch import CONFIGS
from ._reference import packed_width

SIZES = ((4096, 4096), (4096, 14336), (14336, 4096))  # outputs, inputs
GEMV = dict(BLOCK_N=(8, 16, 32), CODES=(256, 512, 1024), SPLIT=(1, 2, 4, 8), num_warps=(2, 4, 8), num_stages=(3, 4))
FEW = dict(
    BLOCK_M=(16,), BLOCK_N=(64, 128), BLOCK_K=(64, 128), SPLIT=(1, 2, 4, 8), num_warps=(4,), num_stages=(3, 4, 5)
)
MANY = dict(BLOCK_M=(64, 128), BLOCK_N=(64, 128), BLOCK_K=(32, 64), SPLIT=(1, 2), num_warps=(4, 8), num_stages=(3, 4))
GRAD = dict(BLOCK_M=(64, 128), BLOCK_N=(32, 64), BLOCK_K=(64, 128), num_warps=(4, 8), num_stages=(2, 3, 4))


def candidates(space: dict) -> list[dict]:
    return [dict(zip(space, values)) for values in itertools.product(*space.values())]  # noqa: B905 (Python 3.9)


def tasks():
    """(operation, key, candidates, tokens, bits, backward)."""
    for rows, inputs in SIZES:
        sizes = {"rows": rows, "inputs": inputs}
        for bits in (2, 3, 4, 8):
            yield "gemv", {"bits": bits, "tokens": 1, **sizes}, candidates(GEMV), 1, bits, False
        for tokens, space in ((16, FEW), (64, MANY), (2048, MANY)):
            yield "gemm", {"dtype": "half", "tokens": tokens, **sizes}, candidates(space), tokens, 4, False
        yield "grad", {"dtype": "half", "tokens": 2048, **sizes}, candidates(GRAD), 2048, 4, True


def seconds(launch: dict, rows: int, inputs: int, tokens: int, bits: int, backward: bool) -> float:
    """Median milliseconds with these launch parameters; infinite where they do not fit the device."""
    from triton.testing import do_bench

    g = torch.Generator("cuda").manual_seed(0)
    made = dict(generator=g, device="cuda")
    qweight = torch.randint(0, 256, (rows, packed_width(inputs, bits)), dtype=torch.uint8, **made)
    grid = [torch.rand(rows, inputs // 64, **made).half() for _ in range(2)]
    x = torch.randn(tokens, rows if backward else inputs, **made).bfloat16()
    chosen, functional.config = functional.config, lambda *_, **__: launch
    try:
        if backward:
            run = lambda: functional._linear_grad(x, qweight, *grid, bits, 64, inputs)  # noqa: E731
        else:
            run = lambda: functional.quantized_linear(x, qweight, *grid, bits, 64)  # noqa: E731
        run()
        return do_bench(run, return_mode="median")
    except Exception as error:  # parameters that need too much of the device
        if "out of resource" not in str(error):
            raise
        return float("inf")
    finally:
        functional.config = chosen


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("Tuning needs a CUDA device.")
    found: dict[str, list[dict]] = json.loads((CONFIGS / "default.json").read_text())
    tuned: dict[str, list[dict]] = {}
    for op, key, launches, *task in tasks():
        best = min(launches, key=lambda launch: seconds(launch, key["rows"], key["inputs"], *task))
        tuned.setdefault(op, []).append({"key": key, "config": best})
    for op, rows in tuned.items():  # what was not tuned here keeps its defaults
        rows += [row for row in found[op] if row["key"].get("dtype") == "float32"]
    name = torch.cuda.get_device_name().replace(" ", "_")
    (CONFIGS / f"device_name={name}.json").write_text(json.dumps(tuned, indent=2) + "\n")


if __name__ == "__main__":
    main()
