"""Compile the cases of kernel folders for Hopper on a machine without a GPU and report what the machine code uses.

    python kernels/compile_sm90.py hfext-attention ...     one JSON object a line, exit status 1 when a check fails

A folder lists its cases in `tests/compiled.py`: `cases()` yields `Case`-like dicts with the kernel, the types of its
arguments (int32 where none is given), its constexprs, launch options and limits.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent
SHARED_MEMORY = 232448  # bytes that one block may have on sm_90


def compile_case(case: dict) -> dict:
    """Compile one case and read registers, spills and shared memory from the machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, types, constants = case["kernel"], case["types"], case["constexprs"]
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = types.get(name, "i32")
        if signature[name].startswith("*") or name in case.get("divisible", ()):
            attributes[(index,)] = [["tt.divisibility", 16]]
    start = time.perf_counter()
    source = ASTSource(fn=kernel, signature=signature, constexprs=dict(constants), attrs=attributes)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(case["options"]))
    found = {
        "case": case["name"],
        "triton": triton.__version__,
        "seconds": round(time.perf_counter() - start, 1),
        "shared": built.metadata.shared,
        "wgmma": built.asm["ptx"].count("wgmma.mma_async"),
        **_resources(built.asm["cubin"], Path(triton.__file__).parent / "backends" / "nvidia" / "bin"),
    }
    limits = case.get("limits", {})
    found["failed"] = [
        text
        for text, bad in (
            (f"shared memory {found['shared']} > {SHARED_MEMORY}", found["shared"] > SHARED_MEMORY),
            ("no wgmma", limits.get("wgmma", False) and not found["wgmma"]),
            (f"{found['spills']} spills, stack {found['stack']}", found["spills"] or found["stack"]),
            (f"{found['registers']} registers", found["registers"] > limits.get("registers", 255)),
        )
        if bad
    ]
    return found


def _resources(cubin: bytes, tools: Path) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [tools / "cuobjdump", "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
        code = subprocess.run([tools / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
    registers = max(int(n) for n in re.findall(r"REG:(\d+)", usage))
    stack = max(int(n) for n in re.findall(r"(?:STACK|LOCAL):(\d+)", usage))
    return {"registers": registers, "stack": stack, "spills": len(re.findall(r"\b(?:LDL|STL)\b", code))}


def cases_of(folder: str) -> list[dict]:
    sys.path.insert(0, str(ROOT / folder / "torch-ext"))
    path = ROOT / folder / "tests" / "compiled.py"
    spec = importlib.util.spec_from_file_location(f"compiled_{folder}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return list(module.cases())


def main(folders: list[str]) -> int:
    failed = 0
    for folder in folders:
        for case in cases_of(folder):
            found = {"folder": folder, **compile_case(case)}
            failed += bool(found["failed"])
            sys.stdout.write(json.dumps(found) + "\n")
            sys.stdout.flush()
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
