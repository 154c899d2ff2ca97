"""A data set as training sees it: items drawn by (index, seed)."""

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ..common import memory
from ..common.images import CorruptImageError
from .buckets import Buckets, Size, make_buckets
from .captions import REMEDY, PairedImages, PairedLatents, caption_at, caption_of, check_captions
from .datasets import make_dataset
from .latents import Latents, LatentTransform
from .streamed import StreamedRows
from .transforms import ImageTransform, Unaugmented

# Those of a config's `dataset` section that aren't of reading it.
TRANSFORM_KEYS = ("random_crop", "horizontal_flip", "jpeg_draft")
_MAX_CORRUPT_IN_A_ROW = 1000
_READ_AT_ONCE = 100_000  # captions in files, in seconds


class TrainingData(Dataset[dict[str, Any]]):
    """A data set whose items are drawn by (index, seed) and come as dicts.

    Of an item: `image`, `original`, `aug_cond`, `index`, `seed`, with classes also `class`, and
    `skipped`, the paths of corrupt images that the next image stood in for (an error with
    strict=True). With a caption_key also `caption`, and with paired images `paired_image` and
    `paired_original`. transform: what the data set applies to its images; it augments a batch's
    together. buckets: the sizes that it gives them, where they are several.
    """

    def __init__(
        self,
        data: Dataset[Any],
        num_classes: int = 0,
        image_key: int | str = 0,
        class_key: int | str = 1,
        strict: bool = False,
        caption_key: int | str | None = None,
        caption_remedy: str = REMEDY,
        paired: PairedImages | PairedLatents | None = None,
        transform: ImageTransform | None = None,
        buckets: Buckets | None = None,
    ):
        self.data, self.transform, self.buckets = data, transform, buckets
        self.caption_key, self.caption_remedy = caption_key, caption_remedy
        self.paired = paired
        self.num_classes = num_classes
        self.image_key, self.class_key = image_key, class_key
        self.strict = strict

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]

    def of_size(self, size: Size) -> "TrainingData":
        """The same data with its images at one size, (h, w), where they are of several."""
        if self.buckets is None:
            return self
        made = copy.copy(self)
        made.buckets = Buckets([size], np.zeros(len(self), dtype=np.uint16))
        return made

    def caption(self, index: int) -> str:
        """The caption of an item, for which no image file is read. Raises ValueError without."""
        assert self.caption_key is not None
        return caption_at(self.data, index, self.caption_key, self.caption_remedy)

    def known_captions(self) -> Iterable[str]:
        """Captions that are soon read: of latents all, of image files at most 100,000, evenly
        spaced; of other data none."""
        if isinstance(self.data, Latents):
            yield from self.data.source.texts()
        elif hasattr(self.data, "paths"):
            n = min(len(self), _READ_AT_ONCE)
            yield from (self.caption(i * len(self) // n) for i in range(n))

    def describe(self) -> str:
        """What the data set has to say of itself beyond its size, such as images by class."""
        lines = [self.data.describe()] if hasattr(self.data, "describe") else []
        if self.buckets is not None:
            lines.append(self.buckets.describe())
        return "\n".join(lines)

    def __getitems__(self, draws: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
        with torch.random.fork_rng(devices=[]):
            items = [self._draw(*draw) for draw in draws]
        later = [item for item in items if "numbers" in item]
        if later:
            assert self.transform is not None
            originals = [item["original"] for item in later]
            numbers = torch.stack([item.pop("numbers") for item in later])
            for item, image, cond in zip(
                later, *self.transform.augment.augment(originals, numbers)
            ):
                item["image"], item["aug_cond"] = image, cond
        return items

    def __getitem__(self, draw: tuple[int, int]) -> dict[str, Any]:
        return self.__getitems__([draw])[0]

    def _draw(self, index: int, seed: int) -> dict[str, Any]:
        skipped: list[str] = []
        while True:
            torch.default_generator.manual_seed(seed)
            self._choose_size(index)
            try:
                item = self.data[index]
                images = self._image_of(item, index)
                paired = self._paired(index, seed)
                break
            except CorruptImageError as error:
                if self.strict or len(skipped) == min(len(self), _MAX_CORRUPT_IN_A_ROW) - 1:
                    raise
                skipped.append(str(error.filename or f"item {index} ({error})"))
                index = self._after(index)
        out = {**images, "index": index, "seed": seed}
        if self.num_classes:
            out["class"] = self._class_of(item, index)
        if self.caption_key is not None:
            key, remedy = self.caption_key, self.caption_remedy
            out["caption"] = caption_of(self.data, item, index, key, remedy)
        return {**out, **paired, "skipped": "\n".join(skipped)}

    def _choose_size(self, index: int) -> None:
        """The size of the bucket that the image is in, for it and its partner."""
        if self.buckets is None:
            return
        size = self.buckets.size_of(index)
        if self.transform is not None:
            self.transform.size = size
        if isinstance(self.paired, PairedImages):
            self.paired.transform.size = size

    def _after(self, index: int) -> int:
        """The image that stands in for a corrupt one."""
        if self.buckets is not None:
            return self.buckets.after(index)
        streamed = getattr(self.data, "data", None)
        if isinstance(streamed, StreamedRows):
            return streamed.after(index)
        return (index + 1) % len(self)

    def _image_of(self, item: Any, index: int) -> dict[str, torch.Tensor]:
        try:
            found = item[self.image_key]
            if isinstance(found, Unaugmented):
                images = found._asdict()
            else:
                image, original, aug_cond = found
                images = {"image": image, "original": original, "aug_cond": aug_cond}
            made = {getattr(x, "dtype", None) for x in images.values()}
        except (KeyError, IndexError, TypeError, ValueError):
            made = set()
        if made != {torch.float32}:
            raise ValueError(
                f"item {index} of the data set has no image that `transform` was applied to at "
                f"{self.image_key!r} (dataset.image_key)"
            )
        # those of ImageTransform come from 8 bits
        if not isinstance(found, Unaugmented) and not torch.isfinite(images["image"]).all():
            error = CorruptImageError(f"item {index} of the data set is NaN or infinite somewhere")
            error.filename = f"item {index}, which is NaN or infinite somewhere"
            raise error
        return images

    def _paired(self, index: int, seed: int) -> dict[str, torch.Tensor]:
        """The paired image, augmented by the random numbers that augmented the image."""
        if self.paired is None:
            return {}
        torch.default_generator.manual_seed(seed)
        image, original, _ = self.paired[index]
        return {"paired_image": image, "paired_original": original}

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


def as_stored(section: Mapping[str, Any]) -> dict[str, Any]:
    """A config's `dataset` section for images to compare with: of one size, cropped centrally."""
    return {k: v for k, v in section.items() if k not in (*TRANSFORM_KEYS, "buckets")}


def of_split(section: Mapping[str, Any], split: str) -> dict[str, Any]:
    """A config's `dataset` section for a split; rows of `huggingface` are of the one it names."""
    other = section["type"] == "huggingface" and split != section["split"]
    return {**section, "split": split, **({"num_examples": None} if other else {})}


def make_training_data(
    config: Mapping[str, Any],
    folder: Any = ".",
    strict: bool = False,
    shape: Sequence[int] | None = None,
) -> TrainingData:
    """The training data of a config; `folder` holds a custom data set's file.

    shape: (c, h, w) of the images, where they aren't the model's, which is of their latents. Its
    num_classes are the config's or, where that has none, those of the subfolders or latents.
    """
    model, section = config["model"], config["dataset"]
    c, h, w = shape or (model["input_channels"], *model["input_size"])
    sizes = [(int(h), int(w)) for h, w in section.get("buckets") or ()]
    h, w = max([(h, w), *sizes], key=math.prod)
    memory.check(20 * c * h * w, f"an image of {h} x {w}", "make model.input_size smaller")

    def transform(channels: int, later: bool = False) -> ImageTransform:
        own = {key: section.get(key, False) for key in TRANSFORM_KEYS}
        probability = model["augment_prob"]
        return ImageTransform(
            (h, w), channels, probability, section["background"], **own, later=later
        )

    own: Any
    if section["type"] == "latents":
        known = config["autoencoder"]
        own = LatentTransform(known["mean"], known["std"], model["sigma_data"], c)
    else:
        # a custom data set may do something with what its transform returns
        own = transform(c, later=section["type"] != "custom")
    data = make_dataset(section, own, folder)
    num_classes = section["num_classes"]
    if num_classes is None:
        found: Any = data
        num_classes = found.num_classes if hasattr(data, "num_classes") else len(found.counts)
    keys = section["image_key"], section["class_key"]
    more: dict[str, Any] = {}
    if (text := config.get("text")) is not None:
        more["caption_key"] = section["caption_key"]
        if not text:  # captions alone are asked for, by a flag of encode_latents.py
            more["caption_remedy"] = "set dataset.caption_key, or leave out --captions"
        check_captions(data, *more.values())
    condition = config.get("image_condition") or {}
    if condition and isinstance(data, Latents):
        more["paired"] = PairedLatents(data)
    elif condition.get("type") == "paired":
        of = transform(condition["channels"])
        more["paired"] = PairedImages(data, condition["location"], of)
    made = TrainingData(data, num_classes, *keys, strict, **more, transform=own)
    if sizes:
        made.buckets = make_buckets(data, sizes)
    made[0, 0]  # a data set that gives something else is known before anything is written
    return made
