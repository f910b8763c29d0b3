"""`hfext doctor FOLDER` looks at the files too: weights that are cut off cannot be served."""

import json

import pytest
from typer.testing import CliRunner

from hfext.cli import app

INDEX = "model.safetensors.index.json"


def doctor(folder):
    return CliRunner().invoke(app, ["doctor", str(folder)])


def cut(path):
    path.write_bytes(path.read_bytes()[:-5])


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda f: cut(f / "model.safetensors"), "model.safetensors is damaged"),
        (lambda f: (f / "kv_cache.safetensors").write_bytes(b"abc"), "kv_cache.safetensors is damaged"),
        (lambda f: (f / INDEX).write_text(json.dumps({"weight_map": {"a": "b.safetensors"}})), "names b.safetensors"),
        (lambda f: (f / INDEX).write_text("[]"), "cannot be read as an index"),
        (lambda f: (f / "ngram_store.json").write_text("{"), "ngram_store.json is no JSON"),
        (lambda f: (f / "kv_prediction.json").write_text('{"a":' * 100_000), "kv_prediction.json is no JSON"),
    ],
    ids=["truncated", "cache", "shard", "index", "store", "predictor"],
)
def test_broken_files_are_named(folder, spoil, message):
    assert doctor(folder).exit_code == 0
    spoil(folder)
    done = doctor(folder)
    assert done.exit_code == 1 and message in done.output.replace("\n", " ") and "cannot serve it" in done.output
