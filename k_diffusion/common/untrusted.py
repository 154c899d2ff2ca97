"""What files of strangers say of themselves, checked before memory is taken for it."""

import io
import json
import os
import struct
import zipfile
from pathlib import Path
from typing import IO

from safetensors import SafetensorError, safe_open

from .files import PathLike, check_readable

# Real headers have about 100 bytes for each tensor.
_MAX_HEADER = 100_000_000


def check_torch_file(path: PathLike) -> None:
    """Raises ValueError for a file that torch.save hasn't written, or one larger than it is.

    torch.save stores its zip entries as they are: a compressed one, or one that says it is longer
    than the whole file, expands into memory that its size doesn't tell of.
    """
    check_readable(path, "checkpoint")
    with open(path, "rb") as file:
        check_torch_stream(file, path)


def check_torch_stream(file: IO[bytes], path: PathLike) -> None:
    """As `check_torch_file`, of an open file, which it leaves anywhere. path: of it."""
    head = file.read(4)
    if not b"PK\x03\x04".startswith(head):
        raise ValueError(
            f"{path} is damaged or no checkpoint: it isn't in torch.save's zip format; an "
            "older or other file has to be loaded and saved anew by a program that you trust"
        )
    size = file.seek(0, io.SEEK_END)
    try:
        entries = zipfile.ZipFile(file).infolist()
    except (
        zipfile.BadZipFile,
        ValueError,
        OSError,
        struct.error,
        NotImplementedError,
    ) as error:
        raise ValueError(f"{path} is damaged or truncated: {error}") from None
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED:
            raise ValueError(
                f"{path} has compressed parts ({entry.filename}: {entry.compress_size:,} bytes "
                f"that say they expand to {entry.file_size:,}), which torch.save doesn't write"
            )
    if (total := sum(entry.file_size for entry in entries)) > size:
        raise ValueError(
            f"{path} says that it holds {total:,} bytes, but the file has {size:,}; it is damaged "
            "or made to take your memory"
        )


def check_safetensors_file(path: PathLike) -> None:
    """Raises ValueError for a header that the file is too short for, or that is no header."""
    check_readable(path, "checkpoint")
    size = Path(path).stat().st_size
    with open(path, "rb") as file:
        head = file.read(8)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or not 2 <= length <= min(size - 8, _MAX_HEADER):
            raise ValueError(
                f"{path} is not a complete safetensors file: it has {size:,} bytes, and its header "
                f"would be {length:,} bytes long"
            )
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError):
            raise ValueError(f"{path} is not a safetensors file: its header isn't JSON") from None
    if not isinstance(header, dict):
        raise ValueError(f"{path} is not a safetensors file: its header isn't a JSON object")


def get_safetensors_metadata(path: PathLike) -> dict[str, str]:
    """The metadata of a safetensors file, {} where it has none; no weights are read.

    Raises ValueError for a file that is truncated or no safetensors file.
    """
    check_safetensors_file(path)
    try:
        with safe_open(os.fspath(path), "pt") as file:
            return file.metadata() or {}
    except SafetensorError as err:
        raise ValueError(f"{path} is not a complete safetensors file ({err})") from err
