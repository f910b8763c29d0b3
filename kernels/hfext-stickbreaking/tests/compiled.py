"""What is compiled for Hopper: head sizes and masks that models use, with the shipped launch parameters."""

from hfext_stickbreaking import _kernels
from hfext_stickbreaking._launch import _nearest

POINTERS = ("q", "k", "v", "o", "do", "dq", "dk", "dv")
FLOATS = ("rest", "drest", "right", "left", "logs", "parts")
INTS = ("lo", "hi", "q_first", "q_last")
STRIDES = tuple(f"{x}_{y}" for x in ("q", "k", "v", "do") for y in ("b", "h", "m", "n"))
KERNELS = {
    "forward": _kernels.stickbreaking_forward,
    "edges": _kernels.stickbreaking_edges,
    "query_gradient": _kernels.stickbreaking_query_gradient,
    "key_gradient": _kernels.stickbreaking_key_gradient,
    "decode": _kernels.stickbreaking_decode,
}


def case(op, dtype, D, registers=255, half=None, **flags):
    """`half` is "k" or "v" for a key gradient that makes one of its two results."""
    kernel = KERNELS[op]
    element = {"16 bit": "bf16", "float32": "fp32"}[dtype]
    types = {
        **dict.fromkeys(POINTERS, f"*{element}"),
        **dict.fromkeys(FLOATS, "*fp32"),
        **dict.fromkeys(INTS, "*i32"),
        **dict.fromkeys(("keys", "mask"), "*u8"),
        "scale": "fp32",
    }
    if op == "decode":
        types["o"] = "*fp32"
    wide = max(16, 1 << (D - 1).bit_length())
    key = tuple(sorted({"dtype": dtype, "D": wide, "M": 4096, "N": 4096}.items()))
    setting = dict(_nearest(op, "cpu", key))
    wider = _nearest("key_gradient", "cpu", key)["BN"]
    narrow = min(_nearest("query_gradient", "cpu", key)["BN"], wider)
    if op == "edges":
        setting["BN"] = narrow
    options = {name: setting.pop(name) for name in ("num_warps", "num_stages")}
    setting.pop("APART", None)
    constants = {
        "KEYS": False, "MASK": False, "REST": False, "UPCAST": False, "PRECISION": "ieee", **flags, **setting,
        "D": D, "DV": D, "BD": wide, "BDV": wide, "BR": 16, "WITH_K": half != "v",
        "WITH_V": half != "k", "BK": wider, "PARTS": wider // narrow, "q_d": 1, "k_d": 1, "v_d": 1, "do_d": 1,
        "mask_n": 1,
    }  # fmt: skip
    return {
        "name": f"{op} {element} D{D} {' '.join([*flags, half or ''])}".strip(),
        "kernel": kernel,
        "types": types,
        "constexprs": {name: value for name, value in constants.items() if name in kernel.arg_names},
        "divisible": STRIDES,
        "options": options,
        "limits": {"wgmma": dtype == "16 bit" and op != "decode", "registers": registers},
    }


def cases():
    for op in KERNELS:
        for D in (64, 128, 256):
            for dtype in ("16 bit", "float32"):
                halves = "kv" if op == "key_gradient" and D == 256 else (None,)
                yield from (case(op, dtype, D, half=half) for half in halves)
        yield case(op, "16 bit", 64, KEYS=True)
    for op in ("forward", "query_gradient", "key_gradient"):
        yield case(op, "16 bit", 96)
        for D in (64, 128):
            yield case(op, "16 bit", D, MASK=True)
    yield case("decode", "16 bit", 128, MASK=True)
    yield case("query_gradient", "16 bit", 128, REST=True)
    combine = {
        "name": "combine D128",
        "kernel": _kernels.stickbreaking_combine,
        "types": {"parts": "*fp32", "logs": "*fp32", "o": "*bf16", "rest": "*fp32"},
        "constexprs": {"DV": 128, "BDV": 128},
        "options": {"num_warps": 4, "num_stages": 2},
    }
    yield combine
