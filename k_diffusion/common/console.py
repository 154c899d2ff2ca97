"""Standard output and error that outlast their readers."""

import errno
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

# A pipe whose reader has left, a terminal that was closed.
_GONE = {errno.EPIPE, errno.EIO}


class Outlasting:
    """A text stream that drops what nobody reads any more, where others raise BrokenPipeError.

    forgiving: it drops what can't be written for any other reason, too, such as a full disk, and
    says so once on the other stream.
    """

    def __init__(self, stream: Any, name: str):
        self.stream, self.name = stream, name
        self.other: Outlasting | None = None
        self.forgiving = self.lost = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self._try(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def settle(self) -> None:
        """Flush, and drop what can't be written: the interpreter's exit would try again."""
        try:
            self.stream.flush()
        except OSError:
            self._drop()

    def _try(self, do: Callable[..., object], *args: str) -> None:
        try:
            do(*args)
        except OSError as error:
            if error.errno in _GONE:
                self._drop()
            elif not self.forgiving:
                raise
            first, self.lost = not self.lost, True
            if first and self.forgiving and self.other is not None:
                reason = error.strerror or error
                self.other.write(f"can't write {self.name} any more ({reason}); going on\n")
                self.other.flush()

    def _drop(self) -> None:
        """Empty the buffer, and send what follows to the null device."""
        with suppress(OSError, ValueError):  # a stream in memory has no descriptor
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.stream.fileno())
            os.close(null)
            self.stream.flush()


@contextmanager
def outlasting() -> Iterator[None]:
    """Within it, sys.stdout and sys.stderr outlast their readers, and take any text.

    What their encoding hasn't got is written as escapes.
    """
    before = sys.stdout, sys.stderr
    errors = [getattr(stream, "errors", None) for stream in before]
    _take_errors(before, ["backslashreplace"] * 2)
    out, err = Outlasting(sys.stdout, "standard output"), Outlasting(sys.stderr, "standard error")
    out.other, err.other = err, out
    sys.stdout, sys.stderr = out, err
    try:
        yield
    finally:
        for stream in out, err:
            stream.settle()
        sys.stdout, sys.stderr = before
        _take_errors(before, errors)


def _take_errors(streams: Iterable[Any], errors: Iterable[str | None]) -> None:
    for stream, handler in zip(streams, errors):
        if hasattr(stream, "reconfigure"):  # as files have, and streams in memory have not
            with suppress(OSError, ValueError):
                stream.reconfigure(errors=handler)


def forgive() -> None:
    """From here on a full disk, too, is no reason to stop: what is said matters less than the work.

    For programs whose product is not their standard output.
    """
    for stream in sys.stdout, sys.stderr:
        if isinstance(stream, Outlasting):
            stream.forgiving = True
