"""The data sets that a config can name: a table of functions (section, transform, folder)."""

import importlib.util
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from .. import utils

Transform = Callable[[Image.Image], Any]

_EXTRA = 'install it with: pip install "k-diffusion[train]"'


def _need(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"this data set needs {module.split('.')[0]}; {_EXTRA}") from error


class Digits(Dataset[tuple[Any, int]]):
    """scikit-learn's handwritten digits, 8 x 8 and greyscale: items (image, class)."""

    in_memory = True

    def __init__(self, transform: Transform):
        digits = _need("sklearn.datasets").load_digits()
        self.images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
        self.classes = digits.target.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(Image.fromarray(self.images[index])), self.classes[index]


class Custom(Dataset[Any]):
    """A data set made by a function of a Python file: `get_dataset(config, transform=...)`.

    Pickles as the way to make it, so that worker processes started by spawn load the file anew.
    """

    def __init__(self, file: Path, function: str, config: Mapping[str, Any], transform: Transform):
        self.recipe = (file, function, config, transform)
        if not file.is_file():
            raise ValueError(f"no data set file {file}; dataset.location is relative to the config")
        name = f"k_diffusion_custom_{file.stem}"
        spec = importlib.util.spec_from_file_location(name, file)
        if spec is None or spec.loader is None:
            raise ValueError(f"{file} is not a Python file")
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if not hasattr(module, function):
            raise ValueError(f"{file} has no function {function!r} (dataset.get_dataset)")
        self.data = getattr(module, function)(dict(config), transform=transform)

    def __reduce__(self) -> tuple[Any, ...]:
        return Custom, self.recipe

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        return self.data[index]


def _imagefolder(section: Mapping[str, Any], transform: Transform, folder: Path) -> Dataset[Any]:
    return utils.FolderOfImages(section["location"], transform, mode=None)


def _imagefolder_class(
    section: Mapping[str, Any], transform: Transform, folder: Path
) -> Dataset[Any]:
    if not Path(section["location"]).is_dir():
        raise ValueError(f"no image folder {section['location']!r} (dataset.location)")
    try:
        return _need("torchvision.datasets").ImageFolder(
            section["location"], transform, loader=partial(utils.open_image, mode=None)
        )
    except FileNotFoundError as error:
        raise ValueError(
            f"{section['location']!r} needs one subfolder with images for each class: {error}"
        ) from None


def _torchvision(name: str, section: Mapping[str, Any], transform: Transform) -> Dataset[Any]:
    cls = getattr(_need("torchvision.datasets"), name)
    return cls(section["location"], train=True, download=True, transform=transform)


def _huggingface(section: Mapping[str, Any], transform: Transform, folder: Path) -> Dataset[Any]:
    library = _need("datasets")
    location = Path(section["location"])
    if (location / "dataset_info.json").is_file():
        data = library.load_from_disk(str(location))
    elif (location / "dataset_dict.json").is_file():
        data = library.load_from_disk(str(location))[section["split"]]
    else:
        data = library.load_dataset(section["location"], split=section["split"])
    image_key = section["image_key"]
    if image_key not in data.column_names:
        raise ValueError(
            f"dataset.image_key: no column {image_key!r}; there are {data.column_names}"
        )
    helper = partial(
        utils.hf_datasets_augs_helper, transform=transform, image_key=image_key, mode=None
    )
    return data.with_transform(helper)


def _custom(section: Mapping[str, Any], transform: Transform, folder: Path) -> Dataset[Any]:
    file = (folder / section["location"]).resolve()
    return Custom(file, section["get_dataset"], section["config"], transform)


DATASETS: dict[str, Callable[[Mapping[str, Any], Transform, Path], Dataset[Any]]] = {
    "digits": lambda section, transform, folder: Digits(transform),
    "imagefolder": _imagefolder,
    "imagefolder-class": _imagefolder_class,
    "cifar10": lambda section, transform, folder: _torchvision("CIFAR10", section, transform),
    "mnist": lambda section, transform, folder: _torchvision("MNIST", section, transform),
    "huggingface": _huggingface,
    "custom": _custom,
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
    data = DATASETS[section["type"]](section, transform, Path(folder))
    if not len(data):  # type: ignore[arg-type]
        raise ValueError(f"the data set {section['type']!r} is empty")
    return data
