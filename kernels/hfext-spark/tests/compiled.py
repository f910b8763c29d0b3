"""What is compiled for Hopper: the shapes and options that models use, with the launch parameters that are shipped."""

from hfext_spark import _backward, _decode, _kernels, _topk_kernels
from hfext_spark._autograd import align, pieces
from hfext_spark._launch import _nearest

POINTERS = ("q", "k", "v", "o", "do", "dq", "dk", "dv")
FLOATS = ("lse", "thetas", "delta", "table", "stats", "part_lse")
STRIDES = tuple(f"{x}_{y}" for x in ("q", "k", "v", "do", "dq", "dk", "dv") for y in ("b", "h", "m", "n"))


def shipped(op, **key):
    setting = dict(_nearest(op, "cpu", tuple(sorted(key.items()))))
    options = {name: setting.pop(name) for name in ("num_warps", "num_stages") if name in setting}
    return setting, options


def padded(size):
    return max(16, 1 << (size - 1).bit_length())


def attention(op, kernel, dtype, D, r=None, halves=False, interval=True, piece=0, **flags):
    element = {"16 bit": "bf16", "float32": "fp32"}[dtype]
    types = {
        **dict.fromkeys(POINTERS, f"*{element}"),
        **dict.fromkeys(FLOATS, "*fp32"),
        **dict.fromkeys(("lo", "hi", "q_first", "q_last"), "*i32"),
        **dict.fromkeys(("keys", "mask"), "*u8"),
        **dict.fromkeys(("scale1", "scale2", "p_drop"), "fp32"),
        "seed_at": "*i64",
    }
    if op == "decode":
        types["o"] = "*fp32"
    gate, r = r is not None, r or D
    setting, options = shipped(
        op, dtype=dtype, D=padded(D), M=4096, N=4096, dropout=str(flags.get("DROPOUT", False)).lower()
    )
    made = pieces(setting.pop("APART", 0), padded(r), gate)
    if op == "key_gradient":
        flags = {**flags, **made[piece]}
    constants = {
        "MASK": False, "KEYS": False, "DROPOUT": False, **flags, **setting, "INTERVAL": interval, "UNBIASED": True,
        "GATE": gate, "HALVES": halves, "ALIGN": align(D, r, halves), "D": D, "R": r, "DV": D, "BD1": padded(r),
        "BD2": padded(D - r) if gate else 16, "BDV": padded(D), "UPCAST": False, "PRECISION": "ieee", "BR": 16,
        "q_d": 1, "k_d": 1, "v_d": 1, "do_d": 1, "mask_n": 1,
    }  # fmt: skip
    names = [name.lower() for name, on in flags.items() if on is True]
    names += [f"{flags['CW']} columns from {flags['C0']}"] if flags.get("CW") else []
    about = f"r{r}{' halves' if halves else ''}" if gate else "no gate"
    return {
        "name": f"{kernel.__name__} {element} D{D} {about} {' '.join(names)}".strip(),
        "kernel": kernel,
        "types": types,
        "constexprs": {name: value for name, value in constants.items() if name in kernel.arg_names},
        "divisible": STRIDES,
        "options": options,
        "limits": {"wgmma": dtype == "16 bit" and op != "decode", "registers": 255},
    }


def rows(op, kernel, element, key, **flags):
    """The top-k and the feed-forward kernels."""
    types = {
        **dict.fromkeys(("x", "y", "g", "dx", "k1", "k2", "v"), f"*{element}"),
        **dict.fromkeys(("stats", "table", "s", "h", "parts"), "*fp32"),
        "count": "*fp32" if op == "topk" else "*i32",
        "index": "*i32",
        "mask": "*u8",
    }
    setting, options = shipped(op, **key)
    constants = {**setting, **flags, **dict.fromkeys(("x_col", "g_col", "mask_col"), 1)}
    return {
        "name": f"{kernel.__name__} {element} {key} {' '.join(n.lower() for n, on in flags.items() if on)}".strip(),
        "kernel": kernel,
        "types": types,
        "constexprs": {name: value for name, value in constants.items() if name in kernel.arg_names},
        "divisible": ("x_row", "g_row", "mask_row", "k1_row", "k2_row", "v_row", "width", "units", "r"),
        "options": options,
        "limits": {"registers": 255},
    }


def cases():
    trio = (
        ("forward", _kernels.spark_forward),
        ("query_gradient", _backward.spark_query_gradient),
        ("key_gradient", _backward.spark_key_gradient),
    )
    for op, kernel in trio:
        for D, r in ((64, 32), (128, 64), (256, 128)):
            yield attention(op, kernel, "16 bit", D, r, halves=True, KEYS=True)
        yield attention(op, kernel, "16 bit", 128, 48)
        yield attention(op, kernel, "16 bit", 96, 32, halves=True, MASK=True)
        yield attention(op, kernel, "16 bit", 128, 64, interval=False, DROPOUT=True)
        for D in (64, 128, 256):
            yield attention(op, kernel, "16 bit", D, KEYS=True)
        if op == "key_gradient":
            for D, pieces_after in ((128, (1,)), (256, (1, 2))):
                for piece in pieces_after:
                    yield attention(op, kernel, "16 bit", D, D // 2, halves=True, piece=piece, KEYS=True)
                    yield attention(op, kernel, "16 bit", D, piece=piece, KEYS=True)
        yield attention(op, kernel, "float32", 64, 32, halves=True)
        yield attention(op, kernel, "float32", 128, 64, KEYS=True)
    for kernel in (_decode.spark_moments, _decode.spark_decode):
        for D in (64, 128, 256):
            yield attention("decode", kernel, "16 bit", D, D // 2, halves=True, KEYS=True)
        yield attention("decode", kernel, "16 bit", 128, MASK=True)
        yield attention("decode", kernel, "float32", 128, 64)
    for element in ("bf16", "fp32"):
        for width in (512, 13824):
            for mask in (False, True):
                flags = dict(SOFT=not mask, UNBIASED=True, MASK=mask)
                yield rows("topk", _topk_kernels.topk_forward, element, {"width": width}, **flags)
                yield rows("topk", _topk_kernels.topk_backward, element, {"width": width}, **flags)
        yield rows("ffn_predict", _topk_kernels.ffn_predict, element, {"d": 1024})
        yield rows("ffn_gate", _topk_kernels.ffn_gate, element, {"d": 1280})
        yield rows("ffn_output", _topk_kernels.ffn_output, element, {"d": 2304})
    yield rows("ffn_compact", _topk_kernels.ffn_compact, "fp32", {"units": 13824}, UNBIASED=True)
