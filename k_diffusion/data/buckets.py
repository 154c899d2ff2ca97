"""Several image sizes in one run: each image at the size of the nearest aspect ratio."""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from .scan import recall, remember, worth_keeping

Size = tuple[int, int]
_VERSION = 1
_THREADS = 16  # which wait for disks more than they compute


class Buckets:
    """The images of a data set by size.

    sizes: those of the buckets that have images, (h, w). which: (n,), the bucket of each image.
    groups: the indices of the images in each bucket.
    """

    def __init__(self, sizes: Sequence[Size], which: np.ndarray):
        used = np.unique(which)
        self.sizes = [sizes[i] for i in used]
        self.which = np.searchsorted(used, which).astype(np.uint16)
        self.groups = [np.flatnonzero(self.which == i) for i in range(len(used))]

    def size_of(self, index: int) -> Size:
        """The size of an image's bucket."""
        return self.sizes[self.which[index]]

    def after(self, index: int) -> int:
        """The next image in the same bucket; after its last its first."""
        group = self.groups[self.which[index]]
        return int(group[(np.searchsorted(group, index) + 1) % len(group)])

    def describe(self) -> str:
        """The sizes and how many images each has."""
        parts = [f"{h} x {w} {len(g):,}" for (h, w), g in zip(self.sizes, self.groups)]
        return f"images by height x width: {', '.join(parts)}"


def nearest(size: Size, sizes: Sequence[Size]) -> int:
    """The one of the sizes whose aspect ratio is nearest to that of a size, as a factor."""
    ratios = [abs(math.log(size[0] * w / (size[1] * h))) for h, w in sizes]
    return ratios.index(min(ratios))


def make_buckets(data: Any, sizes: Sequence[Size]) -> Buckets:
    """The buckets of a data set, which must tell its images' sizes, `image_size(index)`.

    An image that can't be read is put in the first bucket, and skipped when its turn comes. Of many
    images, the sizes are kept in the cache folder, if all could be read.
    """
    size_of: Callable[[int], Size] = data.image_size
    digest = hashlib.sha256()
    for name in data.image_names():
        digest.update(name.encode("utf-8", "surrogateescape") + b"\0")
    key = json.dumps([_VERSION, digest.hexdigest()])
    known = recall("sizes", key)
    if known is None:

        def read(index: int) -> Size | None:
            try:
                return size_of(index)
            except OSError:
                return None

        with ThreadPoolExecutor(_THREADS) as pool:
            known = list(pool.map(read, range(len(data)), chunksize=64))
        # an image may be unreadable for a moment
        if worth_keeping(len(known)) and None not in known:
            remember("sizes", key, known)
    chosen: dict[Any, int] = {}
    which = np.empty(len(known), dtype=np.int64)
    for i, size in enumerate(known):
        size = size and (size[0], size[1])
        if size not in chosen:
            chosen[size] = nearest(size, sizes) if size else 0
        which[i] = chosen[size]
    return Buckets(sizes, which)
