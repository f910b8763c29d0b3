"""A metric as arrays go in and a dict comes out, for `hfext.metrics.load`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Form:
    """What `hfext.metrics.load` needs.

    Args:
        compute: The function; every feature is one of its arguments, the rest are options.
        features: Argument to type: `"float64"`, `"int64"`, `"string"`; in a list for one list a row.
        description: What goes in and what comes out.
    """

    compute: Callable[..., dict[str, Any]]
    features: dict[str, Any]
    description: str
