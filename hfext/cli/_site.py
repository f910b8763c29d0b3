"""The static site: pages made from records, docstrings and results, rendered by MkDocs and its Material theme.

It needs no network, neither to build nor to read: fonts are the system's, and the search index is a file of the site.
"""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import yaml

from .. import recipe, registry
from . import _site_method, _site_pages
from ._site_folder import replaced

# Opened from disk a page may start no worker, which the theme's search wants: a hidden frame does its work there.
_WORKER = """\
if (location.protocol === "file:") {
  window.IFrameWorker = class extends EventTarget {
    constructor(url) {
      super();
      this.waiting = [];
      const frame = document.createElement("iframe");
      frame.hidden = true;
      frame.srcdoc = "<!doctype html><title>search</title>";
      frame.onload = () => {
        const inner = frame.contentWindow;
        inner.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }));
        inner.importScripts = (...urls) => Promise.all(urls.map(one => load(inner, one)));
        load(inner, url).then(() => {
          this.inner = inner;
          this.waiting.splice(0).forEach(data => this.postMessage(data));
        });
      };
      document.body.append(frame);
    }
    postMessage(data) {
      if (this.inner) this.inner.dispatchEvent(new MessageEvent("message", { data }));
      else this.waiting.push(data);
    }
    terminate() {}
  };
  window.Worker = window.IFrameWorker;
  const load = (inner, url) => new Promise((resolve, reject) => {
    const script = inner.document.createElement("script");
    Object.assign(script, { src: url, onload: resolve, onerror: reject });
    inner.document.body.append(script);
  });
}
"""
_WORKER_PATH = "assets/iframe-worker.js"
_STYLE = """\
.md-grid { max-width: 76rem; }
.md-typeset table:not([class]) { font-size: .66rem; }
.md-typeset table:not([class]) th { min-width: 3rem; }
.md-typeset td:first-child code, .md-typeset td:nth-child(2) code { white-space: nowrap; }
.md-typeset pre > code { white-space: pre-wrap; }
.md-typeset h1 { font-weight: 600; }
"""
_STYLE_PATH = "assets/site.css"


def build(folder: Path, group: Any) -> int:
    """Write the site to `folder`, in the place of an earlier one if that is all it holds; the number of its pages.

    Raises:
        `ImportError`: MkDocs or its theme is missing.
        `ValueError`: The folder holds something else, or a page has a broken link. Nothing was changed.
    """
    try:
        import material  # noqa: F401
        from mkdocs.commands.build import build as render
        from mkdocs.config import load_config
        from mkdocs.exceptions import MkDocsException
    except ImportError as error:
        raise ImportError("the site needs mkdocs-material: pip install 'hfext[docs]'") from error
    with replaced(folder) as made, tempfile.TemporaryDirectory() as scratch:
        pages, source = all_pages(group), Path(scratch, "docs")
        for name, text in {**pages, _STYLE_PATH: _STYLE, _WORKER_PATH: _WORKER}.items():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_text(text, encoding="utf-8")
        (source / "plots").mkdir()
        for plot in (recipe.recipes_dir() / "results").glob("*.png"):
            shutil.copy(plot, source / "plots")
        settings = Path(scratch, "mkdocs.yml")
        settings.write_text(yaml.safe_dump(_settings(source, made, list(pages)), sort_keys=False), encoding="utf-8")
        try:
            config = load_config(config_file=str(settings))
            render(config)
        except MkDocsException as error:
            raise ValueError(f"the site could not be built: {error}") from error
        # For a server that has the site at its root; elsewhere its links lead nowhere.
        (made / "404.html").unlink(missing_ok=True)
    return len(pages)


def all_pages(group: Any) -> dict[str, str]:
    """{path: Markdown} of the whole site."""
    text = _site_pages.readme()
    methods = registry.methods()
    pages = {"index.md": _site_pages.index(text), "examples.md": _site_pages.examples(text)}
    for family in dict.fromkeys(method.family for method in methods):
        pages[f"choose/{family}.md"] = _site_pages.choose(family)
    for method in methods:
        pages[f"methods/{method.family}/{method.name}.md"] = _site_method.page(method)
    pages["papers.md"] = _site_pages.papers()
    pages["benchmarks.md"] = _site_pages.benchmarks()
    pages["cli.md"] = _site_pages.commands(group)
    for name in [name for name in pages if "/" not in name]:
        # One page is a tab of its own: there is nothing to list beside it.
        hidden = ["navigation", "toc"] if name == "papers.md" else ["navigation"]
        pages[name] = f"---\nhide: [{', '.join(hidden)}]\n---\n\n{pages[name]}"
    return pages


def _settings(source: Path, made: Path, names: list[str]) -> dict[str, Any]:
    families: dict[str, list] = {}
    for name in names:
        if name.startswith("methods/"):
            families.setdefault(name.split("/")[1], []).append({Path(name).stem: name})
    palette = [
        {"media": f"(prefers-color-scheme: {scheme})", "scheme": look, "primary": "indigo"}
        for scheme, look in (("light", "default"), ("dark", "slate"))
    ]
    return {
        "site_name": "hfext",
        "docs_dir": str(source),
        "site_dir": str(made),
        "strict": True,
        "theme": {
            "name": "material",
            "font": False,
            "palette": palette,
            "features": ["navigation.tabs", "navigation.prune", "navigation.top", "content.code.copy"],
        },
        "plugins": ["search", "offline"],
        "extra_css": [_STYLE_PATH],
        "extra": {"generator": False, "polyfills": [_WORKER_PATH]},
        "markdown_extensions": [
            "admonition",
            "tables",
            {"toc": {"permalink": True}},
            "pymdownx.details",
            "pymdownx.superfences",
            {"pymdownx.highlight": {"use_pygments": True, "guess_lang": False}},
        ],
        "validation": {
            "omitted_files": "warn",
            "absolute_links": "warn",
            "unrecognized_links": "warn",
            "anchors": "warn",
        },
        "nav": [
            {"Home": "index.md"},
            {"Examples": "examples.md"},
            {"How to choose": [{family: f"choose/{family}.md"} for family in families]},
            {"Methods": [{family: pages} for family, pages in families.items()]},
            {"Papers": "papers.md"},
            {"Benchmarks": "benchmarks.md"},
            {"Command line": "cli.md"},
        ],
    }
