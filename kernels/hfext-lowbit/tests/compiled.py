"""What is compiled for sm_90 without a GPU: the launches of the shipped configuration, and groups of any size."""

BITS = (2, 3, 4, 8)
ALIGNED = ("N", "K", "WIDTH", "stride_m", "stride_n", "stride_q")


def case(name, kernel, dtype, constants, warps, stages, wgmma, registers, out=None):
    """One row. Aligned arguments are multiples of 16."""
    types = {"x": dtype, "dy": dtype, "bias": dtype, "out": out or dtype, "qweight": "*u8", "parts": "*fp32"}
    types.update(scales="*fp16", zeros="*fp16")
    names = [arg for arg in kernel.arg_names if arg not in constants]
    return {
        "name": name,
        "kernel": kernel,
        "types": {arg: types[arg] for arg in names if arg in types},
        "constexprs": constants,
        "divisible": ALIGNED,
        "options": {"num_warps": warps, "num_stages": stages},
        "limits": {"registers": registers, "wgmma": wgmma},
    }


def cases():
    from hfext_lowbit import _kernels as k

    for bits in BITS:
        codes = 512 if bits == 2 else 256
        for tokens, group in ((1, 64), (4, 64), (1, codes)):
            constants = {
                "stride_k": 1, "GROUP": 14336 if group == codes else 64, "BITS": bits, "TOKENS": tokens,
                "BLOCK_N": 16, "GROUPS": codes // group, "CODES": group, "SPLIT": 4, "STAGES": 3, "HAS_BIAS": False,
            }  # fmt: skip
            if tokens == 1:
                constants["M"] = 1  # a launch makes a constant of a 1
            name = f"gemv-w{bits}-{tokens}-tokens-{'one-group' if group == codes else 'groups'}"
            yield case(name, k.gemv_kernel, "*bf16", constants, 4, 3, False, 128, "*fp32")
        gemm = {"stride_k": 1, "GROUP": 64, "BITS": bits, "WHOLE": True, "UPCAST": False}
        few = {**gemm, "BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 64, "SPLIT": 8, "HAS_BIAS": False}
        some = {**gemm, "BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "SPLIT": 1, "HAS_BIAS": True}
        many = {**some, "BLOCK_M": 128, "BLOCK_N": 128}
        grad = {"stride_n": 1, "GROUP": 64, "BITS": bits, "WHOLE": True, "UPCAST": False}
        back = {**grad, "BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64}
        for dtype in ("bf16", "fp16") if bits == 4 else ("bf16",):
            yield case(f"gemm-few-w{bits}-{dtype}", k.gemm_kernel, f"*{dtype}", few, 4, 4, True, 96, "*fp32")
            yield case(f"gemm-some-w{bits}-{dtype}", k.gemm_kernel, f"*{dtype}", some, 4, 3, True, 128)
            yield case(f"gemm-many-w{bits}-{dtype}", k.gemm_kernel, f"*{dtype}", many, 8, 3, True, 192)
            yield case(f"grad-many-w{bits}-{dtype}", k.grad_kernel, f"*{dtype}", back, 4, 3, True, 192)
    any_group = {**many, "GROUP": 48, "BITS": 4, "WHOLE": False}
    yield case("gemm-any-group", k.gemm_kernel, "*bf16", any_group, 8, 3, True, 232)
    plain = {**some, "BITS": 4, "BLOCK_M": 32, "BLOCK_K": 32}
    yield case("gemm-fp32", k.gemm_kernel, "*fp32", plain, 4, 2, False, 128)
    plain = {**grad, "BITS": 4, "BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32}
    yield case("grad-fp32", k.grad_kernel, "*fp32", plain, 4, 2, False, 208)
    few = {**grad, "BITS": 4, "BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 64}
    yield case("grad-few", k.grad_kernel, "*bf16", few, 4, 3, False, 96)
    added = {"SPLIT": 4, "BLOCK": 1024, "HAS_BIAS": True}
    yield case("sum", k.sum_kernel, "*bf16", added, 4, 2, False, 64)
    ones = {"N": 1, "M": 1, "K": 1, "stride_m": 1, "stride_q": 1, "stride_g": 1, "n_groups": 1, "WIDTH": 1}
    tiny = {"GROUP": 8, "BITS": 8, "TOKENS": 1, "BLOCK_N": 16, "GROUPS": 32, "CODES": 8, "STAGES": 3}
    yield case("gemv-all-one", k.gemv_kernel, "*bf16", {**constants, **tiny, **ones}, 4, 3, False, 128, "*fp32")
    yield case("sum-all-one", k.sum_kernel, "*bf16", {**added, "N": 1, "total": 1}, 4, 2, False, 64)
