"""`python -m hfext_gr_kan.tune`: time launch parameters on this GPU and write `configs/device_name=....json`."""

from __future__ import annotations

import itertools
import json
import sys

import torch

from . import _launch
from .rational import _backward, _forward

WIDTHS = (96, 384, 1024)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def candidates(op: str):
    if op == "forward":
        for elements, warps in itertools.product((512, 1024, 2048, 4096), (4, 8)):
            yield {"elements": elements, "num_warps": warps}
        return
    for elements, warps, stages, programs in itertools.product((512, 1024, 2048), (4, 8), (1, 2, 3, 4), (1, 2, 3, 4)):
        if elements >= 64 * warps:
            yield {"elements": elements, "num_warps": warps, "stages": stages, "programs_per_processor": programs}


def best(op: str, dtype: torch.dtype, width: int) -> dict:
    """The row of the fastest candidate on 2^26 elements in 8 groups."""
    from triton.testing import do_bench

    channels = 8 * width
    x = torch.randn((1 << 26) // channels, channels, device="cuda", dtype=dtype)
    a, b = torch.randn(8, 6, device="cuda"), torch.randn(8, 4, device="cuda")
    module = sys.modules[f"{__package__}.rational"]
    found = []
    for candidate in candidates(op):
        module.config = lambda *_, candidate=candidate, **__: candidate
        run = (
            (lambda: _forward(x, a, b, "abs_terms")) if op == "forward" else lambda: _backward(x, x, a, b, "abs_terms")
        )
        found.append((do_bench(run, return_mode="median"), candidate))
    time, config = min(found, key=lambda pair: pair[0])
    return {"key": {"dtype": str(dtype).replace("torch.", ""), "width": width}, "config": config, "milliseconds": time}


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("hfext_gr_kan.tune needs a GPU.")
    rows = {op: [best(op, dtype, width) for dtype in DTYPES for width in WIDTHS] for op in ("forward", "backward")}
    rows = {
        op: [{**row, "milliseconds": round(row["milliseconds"], 4)} for row in found] for op, found in rows.items()
    }
    device = torch.cuda.get_device_name().replace(" ", "_")
    path = _launch.CONFIGS / f"device_name={device}.json"
    path.write_text(json.dumps(rows, indent=1) + "\n")
    sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    main()
