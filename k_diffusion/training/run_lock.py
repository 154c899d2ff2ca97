"""One run to a name: a lock that lives as long as the process that holds it."""

import contextlib
import errno
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..distributed import end_together
from .run_files import remove_temporaries, state_path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


class RunBusyError(ValueError):
    """Another process holds the name of a run; says which, where, and since when."""


@contextlib.contextmanager
def hold(name: str, accelerator: Any) -> Iterator[None]:
    """Around a run: no other may have its name. Files that a killed run half wrote are removed.

    The main process holds the lock for all. The operating system releases it when that process
    ends, however it does. Where there are no locks, it says so and goes on. Raises RunBusyError on
    the main process, or OSError, and ends the others.
    """
    with contextlib.ExitStack() as held:
        refusal = None
        if accelerator.is_main_process:
            try:
                held.enter_context(_hold(name, accelerator.print))
            except (RunBusyError, OSError) as error:
                refusal = error
        end_together(accelerator, refusal)
        yield


@contextlib.contextmanager
def _hold(name: str, say: Callable[[str], object]) -> Iterator[None]:
    path = lock_path(name).absolute()
    made = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = _take(path, name, say)
    try:
        if handle is not None:
            remove_temporaries(name)
        yield
    finally:
        if handle is not None:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)  # while it is held: nobody else's
            os.close(handle)
        with contextlib.suppress(OSError):  # a run that was refused leaves no empty folders
            for folder in made:
                folder.rmdir()


def lock_path(name: str) -> Path:
    """The file that is locked while a run of this name is under way."""
    state = state_path(name)
    return state.with_name(f".{state.name.removesuffix('_state.json')}.lock")


def _take(path: Path, name: str, say: Callable[[str], object]) -> int | None:
    """A locked file, whose closing releases it; None where there are no locks."""
    if fcntl is None:
        say(_WITHOUT.format("this system", name))
        return None
    while True:
        handle, own = _open(path)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # whoever held it may have deleted it meanwhile
            gone = os.fstat(handle).st_nlink == 0
            if not gone and not own:
                with contextlib.suppress(OSError):
                    path.unlink()
                    gone = True
            if gone:
                os.close(handle)
                continue
        except OSError as error:
            holder = os.read(handle, 4096)
            os.close(handle)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
                say(_WITHOUT.format(f"the file system of {path}", name))
                return None
            raise RunBusyError(
                f"another run is called {name!r}, {_who(holder)}; stop it, or pass another --name"
            ) from None
        break
    # a forked worker may outlive this process, and must not hold its lock
    os.register_at_fork(after_in_child=lambda: _close_in_child(handle, path))
    me = {"host": socket.gethostname(), "pid": os.getpid(), "start": time.strftime("%F %T %z")}
    with contextlib.suppress(OSError):  # another user's file, a full disk
        os.ftruncate(handle, 0)
        os.write(handle, json.dumps(me).encode())
    return handle


def _open(path: Path) -> tuple[int, bool]:
    """The file to lock, and whether it can be written: another user's can only be read."""
    flags = os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o666), True
    except PermissionError:
        with contextlib.suppress(OSError):
            return os.open(path, os.O_RDONLY | flags), False
    raise PermissionError(
        f"can't lock {path}: permission denied; delete it, or pass another --name"
    )


def _close_in_child(handle: int, path: Path) -> None:
    with contextlib.suppress(OSError):
        if os.path.samestat(os.fstat(handle), path.stat()):  # not another file's number by now
            os.close(handle)


_WITHOUT = "{} has no locks: see to it that no other run is called {!r}"


def _who(holder: bytes) -> str:
    try:
        run = json.loads(holder)
        return f"process {run['pid']} on {run['host']} since {run['start']}"
    except (ValueError, KeyError, TypeError):
        return "by a process that has just started"
