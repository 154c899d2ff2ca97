"""What the root scripts share: argument types, and errors as sentences."""

import argparse
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path


def friendly_errors(main: Callable[[], None]) -> Callable[[], None]:
    """Ends a script with an error's text instead of a traceback, where the user can mend it.

    K_DIFFUSION_DEBUG=1 shows the traceback.
    """

    @functools.wraps(main)
    def run() -> None:
        try:
            main()
        except (ValueError, ImportError, OSError, FloatingPointError) as error:
            if os.environ.get("K_DIFFUSION_DEBUG", "0") not in {"", "0"}:
                raise
            sys.exit(f"{Path(sys.argv[0]).name}: error: {error}")

    return run


def positive(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def seed(text: str) -> int:
    """An argparse type: an integer of at least 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, got {value}")
    return value


def size(text: str) -> tuple[int, int]:
    """An argparse type: HxW, or one number for both."""
    try:
        h, _, w = text.lower().partition("x")
        return positive(h), positive(w or h)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be HxW, e.g. 256x384, got {text!r}") from None


def writable(path: Path) -> Path:
    """A path to write to, its folder made. Raises OSError before work is done for nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise PermissionError(f"can't write {path}: its folder is not writable; choose another")
    if path.is_dir():
        raise IsADirectoryError(f"can't write {path}: it is a folder; name a file")
    return path
