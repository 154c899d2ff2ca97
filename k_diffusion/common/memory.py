"""Memory and cores that are there, asked before much of them is taken."""

import contextlib
import importlib
import os
from pathlib import Path


def available() -> int | None:
    """Bytes of memory that this process could still take on the host; None where nobody knows."""
    limits = []
    with contextlib.suppress(ImportError):  # comes with accelerate
        limits.append(importlib.import_module("psutil").virtual_memory().available)
    if not limits:
        with contextlib.suppress(AttributeError, ValueError, OSError):
            limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with contextlib.suppress(ValueError, OSError):  # a container may get less than the machine has
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(limits, default=None)


def cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def ran_out(error: BaseException) -> bool:
    """Whether an error says that memory ran out; torch has a class of its own for GPUs alone."""
    said = str(error).split("\n")[0]
    return isinstance(error, MemoryError) or any(
        text in said for text in ("out of memory", "can't allocate memory", "not enough memory")
    )


def check(size: float, what: str, remedy: str) -> None:
    """Raises ValueError if `size` bytes for `what` are more than there is."""
    there = available()
    if there is not None and size > there:
        raise ValueError(
            f"{what} would take {size / 2**30:,.1f} GiB of memory, and {there / 2**30:,.1f} GiB "
            f"are free; {remedy}"
        )
