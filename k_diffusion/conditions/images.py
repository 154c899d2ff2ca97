"""Images that a model is told: of data, of files, and as the latents of a latent model."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..common.images import open_image
from ..data.transforms import fitted
from ..encoders.autoencoder import Autoencoder

# Of the luminance of ITU-R BT.601, by which PIL makes grey images, too.
_LUMINANCE = (0.299, 0.587, 0.114)


def of_images(
    section: Mapping[str, Any], images: Tensor, autoencoder: Autoencoder | None = None
) -> dict[str, Tensor]:
    """What a config's `image_condition` makes of whole images, or of paired ones.

    images: (n, c, h, w) in [-1, 1]. autoencoder: of a latent model.
    """
    if section["type"] == "downsampled":
        small = [side // section["factor"] for side in images.shape[2:]]
        images = enlarged(resized(images, small), images.shape[2:])
    elif section["type"] == "grayscale" and images.shape[1] > 2:
        weights = images.new_tensor(_LUMINANCE)[:, None, None]
        images = (images[:, :3] * weights).sum(1, keepdim=True)
    elif section["type"] == "grayscale":
        images = images[:, :1]
    return {"unet_cond": as_told(images, autoencoder)}


def as_told(images: Tensor, autoencoder: Autoencoder | None) -> Tensor:
    """Images as a model is told or edits them: as they are, or as the means of their latents.

    images: (n, c, h, w) in [-1, 1]. autoencoder: of a latent model, in whose units latents are.
    """
    if autoencoder is None:
        return images
    moments = moments_of(images, autoencoder).float()
    return autoencoder.sample(moments, noise=torch.zeros_like(moments.chunk(2, 1)[0]))


@torch.no_grad()
def moments_of(images: Tensor, autoencoder: Autoencoder) -> Tensor:
    """The raw moments (n, 2 c', h', w') of images (n, c, h, w) that a model is told.

    One channel is repeated for an autoencoder of colours.
    """
    images = images.to(autoencoder.shift.device)
    return autoencoder.encode(images.expand(-1, autoencoder.image_channels, -1, -1))


def check_images(config: Mapping[str, Any], autoencoder: Autoencoder) -> None:
    """Raises ValueError where a latent model can't be told the images that its config names."""
    model, section = config["model"], config.get("image_condition") or {}
    c, h, w = autoencoder.image_shape((model["input_channels"], *model["input_size"]))
    factor, channels = section.get("factor", 1), section.get("channels", 1)
    if h % factor or w % factor:
        raise ValueError(
            f"image_condition.factor: {factor} must divide the sides of the images, {h} x {w}"
        )
    if channels not in {1, c}:
        raise ValueError(
            f"image_condition.channels is {channels}, but {autoencoder.name} takes images of {c}; "
            "set it to 1"
        )


def resized(images: Tensor, size: Sequence[int]) -> Tensor:
    """Images of another size, by the antialiased bicubic filter. images: (n, c, h, w)."""
    return F.interpolate(images, tuple(size), mode="bicubic", antialias=True)


def enlarged(images: Tensor, size: Sequence[int]) -> Tensor:
    """Small images in the size of the model's, bicubic between pixels. images: (n, c, h, w)."""
    return F.interpolate(images, tuple(size), mode="bicubic")


def read_image_condition(
    config: Mapping[str, Any],
    image: str | Path | Image.Image,
    size: Sequence[int],
    say: Callable[[str], object] = print,
    autoencoder: Autoencoder | None = None,
) -> Tensor:
    """A picture as the condition of images of `size`, (1, c, h, w).

    It may be whole, or for super-resolution as small as the model knows it; one of another size is
    scaled and cropped, which `say` is told. autoencoder: of a latent model. Raises OSError for a
    file that can't be read, ValueError for a model that takes no images.
    """
    section = config.get("image_condition")
    if section is None:
        raise ValueError("this model takes no images as its condition; leave them out")
    if isinstance(image, Image.Image):
        name, picture = "the image", image
    else:
        name, picture = str(image), open_image(image, None)
    paired = section["type"] == "paired"
    own = autoencoder.image_channels if autoencoder else config["model"]["input_channels"]
    channels = section["channels"] if paired else own
    factor = section["factor"] if section["type"] == "downsampled" else 1
    small = [side // factor for side in size]
    if factor > 1 and picture.size == (small[1], small[0]):
        images = enlarged(fitted(picture, name, (channels, *small), say), size)
        return as_told(images, autoencoder)
    whole = fitted(picture, name, (channels, *size), say)
    return of_images(section, whole, autoencoder)["unet_cond"]
