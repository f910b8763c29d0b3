"""Is a logits processor right in every mode of `generate`? Checks that anyone can run on their own.

    from hfext.decoding import conformance

    report = conformance.run(lambda **options: TopPLogitsWarper(0.9, **options), min_tokens_to_keep=True)
    print(report)
    report.raise_for_failures()

or, one test for each check:

    @pytest.mark.parametrize("name", conformance.CHECKS)
    def test_my_processor(name):
        conformance.run(make, checks=[name], stateful=True).raise_for_failures()

`make` returns a fresh processor at each call. The keyword arguments of `run` are its declared facts, see [`Facts`]:
they say which checks apply. Half of the checks call `processor(input_ids, scores)` once, with the rows, dtypes, memory
layouts and vocabularies that occur; the others replay whole texts the way `generate` hands them out (beams, drafts,
padding, finished rows, a second use of the object) or run `generate` on a tiny random Llama, and compare each row with
a straight replay of its text alone. Nothing is downloaded and the global generators are left as they are.

Not decided here, because a call does not tell: rows with one prefix whose scores differ (encoder-decoder) and that
change places too; a prompt that continues an earlier output of the same object.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from transformers import LogitsProcessor

from ..registry import suggest
from . import _conformance_calls, _conformance_replays  # noqa: F401  (they add their checks to CHECKS)
from ._conformance_checks import CHECKS, Facts, Skip, Subject
from ._conformance_generate import tiny_language_model

__all__ = ["CHECKS", "Facts", "Outcome", "Report", "Subject", "run", "tiny_language_model"]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Of one check: `status` and, unless it passed, the reason; `requirement` is what must hold."""

    check: str
    status: Literal["passed", "failed", "skipped"]
    reason: str = ""

    @property
    def requirement(self) -> str:
        return " ".join((CHECKS[self.check].__doc__ or "").split())


@dataclass(frozen=True)
class Report:
    """The outcomes of all checks of one processor; `str` gives a table."""

    name: str
    outcomes: list[Outcome]

    def count(self, status: str) -> int:
        return sum(outcome.status == status for outcome in self.outcomes)

    @property
    def failures(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.status == "failed"]

    def raise_for_failures(self) -> None:
        """`AssertionError` that lists every failed check with its reason and what must hold."""
        if self.failures:
            lines = [f"- {f.check}: {f.reason}\n  {f.requirement}" for f in self.failures]
            raise AssertionError(f"{self.name} fails {len(lines)} of {len(self.outcomes)} checks\n" + "\n".join(lines))

    def __str__(self) -> str:
        counts = ", ".join(f"{self.count(status)} {status}" for status in ("passed", "failed", "skipped"))
        width = max(map(len, CHECKS))
        rows = [f"{o.status:<8}{o.check:<{width}}  {o.reason}".rstrip() for o in self.outcomes]
        return "\n".join([f"{self.name}: {counts}", *rows])


def run(
    make: Callable[..., LogitsProcessor],
    *,
    name: str | None = None,
    checks: Iterable[str] | None = None,
    **facts: Any,
) -> Report:
    """Run the checks on the processors that `make` returns.

    Args:
        make (`Callable[..., LogitsProcessor]`): Returns a fresh processor; takes the options that the facts declare.
        name (`str`, *optional*): Heads the report; by default that of the processor's class.
        checks (`Iterable[str]`, *optional*): Names in `CHECKS`; all by default.
        **facts: Fields of [`Facts`].

    Returns:
        [`Report`]. An exception inside a check is a failure of it; `KeyError` for a check that does not exist.
    """
    if isinstance(make, LogitsProcessor):
        raise TypeError(f"make is a {type(make).__name__} but must return a fresh one: lambda **options: ...")
    for fact in facts:
        if fact not in (known := [field.name for field in fields(Facts)]):
            raise TypeError(f"There is no fact {fact!r}. {suggest(fact, known)}")
    subject = Subject(make, Facts(**facts))
    chosen = list(CHECKS) if checks is None else [checks] if isinstance(checks, str) else list(checks)
    for check in [*chosen, *subject.facts.exempt]:
        if check not in CHECKS:
            raise KeyError(f"No check is called {check!r}. {suggest(check, CHECKS)}")
    if name is None:
        name = type(subject.make(torch.zeros(1, 1, dtype=torch.long))).__name__
    return Report(name, [_outcome(check, subject) for check in chosen])


def _outcome(check: str, subject: Subject) -> Outcome:
    if check in subject.facts.exempt:
        return Outcome(check=check, status="skipped", reason=subject.facts.exempt[check])
    try:
        with torch.no_grad():
            CHECKS[check](subject)
    except Skip as skip:
        return Outcome(check=check, status="skipped", reason=str(skip))
    except AssertionError as failure:
        return Outcome(check=check, status="failed", reason=str(failure))
    except Exception as error:
        # Whatever a foreign processor raises is its failure; the other checks still run.
        return Outcome(check=check, status="failed", reason=f"{type(error).__name__}: {error}".splitlines()[0])
    return Outcome(check=check, status="passed")
