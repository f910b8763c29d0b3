"""Superposed decoding as a Hub folder: `custom_generate/generate.py`, put together from the library's own source."""

import ast
import os
import re
from importlib.resources import files
from pathlib import Path

_SOURCES = (
    "_adapters",
    "_ngram_count",
    "_ngram_files",
    "ngram_store",
    "_superposed_drafts",
    "_superposed_loop",
    "_superposed_ngrams",
    "superposed",
    "_superposed_entry",
)

_HEADER = '''"""Superposed decoding (arXiv 2405.18400) for `model.generate(..., custom_generate=...)`, in one file.

Made from the source of hfext by `hfext.decoding.export_superposed`: change it there.
"""
'''

_README = """---
library_name: transformers
license: apache-2.0
tags:
- custom_generate
- arxiv:2405.18400
---

# Superposed decoding

Several drafts of a prompt for the model calls of one: every step feeds one weighted sum of the drafts' embeddings.
For decoder-only text models with a key-value cache.

```python
drafts = model.generate(
    **tokenizer(prompt, return_tensors="pt"),
    custom_generate="<this repository>",
    trust_remote_code=True,
    num_drafts=3,
    max_new_tokens=10,
)
print(tokenizer.batch_decode(drafts, skip_special_tokens=True))
```

Drafts stand best first inside each prompt; `return_dict_in_generate=True` returns their scores too. The method's
quality comes from an n-gram store of text like the one wanted: `ngram_store="<folder>"`, made with
`NGramStore.build(texts, tokenizer).save(folder)`, where `NGramStore` is in `custom_generate/generate.py` and in hfext.
All options are in the docstring of `SuperposedConfig` there, where its `temperature` is here `superposed_temperature`:
`temperature` belongs to sampling, and a pipeline passes one to every model. `do_sample`, `num_beams`,
`num_return_sequences`, `streamer` and `assistant_model` are refused.

With weights in this repository, `from_pretrained(..., trust_remote_code=True)` makes this the model's own `generate`,
and `model.generate(..., custom_generate=None)` is that of transformers. Pipelines sample by default: give them
`do_sample=False`. In your own code call `generate` of the file; the loop in it cannot see a streamer.

Method: Shen et al., Superposed Decoding: Multiple Generations from a Single Autoregressive Inference Pass,
arXiv 2405.18400.
"""

_REQUIREMENTS = "torch>=2.5\ntransformers>=5.0\nsafetensors>=0.4.3\nnumpy>=1.26\n"


def superposed_source() -> str:
    """The text of `generate.py`: the library's modules in one, without its registry."""
    imports, bodies = {}, []
    for name in _SOURCES:
        text = files(__package__).joinpath(f"{name}.py").read_text(encoding="utf-8")
        lines, at, body = text.splitlines(), 0, []
        for node in ast.parse(text).body:
            # From the end of the statement before, so that comments stay with what they explain.
            source, at = "\n".join(lines[at : node.end_lineno]), node.end_lineno
            if isinstance(node, ast.Import | ast.ImportFrom):
                if not getattr(node, "level", 0):
                    imports.setdefault(getattr(node, "module", None), set()).update(map(ast.unparse, node.names))
            elif not _stays_behind(node):
                body.append(source)
        bodies.append("\n".join(body).strip("\n"))
    head = "\n".join([f"import {name}" for name in sorted(imports.pop(None, ()))])
    head += "".join(f"\nfrom {module} import {', '.join(sorted(imports[module]))}" for module in sorted(imports))
    # The loop alone cannot refuse a streamer without the library's hook of `generate`: it is not public there.
    bodies = [re.sub(r"\bsuperposed_generate\b", "_superposed_generate", body) for body in bodies]
    return f"{_HEADER}\n{head}\n\n" + "\n\n\n".join(bodies) + "\n"


def _stays_behind(node: ast.stmt) -> bool:
    """Docstrings of modules, calls of `compat`, and the method's record."""
    if isinstance(node, ast.Expr):
        call = isinstance(node.value, ast.Call) and ast.unparse(node.value.func).startswith("compat.")
        return call or isinstance(node.value, ast.Constant)
    return isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "METHOD"


def export_superposed(folder: str | Path, readme: bool = True) -> Path:
    """Write superposed decoding as a repository for `generate(custom_generate=folder, trust_remote_code=True)`.

    The code needs torch, transformers, safetensors and numpy, and not hfext. With a model's weights in the same
    folder, `from_pretrained(folder, trust_remote_code=True)` makes it the model's own `generate`.

    Args:
        folder (`str` or `Path`): A new folder or that of a saved model; `custom_generate` in it is written anew.
        readme (`bool`, *optional*, defaults to `True`): Write a `README.md`, which must not exist yet.

    Returns:
        The path of `generate.py`.
    """
    folder = Path(folder)
    if readme and (folder / "README.md").exists():
        raise FileExistsError(
            f"{folder / 'README.md'} exists: pass readme=False and add the tag custom_generate to it."
        )
    code = folder / "custom_generate"
    code.mkdir(parents=True, exist_ok=True)
    _replace(code / "requirements.txt", _REQUIREMENTS)
    if readme:
        _replace(folder / "README.md", _README)
    _replace(code / "generate.py", superposed_source())
    return code / "generate.py"


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
