"""From the image of a data set to what a model is trained on."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageOps

from ..augmentation import KarrasAugmentationPipeline
from ..common.images import PIL_MODES, convert_mode, from_pil_image, upright


class Unaugmented(NamedTuple):
    """An image, (c, h, w) in [-1, 1], and the random numbers of its augmentation: (13,), (0,) for
    none."""

    original: torch.Tensor
    numbers: torch.Tensor


class ImageTransform:
    """PIL image to (augmented image, image, augmentation condition), as float tensors.

    The image is converted to the mode of its number of channels, over `background` where it is
    transparent and the mode isn't, scaled to cover size (h, w) and cropped: around its centre, or
    anywhere with random_crop. horizontal_flip mirrors every other one. Images are (c, h, w) in
    [-1, 1], the condition is (9,). later: return `Unaugmented`, for `augment.augment` to do with
    many what a call would do with each. jpeg_draft: JPEGs of files may be decoded at a half, a
    quarter or an eighth of their size, as long as that covers `size`.
    """

    def __init__(
        self,
        size: tuple[int, int],
        channels: int,
        augment_prob: float = 0.0,
        background: str = "white",
        *,
        random_crop: bool = False,
        horizontal_flip: bool = False,
        jpeg_draft: bool = False,
        later: bool = False,
    ):
        if channels not in PIL_MODES:
            raise ValueError(
                f"model.input_channels is {channels}, but images have "
                f"{', '.join(map(str, PIL_MODES))} channels"
            )
        self.size, self.mode, self.background = size, PIL_MODES[channels], background
        self.random_crop, self.horizontal_flip = random_crop, horizontal_flip
        self.jpeg_draft = jpeg_draft
        self.later = later
        self.augment = KarrasAugmentationPipeline(augment_prob, disable_all=augment_prob == 0)

    @property
    def works(self) -> bool:
        """Whether it takes more than a look at the image: by augmentation."""
        return not self.augment.disable_all

    @property
    def draft(self) -> tuple[int, int] | None:
        """The size that a decoded JPEG has to cover, where it may be smaller than it is stored."""
        return self.size if self.jpeg_draft else None

    def __call__(self, image: Image.Image) -> Any:
        image = self._fitted(image)
        if self.later:
            numbers = torch.empty(0) if self.augment.disable_all else self.augment.draw()
            return Unaugmented(from_pil_image(image), numbers)
        return self.augment(image)

    def _fitted(self, image: Image.Image) -> Image.Image:
        h, w = self.size
        image = convert_mode(upright(image), self.mode, self.background)
        # drawn for images of any size: seeds depend on it
        x, y = torch.rand(2).tolist() if self.random_crop else (0.5, 0.5)
        if image.size != (w, h):
            image = ImageOps.fit(image, (w, h), Image.Resampling.BICUBIC, centering=(x, y))
        if self.horizontal_flip and torch.rand(()) < 0.5:
            image = ImageOps.mirror(image)
        return image


def fitted(
    image: Image.Image, name: str, shape: Sequence[int], say: Callable[[str], object]
) -> torch.Tensor:
    """A picture as a model of images (c, h, w) takes it: (1, c, h, w) in [-1, 1].

    One of another size is scaled to cover h x w and cropped around its centre, which `say` is told,
    with its name. Raises ValueError for channels that pictures don't have.
    """
    c, h, w = shape
    transform = ImageTransform((h, w), c)
    if image.size != (w, h):
        say(f"{name} has {image.height} x {image.width} pixels: scaled and cropped to {h} x {w}")
    return transform(image)[1][None]
