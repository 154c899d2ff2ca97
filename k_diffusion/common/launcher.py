"""Importing this, before torch, ties a process to the launcher that started it, if any.

A launcher that is killed can't tell its processes, and `accelerate launch` dies of SIGTERM, which
is what schedulers send, without doing so. They would train on, with nobody to stop them. Tied, each
of them gets SIGTERM when its launcher ends. A process that was started by a shell, nohup, setsid or
a container outlives those as ever.

Run as a script, this is torchrun, but leaves without a traceback when it is told to.
"""

import ctypes
import os
import re
import signal
import sys
import threading
from pathlib import Path
from typing import Any

_LAUNCHER = re.compile(r"\b(torchrun|torch\.distributed\.(run|launch)|accelerate\S*[ -.]launch)\b")
_PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>


def find_launcher() -> Any:
    """The process of torchrun or `accelerate launch` that started this one (psutil), or None."""
    if os.name != "posix":
        return None
    try:
        import psutil  # comes with accelerate
    except ImportError:
        return None
    try:
        parent = psutil.Process().parent()
        words = parent.cmdline() if parent else []
    except psutil.Error:
        return None
    # the words of a shell's script may be anything
    named = bool(words) and "python" in Path(words[0]).name and _LAUNCHER.search(" ".join(words))
    return parent if named or "TORCHELASTIC_RUN_ID" in os.environ else None


def tie() -> bool:
    """Whether a launcher started this process, which then gets SIGTERM when the launcher ends."""
    launcher = find_launcher()
    if launcher is None:
        return False
    if not _ask_kernel(launcher.pid):
        threading.Thread(target=_wait_for_end, args=(launcher,), daemon=True).start()
    elif os.getppid() != launcher.pid:  # it ended before the kernel knew
        os.kill(os.getpid(), signal.SIGTERM)
    return True


def _ask_kernel(parent: int) -> bool:
    """Let Linux send SIGTERM when the parent ends. False where it can't.

    It watches the thread that started this process: only the main one lives as long as its process.
    """
    try:
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        prctl = ctypes.CDLL(None).prctl
    except (OSError, AttributeError):
        return False
    number = ctypes.c_ulong(signal.SIGTERM)
    return str(os.getpid()) in children and prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0) == 0


def _wait_for_end(launcher: Any) -> None:
    launcher.wait()
    os.kill(os.getpid(), signal.SIGTERM)


def torchrun() -> None:
    """torchrun, which hands a signal on to its processes and then leaves with 128 + its number.

    Where a process fails, its exit code is torchrun's.
    """
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        run.main()
    except SignalException as error:
        sys.exit(128 + error.sigval)
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        sys.exit(code if code > 0 else 128 - code)


LAUNCHED = tie()

if __name__ == "__main__":
    del sys.path[0]  # this folder, whose names are not for the top level
    torchrun()
