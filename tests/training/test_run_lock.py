import errno
import fcntl
import json
import os
import re
import socket
import subprocess
import sys

import pytest
import runs

from k_diffusion.training import run_lock


class Alone:
    is_main_process = True
    num_processes = 1
    print = staticmethod(print)


class Second(Alone):
    is_main_process = False


HOLD = """
import sys, time
from types import SimpleNamespace
from k_diffusion.training import run_lock
alone = SimpleNamespace(is_main_process=True, num_processes=1, print=print)
with run_lock.hold(sys.argv[1], alone):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def name(tmp_path):
    return str(tmp_path / "runs" / "a")


def test_one_run_to_a_name_and_none_after_it(name, tmp_path):
    with run_lock.hold(name, Alone()):
        message = (
            rf"another run is called '{name}', process {os.getpid()} on {socket.gethostname()}"
        )
        with pytest.raises(run_lock.RunBusyError, match=rf"{message} since 20..-"):
            run_lock.hold(name, Alone()).__enter__()
        with run_lock.hold(name + "_b", Alone()), run_lock.hold(name, Second()):
            pass
    with run_lock.hold(name, Alone()):
        pass
    assert not (tmp_path / "runs").exists()  # nor an empty folder of its making


def test_a_killed_process_holds_no_name_and_its_half_files_go(name):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, name],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(runs.ROOT)},
    )
    assert process.stdout.readline() == "held\n"
    half = run_lock.lock_path(name).with_name(f".a_00000003.pth.{'7' * 16}.part")
    half.touch()
    with pytest.raises(run_lock.RunBusyError, match=f"process {process.pid} on "):
        run_lock.hold(name, Alone()).__enter__()
    assert half.exists()
    process.kill()
    process.communicate()
    assert json.loads(run_lock.lock_path(name).read_text())["pid"] == process.pid
    with run_lock.hold(name, Alone()):
        assert not half.exists()


def test_a_forked_worker_that_outlives_its_process_holds_no_name(name):
    with run_lock.hold(name, Alone()):
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.read(read, 1)
            os._exit(0)
    try:
        with run_lock.hold(name, Alone()):
            pass
    finally:
        os.write(write, b"x")
        os.waitpid(child, 0)
        os.close(read), os.close(write)


@pytest.mark.parametrize("how", ["no module", "no locks there"])
def test_without_locks_it_says_so(name, monkeypatch, capsys, how):
    if how == "no module":
        monkeypatch.setattr(run_lock, "fcntl", None)
    else:

        def flock(*args):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(fcntl, "flock", flock)
    with run_lock.hold(name, Alone()):
        assert not run_lock.lock_path(name).exists()
    said = capsys.readouterr().out
    assert re.search(r"has no locks: see to it that no other run is called '.*a'", said)


def test_the_lock_of_another_users_killed_run(name, monkeypatch):
    """Which this user may read and not write."""
    path, opened = run_lock.lock_path(name), os.open

    def refuse(file, flags, mode=0o777):
        if file == path.absolute() and flags & os.O_RDWR and path.exists():
            raise PermissionError(errno.EACCES, "Permission denied", str(file))
        return opened(file, flags, mode)

    path.parent.mkdir()
    path.write_text('{"pid": 1, "host": "there", "start": "then"}')
    monkeypatch.setattr(run_lock.os, "open", refuse)
    with run_lock.hold(name, Alone()):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    path.write_text('{"pid": 1, "host": "there", "start": "then"}')
    with open(path) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(run_lock.RunBusyError, match="process 1 on there since then"):
            run_lock.hold(name, Alone()).__enter__()

    def unreadable(file, flags, mode=0o777):
        raise PermissionError(errno.EACCES, "Permission denied", str(file))

    monkeypatch.setattr(run_lock.os, "open", unreadable)
    with pytest.raises(PermissionError, match=r"can't lock .*\.a\.lock: permission denied; delete"):
        run_lock.hold(name, Alone()).__enter__()
