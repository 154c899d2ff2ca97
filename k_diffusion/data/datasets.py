"""The data sets that a config can name: a table of functions (section, transform, folder)."""

import io
import os
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from ..common.files import PathLike, printable
from ..common.images import (
    CorruptImageError,
    convert_mode,
    decoded,
    open_image,
    unreadable,
    upright,
)
from ..common.text import need, unknown_name
from .archives import tar_shards, zip_of_images
from .custom import custom
from .idx import IDXFolder, has_idx
from .latents import Latents
from .scan import IMG_EXTENSIONS, Paths, SizedFiles, images_below, in_split
from .streamed import StreamedRows, rows_of
from .streamed_shards import streamed_shards

Transform = Callable[[Image.Image], Any]
_INSTALL = '"k-diffusion[datasets]"'


def hf_datasets_augs_helper(
    examples: MutableMapping[str, Any],
    transform: Callable[[Image.Image], Any],
    image_key: str,
    mode: str | None = "RGB",
) -> dict[str, Any]:
    """Apply `transform` to the images of a Hugging Face batch; its other columns stay as they are.

    For `dataset.set_transform(functools.partial(...))`. mode: the PIL mode images are converted to
    first, over white where they are transparent, None to leave them as they are stored. Raises
    ValueError for an unknown image_key.
    """
    if image_key not in examples:
        raise ValueError(f"no column {image_key!r} in the data set; it has {', '.join(examples)}")
    if None in (column := list(examples[image_key])):
        raise ValueError(
            f"{image_key!r} of row {column.index(None)} of this batch is missing; drop such rows "
            f"with dataset.filter(lambda row: row[{image_key!r}] is not None)"
        )
    images = (convert_mode(upright(image), mode) if mode else image for image in column)
    return {**examples, image_key: [transform(image) for image in images]}


def _image_folder(root: PathLike) -> Path:
    """The folder as a path. Raises ValueError where there is none."""
    if not (path := Path(root)).is_dir():
        raise ValueError(f"no image folder at {path}; check the data set's location")
    return path


def _read(path: Path, transform: Transform | None, mode: str | None) -> Any:
    """An image file, transformed. Raises `CorruptImageError` with its path."""
    image = open_image(path, mode, getattr(transform, "draft", None))
    try:
        return image if transform is None else transform(image)
    except CorruptImageError as error:
        raise unreadable(printable(path), error) from error


class FolderOfImages(SizedFiles, Dataset[tuple[Any]]):
    """The images in a folder and its subfolders, sorted by path; items are 1-tuples.

    transform: a function of the PIL image (default: none). mode: the PIL mode images are converted
    to first, over white where they are transparent, None to leave them as they are stored. Raises
    ValueError for a missing folder or one without images, `CorruptImageError` with the path when an
    image can't be read.
    """

    IMG_EXTENSIONS = IMG_EXTENSIONS

    def __init__(
        self,
        root: PathLike,
        transform: Callable[[Image.Image], Any] | None = None,
        mode: str | None = "RGB",
    ):
        self.root = _image_folder(root)
        self.transform = transform
        self.mode = mode
        found = images_below(self.root, self.IMG_EXTENSIONS)
        names = [os.path.join(folder, name) for folder, images in found.items() for name in images]
        # as paths compare: part by part
        names.sort(key=lambda name: os.path.normcase(name).replace(os.sep, "\0"))
        self.paths = Paths(self.root, names)
        if not self.paths:
            extensions = " ".join(sorted(self.IMG_EXTENSIONS))
            raise ValueError(f"no images below {self.root}; it needs files ending in {extensions}")

    def __repr__(self) -> str:
        return f"{type(self).__name__}(root={str(self.root)!r}, len={len(self)})"

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: int) -> tuple[Any]:
        return (_read(self.paths[key], self.transform, self.mode),)


class Digits(Dataset[tuple[Any, int]]):
    """scikit-learn's handwritten digits, 8 x 8 and greyscale: items (image, class).

    split: "test" is every fifth digit of each class, "train" the others, "all" both.
    """

    in_memory = True

    def __init__(self, transform: Transform, split: str = "all"):
        digits = need("sklearn.datasets", "the digits data set").load_digits()
        kept = in_split(digits.target, split)
        self.images = np.rint(digits.images[kept] * (255 / 16)).astype(np.uint8)
        self.classes = digits.target[kept].tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(Image.fromarray(self.images[index])), self.classes[index]


def _digits(section: Mapping[str, Any], transform: Transform, folder: Path) -> Dataset[Any]:
    if 0 < section["num_classes"] < 10:
        raise ValueError(
            f"dataset.num_classes is {section['num_classes']}, but there are 10 digits"
        )
    return Digits(transform, section["split"])


