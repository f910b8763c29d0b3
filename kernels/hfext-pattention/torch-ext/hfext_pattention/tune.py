"""`python -m hfext_pattention.tune`: time launch parameters on this GPU and write `configs/device_name=....json`.

Candidates that spill or need too much shared memory are slow or fail to launch, and so drop out.
"""

from __future__ import annotations

import itertools
import json
import sys

import torch

from . import _launch
from .pattention import _Run

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS = (512, 8192)
TOKENS, WIDTH = 3072, 768


def candidates(op: str, dtype: torch.dtype):
    sizes = (32, 64) if dtype == torch.float32 else (64, 128)
    inner = (32,) if dtype == torch.float32 else (32, 64, 128)
    outs = (None,) if op.startswith("statistics") else ((64,) if dtype == torch.float32 else (64, 128, 256))
    for outer, n, out, warps, stages in itertools.product(sizes, inner, outs, (4, 8), (2, 3, 4)):
        m, n = (n, outer) if op == "tokens" else (outer, n)
        found = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_D": 32 if dtype == torch.float32 else 64}
        yield {**found, **({} if out is None else {"BLOCK_O": out}), "num_warps": warps, "num_stages": stages}


def best(op: str, dtype: torch.dtype, rows: int) -> dict:
    """The row of the fastest candidate."""
    import triton
    from triton.testing import do_bench

    x = torch.randn(rows, WIDTH, device="cuda", dtype=dtype)
    keys, values = (torch.randn(TOKENS, WIDTH, device="cuda", dtype=dtype) for _ in range(2))
    run = _Run(x, keys, values, torch.tensor(TOKENS**0.5, device="cuda"), None, None, "l2_norm_gelu", 0.0)
    offset, factor = run.statistics()
    inner = run.inner(x, offset, factor)
    calls = {
        "statistics": run.statistics,
        "statistics_backward": lambda: run.inner(x, offset, factor),
        "rows": lambda: run.by_rows(offset, factor, None, None),
        "rows_backward": lambda: run.by_rows(offset, factor, x, inner),
        "tokens": lambda: run.by_tokens(offset, factor, x, inner, keys=True),
    }
    module, shipped = sys.modules[f"{__package__}.pattention"], _launch.config
    found = []
    for candidate in candidates(op, dtype):
        module.config = lambda name, *_, candidate=candidate, **__: candidate
        try:
            found.append((do_bench(calls[op], return_mode="median"), candidate))
        except (triton.runtime.errors.OutOfResources, triton.compiler.errors.CompilationError):
            continue
        finally:
            module.config = shipped
    time, config = min(found, key=lambda pair: pair[0])
    key = {"dtype": str(dtype).replace("torch.", ""), "rows": rows}
    return {"key": key, "config": config, "milliseconds": round(time, 4)}


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("hfext_pattention.tune needs a GPU.")
    ops = ("statistics", "statistics_backward", "rows", "rows_backward", "tokens")
    found = {op: [best(op, dtype, rows) for dtype in DTYPES for rows in ROWS] for op in ops}
    device = torch.cuda.get_device_name().replace(" ", "_")
    path = _launch.CONFIGS / f"device_name={device}.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    main()
