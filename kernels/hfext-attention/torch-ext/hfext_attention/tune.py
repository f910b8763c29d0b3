"""`python -m hfext_attention.tune`: time launch parameters on this GPU and write `configs/device_name=<name>.json`.

Every candidate that compiles is timed on causal attention of two lengths; the fastest of each key is kept. The file
replaces the rows of `configs/default.json` for this device. Nothing is tuned while a model runs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from . import _autograd, _launch
from .attention import intervals

CANDIDATES = {
    "forward": [(m, n, w, s) for m in (64, 128) for n in (32, 64, 128) for w in (4, 8) for s in (2, 3, 4)],
    "query_gradient": [(m, n, w, s) for m in (64, 128) for n in (32, 64, 128) for w in (4, 8) for s in (2, 3)],
    "key_gradient": [(m, n, w, s) for m in (32, 64) for n in (64, 128) for w in (4, 8) for s in (2, 3)],
    "decode": [(0, n, w, s) for n in (32, 64, 128) for w in (4, 8) for s in (2, 3, 4)],
}


def main(folder: Path = _launch.CONFIGS) -> Path:
    if not torch.cuda.is_available():
        raise SystemExit("Launch parameters are timed on a CUDA device, and there is none.")
    from triton.testing import do_bench

    device = torch.cuda.get_device_name().replace(" ", "_")
    found: dict[str, list[dict]] = {op: [] for op in CANDIDATES}
    for features in (False, True):
        for D in (64, 128, 256):
            for N in (2048, 16384):
                for op, candidates in CANDIDATES.items():
                    best, least = None, float("inf")
                    for BM, BN, warps, stages in candidates:
                        setting = {"BN": BN, "num_warps": warps, "num_stages": stages}
                        if op != "decode":
                            setting["BM"] = BM
                        try:
                            ms = do_bench(_call(op, setting, D, N, features), warmup=5, rep=20, return_mode="median")
                        except Exception as error:  # a candidate that does not fit the device is no candidate
                            sys.stderr.write(f"{op} D{D} {setting}: {str(error)[:100]}\n")
                            continue
                        if ms < least:
                            best, least = setting, ms
                    if best is not None:
                        key = {"dtype": "16 bit", "features": str(features).lower(), "D": D, "N": N}
                        found[op].append({"key": key, "config": best, "ms": least})
    default = json.loads((_launch.CONFIGS / "default.json").read_text())
    for op, rows in found.items():
        rows += [row for row in default[op] if row["key"]["dtype"] == "float32"]
    path = folder / f"device_name={device}.json"
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({op: rows for op, rows in found.items() if rows}, indent=2) + "\n")
    partial.rename(path)
    return path


def _call(op: str, setting: dict, D: int, N: int, features: bool):
    """One call of an operation with launch parameters of our own."""
    M = 1 if op == "decode" else N
    q, k, v = (torch.randn(1, 16, t, D, device="cuda", dtype=torch.bfloat16) for t in (M, N, N))
    lo, hi = (x.cuda() for x in intervals(M, N, N - M))
    cap = 30.0 if features else 0.0
    usual = _autograd._setting

    def chosen(name: str, *rest):
        return {**usual(name, *rest), **(setting if name == op else {})}

    def run():
        _autograd._setting = chosen
        try:
            if op == "decode":
                return _autograd.decode(q, k, v, lo, hi, None, None, None, None, None, D**-0.5, cap, N - M, 0)
            o, lse = _autograd.forward(q, k, v, lo, hi, None, None, None, None, None, None, D**-0.5, cap, N - M, 0.0)
            if op != "forward":
                nothing = (None, None, None, None, None, None)
                _autograd.backward(o, None, q, k, v, o, lse, lo, hi, *nothing, D**-0.5, cap, N - M, 0.0, False)
            return o
        finally:
            _autograd._setting = usual

    return run


if __name__ == "__main__":
    sys.stdout.write(f"{main()}\n")
