"""`python -m hfext_spark.tune`: time launch parameters on this GPU and write `configs/device_name=....json`.

Candidates that spill or need too much shared memory are slow or fail to launch, and so drop out.
"""

from __future__ import annotations

import itertools
import json
import sys

import torch

from . import _autograd, _launch, ffn
from .attention import spark_attention
from .topk import statistical_topk

DTYPES = (torch.float32, torch.bfloat16)
ATTENTION = ("forward", "query_gradient", "key_gradient", "decode")
WIDTHS = (256, 1024, 8192)


def candidates(op: str):
    if op == "decode":
        sizes = [{"BN": n} for n in (16, 32, 64, 128)]
    elif op in ATTENTION:
        sizes = [{"BM": m, "BN": n} for m, n in itertools.product((16, 32, 64, 128), (16, 32, 64, 128))]
        if op == "key_gradient":
            sizes = [{**size, "APART": apart} for size in sizes for apart in (0, 1, 2)]
    elif op in ("topk", "ffn_compact"):
        sizes = [{"BLOCK": n} for n in (256, 512, 1024, 2048, 4096)]
    else:
        rows = "BLOCK_F" if op == "ffn_predict" else "BLOCK_A"
        sizes = [{rows: m, "BLOCK_D": n} for m, n in itertools.product((8, 16, 32, 64), (128, 256, 512))]
    for size, warps, stages in itertools.product(sizes, (1, 2, 4, 8), (1, 2, 3)):
        yield {**size, "num_warps": warps, "num_stages": stages}


def attention_case(op: str, dtype: torch.dtype, D: int):
    """A call that launches `op`, and the key of its row."""
    kind = "float32" if dtype == torch.float32 else "16 bit"
    M = 1 if op == "decode" else 4096
    q, k, v = (torch.randn(2, h, n, D, device="cuda", dtype=dtype) for h, n in ((16, M), (4, 4096), (4, 4096)))
    if op in ("forward", "decode"):

        def call():
            return spark_attention(q, k, v, 256, r=D // 2, halves=True, causal=M > 1)
    else:
        leaves = [x.requires_grad_() for x in (q, k, v)]
        o = spark_attention(*leaves, 256, r=D // 2, halves=True, causal=True)
        do = torch.randn_like(o)

        def call():
            return torch.autograd.grad(o, leaves, do, retain_graph=True)

    return call, {"dtype": kind, "D": D}


def row_case(op: str, width: int):
    if op == "topk":
        x = torch.randn(8192, width, device="cuda")
        return (lambda: statistical_topk(x, 0.08 * width)), {"width": width}
    d, units = 2304, max(width, 1024)
    x, *weights = (
        torch.randn(s, device="cuda").bfloat16() for s in ((1, d), (units, 1024), (units, d - 1024), (units, d))
    )
    key = {"units": units} if op == "ffn_compact" else {}
    return (lambda: ffn.decode(x, *weights, max(1, int(0.08 * units)), True)), key


def best(op: str, call, key: dict) -> dict:
    """The row of the fastest candidate."""
    import triton
    from triton.testing import do_bench

    places = [_autograd, ffn, sys.modules[f"{__package__}.topk"]]
    shipped, found = _launch.config, []
    for candidate in candidates(op):

        def chosen(name, *args, candidate=candidate, **kw):
            return candidate if name == op else shipped(name, *args, **kw)

        for module in places:
            module.config = chosen
        try:
            found.append((do_bench(call, return_mode="median"), candidate))
        except (triton.runtime.errors.OutOfResources, triton.compiler.errors.CompilationError):
            continue
        finally:
            for module in places:
                module.config = shipped
    time, config = min(found, key=lambda pair: pair[0])
    return {"key": key, "config": config, "milliseconds": round(time, 4)}


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("hfext_spark.tune needs a GPU.")
    found = {}
    for op in ATTENTION:
        found[op] = [best(op, *attention_case(op, dtype, D)) for dtype in DTYPES for D in (64, 128, 256)]
    for op in ("topk", "ffn_compact"):
        found[op] = [best(op, *row_case(op, width)) for width in WIDTHS]
    for op in ("ffn_predict", "ffn_gate", "ffn_output"):
        found[op] = [best(op, *row_case(op, 13824))]
    device = torch.cuda.get_device_name().replace(" ", "_")
    path = _launch.CONFIGS / f"device_name={device}.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    main()
