"""What is compiled for sm_90 without a GPU: the launches of the shipped configuration at the sizes of ViT-B."""

import triton.language as tl
from hfext_gr_kan import _kernels

FLOATS = ("a_ptr", "b_ptr", "partial_ptr", "da_ptr", "db_ptr")
ALIGNED = ("rows", "width", "stride_row", "grad_stride_row")


def case(name, kernel, dtype, constants, num_warps, registers):
    names = kernel.arg_names
    ones = {arg: 1 for arg in names if arg.endswith("stride_col")}  # a launch makes a constant of a 1
    types = {arg: "*fp32" if arg in FLOATS else f"*{dtype}" for arg in names if arg.endswith("_ptr")}
    return {
        "name": name,
        "kernel": kernel,
        "types": types,
        "constexprs": {**constants, **ones},
        "divisible": ALIGNED,
        "options": {"num_warps": num_warps},
        "limits": {"registers": registers},
    }


def cases():
    forward, backward = _kernels.rational_forward_kernel, _kernels.rational_backward_kernel
    for dtype in ("bf16", "fp16", "fp32"):
        for form in ("abs_terms", "abs_sum"):
            shared = {"M": 5, "N": 4, "ABS_TERMS": form == "abs_terms", "COMPUTE": tl.float32, "BLOCK_C": 128}
            tile = {**shared, "BLOCK_R": 8 if dtype == "fp32" else 16}
            yield case(f"forward {dtype} {form}", forward, dtype, tile, 4, 64)
            yield case(f"backward {dtype} {form}", backward, dtype, {**shared, "BLOCK_R": 8, "STAGES": 3}, 8, 128)
    largest = {"M": 8, "N": 6, "ABS_TERMS": True, "COMPUTE": tl.float32, "BLOCK_C": 128, "BLOCK_R": 8, "STAGES": 3}
    yield case("backward with the largest orders", backward, "bf16", largest, 8, 168)
    ones = {"groups": 1, "width": 1, "rows": 1, "BLOCK_R": 1, "BLOCK_C": 1}  # a launch makes constants of these
    for kernel, more in ((forward, {}), (backward, {"tiles": 1, "STAGES": 3})):
        least = {"M": 1, "N": 0, "ABS_TERMS": False, "COMPUTE": tl.float32, **ones, **more}
        yield case(f"one element, {kernel.__name__}", kernel, "fp32", least, 4, 128)
    reduction = {"M": 5, "N": 4, "ABS_TERMS": True, "BLOCK": 64, "COEFFICIENTS": 16}
    yield case("reduction", _kernels.rational_reduce_kernel, "fp32", reduction, 4, 128)
