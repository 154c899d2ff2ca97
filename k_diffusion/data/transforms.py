"""From the image of a data set to what a model is trained on."""

from typing import NamedTuple

import torch
from PIL import Image, ImageOps

from ..augmentation import KarrasAugmentationPipeline
from ..common.images import PIL_MODES, convert_mode, from_pil_image, upright


class Unaugmented(NamedTuple):
    """An image, (c, h, w) in [-1, 1], and the random numbers of its augmentation, (13,)."""

    original: torch.Tensor
    numbers: torch.Tensor


class ImageTransform:
    """PIL image to (augmented image, image, augmentation condition), as float tensors.

    The image is converted to the mode of its number of channels, over `background` where it is
    transparent and the mode isn't, scaled to cover size (h, w) and cropped around its centre.
    Images are (c, h, w) in [-1, 1], the condition is (9,).
    """

    def __init__(
        self,
        size: tuple[int, int],
        channels: int,
        augment_prob: float = 0.0,
        background: str = "white",
    ):
        if channels not in PIL_MODES:
            raise ValueError(
                f"model.input_channels is {channels}, but images have "
                f"{', '.join(map(str, PIL_MODES))} channels"
            )
        self.size, self.mode, self.background = size, PIL_MODES[channels], background
        self.augment = KarrasAugmentationPipeline(augment_prob, disable_all=augment_prob == 0)

    def __call__(self, image: Image.Image) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.augment(self._fitted(image))

    def later(self, image: Image.Image) -> Unaugmented:
        """The image as it is, for `augment.augment` to do with many what a call does with one."""
        original = from_pil_image(self._fitted(image))
        return Unaugmented(original, self.augment.draw())

    def _fitted(self, image: Image.Image) -> Image.Image:
        h, w = self.size
        image = convert_mode(upright(image), self.mode, self.background)
        if image.size != (w, h):
            image = ImageOps.fit(image, (w, h), Image.Resampling.BICUBIC)
        return image
