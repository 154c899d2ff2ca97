"""From the image of a data set to what a model is trained on."""

from collections.abc import Callable, Sequence

import torch
from PIL import Image, ImageOps

from ..augmentation import KarrasAugmentationPipeline
from ..common.images import PIL_MODES, convert_mode, upright


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
        h, w = self.size
        image = convert_mode(upright(image), self.mode, self.background)
        if image.size != (w, h):
            image = ImageOps.fit(image, (w, h), Image.Resampling.BICUBIC)
        return self.augment(image)


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
