"""Data sets of a Python file outside the package."""

import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import Dataset

from ..common.images import CorruptImageError


class Custom(Dataset[Any]):
    """A data set made by a function of a Python file: `get_dataset(config, transform=...)`.

    Pickles as the way to make it, so that worker processes started by spawn load the file anew.
    """

    def __init__(
        self,
        file: Path,
        function: str,
        config: Mapping[str, Any],
        transform: Callable[[Image.Image], Any],
    ):
        self.recipe = (file, function, config, transform)
        if not file.is_file():
            raise ValueError(f"no data set file {file}; dataset.location is relative to the config")
        name = f"k_diffusion_custom_{file.stem}"
        spec = importlib.util.spec_from_file_location(name, file)
        if spec is None or spec.loader is None:
            raise ValueError(f"{file} is not a Python file")
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        with _errors_of(file):
            spec.loader.exec_module(module)
        make = getattr(module, function, None)
        if not callable(make):
            raise ValueError(f"{file} has no function {function!r} (dataset.get_dataset)")
        with _errors_of(file, f" in {function}(config, transform=...)"):
            self.data = make(dict(config), transform=transform)
        if not hasattr(self.data, "__getitem__") or not hasattr(self.data, "__len__"):
            raise ValueError(
                f"{function} of {file} must return a data set with __len__ and __getitem__, got "
                f"{type(self.data).__name__}"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        return Custom, self.recipe

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        with _errors_of(self.recipe[0], f" in item {index}"):
            return self.data[index]


@contextmanager
def _errors_of(file: Path, where: str = "") -> Iterator[None]:
    """Turns what a data set's file raises into a ValueError that says where it did."""
    try:
        yield
    except (CorruptImageError, KeyboardInterrupt):
        raise
    except BaseException as error:  # sys.exit, too
        lines = [
            f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(file)
        ]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
        at = f"line {line} of {file}" if line else str(file)
        said = " ".join((error.msg if isinstance(error, SyntaxError) else str(error)).split())
        raise ValueError(f"{at}{where}: {type(error).__name__}: {said}") from error


def custom(
    section: Mapping[str, Any], transform: Callable[[Image.Image], Any], folder: Path
) -> Dataset[Any]:
    """The data set of a `dataset` section of type custom."""
    file = (folder / section["location"]).resolve()
    return Custom(file, section["get_dataset"], section["config"], transform)
