"""Arguments that are given once or several times, and what may be given."""

from __future__ import annotations

import math
from typing import Any

from mlxdiff.errors import UsageError


def listed(value: Any) -> list[Any]:
    """The values of an argument: none, the one, or those of a list or tuple."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def finite_number(name: str, value: Any) -> float:
    """A number of any size. Raises: UsageError."""
    known = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not known or not math.isfinite(value):
        raise UsageError(f"{name} is {value!r}; expected a number")
    return float(value)
