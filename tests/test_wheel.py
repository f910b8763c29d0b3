"""The wheel holds what the checkout holds: built, installed into an environment of its own, imported, used."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

PROGRAM = """
import json, pathlib, hfext
from hfext import hub, recipe, registry
print(json.dumps({
    "file": hfext.__file__,
    "version": hfext.__version__,
    "checkout": recipe.checkout() and str(recipe.checkout()),
    "recipes": sorted(p.relative_to(recipe.recipes_dir()).as_posix() for p in recipe.recipes_dir().rglob("*.yaml")),
    "loaded": type(recipe.load("bench/import")[1]).__name__,
    "card": str(hub.model_card(registry.methods()[0].name)),
    "typed": (pathlib.Path(hfext.__file__).parent / "py.typed").is_file(),
}))
"""


def _run(*command, **options):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_installed_wheel_works_outside_the_checkout(tmp_path):
    pytest.importorskip("build")
    pytest.importorskip("hatchling")
    _run(sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path / "dist", ROOT)
    (wheel,) = (tmp_path / "dist").glob("hfext-*.whl")
    (_sdist,) = (tmp_path / "dist").glob("hfext-*.tar.gz")

    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    packages = Path(_run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    _run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    # The dependencies come from the environment of this test; its .pth files, which point to the checkout, do not.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))

    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    seen = json.loads(_run(python, "-c", PROGRAM, cwd=tmp_path, env=environment).splitlines()[-1])
    assert Path(seen["file"]).is_relative_to(packages) and seen["checkout"] is None
    in_checkout = sorted(path.relative_to(ROOT / "recipes").as_posix() for path in (ROOT / "recipes").rglob("*.yaml"))
    assert seen["recipes"] == in_checkout and seen["loaded"] == "Config"
    assert seen["card"].startswith("---") and seen["typed"] and seen["version"] in wheel.name

    listed = json.loads(_run(packages.parents[2] / "bin" / "hfext", "list", "--json", cwd=tmp_path, env=environment))
    assert listed
    if find_spec("material"):
        site = tmp_path / "site"
        _run(packages.parents[2] / "bin" / "hfext", "docs", "--site", site, cwd=tmp_path, env=environment)
        pages = {path.relative_to(site).as_posix() for path in site.rglob("*.html")}
        assert {f"methods/{m['family']}/{m['name']}.html" for m in listed} <= pages
        assert "five lines" in (site / "index.html").read_text() and any((site / "plots").iterdir())
