"""How a bad value is told: which field, what it was, what is allowed."""

from __future__ import annotations

import numbers
import re

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def shown(value: object) -> str:
    """A value as messages show it: its repr, cut off where that is long."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


class InvalidValue(ValueError):
    """A value outside what its field allows.

    Attributes:
        field: the field's name, as callers spell it.
        value: the value as given.
        expected: what is allowed, and where it helps what to do.
    """

    def __init__(self, field: str, value: object, expected: str) -> None:
        super().__init__(f"{field}={shown(value)}: expected {expected}")
        self.field = field
        self.value = value
        self.expected = expected


def check_int(field: str, value: object, low: int, high: int) -> int:
    """`value` as an int in [low, high]; raises InvalidValue."""
    expected = f"an integer from {low:,} to {high:,}"
    if isinstance(value, (bool, float, str)) or not hasattr(value, "__index__"):
        raise InvalidValue(field, value, expected)
    number = int(value.__index__())
    if not low <= number <= high:
        raise InvalidValue(field, number, expected)
    return number


def check_ratio(field: str, value: float, *, high_inclusive: bool) -> None:
    """Raises InvalidValue unless `value` is a number in [0, 1], or in [0, 1)."""
    in_range = isinstance(value, numbers.Real) and not isinstance(value, bool) and 0 <= value <= 1
    if not in_range or (value == 1 and not high_inclusive):
        raise InvalidValue(field, value, f"a number with 0 <= {field} {'<=' if high_inclusive else '<'} 1")


def check_number(field: str, value: float, low: float, high: float) -> None:
    """Raises InvalidValue unless `value` is a number in [low, high]."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or not low <= value <= high:
        raise InvalidValue(field, value, f"a number from {low:g} to {high:g}")


def check_seconds(field: str, value: object) -> None:
    """Raises InvalidValue unless `value` is a time that one can wait: a finite number of seconds, at least 0.001."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or not 0.001 <= float(value) <= 2**30:
        raise InvalidValue(field, value, "a finite number of seconds, at least 0.001")


def check_name(field: str, value: object) -> str:
    """`value` as the name of an experiment or a project; raises InvalidValue."""
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise InvalidValue(
            field, value, "1 to 128 characters from A-Z a-z 0-9 . _ - that start with a letter or a digit"
        )
    return value
