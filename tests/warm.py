"""Runs scripts in processes forked from this one, which has imported what takes seconds to import.

python warm.py FD: a socket to receive jobs from, until it is closed. What a script imports of this
repository is new in its process, and so are its environment, folder, session and signals.
"""

import contextlib
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import sys
from typing import Any

PRELOADED = (
    "torch", "torch._dynamo", "torch.distributed.run", "jsonmerge",
    "accelerate", "accelerate.tracking",
    "matplotlib.backends.backend_agg", "matplotlib.figure", "PIL.Image", "scipy.special",
    "scipy.ndimage", "scipy.integrate", "sklearn.datasets",
)  # fmt: skip


def preload() -> None:
    for name in PRELOADED:
        with contextlib.suppress(ImportError):  # some test will say so
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # collecting would write to, and so copy, all of it in each process


def serve(jobs: socket.socket) -> dict[str, Any]:
    """In the server: never returns. In a process of its own: returns a job, to be run."""
    while True:
        message, fds, _, _ = socket.recv_fds(jobs, 1 << 20, 3)
        if not message:
            sys.exit()
        output, errors, report = fds
        if os.fork():  # the server
            for fd in fds:
                os.close(fd)
            continue
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        child = os.fork()
        if child:  # the one that waits for the script
            os.close(output)
            os.close(errors)
            jobs.close()
            os.write(report, f"{child}\n".encode())
            _, status = os.waitpid(child, 0)
            os.write(report, f"{os.waitstatus_to_exitcode(status)}\n".encode())
            os._exit(0)
        jobs.close()
        os.close(report)
        os.setsid()
        os.dup2(output, 1)
        os.dup2(errors, 2)
        os.close(output)
        os.close(errors)
        return json.loads(message)


def run(job: dict[str, Any]) -> None:
    """Run a job as the interpreter would."""
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
    os.environ.clear()
    os.environ.update(job["env"])
    os.chdir(job["folder"])
    first, *_ = sys.argv = job["argv"]
    sys.path[0] = job["folder"] if first == "-m" else os.path.dirname(first)
    sys.path[1:1] = filter(None, job["env"].get("PYTHONPATH", "").split(os.pathsep))
    with contextlib.suppress(ImportError):
        import sitecustomize  # noqa: F401  which may be a test's
    if first == "-m":
        del sys.argv[0]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    preload()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    run(serve(socket.socket(fileno=int(sys.argv[1]))))
