"""From a data set to an endless, resumable stream of batches.

The stream is a function of (seed, position): sample t is entry t mod N of the permutation of epoch
t div N, and its augmentation draws from a generator seeded by (seed, t). So a run that resumes at
position t goes on as if it had never stopped, whatever the number of workers.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset, Sampler

from .. import utils
from ..augmentation import KarrasAugmentationPipeline

_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
_MAX_CORRUPT_IN_A_ROW = 1000


def derive_seed(*parts: int) -> int:
    """A seed in [0, 2**63) that belongs to a tuple of integers >= 0, but for zeros at its end."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


class ImageTransform:
    """PIL image to (augmented image, image, augmentation condition), as float tensors.

    The image is scaled to cover size (h, w), cropped around its centre and converted to the mode
    of its number of channels. Images are (c, h, w) in [-1, 1], the condition is (9,).
    """

    def __init__(self, size: tuple[int, int], channels: int, augment_prob: float = 0.0):
        if channels not in _MODES:
            raise ValueError(
                f"model.input_channels is {channels}, but images have "
                f"{', '.join(map(str, _MODES))} channels"
            )
        self.size, self.mode = size, _MODES[channels]
        self.augment = KarrasAugmentationPipeline(augment_prob, disable_all=augment_prob == 0)

    def __call__(self, image: Image.Image) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        h, w = self.size
        if image.mode.startswith("I"):  # 16-bit grey, which PIL would clip to 8 bits
            image = Image.fromarray((np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8))
        image = image.convert(self.mode)
        if image.size != (w, h):
            image = ImageOps.fit(image, (w, h), Image.Resampling.LANCZOS)
        return self.augment(image)


class TrainingData(Dataset[dict[str, Any]]):
    """A data set whose items are drawn by (index, seed) and come as dicts.

    Of an item: `image`, `original`, `aug_cond`, with classes also `class`, and `skipped`, the paths
    of corrupt images that the next image stood in for (an error with strict=True).
    """

    def __init__(
        self,
        data: Dataset[Any],
        num_classes: int = 0,
        image_key: int | str = 0,
        class_key: int | str = 1,
        strict: bool = False,
    ):
        self.data = data
        self.num_classes = num_classes
        self.image_key, self.class_key = image_key, class_key
        self.strict = strict

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]

    def __getitems__(self, draws: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
        with torch.random.fork_rng(devices=[]):
            return [self._draw(*draw) for draw in draws]

    def __getitem__(self, draw: tuple[int, int]) -> dict[str, Any]:
        return self.__getitems__([draw])[0]

    def _draw(self, index: int, seed: int) -> dict[str, Any]:
        torch.default_generator.manual_seed(seed)
        skipped: list[str] = []
        while True:
            try:
                item = self.data[index]
                break
            except utils.CorruptImageError as error:
                if self.strict or len(skipped) == min(len(self), _MAX_CORRUPT_IN_A_ROW) - 1:
                    raise
                skipped.append(str(error.filename))
                index = (index + 1) % len(self)
        try:
            image, original, aug_cond = item[self.image_key]
        except (KeyError, IndexError, TypeError, ValueError):
            raise ValueError(
                f"item {index} of the data set has no image that `transform` was applied to at "
                f"{self.image_key!r} (dataset.image_key)"
            ) from None
        out = {"image": image, "original": original, "aug_cond": aug_cond}
        if self.num_classes:
            out["class"] = self._class_of(item, index)
        return {**out, "skipped": "\n".join(skipped)}

    def _class_of(self, item: Any, index: int) -> int:
        try:
            label = int(item[self.class_key])
        except (KeyError, IndexError, TypeError, ValueError):
            raise ValueError(
                f"item {index} of the data set has no class id at {self.class_key!r}, but "
                f"num_classes is {self.num_classes}; set dataset.class_key, or num_classes to 0"
            ) from None
        if not 0 <= label < self.num_classes:
            raise ValueError(
                f"item {index} of the data set has class {label}, outside of 0 to "
                f"{self.num_classes - 1}; dataset.num_classes must be the number of classes"
            )
        return label


class Stream(Sampler[list[tuple[int, int]]]):
    """Endless batches of (index, seed), this process's share of the global stream from `start` on.

    Consecutive global batches of batch_size * processes samples; each process takes its slice.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int,
        start: int = 0,
        process: int = 0,
        processes: int = 1,
    ):
        if length < batch_size * processes:
            raise ValueError(
                f"the data set has {length} images, fewer than one batch of {batch_size}"
                + (f" on each of {processes} processes" if processes > 1 else "")
                + f"; pass --batch-size {max(1, length // processes)} or less"
            )
        self.length, self.batch_size, self.seed, self.start = length, batch_size, seed, start
        self.process, self.processes = process, processes

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = -1, torch.empty(0)
        at = self.start + self.process * self.batch_size
        while True:
            batch = []
            for t in range(at, at + self.batch_size):
                if t // self.length != epoch:
                    epoch = t // self.length
                    generator = torch.Generator().manual_seed(derive_seed(self.seed, 0, epoch))
                    order = torch.randperm(self.length, generator=generator)
                batch.append((int(order[t % self.length]), derive_seed(self.seed, 1, t)))
            yield batch
            at += self.batch_size * self.processes


def _own_session(worker: int) -> None:
    # signals to the process group, such as Ctrl-C, are for the main process, which still needs data
    if hasattr(os, "setsid"):
        os.setsid()


def make_loader(
    data: TrainingData, stream: Stream, num_workers: int = 0, start_method: str = "spawn"
) -> DataLoader[dict[str, Any]]:
    """A DataLoader over the stream. Small data sets held in memory are read without workers."""
    if getattr(data.data, "in_memory", False):
        num_workers = 0
    return DataLoader(
        data,
        batch_sampler=stream,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        multiprocessing_context=start_method if num_workers else None,
        worker_init_fn=_own_session,
        pin_memory=torch.cuda.is_available(),
    )


def checked(
    batches: Iterable[dict[str, Any]], report: Callable[[dict[str, Any]], object]
) -> Iterator[dict[str, Any]]:
    """The batches, each first shown to `report`, which tells of corrupt images."""
    try:
        for batch in batches:
            report(batch)
            yield batch
    except (ValueError, OSError) as error:
        # a worker's error has its traceback as text; what it says comes last
        said = re.findall(r"^[\w.]+Error: (.*)", str(error), re.MULTILINE)
        if said and str(error).startswith("Caught "):
            raise type(error)(said[-1]) from error
        raise


def make_training_data(
    config: Mapping[str, Any], folder: Any = ".", strict: bool = False
) -> TrainingData:
    """The training data of a config; `folder` holds a custom data set's file."""
    from .datasets import make_dataset

    model, section = config["model"], config["dataset"]
    h, w = model["input_size"]
    transform = ImageTransform((h, w), model["input_channels"], model["augment_prob"])
    data = make_dataset(section, transform, folder)
    return TrainingData(
        data, section["num_classes"], section["image_key"], section["class_key"], strict
    )
