"""What the scripts share: argument types, help, and errors as sentences."""

import argparse
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path

from . import console


def friendly_errors(main: Callable[[], None]) -> Callable[[], None]:
    """Ends a script with an error's text instead of a traceback, where the user can mend it.

    K_DIFFUSION_DEBUG=1 shows the traceback. A reader of its output that leaves, as `head` does, is
    no error: the script goes on without.
    """

    @functools.wraps(main)
    @console.outlasting()
    def run() -> None:
        name = Path(sys.argv[0]).name
        try:
            main()
            sys.stdout.flush()  # on a full disk
        except (ValueError, ImportError, OSError, FloatingPointError) as error:
            if os.environ.get("K_DIFFUSION_DEBUG", "0") not in {"", "0"}:
                raise
            sys.exit(f"{name}: error: {error}")
        except KeyboardInterrupt:
            print(f"{name}: interrupted", file=sys.stderr)
            sys.exit(130)  # as a shell reports SIGINT

    return run


class HelpFormatter(argparse.HelpFormatter):
    """Help that ends in the default, where there is one to tell."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        if not default or default == argparse.SUPPRESS:
            return action.help
        shown = " ".join(default) if isinstance(default, (list, tuple)) else default
        return f"{action.help} (default: {shown})"


def _integer(least: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
        return value

    return integer


positive = _integer(1)
non_negative = _integer(0)


def size(text: str) -> tuple[int, int]:
    """An argparse type: HxW, or one number for both."""
    try:
        h, _, w = text.lower().partition("x")
        return positive(h), positive(w or h)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be HxW, e.g. 256x384, got {text!r}") from None
