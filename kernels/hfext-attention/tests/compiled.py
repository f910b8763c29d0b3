"""What is compiled for Hopper: the shapes and modifiers that models use, with the shipped launch parameters."""

from hfext_attention import _backward, _decode, _kernels, _packed_kernels
from hfext_attention._launch import _nearest

POINTERS = ("q", "k", "v", "o", "do", "dq", "dk", "dv")
FLOATS = ("lse", "delta", "grad_lse", "slopes", "sink", "bias", "db")
INTS = ("lo", "hi", "q_first", "q_last")
BYTES = ("keys", "mask")
STRIDES = tuple(f"{x}_{y}" for x in ("q", "k", "v", "do") for y in ("b", "h", "m", "n"))
PLAIN = {name: False for name in ("SOFTCAP", "BIAS", "MASK", "KEYS", "ALIBI", "SINK", "DROPOUT", "UPCAST")}


def case(op, kernel, dtype, D, INTERVAL=True, registers=255, **flags):
    element = {"16 bit": "bf16", "float32": "fp32"}[dtype]
    types = {
        **dict.fromkeys(POINTERS, f"*{element}"),
        **dict.fromkeys(FLOATS, "*fp32"),
        **dict.fromkeys(INTS, "*i32"),
        **dict.fromkeys(BYTES, "*u8"),
        **dict.fromkeys(("scale", "softcap", "p_drop"), "fp32"),
        "seed_at": "*i64",
    }
    if kernel is _decode.attention_decode:
        types["o"] = "*fp32"
    features = any(flags.get(name) for name in ("SOFTCAP", "BIAS", "MASK", "ALIBI", "DROPOUT"))
    wide = max(16, 1 << (D - 1).bit_length())
    key = {"dtype": dtype, "features": str(features).lower(), "D": wide, "M": 4096, "N": 4096}
    setting = dict(_nearest(op, "cpu", tuple(sorted(key.items()))))
    options = {name: setting.pop(name) for name in ("num_warps", "num_stages")}
    constants = {
        **PLAIN, **flags, **setting, "INTERVAL": INTERVAL, "D": D, "DV": D, "BD": wide, "BDV": wide,
        "PRECISION": "ieee", "BR": 16, "SPLIT": setting.get("SPLIT", True),
        "WITH_K": True, "WITH_V": not setting.pop("APART", False), "q_d": 1, "k_d": 1, "v_d": 1, "do_d": 1,
        "bias_n": 1, "mask_n": 1, **flags,
    }  # fmt: skip
    names = [name for name, on in flags.items() if on]
    return {
        "name": f"{op} {element} D{D} {'interval' if INTERVAL else 'full'} {' '.join(names)}".strip(),
        "kernel": kernel,
        "types": types,
        "constexprs": {name: value for name, value in constants.items() if name in kernel.arg_names},
        "divisible": STRIDES,
        "options": options,
        "limits": {"wgmma": dtype == "16 bit" and op != "decode", "registers": registers},
    }


def cases():
    forward, query, key = (
        _kernels.attention_forward,
        _backward.attention_query_gradient,
        _backward.attention_key_gradient,
    )
    for D in (64, 96, 128, 256):
        for op, kernel in (("forward", forward), ("query_gradient", query), ("key_gradient", key)):
            yield case(op, kernel, "16 bit", D)
    for op, kernel in (("forward", forward), ("query_gradient", query), ("key_gradient", key)):
        yield case(op, kernel, "16 bit", 128, INTERVAL=False)
        yield case(op, kernel, "16 bit", 128, SOFTCAP=True, KEYS=True)
        yield case(op, kernel, "16 bit", 64, BIAS=True, KEYS=True)
        yield case(op, kernel, "16 bit", 256, SOFTCAP=True)
        yield case(op, kernel, "16 bit", 128, DROPOUT=True)
        yield case(op, kernel, "float32", 64)
    yield case("key_gradient", key, "16 bit", 256, WITH_K=False, WITH_V=True)  # the other half of the one above
    yield case("forward", forward, "16 bit", 64, SINK=True, KEYS=True)
    yield case("forward", forward, "16 bit", 128, MASK=True)
    yield case("forward", forward, "16 bit", 128, ALIBI=True)
    yield case("forward", forward, "float32", 128)
    yield case("bias_gradient", _backward.attention_bias_gradient, "16 bit", 64, KEYS=True)
    yield case("bias_gradient", _backward.attention_bias_gradient, "float32", 64)
    for D in (64, 128, 256):
        yield case("decode", _decode.attention_decode, "16 bit", D, KEYS=True)
    yield case("decode", _decode.attention_decode, "16 bit", 128, SOFTCAP=True, BIAS=True)
    yield case("decode", _decode.attention_decode, "float32", 128)
    for bits in (2, 3, 4, 8):
        yield packed(bits, bits, 128)
    yield packed(4, 4, 256)
    yield packed(2, 16, 128, KALIGNED=False)
    yield packed(16, 4, 128, SOFTCAP=True, KEYS=True)


def packed(kbits, vbits, D, **flags):
    kernel = _packed_kernels.attention_packed
    key = {"dtype": "16 bit", "D": D}
    setting = dict(_nearest("packed", "cpu", tuple(sorted(key.items()))))
    options = {name: setting.pop(name) for name in ("num_warps", "num_stages")}
    stored = {side: "*bf16" if bits == 16 else "*u8" for side, bits in (("k", kbits), ("v", vbits))}
    grids = {f"{side}_{name}": "*fp16" for side in "kv" for name in ("scale", "minimum")}
    constants = {
        **setting, "D": D, "BD": D, "BR": 16, "KBITS": kbits, "VBITS": vbits, "KGROUP": 32, "VGROUP": 32,
        "KTOKENS": True, "VTOKENS": False, "KALIGNED": True, "VALIGNED": False, "INTERVAL": True, "SOFTCAP": False,
        "KEYS": False, "UPCAST": False, "PRECISION": "ieee", "q_d": 1, **flags,
    }  # fmt: skip
    return {
        "name": f"packed keys {kbits} values {vbits} D{D} {' '.join(flags)}".strip(),
        "kernel": kernel,
        "types": {
            "q": "*bf16", "o": "*fp32", "lse": "*fp32", "lo": "*i32", "hi": "*i32", "keys": "*u8", "scale": "fp32",
            "softcap": "fp32", **stored, **grids,
        },
        "constexprs": constants,
        "divisible": ("q_b", "q_h", "q_m", "k_b", "k_h", "k_n", "v_b", "v_h", "v_n", "ks_b", "ks_h", "vs_b"),
        "options": options,
    }  # fmt: skip
