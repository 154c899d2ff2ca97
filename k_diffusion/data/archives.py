"""Images in archives, read at their places: zip files of EDM's layout, tar shards of WebDataset.

Their tables of contents are read once, and kept in the cache folder where they are long. So every
image can be had by its index: a run shuffles all of them and resumes at the sample, as with a
folder. That takes no package, and archives that are files, tar shards uncompressed.
"""

import glob
import io
import itertools
import json
import re
import struct
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from torch.utils.data import Dataset

from ..common.files import printable
from ..common.images import CorruptImageError, decode_image, image_size, unreadable
from .scan import IMG_EXTENSIONS, in_split, recall, remember, worth_keeping

_LOCAL_HEADER = 30  # of a zip file's member, before its name
_VERSION = 2


class Member(NamedTuple):
    """An image in an archive. crc: of a zip file's member; packed: deflated there. caption: where
    its text is and how long, in bytes."""

    name: str
    label: int | None
    offset: int
    size: int
    crc: int | None = None
    packed: bool = False
    caption: tuple[int, int] | None = None


class ArchivedImages(Dataset[dict[str, Any]]):
    """The images of archives, in their order: items with `image` and, where known, `class`.

    archives: the files, with the images in each. keys: the names of an item's image, class and
    caption, which an item has where its archive does. split: "test" is every fifth image of each
    class, "train" the others. `counts` maps class ids to numbers of images of all splits. Raises
    `CorruptImageError` for an image that can't be read.
    """

    def __init__(
        self,
        archives: Sequence[tuple[Path, Sequence[Member]]],
        transform: Callable[[Image.Image], Any],
        split: str = "all",
        keys: Sequence[str] = ("image", "class", "txt"),
    ):
        self.files = [path for path, _ in archives]
        self.transform, self.keys = transform, keys
        places = [(i, member) for i, (_, found) in enumerate(archives) for member in found]
        kept = in_split([member.label or 0 for _, member in places], split)
        self.places = [places[i] for i in kept]
        counts = Counter(member.label for _, member in places if member.label is not None)
        self.counts = {str(i): counts[i] for i in range(max(counts, default=-1) + 1)}

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        file, member = self.places[index]
        name = f"{member.name} of {printable(self.files[file])}"
        try:
            content = self._content(index)
        except OSError as error:
            raise unreadable(name, error) from error
        item = {self.keys[0]: transformed(content, name, self.transform)}
        if member.label is not None:
            item[self.keys[1]] = member.label
        if member.caption is not None:
            item[self.keys[2]] = self._caption(file, name, *member.caption)
        return item

    def _caption(self, file: int, image: str, offset: int, size: int) -> str:
        with self.files[file].open("rb") as archive:
            archive.seek(offset)
            return caption_text(archive.read(size), image)

    def without_caption(self, ending: str) -> list[str]:
        """The images without a text of that ending, which is that of `keys`."""
        return [member.name for _, member in self.places if member.caption is None]

    def image_size(self, index: int) -> tuple[int, int]:
        """(h, w) of an image as it is stored, upright."""
        return image_size(io.BytesIO(self._content(index)))

    def image_names(self) -> Iterable[str]:
        """What tells the images from others."""
        files = [f"{path.resolve()} {path.stat().st_mtime_ns}" for path in self.files]
        return [*files, *(f"{i} {member.name}" for i, member in self.places)]

    def _content(self, index: int) -> bytes:
        """An image's file. Raises OSError for one that is damaged."""
        file, member = self.places[index]
        with self.files[file].open("rb") as archive:
            archive.seek(member.offset)
            if member.crc is not None:
                header = archive.read(_LOCAL_HEADER)
                if len(header) < _LOCAL_HEADER:
                    raise OSError("the archive ends before it")
                archive.seek(sum(struct.unpack("<2H", header[26:])), 1)
            content = archive.read(member.size)
        if len(content) < member.size:
            raise OSError("the archive ends before it")
        if member.packed:
            try:
                content = zlib.decompress(content, -15)
            except zlib.error as error:
                raise OSError(str(error)) from error
        if member.crc not in (None, zlib.crc32(content)):
            raise OSError("its checksum is another")
        return content


