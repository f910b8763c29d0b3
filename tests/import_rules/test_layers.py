"""Who imports what, read from the source: registry, compat and the packing of codes stand alone, families know only
themselves."""

import ast
from pathlib import Path

import pytest

from hfext.registry import FAMILIES

PACKAGE = Path(__file__).resolve().parents[2] / "hfext"
FILES = sorted(PACKAGE.rglob("*.py"))
BASES = {"unlearning": {"losses", "optim", "metrics"}, "training": {"losses", "optim"}, "optim": {"schedule"}}
PRIVATE_OWNERS = ("transformers", "accelerate", "peft", "trl", "datasets", "huggingface_hub")
# Imported inside functions, so that `import hfext` works without them.
LAZY = ("triton", "kernels", "datasets", "evaluate", "matplotlib", "sklearn", "trl", "gguf", "wandb", "trackio")


def _module(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source: str, module: str, is_package: bool = False) -> list[tuple[str, bool]]:
    """Every imported dotted name of a module, and whether the import stands outside functions."""
    tree = ast.parse(source)
    inside = {
        id(node)
        for outer in ast.walk(tree)
        if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or _for_types_only(outer)
        for node in ast.walk(outer)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) not in inside) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parts = parts[: len(parts) - node.level + is_package]
                base = ".".join([*parts, *([node.module] if node.module else [])])
            found += [(f"{base}.{alias.name}", id(node) not in inside) for alias in node.names]
    return found


def _for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def _of(path: Path) -> list[tuple[str, bool]]:
    return imports(path.read_text(), _module(path), path.name == "__init__.py")


def _allowed(part: str) -> set[str] | None:
    """The parts of hfext that a part may import; `None` for everything."""
    if part == "compat":
        return {"compat"}
    if part in ("registry", "_fields", "_packing"):
        return set()
    if part == "compression":
        return {"_fields"}
    if part in FAMILIES:
        return {"registry", "compat", "_fields", "_packing", "compression", part} | BASES.get(part, set())
    return None


def violations(path: Path, names: list[tuple[str, bool]]) -> list[str]:
    part = path.relative_to(PACKAGE).with_suffix("").parts[0]
    allowed = _allowed(part)
    own = [name.split(".") for name, _ in names if name.split(".")[0] == "hfext"]
    found = []
    for parts in own:
        target = parts[1] if len(parts) > 1 else "hfext"
        if allowed is not None and target not in allowed:
            found.append(f"{part} imports {'.'.join(parts)}")
    if part != "compat":
        for name, _ in names:
            parts = name.split(".")
            if parts[0] in PRIVATE_OWNERS and any(p.startswith("_") and p != "__version__" for p in parts[1:]):
                found.append(f"{part} imports {name}, which is private to {parts[0]}")
    if part not in ("cli", "experiments"):
        found += [f"{part} imports {n} outside a function" for n, top in names if top and n.split(".")[0] in LAZY]
    return found


@pytest.mark.parametrize("path", FILES, ids=_module)
def test_imports_follow_the_layers(path):
    assert violations(path, _of(path)) == []


def test_the_whole_package_was_read():
    assert {"hfext.registry", "hfext.compat", "hfext.optim", "hfext.cli", "hfext.recipe"} <= {
        _module(f) for f in FILES
    }
    folders = {path.parent.name for path in FILES if path.parent.parent == PACKAGE}
    assert folders <= set(FAMILIES) | {"cli", "compat", "experiments", "hub"}


@pytest.mark.parametrize("path", FILES, ids=_module)
def test_files_are_named_for_what_they_do_and_short(path):
    assert path.stem.strip("_") not in {"utils", "util", "common", "helpers", "helper", "misc"}
    assert len(path.read_text().splitlines()) <= 400


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*/__init__.py")), ids=_module)
def test_family_inits_export_and_register_only(path):
    assert len(path.read_text().splitlines()) <= 60
    tree = ast.parse(path.read_text())
    assert not any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in tree.body)


@pytest.mark.parametrize(
    "file, source, problem",
    [
        ("registry.py", "from .compat import x", "registry imports hfext.compat.x"),
        ("compat/_torch.py", "import hfext", "compat imports hfext"),
        ("optim/sam.py", "from ..training import saf", "optim imports hfext.training.saf"),
        ("optim/sam.py", "def f():\n    from hfext.hub import model_card", "optim imports hfext.hub.model_card"),
        ("optim/__init__.py", "from .. import recipe", "optim imports hfext.recipe"),
        ("training/saf.py", "from ..unlearning import npo", "training imports hfext.unlearning.npo"),
        (
            "hub.py",
            "from transformers.trainer import _is_peft_model",
            "hub imports transformers.trainer._is_peft_model",
        ),
        ("optim/sam.py", "import triton", "optim imports triton outside a function"),
    ],
)
def test_a_breach_is_seen(file, source, problem):
    path = PACKAGE / file
    found = violations(path, imports(source, _module(path), path.name == "__init__.py"))
    assert len(found) == 1 and found[0].startswith(problem)


@pytest.mark.parametrize(
    "file, source",
    [
        ("optim/sam.py", "from ..registry import Method\nfrom ._wrapper import x\nfrom .. import compat"),
        ("training/saf.py", "from ..optim.sam import sam_direction"),
        ("hub.py", "from . import recipe\nfrom transformers import __version__"),
        ("compat/_trainer.py", "from transformers.trainer import _is_peft_model"),
        ("optim/sam.py", "def f():\n    import triton"),
        ("hub.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import datasets"),
    ],
)
def test_what_is_allowed_passes(file, source):
    path = PACKAGE / file
    assert violations(path, imports(source, _module(path), path.name == "__init__.py")) == []