def _imagefolder(section: Mapping[str, Any], transform: Transform, folder: Path) -> Dataset[Any]:
    data = FolderOfImages(section["location"], transform, mode=None)
    data.paths = data.paths.take(in_split([0] * len(data), section.get("split", "all")))
    return data


class FolderOfClasses(SizedFiles, Dataset[tuple[Any, int]]):
    """The images of a folder with one subfolder for each class: items (image, class id).

    Class ids count the subfolders that have images, in the order of their names; `counts` maps
    those names to numbers of images, `empty` names the others. Raises ValueError for a missing
    folder or one without images in subfolders, `CorruptImageError` when an image can't be read.

    split: "test" is every fifth image of each class, "train" the others, "all" both.
    """

    def __init__(self, root: PathLike, transform: Transform | None = None, split: str = "all"):
        self.root, self.transform = _image_folder(root), transform
        images: dict[str, list[str]] = {}
        for parent, names in images_below(self.root, FolderOfImages.IMG_EXTENSIONS, True).items():
            if parent:  # a class, or below it
                found = images.setdefault(Path(parent).parts[0], [])
                found += [os.path.join(parent, name) for name in names]
        self.empty = [name for name, paths in sorted(images.items()) if not paths]
        images = {name: paths for name, paths in sorted(images.items()) if paths}
        if not images:
            raise ValueError(f"{self.root} needs one subfolder with images for each class")
        paths = [path for paths in images.values() for path in paths]
        classes = [i for i, paths in enumerate(images.values()) for _ in paths]
        kept = in_split(classes, split)
        self.paths = Paths(self.root, paths).take(kept)
        self.classes = [classes[i] for i in kept]
        counts = Counter(self.classes)
        self.counts = {name: counts[i] for i, name in enumerate(images)}

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return _read(self.paths[index], self.transform, None), self.classes[index]

    def describe(self) -> str:
        """The classes with their numbers of images, and a notice of the subfolders without any."""
        lines = [f"{name} {count:,}" for name, count in self.counts.items()]
        text = f"{len(lines)} classes, with images: {', '.join(lines)}"
        if self.empty:
            text += f"\nskipped without images: {', '.join(self.empty)}"
        return text


def _imagefolder_class(
    section: Mapping[str, Any], transform: Transform, folder: Path
) -> Dataset[Any]:
    data = FolderOfClasses(section["location"], transform, section.get("split", "all"))
    if 0 < (section["num_classes"] or 0) < len(data.counts):
        raise ValueError(
            f"dataset.num_classes is {section['num_classes']}, but {section['location']} has "
            f"{len(data.counts)} subfolders with images, each of them a class"
        )
    return data


def _mnist(name: str, section: Mapping[str, Any], transform: Transform) -> Dataset[Any]:
    """IDX files at the location; else torchvision's folders in it, or its download."""
    folder = Path(section["location"])
    if has_idx(folder):
        return IDXFolder(folder, transform, section.get("split", "train"))
    return _torchvision(name, section, transform)


def _torchvision(name: str, section: Mapping[str, Any], transform: Transform) -> Dataset[Any]:
    split = section.get("split", "train")
    if split not in ("train", "test"):
        raise unknown_name(f"dataset.split of {section['type']}", split, ("train", "test"))
    cls = getattr(need("torchvision.datasets", section["type"], _INSTALL), name)
    try:
        train = split == "train"
        return cls(section["location"], train=train, download=True, transform=transform)
    except (RuntimeError, OSError) as error:
        raise ValueError(
            f"{section['type']} is not at {section['location']} (dataset.location), and can't be "
            f"downloaded to it: {' '.join(str(error).split())}"
        ) from error


