"""`python -m hfext_stickbreaking.tune`: time launch parameters on this GPU, write `configs/device_name=<name>.json`.

Every candidate that compiles is timed on causal attention of two lengths; the fastest of each key is kept. The tiles
of keys of the two backward kernels belong together (one divides the other), so that of dq is tried with each tile of
the other. The file replaces the rows of `configs/default.json` for this device. Nothing is tuned while a model runs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from . import _autograd, _launch

WARPS_STAGES = [(w, s) for w in (4, 8) for s in (1, 2, 3)]
CANDIDATES = {
    "forward": [(m, n, w, s) for m in (64, 128) for n in (32, 64) for w, s in WARPS_STAGES],
    "key_gradient": [(m, n, w, s) for m in (32, 64) for n in (32, 64, 128) for w, s in WARPS_STAGES],
    "query_gradient": [(m, n, w, s) for m in (64, 128) for n in (16, 32, 64) for w, s in WARPS_STAGES],
    "edges": [(m, 0, w, s) for m in (64, 128) for w, s in WARPS_STAGES],
    "decode": [(0, n, w, s) for n in (32, 64, 128) for w, s in WARPS_STAGES],
}


def main(folder: Path = _launch.CONFIGS) -> Path:
    if not torch.cuda.is_available():
        raise SystemExit("Launch parameters are timed on a CUDA device, and there is none.")
    from triton.testing import do_bench

    device = torch.cuda.get_device_name().replace(" ", "_")
    default = json.loads((_launch.CONFIGS / "default.json").read_text())
    found: dict[str, list[dict]] = {op: [] for op in CANDIDATES}
    for D in (64, 128, 256):
        for N in (2048, 16384):
            chosen: dict[str, dict] = {}  # later operations are timed with what earlier ones got
            for op, candidates in CANDIDATES.items():
                best, least = None, float("inf")
                for BM, BN, warps, stages in candidates:
                    setting = {"BM": BM, "BN": BN, "num_warps": warps, "num_stages": stages}
                    setting = {name: value for name, value in setting.items() if value}
                    if op == "key_gradient":
                        setting["APART"] = D == 256
                    try:
                        ms = do_bench(_call(op, {**chosen, op: setting}, D, N), warmup=5, rep=20, return_mode="median")
                    except Exception as error:  # a candidate that does not fit the device is no candidate
                        sys.stderr.write(f"{op} D{D} {setting}: {str(error)[:100]}\n")
                        continue
                    if ms < least:
                        best, least = setting, ms
                if best is not None:
                    chosen[op] = best
                    found[op].append({"key": {"dtype": "16 bit", "D": D, "N": N}, "config": best, "ms": least})
    for op, rows in found.items():
        rows += [row for row in default[op] if row["key"]["dtype"] == "float32"]
    path = folder / f"device_name={device}.json"
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({op: rows for op, rows in found.items() if rows}, indent=2) + "\n")
    partial.rename(path)
    return path


def _call(op: str, settings: dict[str, dict], D: int, N: int):
    """One call of an operation with launch parameters of our own."""
    M = 1 if op == "decode" else N
    q, k, v = (torch.randn(1, 16, t, D, device="cuda", dtype=torch.bfloat16) for t in (M, N, N))
    hi = torch.arange(N - M, N, device="cuda", dtype=torch.int32)[None]
    lo = torch.zeros_like(hi)
    usual = _autograd._setting

    def ours(name: str, *rest):
        return {**usual(name, *rest), **settings.get(name, {})}

    def run():
        _autograd._setting = ours
        try:
            if op == "decode":
                return _autograd.decode(q, k, v, lo, hi, None, None, D**-0.5, 0)
            o, rest = _autograd.forward(q, k, v, lo, hi, None, None, D**-0.5)
            if op != "forward":
                _autograd.backward(o, None, q, k, v, rest, lo, hi, None, None, D**-0.5)
            return o
        finally:
            _autograd._setting = usual

    return run


if __name__ == "__main__":
    sys.stdout.write(f"{main()}\n")
