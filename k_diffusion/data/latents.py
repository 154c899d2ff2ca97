"""Latents as a data set: each item is drawn from its moments when it is loaded."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..augmentation import COND_DIM
from ..common.files import PathLike
from ..encoders.autoencoder import Autoencoder, Statistic, draw, statistic
from ..noise import randn_per_seed
from .latent_sources import open_latents

_STREAM = 7  # of an item's seed: the noise of its latents


class LatentStatistics:
    """Mean and standard deviation of latents drawn from moments, exact over the draws."""

    def __init__(self) -> None:
        self.n = 0
        self.total: Any = 0.0
        self.squares: Any = 0.0

    def update(self, moments: Tensor) -> "LatentStatistics":
        """Take in moments (n, 2 c, h, w)."""
        mean, std = moments.detach().cpu().double().chunk(2, 1)
        self.n += len(mean)
        self.total = self.total + mean.sum(0)
        self.squares = self.squares + (mean**2 + std**2).sum(0)
        return self

    def result(self, per_element: bool = False) -> dict[str, Any]:
        """`mean` and `std`, lists: of the channels, or (c, h, w) `per_element`; and `images`."""
        mean, squares = self.total / self.n, self.squares / self.n
        if not per_element:
            mean, squares = mean.mean((1, 2)), squares.mean((1, 2))
        std = (squares - mean**2).clamp(min=0).sqrt()
        return {"mean": mean.tolist(), "std": std.tolist(), "images": self.n}


class LatentTransform:
    """Moments to latents of mean 0 and standard deviation sigma_data, as a data set's transform.

    mean, std: of the raw latents, (c,) or (c, h, w).
    """

    works = True  # noise of its own for each item

    def __init__(self, mean: Statistic, std: Statistic, sigma_data: float, channels: int):
        self.shift = statistic("mean", mean, channels)
        self.scale = sigma_data / statistic("std", std, channels)

    def __call__(self, moments: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(latents, latents, no augmentation). moments: (2 c, h, w). noise: (c, h, w)."""
        latents = (draw(moments, noise) - self.shift) * self.scale
        return latents, latents, torch.zeros(COND_DIM)


class Latents(Dataset[tuple[Any, ...]]):
    """Items (latents, class id), drawn from the moments by torch's seed; a caption is the third.

    flip_prob: how often those of the mirrored image. Raises ValueError where there are none.
    """

    def __init__(self, path: PathLike, transform: Any, flip_prob: float = 0.0):
        self.source, self.transform, self.flip_prob = open_latents(path), transform, flip_prob
        self.num_classes = self.source.num_classes
        self.in_memory = self.source.in_memory
        if flip_prob and not self.source.flips:
            raise ValueError(
                f"{path} has no latents of mirrored images: set dataset.flip_prob to 0, or encode "
                "with --flips"
            )

    def __len__(self) -> int:
        return len(self.source)

    def draw_flip(self) -> bool:
        """Whether an item is that of the mirrored image, by torch's generator."""
        return self.flip_prob > 0 and bool(torch.rand(()) < self.flip_prob)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        flip = self.draw_flip()
        noise = latent_noise([torch.initial_seed()], self.source.shape)[0]
        latents = self.transform(self.source.moments(index, flip), noise)
        caption = [self.source.caption(index)] if self.source.captions else []
        return latents, self.source.label(index), *caption


def latent_noise(seeds: Iterable[int], shape: Iterable[int]) -> Tensor:
    """The noise of latents (c, h, w) of the items with these seeds: (n, c, h, w)."""
    return randn_per_seed(seeds, tuple(shape), stream=_STREAM)


@torch.no_grad()
def encoded(
    batches: Iterable[dict[str, Any]], autoencoder: Autoencoder
) -> Iterator[dict[str, Any]]:
    """Batches of images as batches of latents, on the autoencoder's device.

    The same numbers as from the data set `latents`: the noise is that of the items' seeds.
    """
    device = autoencoder.shift.device
    for batch in batches:
        moments = autoencoder.encode(batch["image"].to(device, non_blocking=True)).float()
        noise = latent_noise(
            batch["seed"].tolist(), autoencoder.latent_shape(batch["image"].shape[1:])
        )
        yield {**batch, "image": autoencoder.sample(moments, noise=noise)}


def images_section(section: Mapping[str, Any]) -> Mapping[str, Any]:
    """The `dataset` section of the images that latents were made of; other sections as they are.

    Raises ValueError where nobody noted it.
    """
    if section["type"] != "latents":
        return section
    found = open_latents(section["location"]).info.get("dataset")
    if found is None:
        raise ValueError(
            f"the images of the latents at {section['location']} are not known; pass --data, a "
            "folder or a config with the data set of the images"
        )
    return found
