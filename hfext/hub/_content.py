"""What a file holds, told from its bytes and not its name: only what is known to be data is published or loaded.

Known are text in UTF-8 (also JSON, Python, vocabularies), pictures, sound, safetensors, GGUF and SentencePiece models.
A pickle of any protocol is none of these, nor is an archive or an array that may hold one.
"""

import codecs
import pickletools
import re
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

BLOCK = 1 << 20
_MEDIA = re.compile(
    rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|GIF8[79]a|RIFF....(WEBP|WAVE)|%PDF-|OggS|fLaC|....ftyp|ID3[\x02-\x04]|GGUF[\x01-\x09]\0",
    re.DOTALL,
)
_ARCHIVES = {
    b"\x1f\x8b": "a gzip archive",
    b"BZh": "a bzip2 archive",
    b"\xfd7zXZ\0": "an xz archive",
    b"\x28\xb5\x2f\xfd": "a zstd archive",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!": "a rar archive",
    b"\x93NUMPY": "a NumPy array",
    b"\x89HDF\r\n\x1a\n": "an HDF5 file",
    b"\x7fELF": "a compiled program",
    b"MZ": "a compiled program",
}
_CALLS = ("REDUCE", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "BUILD")
_MOST = 100_000  # opcodes that are looked at; a text is none after a few


def why_not(path: Path) -> str | None:
    """Why the content of a file is none that is known to be data; None where it is."""
    with open(path, "rb") as file:
        start = file.read(16)
        if is_pickle(file):
            return "is a pickle, which can run code where it is loaded"
    if _is_zip(path):
        return "is a zip archive, as torch.save writes it, which may hold a pickle"
    named = next((what for magic, what in _ARCHIVES.items() if start.startswith(magic)), None)
    if named and not (named == "a compiled program" and _is_text(path)):
        return f"is {named}, which may hold a pickle or code"
    if path.suffix.lower() == ".safetensors" or _MEDIA.match(start):
        return None
    # SentencePiece: a protobuf whose first field is the list of pieces.
    if path.suffix.lower() in (".model", ".spm", ".vocab") and start[:1] == b"\n" and not _is_text(path):
        return None
    if _is_text(path):
        return None
    if start[:1] == b"\x80":
        return "is a pickle or a damaged one, which can run code where it is loaded"
    return "is binary and of no kind that is known to be data (it may hold a pickle); text must be UTF-8"


def may_be_pickle(path: Path) -> bool:
    """Whether a file is a pickle or an archive as torch writes it."""
    with open(path, "rb") as file:
        return is_pickle(file) or _is_zip(path)


def is_pickle(file: BinaryIO) -> bool:
    """Whether `pickle.load` would get through these bytes, or would call something on its way; they are not run."""
    file.seek(0)
    stack: list[Any] = []
    count, first, named = 0, "", False
    try:
        for opcode, argument, _ in pickletools.genops(file):
            count, first = count + 1, first or opcode.name
            if not _applied(opcode, stack):
                return False
            if opcode.name in ("GLOBAL", "INST"):
                named = named or re.fullmatch(r"[A-Za-z_][\w.]* [A-Za-z_][\w.]*", str(argument)) is not None
            named = named or opcode.name in ("STACK_GLOBAL", "EXT1", "EXT2", "EXT4")
            if (named and opcode.name in _CALLS) or count > _MOST:
                return True
    except Exception:  # bytes that are none fail in many ways
        return False
    # Prose such as "Version 1\n." is a constant by chance; then it goes on.
    return named or first == "PROTO" or not file.read(BLOCK).strip()


def _applied(opcode: Any, stack: list[Any]) -> bool:
    """Whether the machine of pickle has on its stack what this needs."""
    need, mark = list(opcode.stack_before), pickletools.markobject
    if mark in need or (opcode.name == "POP" and stack[-1:] == [mark]):
        if mark not in stack:
            return False
        while stack.pop() is not mark:
            pass
        need = need[: need.index(mark)] if mark in need else []
    if len(stack) < len(need):
        return False
    del stack[len(stack) - len(need) :]
    stack.extend(opcode.stack_after)
    return True


def _is_zip(path: Path) -> bool:
    """Also with bytes before it, which zipfile and torch pass over."""
    try:
        with zipfile.ZipFile(path) as archive:
            return bool(archive.namelist())
    except Exception:  # a file that is none fails in many ways
        with open(path, "rb") as file:
            return file.read(4) == b"PK\x03\x04"


def _is_text(path: Path) -> bool:
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        with open(path, "rb") as file:
            while block := file.read(BLOCK):
                if b"\0" in block:
                    return False
                decoder.decode(block)
            decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return True
