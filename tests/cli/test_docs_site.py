"""The site: built once, every page and link of it looked at, and shown by a browser where there is one."""

import ast
import re
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser
from importlib.util import find_spec
from urllib.parse import unquote, urlsplit

import pytest
from typer.testing import CliRunner

from hfext import recipe, registry
from hfext.cli import _docstrings, _site_method, _site_pages, app
from hfext.cli._site import all_pages
from hfext.cli._site_folder import MARK, mark

needs_mkdocs = pytest.mark.skipif(
    not (find_spec("mkdocs") and find_spec("material")), reason="needs mkdocs-material: pip install 'hfext[docs]'"
)


def _docs(*arguments):
    return CliRunner().invoke(app, ["docs", *map(str, arguments)])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site") / "docs"
    start = time.perf_counter()
    done = _docs("--site", folder)
    assert done.exit_code == 0, done.output
    assert time.perf_counter() - start < 60
    return folder


class Page(HTMLParser):
    """Links, anchors, pictures and scripts of a page, and its text with and without what stands in <code>."""

    def __init__(self, path):
        super().__init__()
        self.links, self.loaded, self.ids, self.text, self.prose = [], [], set(), [], []
        self.open, self.headings = [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.ids |= {given[key] for key in ("id", "name") if given.get(key)}
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        if tag in ("img", "script", "iframe", "source") and given.get("src"):
            self.loaded.append(given["src"])
        if tag == "link" and given.get("href") and given.get("rel") not in ("canonical", "prev", "next"):
            self.loaded.append(given["href"])
        if tag in ("code", "script", "style", "title"):
            self.open.append(tag)
        if tag in ("h1", "h2"):
            self.headings.append("")

    def handle_endtag(self, tag):
        if self.open and tag == self.open[-1]:
            self.open.pop()

    def handle_data(self, data):
        if not {"script", "style"} & set(self.open):
            self.text.append(data)
            if "code" not in self.open:
                self.prose.append(data)


@pytest.fixture(scope="module")
def pages(site):
    # 404.html is for a server, which serves it from the root.
    return {path: Page(path) for path in sorted(site.rglob("*.html")) if path.name != "404.html"}


@needs_mkdocs
def test_no_internal_link_is_dead(site, pages):
    dead, seen = [], 0
    for path, page in pages.items():
        for link in [*page.links, *page.loaded]:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                assert parts.scheme in ("https", "mailto"), f"{path}: {link}"
                continue
            seen += 1
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            anchor = unquote(parts.fragment)
            wrong = not target.is_relative_to(site) or not target.is_file()
            wrong = wrong or bool(anchor and target in pages and anchor not in pages[target].ids)
            dead += [f"{path.relative_to(site)}: {link}"] if wrong else []
    assert dead == [] and seen > 1000


@needs_mkdocs
def test_nothing_is_loaded_from_elsewhere(site, pages):
    assert not [one for page in pages.values() for one in page.loaded if urlsplit(one).netloc]
    assert all("http" not in line for line in (site / "assets" / "site.css").read_text().splitlines())
    assert (site / "search" / "search_index.js").is_file()


@needs_mkdocs
def test_every_method_has_its_page_and_sections(site, pages):
    for method in registry.methods():
        page = pages[site / "methods" / method.family / f"{method.name}.html"]
        assert {"when-to-use-it", "call", "equation", "options", "evidence", "pitfalls"} <= page.ids
        assert "source-and-citation" in page.ids
        words = " ".join("".join(page.text).split())
        assert " ".join(method.title.split()) in words and f"@misc{{{method.name}{method.year}" in words
        assert "Reproduced: yes" in words or "Reproduced: no" in words or "No result of ours" in words
    for family in {method.family for method in registry.methods()}:
        links = pages[site / "choose" / f"{family}.html"].links
        assert all(f"../methods/{family}/{m.name}.html" in links for m in registry.methods(family))


@needs_mkdocs
def test_no_value_is_missing_and_no_template_is_left(pages):
    for path, page in pages.items():
        prose = "".join(page.prose)
        # Records speak of `windup=None`, a table of what is None; elsewhere it is a value that is not there.
        assert not re.search(r"(?<!=)\b(None|undefined|nan|MISSING)\b(?!:)", prose), path
        assert not re.search(r"\{\{|\{%|\{#|object at 0x|<property|<factory>", "".join(page.text)), path
        # Markdown that was not rendered.
        assert not re.search(r"\]\([\w./]+\.md\)|^\| --- |^\?\?\? |```", prose, re.M), path


@needs_mkdocs
def test_the_paper_index_names_every_paper_and_outcome(site, pages):
    page = pages[site / "papers.html"]
    for method in registry.methods():
        assert f"methods/{method.family}/{method.name}.html" in page.links
        assert method.arxiv is None or f"https://arxiv.org/abs/{method.arxiv}" in page.links


def test_every_python_block_of_the_site_is_one_that_is_run():
    """Blocks of the README, which tests/test_readme.py runs, and calls, which tests/cli/test_docs_calls.py runs."""
    text = _site_pages.readme()
    known = {code.strip() for _, code in _site_pages.labelled_blocks(text)}
    for method in registry.methods():
        known |= {_site_method.example(method)[0], method.after_load}
    for name, page in all_pages(_group()).items():
        for code in re.findall(r"^```python\n(.*?)^```", page, re.M | re.S):
            assert code.strip() in known, f"{name}:\n{code}"
            compile(code, name, "exec")
        for code in re.findall(r"^```bash\n(.*?)^```", page, re.M | re.S):
            for line in code.strip().splitlines():
                command, what = re.fullmatch(r"hfext (run|verify) (\S+)", line).groups()
                recipe.load(what) if command == "run" else registry.get(what)


def _group():
    import typer

    return typer.main.get_command(app)


def test_the_commands_are_all_described():
    page = _site_pages.commands(_group())
    for name, command in _group().commands.items():
        assert f"## hfext {name}\n" in page
        for parameter in command.params:
            assert all(f"`{option}`" in page for option in parameter.opts if option.startswith("--"))


# docstrings


def test_options_come_from_the_class_and_those_before_it():
    found = {row["option"]: row for row in _docstrings.options(registry.get("bisam"))}
    assert found["`rho`"]["default"] == "`0.05`" and "Radius" in found["`rho`"]["meaning"]
    assert "phi" in found["`surrogate`"]["meaning"]


def test_options_of_a_function_are_its_parameters():
    found = {row["option"]: row["default"] for row in _docstrings.options(registry.get("ssd"))}
    assert found["`model`"] == "`required`" and "`alpha`" in found


def test_arguments_end_where_the_section_ends():
    text = """First.

    Args:
        a, b (`int`, *optional*, defaults to 3): Two
            lines: with a colon.
        **rest: More.

    Returns:
        Nothing: at all.
    """
    both = "Two lines: with a colon."
    assert _docstrings.arguments(text) == {"a": both, "b": both, "rest": "More."}
    assert _docstrings.arguments("No section.") == _docstrings.arguments(None) == {}
    assert _docstrings.arguments("A.\n\nArgs:\n    nothing here\n") == {}


@pytest.mark.parametrize(
    "text, shown",
    [
        ("a*b and c_d [T, C] < 3", r"a\*b and c\_d \[T, C\] &lt; 3"),
        ("see [`ASAM`] and `x * y`", "see `ASAM` and `x * y`"),
        ("# no heading", r"\# no heading"),
    ],
)
def test_prose_is_no_markup(text, shown):
    assert _docstrings.escaped(text) == shown


def test_formulas_stay_as_they_are():
    assert _docstrings.markdown("A * b:\n\n    x * y_1 < 2\n") == "A \\* b:\n\n    x * y_1 < 2"


def test_columns_keep_their_spaces():
    shown = _docstrings.markdown("code    m_j = 1\nscore   a[m_j]\nTokens *near*.")
    assert shown == "    code    m_j = 1\n    score   a[m_j]\n\nTokens \\*near\\*."


def test_a_row_is_found_by_name_and_by_what_the_file_defines():
    (row,) = _docstrings.chosen(registry.get("saf"))
    assert "SAFMixin" in row["take"]
    assert _docstrings.chosen(registry.get("bisam"))[0]["take"] == "`bisam`"


def test_the_example_imports_what_it_needs():
    for method in registry.methods():
        code, own = _site_method.example(method)
        names = {alias.asname or alias.name for node in ast.parse(code).body for alias in getattr(node, "names", [])}
        assert "hfext" in names and not names & set(own)
    code, own = _site_method.example(registry.get("awq"))
    assert "from hfext.quantization import AWQConfig" in code and own == ["path", "texts"]


# the command


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    pytest.importorskip("mkdocs")
    (tmp_path / "thesis.tex").write_text("years of work")
    done = _docs("--site", tmp_path)
    assert done.exit_code == 2 and "not of an earlier site" in done.output
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@needs_mkdocs
def test_an_earlier_site_is_replaced(tmp_path, monkeypatch):
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "old.html").touch()
    mark(folder)
    one = {"index.md": "# Small\n\n[paper](papers.md)", "papers.md": "# Papers\n"}
    wanted = {"examples.md": "# E", "benchmarks.md": "# B", "cli.md": "# C"}
    monkeypatch.setattr("hfext.cli._site.all_pages", lambda group: {**one, **wanted})
    assert _docs("--site", folder).exit_code == 0
    assert not (folder / "old.html").exists() and (folder / "papers.html").is_file()
    one["index.md"] = "[nowhere](nowhere.md)"
    done = _docs("--site", folder)
    assert done.exit_code == 2 and "could not be built" in done.output and (folder / "papers.html").is_file()


