"""Kernel folders are what the Hub wants: complete, alone, and the same launcher in each."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = sorted(path.parent for path in (ROOT / "kernels").glob("*/build.toml"))
ALLOWED = {"torch", "triton"} | set(sys.stdlib_module_names)


def package(folder):
    return folder / "torch-ext" / folder.name.replace("-", "_")


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f.name)
def test_the_folder_is_complete(folder):
    about = tomllib.loads((folder / "build.toml").read_text())
    general = about["general"]
    assert general["name"] == folder.name and general["edition"] == 5 and general["version"] == 1
    assert general["license"] == "Apache-2.0" and "cuda" in general["backends"]
    assert general["hub"]["repo-id"].endswith("/" + folder.name) and about["torch-noarch"]["pyext"] == ["py", "json"]
    for name in ("CARD.md", "example.py", "flake.nix", "benchmarks/benchmark.py", "tests/compiled.py"):
        assert (folder / name).is_file(), name
    assert list((folder / "tests").glob("test_*.py"))
    for name in ("__init__.py", "_ops.py", "_launch.py", "_reference.py", "configs/default.json", "tune.py"):
        assert (package(folder) / name).is_file(), name
    json.loads((package(folder) / "configs" / "default.json").read_text())


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f.name)
def test_it_imports_only_torch_triton_and_itself(folder):
    for path in package(folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(), feature_version=(3, 9))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            else:
                continue
            assert {name.split(".")[0] for name in names} <= ALLOWED, path
        assert len(path.read_text().splitlines()) <= 480, path


def test_the_launcher_is_the_same_everywhere():
    assert len({(package(folder) / "_launch.py").read_bytes() for folder in FOLDERS}) == 1


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f.name)
def test_it_loads_alone_and_its_example_runs(folder, tmp_path):
    """Copied away, in a process that finds neither hfext nor transformers nor Triton."""
    blocker = (
        "import sys, runpy\n"
        "class Only:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('hfext', 'transformers', 'triton', 'accelerate'):\n"
        "            raise ImportError(name + ' is hidden')\n"
        "sys.meta_path.insert(0, Only())\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        f"import {folder.name.replace('-', '_')} as package\n"
        "assert all(hasattr(package, name) for name in package.__all__)\n"
        f"assert package.__file__.startswith({str(tmp_path)!r})\n"
        f"runpy.run_path({str(folder / 'example.py')!r}, run_name='__main__')\n"
    )
    source = package(folder)
    for path in source.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            target = tmp_path / path.relative_to(source.parent)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    environment = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTHONPATH")}
    done = subprocess.run(
        [sys.executable, "-c", blocker], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr
