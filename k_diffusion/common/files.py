"""Files: written whole or not at all, downloaded, appended to."""

import contextlib
import csv
import errno
import hashlib
import os
import re
import secrets
import shutil
import tempfile
import urllib.parse
import urllib.request
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

from tqdm.auto import tqdm

PathLike = str | os.PathLike[str]


def cache_folder() -> Path:
    """Where downloads, and what took long to find, are kept.

    It is $K_DIFFUSION_CACHE, or k-diffusion in the user's cache folder.
    """
    if own := os.environ.get("K_DIFFUSION_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "k-diffusion"


class DiskFullError(OSError):
    """A file that the disk, the quota or the limit on a file's size has no space for."""


def write_atomically(path: Path, write: Callable[[IO[bytes]], object], size: int = 0) -> None:
    """Write a file under another name, flush it to disk and give it its name.

    At any moment the name holds either the old file or the new one, whole, whoever else writes it.
    size: the bytes it will take at least, for which there must be space. Raises OSError with the
    path if the folder can't be written, DiskFullError if the disk is full.
    """
    check_space(path, size)
    part = temporary(path)
    # another's file or link of this name is nothing to write into
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
    flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    handle = os.open(part, flags, 0o666)
    try:
        with os.fdopen(handle, "w+b") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except Exception as error:
        if reason := why_full(error):
            written = part.stat().st_size
            missing = f" of {size:,}" if size > written else ""
            raise DiskFullError(
                f"can't write {path}: {reason} after {written:,} bytes{missing}; make space, or "
                "choose another folder"
            ) from error
        raise
    finally:
        part.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_folder(folder: Path, write: Callable[[Path], object]) -> list[str]:
    """Write files into a folder, each of which gets its name once all of them are written.

    Weights that are there under other names, as parts of several files, go: one would load them.
    write: is given a new folder to write them into; what has an older file open, or mapped into
    memory, keeps it. Returns the paths within the folder. Raises OSError.
    """
    part = temporary(folder)
    part.mkdir(parents=True)
    try:
        write(part)
        files = [path for path in sorted(part.rglob("*")) if path.is_file()]
        for file in files:
            place = folder / file.relative_to(part)
            place.parent.mkdir(parents=True, exist_ok=True)
            file.replace(place)
        names = [file.relative_to(part).as_posix() for file in files]
        for old in [*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")]:
            if old.name not in names:
                old.unlink()
        return names
    finally:
        shutil.rmtree(part, ignore_errors=True)


def check_space(path: Path, size: int) -> None:
    """Raises DiskFullError unless the disk has space for `size` bytes at a path to be written."""
    free = shutil.disk_usage(path.parent).free if size else 0
    if size > free:
        raise DiskFullError(
            f"can't write {path}: it takes {size:,} bytes, and the disk has {free:,} free; make "
            f"space for {size - free:,} more, or choose another folder"
        )


def why_full(error: BaseException | None) -> str:
    """What the system says to a write that didn't fit; torch.save hides it behind its own error."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return str(error.strerror)
        error = error.__cause__ or error.__context__
    return ""


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def sync_folder(folder: Path) -> None:
    """Make a new name in a folder last, should the machine lose its power."""
    with contextlib.suppress(OSError):  # Windows opens no folders, some file systems sync none
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def temporary(path: Path) -> Path:
    """A name beside a path's, that nobody else has, for what is renamed to it once it is whole."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")


def temporary_of(path: Path) -> str | None:
    """The name of the file, or the folder, that one named by `temporary` would have become."""
    found = re.fullmatch(r"\.(.+?)(\.[0-9a-f]{16})?\.part", path.name)
    return found[1] if found else None


def find_in(folders: Sequence[PathLike], location: PathLike) -> Path | None:
    """The first that is there: a location relative to each folder in turn, then its name alone."""
    named = Path(location)
    places = (Path(folder) / name for name in (named, named.name) for folder in folders)
    return next((place for place in places if place.exists()), None)


def check_writable(path: Path) -> Path:
    """A path that can be written to. Raises OSError, before work is done for nothing."""
    folder = path.parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        raise NotADirectoryError(f"can't make the folder of {path}: {folder} is a file")
    if path.is_dir():
        raise IsADirectoryError(f"can't write {path}: it is a folder; name a file")
    if path.exists() and not path.is_file():
        raise OSError(f"can't write {path}: it is no ordinary file; choose another name")
    if not os.access(folder, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise PermissionError(f"can't write {path}: permission denied; choose another folder")
    return path


def writable(path: Path) -> Path:
    """A path to write to, its folder made. Raises OSError."""
    check_writable(path).parent.mkdir(parents=True, exist_ok=True)
    return path


def check_readable(path: PathLike, what: str) -> None:
    """Raises OSError unless there is an ordinary file; a pipe would block whoever opens it.

    what: the file's purpose. Shells hand over `<(command)` as a file of /dev/fd, which is let pass.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"the {what} {path} is a folder; name a file")
    if not path.exists():
        raise FileNotFoundError(f"no {what} {path}")
    if not path.is_file() and not str(path).startswith(("/dev/fd/", "/dev/stdin", "/proc/")):
        raise OSError(f"the {what} {path} is no ordinary file, but a pipe or a device")


def printable(path: PathLike) -> str:
    """A path as text that can be written anywhere: bytes that aren't UTF-8 as escapes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def download_file(path: PathLike, url: str, digest: str | None = None) -> PathLike:
    """Download `url` to `path` unless it is there already, and return `path`.

    url: of https, as are those that it leads on to. digest: the SHA-256 of the file in hexadecimal;
    a file at `path` that hasn't got it is replaced. Without one nobody knows what is downloaded; a
    warning tells the digest to pass. The file appears under its name only once it is complete and
    has the digest; one with another digest is kept as NAME.wrong. Raises OSError for a download
    that isn't complete or has another digest, and ValueError for another kind of URL or of digest.
    """
    path = Path(path)
    _check_https(url)
    if digest is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", digest):
        raise ValueError(f"digest must be a SHA-256, 64 hexadecimal digits, got {digest!r}")
    if path.exists() and (digest is None or sha256(path) == digest.lower()):
        return path
    aside = path.with_name(f"{path.name}.wrong")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=path.name, suffix=".part", dir=path.parent)
    part = Path(name)
    try:
        with os.fdopen(handle, "wb") as file, _opener().open(url) as response:
            size = response.headers.get("Content-Length")
            total = None if size is None else int(size)
            with tqdm(total=total, unit="B", unit_scale=True, desc=path.name) as progress:
                while chunk := response.read(1 << 20):
                    progress.update(file.write(chunk))
            if total is not None and file.tell() != total:
                raise OSError(f"{url}: got {file.tell()} of {total} bytes; try again")
        got = sha256(part)
        if digest is None:
            warnings.warn(
                f"{url} was downloaded unchecked; pass digest={got!r} to get this file alone",
                stacklevel=2,
            )
        elif got != digest.lower():
            part.replace(aside)
            raise OSError(f"{url} has SHA-256 {got}, not {digest.lower()}; it is kept as {aside}")
        # mkstemp makes files private; a download is an ordinary file.
        umask = os.umask(0)
        os.umask(umask)
        part.chmod(0o666 & ~umask)
        if path.exists():
            path.replace(aside)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def _check_https(url: str) -> None:
    if urllib.parse.urlsplit(url).scheme != "https":
        raise ValueError(f"downloads are made by https alone, got {url!r}")


class _HttpsRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: str):
        _check_https(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener() -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(_HttpsRedirects)


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            sha.update(chunk)
    return sha.hexdigest()


class CSVLogger:
    """Appends rows to a CSV file and flushes each, so that a killed run loses none.

    An existing file with the same columns is continued. One with other columns is kept under the
    name `NAME.1.csv` (the first free number), with a warning, and a new one is started.
    """

    def __init__(self, filename: PathLike, columns: Sequence[str]):
        self.filename = Path(filename)
        self.columns = list(columns)
        if self._existing_columns() not in ([], self.columns):
            kept = self._free_name()
            self.filename.rename(kept)
            warnings.warn(
                f"{self.filename} has other columns than this run; it was kept as {kept}",
                stacklevel=2,
            )
        self.filename.parent.mkdir(parents=True, exist_ok=True)
        self.file = self.filename.open("a+", newline="", encoding="utf-8")
        self.writer = csv.writer(self.file)
        if not self._existing_columns():
            self._write(self.columns)
        elif not self.filename.read_bytes().endswith(b"\n"):
            # A row cut off in the middle must not swallow the next one.
            self._write([])

    def _existing_columns(self) -> list[str]:
        if not self.filename.exists():
            return []
        with self.filename.open(newline="", encoding="utf-8") as file:
            return next(csv.reader(file), [])

    def _free_name(self) -> Path:
        n = 1
        while (path := self.filename.with_suffix(f".{n}{self.filename.suffix}")).exists():
            n += 1
        return path

    def _write(self, row: Sequence[Any]) -> None:
        self.writer.writerow(row)
        self.file.flush()

    def write(self, *args: Any) -> None:
        """Write one row, one value per column. Raises ValueError for another number of values."""
        if len(args) != len(self.columns):
            raise ValueError(
                f"{self.filename} has {len(self.columns)} columns "
                f"({', '.join(self.columns)}), got {len(args)} values"
            )
        self._write(args)
