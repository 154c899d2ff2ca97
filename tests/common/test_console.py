import io
import os
import subprocess
import sys
from contextlib import contextmanager, redirect_stderr, redirect_stdout

import pytest
import runs

from k_diffusion.common import console


class Disk(io.StringIO):
    """A stream in memory that fails with `errno`, if any."""

    errno = 0

    def write(self, text):
        if self.errno:
            raise OSError(self.errno, os.strerror(self.errno))
        return super().write(text)


@contextmanager
def streams():
    """Standard output and error; pytest has its own between a fixture and its test."""
    with redirect_stdout(Disk()) as out, redirect_stderr(Disk()) as err:
        yield out, err
        assert (sys.stdout, sys.stderr) == (out, err)


@pytest.mark.parametrize("gone", sorted(console._GONE))
def test_a_reader_that_leaves_is_no_error(gone):
    with streams() as (out, err), console.outlasting():
        print("heard")
        out.errno = gone
        print("unheard", flush=True)
        print("two", file=sys.stderr)
    assert (out.getvalue(), err.getvalue()) == ("heard\n", "two\n")


def test_a_full_disk_is_an_error_unless_it_is_forgiven():
    with streams() as (out, err), console.outlasting():
        out.errno = 28
        with pytest.raises(OSError, match="No space left on device"):
            print("lost")
        console.forgive()
        print("lost")
        out.errno = 0
        print("there is space again")
        out.errno = 28
        print("lost")
    assert out.getvalue() == "there is space again\n"
    said = "can't write standard output any more (No space left on device); going on\n"
    assert err.getvalue() == said


def test_both_streams_may_be_dead():
    with streams() as (out, err), console.outlasting():
        out.errno = err.errno = 32
        console.forgive()
        print("lost")
        print("lost", file=sys.stderr)


def test_any_text_can_be_said():
    """By whatever encoding a log has; afterwards it is as strict as before."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "latin-1") for _ in range(2))
    with redirect_stdout(out), redirect_stderr(err):
        with console.outlasting():
            print("é \N{SNOWMAN} \udcff")
        with pytest.raises(UnicodeEncodeError):
            print("\N{SNOWMAN}")
    out.flush()
    assert out.buffer.getvalue() == b"\xe9 \\u2603 \\udcff\n"


PROGRAM = """
import sys
from k_diffusion.common import options

@options.friendly_errors
def main():
    for i in range(20000):
        print("line", i)
    print("done", file=sys.stderr)

main()
"""


def start_program(folder, stdout):
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(runs.ROOT)},
    )


def test_a_script_goes_on_when_head_leaves(tmp_path):
    program = start_program(tmp_path, subprocess.PIPE)
    assert program.stdout.readline() == "line 0\n"
    program.stdout.close()
    assert program.stderr.read() == "done\n"
    assert program.wait() == 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has a device that is full")
def test_a_script_whose_product_is_text_ends_on_a_full_disk(tmp_path):
    with open("/dev/full", "w") as full:
        program = start_program(tmp_path, full)
        assert program.stderr.read().endswith("error: [Errno 28] No space left on device\n")
        assert program.wait() == 1
