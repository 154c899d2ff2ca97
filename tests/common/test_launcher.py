import os
import runpy
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest

from k_diffusion.common import launcher


@pytest.fixture
def parent(monkeypatch):
    """Sets the parent's command line."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)

    def set_parent(*words):
        process = SimpleNamespace(cmdline=lambda: list(words), pid=os.getppid())
        monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(parent=lambda: process))

    return set_parent


@pytest.mark.parametrize(
    "command",
    [
        "python3.11 /venv/bin/accelerate launch train.py",
        "/usr/bin/python3 -m accelerate.commands.launch --num_processes 2 train.py",
        "/usr/bin/python /venv/bin/accelerate-launch train.py",
        "/usr/bin/python /venv/bin/torchrun train.py",
        "python -m torch.distributed.run train.py",
    ],
)
def test_launchers_are_known(parent, command):
    parent(*command.split())
    assert launcher.find_launcher() is not None


@pytest.mark.parametrize(
    "command",
    ["", "bash", "-zsh", "nohup python train.py", "docker-init", "python jobs.py", "tmux"],
)
def test_others_may_end_before_their_run(parent, command):
    parent(*command.split())
    assert launcher.find_launcher() is None
    assert not launcher.tie()


def test_a_script_that_runs_a_launcher_is_none(parent):
    parent("bash", "-c", "torchrun other.py; python train.py")
    assert launcher.find_launcher() is None


def test_torchrun_says_so_in_the_environment(parent, monkeypatch):
    parent("bash", "wrapper.sh")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert launcher.find_launcher() is not None


TIED = """
import os, signal, sys, time
from k_diffusion.common import launcher
if sys.argv[1] == "thread":
    launcher._ask_kernel = lambda parent: False
assert launcher.tie()
def leave(number, frame):
    open("told", "w").write(str(number))
    os._exit(0)
signal.signal(signal.SIGTERM, leave)
print("ready", flush=True)
time.sleep(60)
"""

# a launcher whose process starts a tied one, from its main thread or one that ends
LAUNCHER = """
import os, subprocess, sys, threading, time
os.environ["TORCHELASTIC_RUN_ID"] = "x"
start = lambda: subprocess.Popen([sys.executable, "tied.py", sys.argv[1]])
if sys.argv[2] == "thread":
    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
else:
    start()
time.sleep(60)
"""


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
@pytest.mark.parametrize(
    ("how", "started_by"), [("kernel", "main"), ("thread", "main"), ("kernel", "thread")]
)
def test_a_tied_process_is_told_that_its_launcher_was_killed(tmp_path, how, started_by):
    (tmp_path / "tied.py").write_text(TIED)
    command = [sys.executable, "-c", LAUNCHER, how, started_by]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    (child,) = psutil.Process(process.pid).children()
    time.sleep(0.05)
    assert child.is_running()
    assert not (tmp_path / "told").exists()
    process.kill()
    process.communicate()
    psutil.wait_procs([child], timeout=30)
    assert (tmp_path / "told").read_text() == str(int(signal.SIGTERM))


@pytest.mark.parametrize("how", ["signal", "exit code", "killed"])
def test_our_torchrun_leaves_without_a_traceback(monkeypatch, how):
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    def main():
        if how == "signal":
            raise SignalException("told", signal.SIGTERM)
        code = 143 if how == "exit code" else -9
        raise ChildFailedError("train.py", {0: ProcessFailure(0, 1, code, "")})

    monkeypatch.setattr(run, "main", main)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(launcher.__file__, run_name="__main__")
    assert left.value.code == (137 if how == "killed" else 143)
