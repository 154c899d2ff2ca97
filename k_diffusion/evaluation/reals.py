"""Real images to compare with, in the data set's order, and their features."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm.auto import tqdm

from ..common.images import CorruptImageError
from ..conditions import of_batch
from ..data.captions import caption_at
from ..data.datasets import FolderOfImages
from ..data.training_data import TrainingData, as_stored, make_training_data
from ..distributed import broadcast, share
from ..encoders.autoencoder import Autoencoder
from .extraction import Eye, look_at
from .references import ReferenceKey, find_statistics, keep_statistics
from .registry import FeatureSet
from .statistics import FeatureStatistics

# What a `dataset` section says beyond type and location, for a folder that has no config.
_PLAIN = {
    "image_key": 0,
    "class_key": 1,
    "caption_key": "txt",
    "background": "white",
    "split": "all",
}


def folder_section(folder: Path) -> dict[str, Any]:
    """The `dataset` section for a folder: its subfolders are classes where all images are in them.

    Raises ValueError where there is no such folder.
    """
    if not folder.is_dir():
        raise ValueError(f"no folder, config or reference file at {folder}; check the path")
    extensions = FolderOfImages.IMG_EXTENSIONS
    loose = any(path.suffix.lower() in extensions for path in folder.iterdir())
    folders = [path for path in folder.iterdir() if path.is_dir()]
    by_class = not loose and len(folders) > 1
    kind = {"type": "imagefolder-class", "num_classes": None} if by_class else None
    return {
        **_PLAIN,
        "location": str(folder.resolve()),
        **(kind or {"type": "imagefolder", "num_classes": 0}),
    }


class RealImages(Dataset[dict[str, Any]]):
    """The images of a data set in its order, unaugmented, (c, h, w) in [-1, 1].

    section: the `dataset` section of a config. size: (h, w). channels: 1 or 3. folder: where a
    custom data set's file lies. told: the sections `text` and `image_condition` of a config, for
    what goes with the images. A corrupt image is an error: another n would be another number.
    """

    def __init__(
        self,
        section: Mapping[str, Any],
        size: tuple[int, int],
        channels: int,
        folder: Any = ".",
        told: Mapping[str, Any] = {},
    ):
        section = as_stored(section)
        model = {"input_size": size, "input_channels": channels, "augment_prob": 0.0}
        config = {"model": model, "dataset": section, **told}
        self.section, self.size, self.channels = dict(section), size, channels
        self.data: TrainingData = make_training_data(config, folder, strict=True)
        self.num_classes = self.data.num_classes

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            item = self.data[index, 0]
        except CorruptImageError as error:
            raise ValueError(f"{error}; mend or remove it: all images count here") from error
        found = {"image": item["original"], "class": item.get("class", 0)}
        return found | {k: item[k] for k in ("caption", "paired_original") if k in item}

    def batches(
        self, indices: Sequence[int], batch_size: int, device: Any = "cpu", num_workers: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(images (k, c, h, w), classes (k,)) of the indices, in their order; class 0 without."""
        for batch in self.items(indices, batch_size, num_workers):
            yield batch["image"].to(device), batch["class"]

    def items(
        self, indices: Sequence[int], batch_size: int, num_workers: int = 0
    ) -> Iterator[dict[str, Any]]:
        """Batches of images with all that goes with them, by their keys."""
        if getattr(self.data.data, "in_memory", False):
            num_workers = 0
        if getattr(self.data.data, "window", None):
            num_workers = min(num_workers, 1)  # each would fetch all of a stream
        loader: DataLoader[dict[str, Any]] = DataLoader(
            torch.utils.data.Subset(self, indices),
            batch_size,
            num_workers=num_workers,
            multiprocessing_context="spawn" if num_workers else None,
        )
        yield from loader

    def spaced(self, n: int) -> list[int]:
        """n indices, evenly spaced: data sets are often sorted by class.

        Raises ValueError for more than there are.
        """
        if not 0 < n <= len(self):
            raise ValueError(f"the data set has {len(self)} images, {n} were asked for")
        return [i * len(self) // n for i in range(n)]

    def captions(self, indices: Sequence[int]) -> list[str]:
        """The captions of images. Raises ValueError where one has none."""
        key = self.section["caption_key"]
        remedy = "set dataset.caption_key, or pass --prompt"
        return [caption_at(self.data.data, i, key, remedy) for i in indices]

    def load(self, limit: int) -> tuple[Tensor, Tensor]:
        """At most `limit` images, evenly spaced, with their classes: (n, c, h, w), (n,)."""
        images, classes = zip(*self.batches(self.spaced(min(limit, len(self))), 256))
        return torch.cat(images), torch.cat(classes)

    def key(self) -> dict[str, Any]:
        """What tells these images from others: the section, files as they are, and a few images."""
        section = {k: v for k, v in self.section.items() if k != "cond_dropout_rate"}
        digest = hashlib.sha256(str(len(self)).encode())
        for index in sorted({0, len(self) // 2, len(self) - 1}):
            item = self[index]
            digest.update(item["image"].numpy().tobytes() + item.get("caption", "").encode())
        for files in self.data.data, self.data.paired:
            for path in getattr(files, "paths", ()):
                stat = path.stat()
                digest.update(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
        return {**section, "channels": self.channels, "images": digest.hexdigest()[:16]}


class ToldImages:
    """What a model of images is told of real ones, made as it is asked for, as `conditions.Images`.

    reals: with the partners of paired images. places: of the images in it. config: the model's.
    autoencoder: of a latent model.
    """

    def __init__(
        self,
        reals: RealImages,
        places: Sequence[int],
        config: Mapping[str, Any],
        autoencoder: Autoencoder | None = None,
    ):
        self.reals, self.places, self.autoencoder = reals, places, autoencoder
        # a data set of images, where latents were trained on
        self.config = {**config, "dataset": reals.section}

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, numbers: list[int], /) -> Tensor:
        items = default_collate([self.reals[self.places[i]] for i in numbers])
        items["original"] = items["image"]
        return of_batch(items, self.config, None, self.autoencoder, "original")["unet_cond"]

    @cached_property
    def digest(self) -> str:
        """What tells these images from others."""
        key = json.dumps(self.reals.key(), sort_keys=True, default=str)
        return hashlib.sha256(key.encode()).hexdigest()[:16]


def real_sets(
    accelerator: Any,
    reals: RealImages,
    eyes: Mapping[str, Eye],
    n: int,
    *,
    cache: Path | None = None,
    features: bool = True,
    batch_size: int = 64,
    num_workers: int = 0,
) -> dict[str, FeatureSet] | None:
    """n real images, evenly spaced, as each protocol sees them: on the main process, else None.

    eyes: by the protocol's name. features: (n, width), for metrics that need them; else statistics,
    which `cache`, a folder, keeps for the next time. All processes call it together.
    """
    found: dict[str, FeatureSet] = {}
    keys: dict[str, ReferenceKey] = {}
    if cache is not None and not features and accelerator.is_main_process:
        data, split = reals.key(), str(reals.section.get("split"))
        for name, eye in eyes.items():
            weights = eye.encoder.fingerprint()
            keys[name] = ReferenceKey(data, split, reals.size, name, n, weights)
            if known := find_statistics(cache, keys[name]):
                found[name] = known
    missing = broadcast([name for name in eyes if name not in found])
    if missing:
        places = reals.spaced(n)
        mine = [places[i] for i in share(accelerator, n)]
        batches = reals.batches(mine, batch_size, accelerator.device, num_workers)
        shown = tqdm(
            batches,
            desc="real images",
            unit="batch",
            leave=None,
            total=math.ceil(len(mine) / batch_size),
            disable=None if accelerator.is_main_process else True,
        )
        seen = look_at(accelerator, (x for x, _ in shown), n, {k: eyes[k] for k in missing})
        for name, x in (seen.features if seen else {}).items():
            if features:
                found[name] = x
                continue
            found[name] = statistics = FeatureStatistics(x.shape[1], name).update(x)
            if cache is not None:
                keep_statistics(cache, keys[name], statistics)
    return found if accelerator.is_main_process else None
