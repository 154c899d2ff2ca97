"""The images of a folder of any size, found once and kept in the cache folder; and splits."""

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, overload

from ..common.files import cache_folder, write_atomically
from ..common.images import image_size
from ..common.text import unknown_name

IMG_EXTENSIONS = frozenset(
    (".png", ".jpg", ".jpeg", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
)
_SPLITS = ("all", "train", "test")
_VERSION = 1
# Fewer are found in a moment.
_WORTH_KEEPING = 10_000
# What changed so shortly ago may change again without its time telling.
_SETTLED = 2 * 10**9


def in_split(classes: Sequence[int], split: str) -> list[int]:
    """The indices of a data set's split: "test" is every fifth item of each class, "train" the
    others, "all" both.

    Raises ValueError for another split.
    """
    if split not in _SPLITS:
        raise unknown_name("dataset.split", split, _SPLITS)
    seen: Counter[int] = Counter()
    kept = []
    for i, label in enumerate(classes):
        seen[label] += 1
        if falls_in(seen[label], split):
            kept.append(i)
    return kept


def falls_in(number: int, split: str) -> bool:
    """Whether the item of that number, from 1 on, is in a split: "test" has every fifth."""
    return split == "all" or (number % 5 == 0) == (split == "test")


def count_in(total: int, split: str) -> int:
    """How many of so many items are in a split."""
    return {"all": total, "train": total - total // 5, "test": total // 5}[split]


class Paths(Sequence[Path]):
    """Paths below a root, kept as text: as `Path`s, a million would take seconds and gigabytes."""

    def __init__(self, root: Path, names: Sequence[str]):
        self.root, self.names = root, names

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, index: int) -> Path: ...
    @overload
    def __getitem__(self, index: slice) -> "Paths": ...
    def __getitem__(self, index: int | slice) -> "Path | Paths":
        if isinstance(index, slice):
            return Paths(self.root, self.names[index])
        return Path(self.root, self.names[index])

    def take(self, indices: Iterable[int]) -> "Paths":
        """Those at these indices."""
        return Paths(self.root, [self.names[i] for i in indices])


class SizedFiles:
    """What data sets of files have for buckets: `paths`."""

    paths: Paths

    def image_size(self, index: int) -> tuple[int, int]:
        """(h, w) of an image as it is stored, upright."""
        return image_size(self.paths[index])

    def without_caption(self, ending: str) -> list[str]:
        """The images with no text file of that ending beside them. Each folder is listed once."""
        root, ending = os.fspath(self.paths.root), f".{ending.removeprefix('.')}"
        texts: set[str] = set()
        for folder in dict.fromkeys(map(os.path.dirname, self.paths.names)):
            with os.scandir(os.path.join(root, folder)) as entries:
                found = (entry.name for entry in entries if entry.name.endswith(ending))
                texts.update(os.path.join(folder, name) for name in found)
        missing = (n for n in self.paths.names if os.path.splitext(n)[0] + ending not in texts)
        return [os.path.join(root, name) for name in missing]

    def image_names(self) -> Iterable[str]:
        """What tells the images from others, and from those that lay there before."""
        root = self.paths.root.resolve()
        folders = dict.fromkeys(map(os.path.dirname, self.paths.names))
        times = [f"{name} {os.stat(os.path.join(root, name)).st_mtime_ns}" for name in folders]
        return [str(root), *times, *self.paths.names]


class Folder(NamedTuple):
    """What a folder has: the subfolders, the images, and the time at which it last changed."""

    time: int
    folders: list[str]
    images: list[str]


def images_below(
    root: Path, extensions: Collection[str], follow_links: bool = False
) -> dict[str, list[str]]:
    """The names of images, sorted, by folder below root ("" is root itself), sorted as text.

    extensions: of images, in small letters with their dot. follow_links: also of folders that links
    lead to, but for those that a folder is in itself. What is found is kept in the cache folder,
    where it is much; the next time, those folders alone are listed that have changed since, by
    their times.
    """
    key = json.dumps([_VERSION, str(root.resolve()), sorted(extensions), follow_links])
    kept = recall("folders", key) or {}
    known = {name: Folder(*folder) for name, folder in kept.items()}
    found: dict[str, Folder] = {}
    todo: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    while todo:
        name, above = todo.pop()
        path = os.path.join(root, name) if name else os.fspath(root)
        try:
            status = os.stat(path)
            changed, itself = status.st_mtime_ns, (status.st_dev, status.st_ino)
            # a link to a folder that it is in; some file systems number none
            if status.st_ino and itself in above:
                continue
            folder = known.get(name)
            if folder is None or folder.time != changed:
                folder = _listed(path, changed, extensions, follow_links)
        except OSError:  # it is gone, or not for us to read
            continue
        found[name] = folder
        above |= {itself}
        todo += [(os.path.join(name, sub), above) for sub in folder.folders]
    if found != known and worth_keeping(sum(len(folder.images) for folder in found.values())):
        remember("folders", key, found)
    return {name: found[name].images for name in sorted(found)}


def _listed(path: str, changed: int, extensions: Collection[str], follow_links: bool) -> Folder:
    settled = time.time_ns() - changed > _SETTLED
    folders, images = [], []
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=follow_links):
                folders.append(entry.name)
            elif os.path.splitext(entry.name)[1].lower() in extensions and not entry.is_dir():
                images.append(entry.name)
    return Folder(changed if settled else -1, sorted(folders), sorted(images))


def worth_keeping(images: int) -> bool:
    """Whether so many took long enough to find."""
    return images >= _WORTH_KEEPING


def recall(kind: str, key: str) -> Any:
    """What was remembered under a kind and a key; None where nothing was, or it is damaged."""
    try:
        digest, _, text = _place(kind, key).read_bytes().partition(b"\n")
        if digest.decode() != hashlib.sha256(text).hexdigest():
            return None
        return json.loads(text)
    except (OSError, ValueError):
        return None


def remember(kind: str, key: str, value: Any) -> None:
    """Keep a value that JSON can hold in the cache folder, if that can be written."""
    text = json.dumps(value, separators=(",", ":")).encode()
    path = _place(kind, key)
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        head = hashlib.sha256(text).hexdigest().encode() + b"\n"
        write_atomically(path, lambda file: file.write(head + text))


def _place(kind: str, key: str) -> Path:
    return cache_folder() / kind / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
