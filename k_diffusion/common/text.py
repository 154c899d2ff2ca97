"""Text for people: tables, the nearest name, and what to install."""

import difflib
import importlib
from collections.abc import Iterable, Sequence
from types import ModuleType


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The rows of a table as lines, with columns of equal width."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths)) for row in rows)
    return [line.rstrip() for line in lines]


def unknown_name(kind: str, name: str, known: Iterable[str]) -> ValueError:
    """The error for a name that isn't a row of a table: the nearest rows first, then all."""
    known = list(known)
    near = did_you_mean(name, known, most=3)
    return ValueError(f"unknown {kind} {name!r}{near}; there are {', '.join(known)}")


def did_you_mean(got: object, valid: Iterable[str], most: int = 1) -> str:
    """` (did you mean 'x' or 'y'?)` of up to `most` valid names, or "" where none comes near."""
    near = difflib.get_close_matches(str(got), list(valid), n=most, cutoff=0.5)
    return f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""


def need(module: str, what: str, install: str = '"k-diffusion[train]"') -> ModuleType:
    """Import a module, or raise an ImportError that says what needs it and how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{what} needs {module.split('.')[0]}; install it with: pip install {install}"
        ) from error