def zip_of_images(
    section: Mapping[str, Any], transform: Callable[[Image.Image], Any], folder: Path
) -> ArchivedImages:
    """The data set of a config's section of type zip."""
    path = Path(section["location"])
    members = _indexed(path, _zip_members)
    keys = section["image_key"], section["class_key"]
    return _checked(ArchivedImages([(path, members)], transform, section["split"], keys), section)


def tar_shards(
    section: Mapping[str, Any], transform: Callable[[Image.Image], Any]
) -> ArchivedImages:
    """The data set of a config's section of type webdataset, in files."""
    keys = section["image_key"], section["class_key"], section["caption_key"]
    archives = [(path, _indexed(path, _tar_members, *keys)) for path in shards(section["location"])]
    if not any(members for _, members in archives):
        path = archives[0][0]
        with tarfile.open(path, "r:") as archive:
            found = {sample_parts(member.name)[1] for member in archive if member.isreg()}
        raise ValueError(
            f"dataset.image_key: no sample of {section['location']} has an image at "
            f"{section['image_key']!r}; the endings in {path.name}: "
            f"{', '.join(sorted(filter(None, found))[:20]) or 'none'}"
        )
    return _checked(ArchivedImages(archives, transform, section["split"], keys), section)


def _checked(data: ArchivedImages, section: Mapping[str, Any]) -> ArchivedImages:
    if not data.places:
        return data  # an error of all data sets
    if 0 < (section["num_classes"] or 0) < len(data.counts):
        raise ValueError(
            f"dataset.num_classes is {section['num_classes']}, but {section['location']} has "
            f"classes up to {len(data.counts) - 1}; leave it out to have them counted"
        )
    return data


def is_url(location: str) -> bool:
    """Whether it names no file here: a URL, or a command whose output is read by a pipe."""
    return re.match(r"\w+://|pipe:", location) is not None


def shards(location: str) -> list[Path]:
    """The files of a location: a file, a folder's *.tar, or a pattern with *, ?, [] or {00..99}.

    Raises ValueError where there are none, and for a URL.
    """
    if is_url(location):
        raise ValueError(
            f"dataset.location: shards are read at their places in files, and {location} is none; "
            "set dataset.streaming, or download them"
        )
    path = Path(location)
    if path.is_dir():
        found = sorted(path.glob("*.tar"))
    else:
        names = [location]
        while span := re.search(r"\{(\d+)\.\.(\d+)\}", names[0]):
            first, last = span.groups()
            numbers = [f"{i:0{len(first)}}" for i in range(int(first), int(last) + 1)]
            names = [re.sub(r"\{\d+\.\.\d+\}", n, name, count=1) for name in names for n in numbers]
            if not names:
                break
        found = []
        for name in names:
            matched = sorted(glob.glob(name)) if glob.has_magic(name) else [name]
            found += [Path(match) for match in matched]
    missing = [str(path) for path in found if not path.is_file()]
    if missing or not found:
        raise ValueError(f"dataset.location: no tar file at {', '.join(missing[:3]) or location}")
    return found


def _indexed(path: Path, index: Callable[..., list[Member]], *args: str) -> list[Member]:
    """The images of an archive, kept in the cache folder until its size or time is another."""
    try:
        stat = path.stat()
        if not path.is_file():
            raise IsADirectoryError(f"{path} is no file")
    except OSError as error:
        raise ValueError(f"dataset.location: no archive at {path}; check the path") from error
    facts = [_VERSION, index.__name__, *args, str(path.resolve()), stat.st_size, stat.st_mtime_ns]
    key = json.dumps(facts)
    if (kept := recall("archives", key)) is not None:
        return [Member(*member) for member in kept]
    try:
        members = index(path, *args)
    except (OSError, EOFError, tarfile.TarError, zipfile.BadZipFile, NotImplementedError) as error:
        kind = "a zip" if index is _zip_members else "an uncompressed tar"
        said = " ".join(str(error).split())
        raise ValueError(
            f"{path} can't be read as {kind} file ({said}); fetch or unpack it again"
        ) from error
    if worth_keeping(len(members)):
        remember("archives", key, members)
    return members


