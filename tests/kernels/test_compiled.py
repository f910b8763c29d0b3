"""Every kernel compiles for Hopper, without a GPU: tensor cores in use, no spills, shared memory that there is."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
FOLDERS = sorted(path.parent.parent.name for path in KERNELS.glob("*/tests/compiled.py"))
OLD = os.environ.get("HFEXT_OLD_TRITON", "")


@pytest.mark.slow
@pytest.mark.parametrize("triton", ["3.9", "3.6"])
@pytest.mark.parametrize("folder", FOLDERS)
def test_compiles_for_sm_90(folder, triton, tmp_path):
    if triton == "3.6" and not Path(OLD, "triton").is_dir():
        pytest.skip("HFEXT_OLD_TRITON names no folder with Triton 3.6; `make test-all` makes one")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    if triton == "3.6":
        environment["PYTHONPATH"] = OLD
    done = subprocess.run(
        [sys.executable, "-W", "ignore", KERNELS / "compile_sm90.py", folder],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    cases = [json.loads(line) for line in done.stdout.splitlines()]
    assert cases and all(case["triton"].startswith(triton) for case in cases), done.stderr
    failed = {case["case"]: case["failed"] for case in cases if case["failed"]}
    assert not failed and done.returncode == 0, (failed, done.stderr)


def test_every_kernel_folder_is_compiled():
    assert FOLDERS == sorted(path.parent.name for path in KERNELS.glob("*/build.toml"))
