"""What the scripts share: argument types, help, and errors as sentences."""

import argparse
import functools
import math
import os
import re
import sys
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from . import console, memory

T = TypeVar("T")


class UsageError(ValueError):
    """Flags that don't go together. A script leaves with argparse's exit code, 2."""


def friendly_errors(main: Callable[[], None]) -> Callable[[], None]:
    """Ends a script with an error's text instead of a traceback, where the user can mend it.

    The exit code is 2 for a UsageError and 1 for others. K_DIFFUSION_DEBUG=1 shows the traceback. A
    reader of its output that leaves, as `head` does, is no error: the script goes on without.
    """

    @functools.wraps(main)
    @console.outlasting()
    def run() -> None:
        name = Path(sys.argv[0]).name
        try:
            main()
            sys.stdout.flush()  # on a full disk
        except (*_MENDABLE, MemoryError, RuntimeError) as error:
            text = str(error) if isinstance(error, _MENDABLE) else _out_of_memory(error)
            if lost_peer(error):
                text = "another process of this run ended; it says why"
            if text is None or os.environ.get("K_DIFFUSION_DEBUG", "0") not in {"", "0"}:
                raise
            if isinstance(error, UsageError):
                print(f"{name}: error: {text}", file=sys.stderr)
                sys.exit(2)
            sys.exit(f"{name}: error: {text}")
        except KeyboardInterrupt:
            print(f"{name}: interrupted", file=sys.stderr)
            sys.exit(130)  # as a shell reports SIGINT

    return run


_MENDABLE = (ValueError, ImportError, OSError, FloatingPointError)


def lost_peer(error: BaseException) -> bool:
    """Whether an error of one of several processes says that another one is gone."""
    import torch.distributed as dist

    if not (isinstance(error, RuntimeError) and dist.is_available() and dist.is_initialized()):
        return False
    said = f"{type(error).__name__}: {error}"
    return not memory.ran_out(error) and _PEER.search(said) is not None


# of gloo, and of NCCL
_PEER = re.compile(r"closed by peer|reset by peer|Broken pipe|NCCL|DistBackendError")


def _out_of_memory(error: BaseException) -> str | None:
    """A sentence for an error that says that memory ran out, None for any other."""
    if not memory.ran_out(error):
        return None
    said = str(error).split("\n")[0]
    return (
        f"there is not enough memory ({said or 'of the host'}); lower the batch size, the size "
        "of the images or the model's"
    )


def add_compile(add: Callable[..., object], units: Sequence[str]) -> None:
    """Adds --compile, by default of the first of the units that a model can be compiled by.

    add: the `add_argument` of a parser or of a group of it.
    """
    text = "compile the model whole (without a value), or block by block, which is sooner ready"
    add("--compile", nargs="?", const=units[0], choices=units, help=text)


class HelpFormatter(argparse.HelpFormatter):
    """Help that ends in the default, where there is one to tell."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        if not default or default == argparse.SUPPRESS:
            return action.help
        shown = " ".join(default) if isinstance(default, (list, tuple)) else default
        return f"{action.help} (default: {shown})"


# ------------------------------------------------------------------------- types of arguments


def _integer(least: int, most: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
        if value > most:
            raise argparse.ArgumentTypeError(f"must be at most {most}, got {text}")
        return value

    return integer


positive = _integer(1, 2**31 - 1)
steps = _integer(1, 2**63 - 1)
non_negative = _integer(0, 2**31 - 1)
seed = _integer(0, 2**63 - 1)
few = _integer(0, 1024)  # of processes
denoising_steps = _integer(1, 100_000)


def _number(rule: str, holds: Callable[[float], bool]) -> Callable[[str], float]:
    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and holds(value)):
            raise argparse.ArgumentTypeError(f"must be a {rule}, got {text!r}")
        return value

    return number


finite = _number("finite number", lambda x: True)
positive_number = _number("finite number above 0", lambda x: x > 0)
non_negative_number = _number("finite number, 0 or more", lambda x: x >= 0)


def of(read: Callable[[str], T]) -> Callable[[str], T]:
    """An argparse type of a function whose ValueErrors are sentences."""

    def typed(text: str) -> T:
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return typed


@of
def text(text: str) -> str:
    """An argparse type: a line of text that isn't empty."""
    if not text.strip():
        raise ValueError("must not be empty")
    if any(unicodedata.category(letter) in {"Cc", "Cs", "Zl", "Zp"} for letter in text):
        raise ValueError(f"must be one line of UTF-8 without control characters, got {text!r}")
    return text


@of
def name(value: str) -> str:
    """An argparse type: the beginning of files' names, maybe with folders before it."""
    text(value)
    if value.endswith(("/", os.sep)) or Path(value).name in {"", "."} or value.endswith(".."):
        raise ValueError(f"must be the beginning of a file's name, got the folder {value!r}")
    if len(os.fsencode(Path(value).name)) > 200:
        raise ValueError(f"must be at most 200 bytes long, got {len(os.fsencode(value))}")
    return value


def path(value: str) -> Path:
    """An argparse type: the path of a file or folder."""
    return Path(text(value))


@of
def size(text: str) -> tuple[int, int]:
    """An argparse type: HxW, or one number for both."""
    try:
        h, _, w = text.lower().partition("x")
        return positive(h), positive(w or h)
    except (ValueError, argparse.ArgumentTypeError):
        raise ValueError(f"must be HxW, e.g. 256x384, got {text!r}") from None
