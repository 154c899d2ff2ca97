"""Rules for numbers that callers pass: each raises a ValueError that names it and what it got."""

import math
import operator
from typing import Any


def finite(**values: float) -> None:
    """Each must be a finite number."""
    for name, value in values.items():
        if not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}")


def positive(**values: float) -> None:
    """Each must be finite and above 0."""
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be a finite number above 0, got {value}")


def non_negative(**values: float) -> None:
    """Each must be finite, and 0 or more."""
    for name, value in values.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be a finite number, 0 or more, got {value}")


def share(**values: float) -> None:
    """Each must lie between 0 and 1, both included."""
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must lie between 0 and 1, got {value}")


def count(least: int = 0, **values: Any) -> None:
    """Each must be a whole number of at least `least`; also one of NumPy's or a tensor's."""
    for name, value in values.items():
        try:
            enough = operator.index(value) >= least
        except TypeError:
            enough = False
        if not enough:
            raise ValueError(f"{name} must be a whole number, at least {least}, got {value!r}")
