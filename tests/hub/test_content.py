"""What a file holds is told from its bytes: no pickle under any name is published or fetched, and no text is taken
for one."""

import gzip
import io
import json
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import hfext
from hfext import hub as api


class Runs:
    def __reduce__(self):
        return (os.getcwd, ())


def saved(**options):
    torch.save({"a": torch.ones(2)}, buffer := io.BytesIO(), **options)
    return buffer.getvalue()


def zipped(content):
    with zipfile.ZipFile(buffer := io.BytesIO(), "w") as archive:
        archive.writestr("weights", content)
    return buffer.getvalue()


def array(dtype):
    np.save(buffer := io.BytesIO(), np.array([1, "a"], dtype=dtype), allow_pickle=True)
    return buffer.getvalue()


def arrays():
    np.savez(buffer := io.BytesIO(), a=np.array([{}], dtype=object))
    return buffer.getvalue()


PICKLED = {
    **{f"protocol {p}": pickle.dumps({"a": [1, 2.5, "x"]}, p) for p in range(6)},
    **{f"protocol {p}, runs": pickle.dumps(Runs(), p) for p in range(6)},
    "code and then rubbish": b"cos\ngetcwd\n(tR" + b"\xff" * 9,
    "code and then text": pickle.dumps(Runs(), 0) + b"\nhello",
    "torch zip": saved(),
    "torch zip behind bytes": b"hello\n" + saved(),
    "torch, old form": saved(_use_new_zipfile_serialization=False),
    "gz of a pickle": gzip.compress(pickle.dumps({"a": 1})),
    "zip of a pickle": zipped(pickle.dumps({"a": 1}, 0)),
    "picture before a zip": b"\x89PNG\r\n\x1a\n" + saved(),
    "npy": array(object),
    "npz": arrays(),
    "damaged pickle": pickle.dumps(list(range(1000)), 4)[:-5],
    "compiled": b"\x7fELF" + bytes(60),
    "unknown": bytes(range(256)),
}
DATA = {
    "config.txt": b"cat\ndog\nRest of it.\n",
    "vocab.txt": b"in\nout\nI\n.\n",
    "mine.md": b"Mine.",
    "please.md": "Perhaps é.\nNone.\n".encode(),
    "version.txt": b"Version 1\n. And more\n",
    "empty.txt": b"",
    "code.py": b"import os\n",
    "picture.png": b"\x89PNG\r\n\x1a\n" + bytes(range(256)),
    "weights.gguf": b"GGUF\x03\0\0\0" + bytes(64),
    "tokenizer.model": b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02\n\x0c\n\x03<s>\x15\0\0\0\0\x18\x03\x80",
}


@pytest.mark.parametrize("name", ["data.json", "weights.safetensor", "vocab.txt", "tokenizer.model", "notes"])
@pytest.mark.parametrize("what", PICKLED)
def test_a_pickle_is_refused_under_every_name(server, folder, what, name):
    (folder / name).write_bytes(PICKLED[what])
    with pytest.raises(api.Refused, match=f"{name} is .*(pickle|code)"):
        hfext.push_to_hub(folder, "user/thing")
    assert server.repos == {}


@pytest.mark.parametrize("protocol", range(2, 6))
def test_a_binary_pickle_is_called_one(folder, protocol):
    (folder / "data.json").write_bytes(pickle.dumps([1], protocol))
    with pytest.raises(api.Refused, match="data.json is a pickle"):
        api.files_of(folder)


def test_data_is_none(server, folder):
    for name, content in DATA.items():
        (folder / name).write_bytes(content)
    hfext.push_to_hub(folder, "user/thing")
    found = api.fetch("user/thing")
    assert {name: (found / name).read_bytes() for name in DATA} == DATA


@pytest.mark.parametrize("length", range(600, 700, 8))
def test_the_length_of_a_header_is_no_pickle(tmp_path, length):
    """640 bytes of header begin as protocol 2 does."""
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    data = (tmp_path / "a.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + size].ljust(length)
    (tmp_path / "a.safetensors").write_bytes(length.to_bytes(8, "little") + header + data[8 + size :])
    assert set(api.files_of(tmp_path)) == {"a.safetensors"}


HEADERS = {
    "a gap": {"a": ("F32", [2], [0, 8]), "b": ("F32", [2], [12, 20])},
    "a gap at the start": {"a": ("F32", [2], [4, 12])},
    "a span that is not its shape's": {"a": ("F32", [3], [0, 8])},
    "a span that is not its type's": {"a": ("F64", [2], [0, 8])},
    "three offsets": {"a": ("F32", [2], [0, 8, 8])},
    "offsets that are no numbers": {"a": ("F32", [2], ["0", "8"])},
    "mixed offsets": {"a": ("F32", [2], [0, 8]), "b": ("F32", [2], ["8", None])},
    "floats": {"a": ("F32", [2], [0.0, 8.0])},
    "negative": {"a": ("F32", [-2], [0, 8])},
    "huge": {"a": ("F32", [10**400], [0, 8])},
    "no shape": {"a": ("F32", None, [0, 8])},
    "an odd type": {"a": (["F32"], [2], [0, 8]), "b": ("F32", [3], [8, 8])},
}


@pytest.mark.parametrize("name", ["model.safetensors", "model.SAFETENSORS"])
@pytest.mark.parametrize("what", HEADERS)
def test_headers_of_safetensors_that_are_wrong_are_refused(tmp_path, what, name):
    about = {k: {"dtype": d, "shape": s, "data_offsets": o} for k, (d, s, o) in HEADERS[what].items()}
    header = json.dumps(about).encode()
    (tmp_path / name).write_bytes(len(header).to_bytes(8, "little") + header + bytes(20 if what == "a gap" else 8))
    with pytest.raises(api.Refused, match="damaged"):
        api.files_of(tmp_path)


def test_json_that_is_nested_too_deeply_is_damaged(tmp_path):
    deep = "[" * 200_000
    (tmp_path / "model.safetensors").write_bytes(len(deep).to_bytes(8, "little") + deep.encode())
    with pytest.raises(api.Refused, match="damaged"):
        api.files_of(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(deep)
    with pytest.raises(api.Refused, match="damaged"):
        api.files_of(tmp_path)
    (tmp_path / "hfext.json").write_text(deep)
    with pytest.raises(ValueError, match="damaged"):
        api.read_record(tmp_path)
