"""Labelled images in IDX files, the format of MNIST: a header, then bytes."""

import gzip
import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from ..common.text import unknown_name

_PARTS = {"train": "train", "test": "t10k"}
# Two bytes of 0, 8 for unsigned bytes, and the number of dimensions.
_IMAGES, _LABELS = 0x00000803, 0x00000801


class IDXFolder(Dataset[tuple[Any, int]]):
    """The four IDX files of MNIST, Fashion-MNIST and their like: items (image, class).

    The files are `train-images-idx3-ubyte` and so on, or these names with `.gz`. transform: of the
    greyscale PIL image. split: "train" or "test", the latter held out by the data set's authors.
    Raises ValueError for another split, a file that isn't there, and one that isn't such a file.
    """

    in_memory = True

    def __init__(self, root: Path, transform: Callable[[Image.Image], Any], split: str = "train"):
        if split not in _PARTS:
            raise unknown_name("dataset.split of IDX files", split, _PARTS)
        part = _PARTS[split]
        self.root, self.transform = root, transform
        self.images = read_idx(_file(root, f"{part}-images-idx3-ubyte"), _IMAGES)
        labels = _file(root, f"{part}-labels-idx1-ubyte")
        self.classes = read_idx(labels, _LABELS).tolist()
        if len(self.classes) != len(self.images):
            raise ValueError(
                f"{labels} has {len(self.classes):,} labels for {len(self.images):,} images; the "
                "two files must be of one data set"
            )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(Image.fromarray(self.images[index])), self.classes[index]


def has_idx(root: Path) -> bool:
    """Whether a folder has IDX files of images."""
    return any(root.glob("*-images-idx3-ubyte*"))


def read_idx(path: Path, magic: int) -> np.ndarray:
    """The bytes of an IDX file, in the shape that its header says, decompressed where it is .gz.

    magic: the header's first four bytes, as a number. Raises ValueError for another one, another
    number of bytes than the shape needs, and a broken .gz.
    """
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is not a whole .gz file ({error}); fetch it again") from error
    got = int.from_bytes(content[:4], "big")
    if len(content) < 4 or got != magic:
        raise ValueError(
            f"{path} is no such IDX file: it starts with {got:#010x}, not {magic:#010x}; fetch it "
            "again"
        )
    start = 4 + 4 * (magic & 0xFF)
    shape = [int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4)]
    if len(content) - start != math.prod(shape):
        raise ValueError(
            f"{path} should have {math.prod(shape):,} bytes after its header, of shape "
            f"{' x '.join(map(str, shape))}, but has {max(0, len(content) - start):,}; fetch it "
            "again"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _file(root: Path, name: str) -> Path:
    for path in (root / name, root / f"{name}.gz"):
        if path.is_file():
            return path
    raise ValueError(
        f"{root} has no {name} or {name}.gz; dataset.location needs all four IDX files"
    )
