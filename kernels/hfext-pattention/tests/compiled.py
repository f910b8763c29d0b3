"""What is compiled for sm_90 without a GPU: the launches of the shipped configuration, for all modes."""

import json
from pathlib import Path

from hfext_pattention import _kernels

CONFIGS = Path(_kernels.__file__).parent / "configs" / "default.json"
KERNELS = {
    "statistics": (_kernels.pattention_statistics_kernel, "BACKWARD", (False,)),
    "statistics_backward": (_kernels.pattention_statistics_kernel, "BACKWARD", (True,)),
    "rows": (_kernels.pattention_rows_kernel, "BACKWARD", (False,)),
    "rows_backward": (_kernels.pattention_rows_kernel, "BACKWARD", (True,)),
    "tokens": (_kernels.pattention_tokens_kernel, "KEYS", (True, False)),
}
NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
FLOATS = ("offset_ptr", "factor_ptr", "inner_ptr", "partial_ptr", "top_ptr")


def shipped(op, dtype):
    """The row of default.json that a dtype takes."""
    rows = json.loads(CONFIGS.read_text())[op]
    return next(row["config"] for row in rows if row["key"].get("dtype", NAMES[dtype]) == NAMES[dtype])


def case(name, op, dtype, constants, registers):
    kernel, blocks = KERNELS[op][0], dict(shipped(op, dtype))
    options = {key: blocks.pop(key) for key in ("num_warps", "num_stages")}
    types = {arg: "*fp32" if arg in FLOATS else f"*{dtype}" for arg in kernel.arg_names if arg.endswith("_ptr")}
    types["mask_ptr"] = "*u8" if constants["MASKED"] else f"*{dtype}"
    types["seed_ptr"] = "*i64" if constants["DROPOUT"] else "*fp32"
    return {
        "name": name,
        "kernel": kernel,
        "types": {**types, "dropout": "fp32"},
        "constexprs": {**constants, **blocks},
        "divisible": ("rows", "tokens", "d_in", "d_out"),
        "options": options,
        "limits": {"wgmma": dtype != "fp32", "registers": registers},
    }


def cases():
    for dtype in ("bf16", "fp32"):
        for mode in (0, 1, 2) if dtype == "bf16" else (0,):
            plain = {"MODE": mode, "MASKED": False, "DROPOUT": False, "UPCAST": dtype == "fp32"}
            for op, (_, flag, values) in KERNELS.items():
                for value in values:
                    name = f"{op} {dtype} mode {mode} {flag} {value}"
                    yield case(name, op, dtype, {**plain, flag: value}, 240)
    ones = {"rows": 1, "tokens": 1, "d_in": 1, "d_out": 1}  # a launch makes constants of these
    for op, (_, flag, values) in KERNELS.items():
        least = {"MODE": 2, "MASKED": True, "DROPOUT": True, "UPCAST": True, **ones, flag: values[0]}
        yield case(f"{op} fp32 of one element", op, "fp32", least, 240)
    full = {"MODE": 0, "MASKED": True, "DROPOUT": True, "UPCAST": False}
    for op, (_, flag, values) in KERNELS.items():
        yield case(f"{op} fp16 mask dropout", op, "fp16", {**full, flag: values[0]}, 254)