def _zip_members(path: Path) -> list[Member]:
    """dataset.json, if it is there, holds `labels`: pairs of a name and a class, or null."""
    with zipfile.ZipFile(path) as archive:
        labels = _labels(path, archive) if "dataset.json" in archive.NameToInfo else None
        found = sorted(archive.infolist(), key=lambda info: info.filename)
    members = []
    for info in found:
        if Path(info.filename).suffix.lower() not in IMG_EXTENSIONS or info.is_dir():
            continue
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise NotImplementedError(f"{info.filename} is neither stored nor deflated")
        if info.flag_bits & 1:
            raise NotImplementedError(f"{info.filename} is encrypted")
        if labels is not None and info.filename not in labels:
            raise ValueError(f"{path}: dataset.json has no label of {info.filename}")
        label = None if labels is None else labels[info.filename]
        packed = info.compress_type == zipfile.ZIP_DEFLATED
        place = info.header_offset, info.compress_size, info.CRC
        members.append(Member(info.filename, label, *place, packed))
    return members


def _labels(path: Path, archive: zipfile.ZipFile) -> dict[str, int] | None:
    try:
        pairs = json.loads(archive.read("dataset.json"))["labels"]
        if pairs is None:
            return None
        labels = {name.replace("\\", "/"): label for name, label in pairs}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"dataset.json of {path} needs a key 'labels' with pairs of a name and a class, or null"
        ) from error
    for name, label in labels.items():
        if type(label) is not int or label < 0:
            raise ValueError(
                f"dataset.json of {path}: a label must be a class id, 0 or more; {name} has "
                f"{str(label)[:40]}"
            )
    return labels


def _tar_members(path: Path, image_key: str, class_key: str, caption_key: str) -> list[Member]:
    """A sample's members follow each other, with the same name up to its first dot.

    image_key: the ending of its image, "image" for that of any. class_key: that of its class id.
    caption_key: that of its text.
    """
    endings = image_endings(image_key)
    members = []
    with tarfile.open(path, "r:") as archive:
        files = (member for member in archive if member.isreg())
        for key, parts in itertools.groupby(files, key=lambda m: sample_parts(m.name)[0]):
            sample = {sample_parts(part.name)[1]: part for part in parts}
            image = next((sample[e] for e in endings if e in sample), None)
            if image is None:
                continue
            label = None
            if class_key in sample:
                file = archive.extractfile(sample[class_key])
                digits = b"" if file is None else file.read(40)
                label = class_id(digits, f"{path}: {key}.{class_key}")
            text = sample.get(caption_key)
            caption = None if text is None else (text.offset_data, text.size)
            place = image.offset_data, image.size
            members.append(Member(image.name, label, *place, caption=caption))
    return members


def sample_parts(name: str) -> tuple[str, str]:
    """The key and the ending of a member: `a/b.c.png` is `a/b` and `c.png`."""
    folder, slash, base = name.rpartition("/")
    stem, _, ending = base.partition(".")
    return f"{folder}{slash}{stem}", ending.lower()


def image_endings(image_key: str) -> list[str]:
    """The endings of what `image_key` names: one, or those of all images for "image"."""
    return [e[1:] for e in IMG_EXTENSIONS] if image_key == "image" else [image_key.lower()]


def transformed(content: bytes, name: str, transform: Callable[[Image.Image], Any]) -> Any:
    """What `transform` makes of an image in a file, of that name. Raises CorruptImageError."""
    image = decode_image(content, name, None, getattr(transform, "draft", None))
    try:
        return transform(image)
    except CorruptImageError as error:
        raise unreadable(name, error) from error


def class_id(content: bytes, name: str) -> int:
    """The class id in a file of a sample, which `name` is. Raises ValueError where it is none."""
    digits = content.strip()
    if not digits.isdigit():
        raise ValueError(f"{name} must hold a class id, got {digits[:20]!r}")
    return int(digits)


def caption_text(content: bytes, image: str) -> str:
    """The caption in a file, of an image of that name. Raises ValueError where it isn't text."""
    try:
        return " ".join(content.decode("utf-8-sig").split())
    except UnicodeDecodeError as error:
        raise ValueError(f"the caption of {image} is not UTF-8 text: {error.reason}") from None
