"""What the library offers: one `Method` record per paper, written once and read by everything else.

The record of a method stands at the end of its own file as `METHOD = Method(...)`. A family's `__init__` imports its
files and calls `collect(__name__)`. The Hugging Face tables, `hfext list`, the README, the model cards, the
conformance tests and the error messages are all made from these records. This module imports no torch and nothing of
`hfext`, and no user code has to go through it: every class can be imported and used directly.
"""

import difflib
import re
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

FAMILIES = {
    "optim": "optimizers and parametrisations, by name in `TrainingArguments`",
    "schedule": "learning-rate schedules",
    "unlearning": "objectives of `UnlearningTrainer` and post-hoc edits",
    "quantization": "weight quantisation through `from_pretrained`",
    "kv_cache": "compressed key-value caches",
    "attention": "attention implementations",
    "modules": "drop-in modules",
    "decoding": "logits processors and generation loops",
    "metrics": "metrics",
    "training": "Trainer mixins and callbacks",
    "losses": "loss functions",
    "adapters": "PEFT tuners",
    "merging": "model merging",
}
STATUSES = ("faithful", "variant", "abstract-only")


@dataclass(frozen=True, kw_only=True)
class Result:
    """A number with its setting: what the paper reports (`value`) against its own baseline (`baseline`)."""

    metric: str
    setting: str
    value: str
    baseline: str | None = None


@dataclass(frozen=True, kw_only=True)
class Method:
    """The record of one method.

    Args:
        name: What a user types: lower case, the paper's short name.
        family: A key of `FAMILIES`.
        title: The paper's title.
        arxiv: The arXiv id, or `None` with the reason in `notes`.
        year: Year of the first version.
        authors: First author and "et al.", for the citation.
        repo: The authors' code as `owner/name`, or `None`.
        status: One of `STATUSES`.
        difference: What differs from the paper; required for `variant` and `abstract-only`.
        target: Where the implementation lives, `module:attribute`.
        usage: The shortest call, one line of Python.
        summary: One sentence: what it does.
        claim: The sentence of the paper that `hfext verify` checks.
        headline: The number that the paper reports.
        recipe: The recipe that `hfext verify` runs, relative to `recipes/`.
        config: The dataclass whose fields `hfext show` lists, or `None`.
        after_load: The line a user must run on a model trained so after `from_pretrained`, if there is one.
        opt_out: Conformance behaviours that do not apply, each with its reason.
        notes: Anything else a user must know.
    """

    name: str
    family: str
    title: str
    arxiv: str | None
    year: int
    status: str
    target: str
    usage: str
    summary: str
    authors: str = ""
    repo: str | None = None
    difference: str = ""
    claim: str = ""
    headline: Result | None = None
    recipe: str | None = None
    config: type | None = None
    after_load: str = ""
    opt_out: tuple[tuple[str, str], ...] = ()
    notes: str = ""

    def __post_init__(self):
        if not re.fullmatch(r"[a-z][a-z0-9_]*", self.name):
            raise ValueError(f"Method name {self.name!r} must be lower case letters, digits and underscores.")
        if self.family not in FAMILIES:
            raise ValueError(f"{self.name}: unknown family {self.family!r}. {suggest(self.family, FAMILIES)}")
        if self.status not in STATUSES:
            raise ValueError(f"{self.name}: status is {self.status!r} but must be one of {', '.join(STATUSES)}.")
        if self.status != "faithful" and not self.difference:
            raise ValueError(f"{self.name}: status {self.status!r} needs `difference`: say what is not the paper's.")
        if self.arxiv is None and not self.notes:
            raise ValueError(f"{self.name}: a method without an arXiv id gives the reason in `notes`.")
        if self.arxiv is not None and not re.fullmatch(r"\d{4}\.\d{4,5}", self.arxiv):
            raise ValueError(f"{self.name}: arxiv is {self.arxiv!r} but must look like 2407.12993.")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `config` becomes its import path."""
        record = asdict(self)
        record["config"] = self.config and f"{self.config.__module__}:{self.config.__qualname__}"
        record["opt_out"] = dict(self.opt_out)
        return record


_METHODS: dict[str, Method] = {}


def register(method: Method) -> Method:
    """Add one record. The same record again is a no-op; another one of the same name is a `ValueError`."""
    known = _METHODS.get(method.name)
    if known is not None and known != method:
        raise ValueError(f"Two methods are called {method.name!r}: {known.target} and {method.target}.")
    _METHODS[method.name] = method
    return method


def collect(package: str) -> list[Method]:
    """Register every `METHOD` found in the imported modules of `package` and return the records."""
    names = sorted(name for name in sys.modules if name.startswith(package + "."))
    modules = [sys.modules[name] for name in names]
    return [register(vars(module)["METHOD"]) for module in modules if "METHOD" in vars(module)]


def get(name: str) -> Method:
    """The record called `name`; `KeyError` with the nearest name otherwise."""
    if name not in _METHODS:
        raise KeyError(f"No method is called {name!r}. {suggest(name, _METHODS)}")
    return _METHODS[name]


def methods(family: str | None = None, arxiv: str | None = None) -> list[Method]:
    """All records, in family order and then by name; optionally one family's or one paper's."""
    if family is not None and family not in FAMILIES:
        raise KeyError(f"No family is called {family!r}. {suggest(family, FAMILIES)}")
    order = list(FAMILIES)
    found = [m for m in _METHODS.values() if family in (None, m.family) and arxiv in (None, m.arxiv)]
    return sorted(found, key=lambda m: (order.index(m.family), m.name))


def suggest(name: str, known: Iterable[str]) -> str:
    """The end of an error message: the nearest known name, or all of them."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(known) or 'none'}."
