"""A data set as training sees it: items drawn by (index, seed)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from ..common import memory
from ..common.images import CorruptImageError
from .captions import PairedImages, caption_of
from .datasets import make_dataset
from .latents import LatentTransform
from .transforms import ImageTransform

_MAX_CORRUPT_IN_A_ROW = 1000


class TrainingData(Dataset[dict[str, Any]]):
    """A data set whose items are drawn by (index, seed) and come as dicts.

    Of an item: `image`, `original`, `aug_cond`, `index`, `seed`, with classes also `class`, and
    `skipped`, the paths of corrupt images that the next image stood in for (an error with
    strict=True). With a caption_key also `caption`, and with paired images `paired_image` and
    `paired_original`.
    """

    def __init__(
        self,
        data: Dataset[Any],
        num_classes: int = 0,
        image_key: int | str = 0,
        class_key: int | str = 1,
        strict: bool = False,
        caption_key: int | str | None = None,
        paired: PairedImages | None = None,
    ):
        self.data = data
        self.caption_key, self.paired = caption_key, paired
        self.num_classes = num_classes
        self.image_key, self.class_key = image_key, class_key
        self.strict = strict

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]

    def describe(self) -> str:
        """What the data set has to say of itself beyond its size, such as images by class."""
        return self.data.describe() if hasattr(self.data, "describe") else ""

    def __getitems__(self, draws: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
        with torch.random.fork_rng(devices=[]):
            return [self._draw(*draw) for draw in draws]

    def __getitem__(self, draw: tuple[int, int]) -> dict[str, Any]:
        return self.__getitems__([draw])[0]

    def _draw(self, index: int, seed: int) -> dict[str, Any]:
        skipped: list[str] = []
        while True:
            torch.default_generator.manual_seed(seed)
            try:
                item = self.data[index]
                image, original, aug_cond = self._image_of(item, index)
                paired = self._paired(index, seed)
                break
            except CorruptImageError as error:
                if self.strict or len(skipped) == min(len(self), _MAX_CORRUPT_IN_A_ROW) - 1:
                    raise
                skipped.append(str(error.filename or f"item {index} ({error})"))
                index = (index + 1) % len(self)
        out = {"image": image, "original": original, "aug_cond": aug_cond, "index": index}
        out["seed"] = seed
        if self.num_classes:
            out["class"] = self._class_of(item, index)
        if self.caption_key is not None:
            out["caption"] = caption_of(self.data, item, index, self.caption_key)
        return {**out, **paired, "skipped": "\n".join(skipped)}

    def _image_of(self, item: Any, index: int) -> Any:
        try:
            image, original, aug_cond = item[self.image_key]
            made = {getattr(x, "dtype", None) for x in (image, original, aug_cond)}
        except (KeyError, IndexError, TypeError, ValueError):
            made = set()
        if made != {torch.float32}:
            raise ValueError(
                f"item {index} of the data set has no image that `transform` was applied to at "
                f"{self.image_key!r} (dataset.image_key)"
            )
        if not torch.isfinite(image).all():
            error = CorruptImageError(f"item {index} of the data set is NaN or infinite somewhere")
            error.filename = f"item {index}, which is NaN or infinite somewhere"
            raise error
        return image, original, aug_cond

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
    memory.check(20 * c * h * w, f"an image of {h} x {w}", "make model.input_size smaller")

    def transform(channels: int) -> ImageTransform:
        return ImageTransform((h, w), channels, model["augment_prob"], section["background"])

    own: Any
    if section["type"] == "latents":
        known = config["autoencoder"]
        own = LatentTransform(known["mean"], known["std"], model["sigma_data"], c)
    else:
        own = transform(c)
    data = make_dataset(section, own, folder)
    num_classes = section["num_classes"]
    if num_classes is None:
        found: Any = data
        num_classes = found.num_classes if hasattr(data, "num_classes") else len(found.counts)
    keys = section["image_key"], section["class_key"]
    more: dict[str, Any] = {}
    if config.get("text"):
        more["caption_key"] = section["caption_key"]
    condition = config.get("image_condition") or {}
    if condition.get("type") == "paired":
        of = transform(condition["channels"])
        more["paired"] = PairedImages(data, condition["location"], of)
    made = TrainingData(data, num_classes, *keys, strict, **more)
    made[0, 0]  # a data set that gives something else is known before anything is written
    return made
