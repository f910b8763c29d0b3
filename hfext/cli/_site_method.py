"""The page of one method, from its record, its docstrings, its card and its committed result."""

import ast
import builtins
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers

import hfext

from .. import hub, recipe, registry
from ._docstrings import chosen, escaped, markdown, module_of, options
from ._output import place, spread, table

# Longer tables stay in the JSON file.
MOST_ROWS = 30


def page(method: registry.Method) -> str:
    result = recipe.read_result(method.name) or {}
    card = sections(hub.model_card(method.name).text)
    parts = [
        f"# {method.name}",
        escaped(method.summary),
        _facts(method, result),
        "## When to use it",
        _when(method),
        "## Call",
        *_call(method),
        "## Equation",
        markdown(_body(method)),
        "## Options",
        table(options(method), markdown=True) if options(method) else "It has none.",
        "## Evidence",
        *_evidence(method, result),
        "## Pitfalls",
        *_pitfalls(method, card["Limits"]),
        "## Source and citation",
        *_source(method),
        card["Citation"],
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def sections(card: str) -> dict[str, str]:
    """{heading: text} of a card."""
    pieces = re.split(r"^## (.+)\n", card, flags=re.MULTILINE)
    return {heading: text.strip() for heading, text in zip(pieces[1::2], pieces[2::2], strict=True)}


def example(method: registry.Method) -> tuple[str, list[str]]:
    """The usage line behind the imports that it needs, and the names that are the user's own."""
    usage = re.sub(r"^from_pretrained\(", "model = AutoModelForCausalLM.from_pretrained(", method.usage)
    tree = ast.parse(usage)
    nodes = list(ast.walk(tree))
    made = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    used = dict.fromkeys(node.id for node in nodes if isinstance(node, ast.Name) and node.id not in made)
    roots = {id(node.func) for node in nodes if isinstance(node, ast.Call)}
    roots |= {id(node.value) for node in nodes if isinstance(node, ast.Attribute)}
    acted = {node.id for node in nodes if isinstance(node, ast.Name) and id(node) in roots}
    imported, own = {}, []
    for name in used:
        if name == "hfext" or hasattr(builtins, name):
            continue
        # A short word in the place of an argument is the user's data, also where the library has such a name.
        ours = name in acted or "_" in name or name[0].isupper()
        where = _home_of(name, method) if ours else None
        imported.setdefault(where, []).append(name) if where else own.append(name)
    lines = [f"from {where} import {', '.join(sorted(names))}" for where, names in sorted(imported.items())]
    outside = [line for line in lines if not line.startswith("from hfext")]
    inside = ["import hfext", *(line for line in lines if line.startswith("from hfext"))]
    return "\n".join([*outside, "", *inside, "", usage] if outside else [*inside, "", usage]), own


def _home_of(name: str, method: registry.Method) -> str | None:
    for where in (f"hfext.{method.family}", method.target.partition(":")[0]):
        if hasattr(importlib.import_module(where), name):
            return where
    if name in hfext.__all__:
        return "hfext"
    # Of transformers classes only: its modules have names that users give to variables.
    return "transformers" if name[0].isupper() and hasattr(transformers, name) else None


def _facts(method: registry.Method, result: dict[str, Any]) -> str:
    evidence = result.get("evidence")
    claim = ("reproduced" if evidence["reproduced"] else "not reproduced") if evidence else "not run"
    paper = f"[arXiv {method.arxiv}](https://arxiv.org/abs/{method.arxiv})" if method.arxiv else "no paper on arXiv"
    family = f"[{method.family}](../../choose/{method.family}.md)"
    return f"Family: {family} · {paper} · {method.status} · claim: {claim}"


def _when(method: registry.Method) -> str:
    rows = chosen(method)
    if not rows:
        return f"See [how to choose](../../choose/{method.family}.md) among the methods of this family."
    lines = []
    for row in rows:
        wanted, taken, *rest = row
        lines.append(f"- **You want {row[wanted]}.** Take {row[taken]}.")
        lines += [f"    - {heading.capitalize()}: {row[heading]}." for heading in rest if row[heading]]
    return "\n".join(lines)


def _call(method: registry.Method) -> Iterator[str]:
    code, own = example(method)
    yield f"```python\n{code}\n```"
    if own:
        words = ", ".join(f"`{name}`" for name in own)
        verb = "is" if len(own) == 1 else "are"
        yield f"{words} {verb} yours: [the examples](../../examples.md) show whole programs."
    if method.after_load:
        yield "After `from_pretrained` of a model that was trained so:"
        yield f"```python\n{method.after_load}\n```"
    if method.recipe:
        yield "Its experiment, which compares it with a baseline:"
        yield f"```bash\nhfext run {Path(method.recipe).with_suffix('').as_posix()}\nhfext verify {method.name}\n```"


def _body(method: registry.Method) -> str:
    """The docstring of the file without its first line, which says what the summary says."""
    text = module_of(method).__doc__.strip()
    return text.partition("\n")[2].strip("\n") or text


def _evidence(method: registry.Method, result: dict[str, Any]) -> Iterator[str]:
    evidence, paper = result.get("evidence"), method.headline
    rows = []
    if paper:
        value, against = escaped(paper.value), escaped(paper.baseline or "")
        rows.append({"": "paper", "metric": escaped(paper.metric), "value": value, "baseline": against})
        rows[-1]["setting"] = escaped(paper.setting)
    if evidence:
        baseline = f"{evidence['baseline_name']} {spread(evidence['baseline'], evidence.get('baseline_sd'))}"
        value = spread(evidence["ours"], evidence.get("ours_sd"))
        rows.append({"": "here", "metric": escaped(evidence["metric"]), "value": value, "baseline": escaped(baseline)})
        rows[-1]["setting"] = escaped(evidence["setting"])
    if method.claim:
        yield f"Claim: {escaped(method.claim)}"
    if rows:
        yield table(rows, markdown=True)
    if not evidence:
        yield "No result of ours is recorded."
        return
    note = f" {escaped(evidence['note'])}" if evidence.get("note") else ""
    yield f"**Reproduced: {'yes' if evidence['reproduced'] else 'no'}.**{note}"
    if "machine" in result:
        yield (
            f"Measured on {place(result['machine'])} in {result['seconds']:.0f} s, {result['date']}. The paper's "
            "setting is larger: the two numbers are not comparable in size."
        )
    for name in sorted(hub.plots_of([method.name])):
        yield f"![{Path(name).stem}](../../{name})"
    yield from result_tables(result)


def result_tables(record: dict[str, Any]) -> Iterator[str]:
    """Folded, but for the long ones."""
    for title, rows in record.get("tables", {}).items():
        if rows and 0 < len(rows) <= MOST_ROWS and rows[0]:
            inner = table([{key: _plain(value) for key, value in row.items()} for row in rows], markdown=True)
            shown = title.replace('"', "'")
            yield f'??? abstract "{shown}"\n\n' + "\n".join(f"    {line}" for line in inner.splitlines())


def _plain(value: Any) -> Any:
    return escaped(" ".join(value.split())) if isinstance(value, str) else value


def _pitfalls(method: registry.Method, limits: str) -> Iterator[str]:
    yield limits
    if method.opt_out:
        yield "What does not hold for it:"
        yield "\n".join(f"- {escaped(name)}: {escaped(reason)}" for name, reason in method.opt_out)


def _source(method: registry.Method) -> Iterator[str]:
    path = Path(*method.target.partition(":")[0].split(".")).with_suffix(".py")
    tests = Path("tests", *path.parts[1:-1]) / f"test_{path.name}"
    lines = [f"- Code: `{path.as_posix()}`, tests: `{tests.as_posix()}`"]
    if method.recipe:
        lines.append(f"- Recipe: `recipes/{method.recipe}`")
    if method.repo:
        lines.append(f"- The authors' code: [{method.repo}](https://github.com/{method.repo})")
    yield "\n".join(lines)