@pytest.fixture
def small(monkeypatch):
    """A site that is quick to build, and how often that was begun."""
    begun = []
    names = {"papers.md": "# P", "examples.md": "# E", "benchmarks.md": "# B", "cli.md": "# C"}

    def pages(group):
        begun.append(1)
        return {"index.md": "# Small", **names}

    monkeypatch.setattr("hfext.cli._site.all_pages", pages)
    return begun


def _state(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@needs_mkdocs
def test_what_a_user_put_into_an_earlier_site_is_kept(tmp_path, small):
    folder = tmp_path / "docs"
    assert _docs("--site", folder).exit_code == 0 and not (folder / "404.html").exists()
    begun = len(small)
    spoils = {
        "notes.txt": lambda path: path.write_text("mine"),
        "methods/deep/notes.txt": lambda path: (path.parent.mkdir(parents=True), path.write_text("mine")),
        "index.html": lambda path: path.write_text("edited"),
        "linked": lambda path: path.symlink_to(tmp_path),
        MARK: lambda path: path.write_text(""),
        ".git": lambda path: path.write_text("gitdir: elsewhere"),
    }
    for name, spoil in spoils.items():
        kept = (folder / name).read_bytes() if (folder / name).is_file() else None
        spoil(folder / name)
        before = _state(folder)
        done = _docs("--site", folder)
        assert done.exit_code == 2 and "name an empty folder" in done.output, name
        assert _state(folder) == before and [path.name for path in tmp_path.iterdir()] == ["docs"]
        (folder / name).unlink()
        if kept is not None:
            (folder / name).write_bytes(kept)
    assert len(small) == begun  # refused before anything was built
    assert _docs("--site", folder).exit_code == 0


@needs_mkdocs
def test_the_working_directory_and_links_are_refused_before_building(tmp_path, small, monkeypatch):
    folder = tmp_path / "docs"
    assert _docs("--site", folder).exit_code == 0
    (tmp_path / "link").symlink_to(folder)
    before, begun = _state(folder), len(small)
    done = _docs("--site", tmp_path / "link")
    assert done.exit_code == 2 and "is a link" in done.output
    for inside in (folder, folder / "assets"):
        monkeypatch.chdir(inside)
        done = _docs("--site", "." if inside == folder else "..")
        assert done.exit_code == 2 and "working directory" in done.output
    assert _state(folder) == before and len(small) == begun


@needs_mkdocs
def test_a_failure_at_any_step_leaves_the_old_site(tmp_path, small, monkeypatch):
    folder = tmp_path / "docs"
    assert _docs("--site", folder).exit_code == 0
    before, rename = _state(folder), type(folder).rename
    for failing in ("new", "docs"):

        def broken(self, target, failing=failing):
            if self.name == failing:
                raise OSError("disk full")
            return rename(self, target)

        with monkeypatch.context() as patch:
            patch.setattr(type(folder), "rename", broken)
            done = _docs("--site", folder)
        assert done.exit_code == 2 and "disk full" in done.output
        assert _state(folder) == before and [path.name for path in tmp_path.iterdir()] == ["docs"]
    with monkeypatch.context() as patch:
        patch.setattr("hfext.cli._site.all_pages", lambda group: {"index.md": "[no](no.md)"})
        assert _docs("--site", tmp_path / "a" / "b" / "c").exit_code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["docs"]


def test_wrong_arguments_are_named(tmp_path):
    done = _docs("--site", "--check", tmp_path)
    assert done.exit_code == 2 and "take one of them" in done.output
    done = _docs(tmp_path)
    assert done.exit_code == 2 and "only --site writes to a folder" in done.output


def test_without_mkdocs_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "material", None)
    done = _docs("--site", tmp_path / "docs")
    assert done.exit_code == 2 and "pip install 'hfext[docs]'" in done.output


# a browser

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@needs_mkdocs
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium: apt-get install chromium")
def test_a_browser_shows_and_searches_the_site_from_disk(site, tmp_path):
    from PIL import Image

    def browse(page, *options):
        url = (site / page.partition("?")[0]).as_uri() + "".join(page.partition("?")[1:])
        base = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
        command = [*base, "--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=8000", *options, url]
        return subprocess.run(command, capture_output=True, text=True, timeout=120).stdout

    for i, page in enumerate(("index.html", "methods/optim/bisam.html", "papers.html")):
        picture = tmp_path / f"{i}.png"
        browse(page, "--window-size=1280,1600", "--hide-scrollbars", f"--screenshot={picture}")
        with Image.open(picture) as shown:
            assert shown.size == (1280, 1600)
            colours = shown.convert("L").histogram()
        # Text on white below the bar: neither an empty page nor one without its style.
        assert colours[255] > 0.4 * 1280 * 1600 and sum(colours[:80]) > 5_000
    found = browse("index.html?q=eigenbasis", "--dump-dom")
    assert "md-search-result__item" in found and "methods/optim/soap.html" in found