class HuggingFace(Dataset[dict[str, Any]]):
    """A data set of that library: items are its rows, with the transformed image.

    data: a `datasets.Dataset`, or `StreamedRows`, with a column `image_key` of images.
    """

    def __init__(self, data: Any, image_key: str, transform: Transform):
        image_type = need("datasets", "the huggingface data set", _INSTALL).Image
        streamed = isinstance(data, StreamedRows)
        source = data.data if streamed else data
        columns = [k for k, v in (source.features or {}).items() if isinstance(v, image_type)]
        if image_key not in columns:
            raise ValueError(
                f"dataset.image_key: no column {image_key!r} of images; there are "
                f"{', '.join(columns) or 'none'} among {', '.join(source.features or ())}"
            )
        self.image_key, self.transform = image_key, transform
        self.data, self.feature = data, source.features[image_key]
        # decoded here, where a corrupt one can be told from other errors
        for column in columns:
            source = source.cast_column(column, image_type(decode=False))
        if streamed:
            data.data = source
        else:
            self.data = source

    @property
    def window(self) -> int | None:
        """How many rows of a streamed data set are shuffled together; None of another."""
        return getattr(self.data, "window", None)

    def without_caption(self, column: str) -> list[str]:
        """The rows without a text in that column, if it is one of texts and isn't streamed."""
        known = {} if self.window is not None else self.data.features
        if "string" not in getattr(known.get(column), "dtype", ""):
            return []
        texts = self.data.with_format("arrow")[column][:]  # mapped, not read
        if not texts.null_count:
            return []
        return [f"row {i}" for i, missing in enumerate(texts.is_null().to_pylist()) if missing]

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.data[index]
        stored = row[self.image_key]
        name = f"row {index} of the data set"
        if stored is None:
            raise unreadable(name, CorruptImageError("it has no image"))
        if stored.get("path"):
            name = f"{stored['path']} ({name})"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                image = self._decoded(stored)
            image = self.transform(image)
        except Exception as cause:  # PIL's decoders raise many kinds
            raise unreadable(name, cause) from cause
        return {**row, self.image_key: image}

    def _decoded(self, stored: Mapping[str, Any]) -> Image.Image:
        """As the library decodes it, or by `draft`, but for a file that it would have to fetch."""
        content, path = stored["bytes"], stored["path"]
        draft = getattr(self.transform, "draft", None)
        if draft is None or (content is None and not os.path.isfile(path or "")):
            return self.feature.decode_example(stored)
        with Image.open(path if content is None else io.BytesIO(content)) as image:
            made = decoded(image, None, draft)
        return made.convert(self.feature.mode) if self.feature.mode else made


def _huggingface(section: Mapping[str, Any], transform: Transform, folder: Path) -> Dataset[Any]:
    library = need("datasets", "the huggingface data set", _INSTALL)
    location, split = Path(section["location"]), section["split"]
    # older versions ran a data set's own Python file without being asked to
    library.config.HF_DATASETS_TRUST_REMOTE_CODE = False
    try:
        if section.get("streaming"):
            data = library.load_dataset(section["location"], split=split, streaming=True)
        elif (location / "dataset_info.json").is_file():
            data = library.load_from_disk(str(location))
        elif (location / "dataset_dict.json").is_file():
            data = library.load_from_disk(str(location))[split]
        else:
            data = library.load_dataset(section["location"], split=split)
    except KeyError:
        raise ValueError(f"dataset.split: {location} has no split {split!r}") from None
    except Exception as error:  # of the library or of those that it reads and downloads with
        said = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"dataset.location: the Hugging Face data set {section['location']} can't be loaded; "
            f"the library says: {said}"
        ) from error
    if section.get("streaming"):
        data = rows_of(data, split, section["shuffle_window"], section["num_examples"])
    return HuggingFace(data, section["image_key"], transform)


DATASETS: dict[str, Callable[[Mapping[str, Any], Transform, Path], Dataset[Any]]] = {
    "digits": _digits,
    "imagefolder": _imagefolder,
    "imagefolder-class": _imagefolder_class,
    "cifar10": lambda section, transform, folder: _torchvision("CIFAR10", section, transform),
    "mnist": lambda section, transform, folder: _mnist("MNIST", section, transform),
    "fashion-mnist": lambda section, transform, folder: _mnist("FashionMNIST", section, transform),
    "zip": zip_of_images,
    "webdataset": lambda section, transform, folder: (
        streamed_shards(section, transform)
        if section.get("streaming")
        else tar_shards(section, transform)
    ),
    "latents": lambda section, transform, folder: Latents(
        section["location"], transform, section["flip_prob"]
    ),
    "huggingface": _huggingface,
    "custom": custom,
}


def make_dataset(
    section: Mapping[str, Any], transform: Transform, folder: Path = Path()
) -> Dataset[Any]:
    """The data set of a config's `dataset` section.

    transform: of a PIL image, applied to every image. folder: where a custom data set's file lies.
    Items are tuples or dicts, whose image and class are at `image_key` and `class_key`. Raises
    ValueError where there is nothing to read, ImportError where a library is missing.
    """
    if section["type"] not in DATASETS:
        raise ValueError(
            f"no data to train on: dataset.type is {section['type']!r}; "
            f"there are {', '.join(DATASETS)}"
        )
    if section["type"] != "digits" and section["location"] is None:
        raise ValueError(f"no data to train on: set dataset.location of {section['type']!r}")
    data = DATASETS[section["type"]](section, transform, Path(folder))
    if not len(data):  # type: ignore[arg-type]
        part = section.get("split", "all")
        part = "" if part == "all" else f"split {part!r} of the "
        raise ValueError(f"the {part}data set {section['type']!r} is empty")
    return data
