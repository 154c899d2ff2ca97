"""Inpainting: a part of the image is known, the rest is sampled to go with it."""

from typing import Any

import torch
from torch import Tensor, nn

from ..common import numbers
from ..common.tensors import widen
from .by_loss import GradientGuidedDenoiser
from .combine import Ask, Guidance, check_scale


class InpaintingDenoiser(Guidance):
    """Inpainting: the estimate is the given image outside of a mask, the model's within.

    The replacement of RePaint (arXiv:2201.09865, equation 8), made in the estimate: where that is
    constant, a sampler leads x along image + sigma noise, so that the model always sees the known
    part noised as the rest is. Start from image + sigmas[0] noise outside of the mask.

    image: (1, ...) or (n, ...). mask: 1 or True where to paint; (h, w), or as many dimensions as
    the image with 1 for what it is the same in, as (1, 1, h, w). correction: also moves the model's
    estimate within the mask by the gradient of its error outside (manifold-constrained gradients,
    arXiv:2206.00941), weighted by the variance of an estimate, sigma^2 sigma_data^2 / (sigma^2 +
    sigma_data^2), as in pseudoinverse guidance; 1 is exact for independent Gaussian pixels, 0 needs
    no gradient. sigma_data: the standard deviation of the data, for the correction.

    Raises ValueError for a mask of another size, or one that isn't binary, and for a correction
    with a sigma_data that isn't positive.
    """

    parts = ("guided",)
    image: Tensor
    mask: Tensor

    def __init__(
        self,
        model: nn.Module,
        image: Tensor,
        mask: Tensor,
        correction: float = 0.0,
        sigma_data: float = 1.0,
    ):
        super().__init__()
        self.register_buffer("image", image, persistent=False)
        self.register_buffer("mask", check_mask(mask, image), persistent=False)
        self.guided: nn.Module = model
        if check_scale(correction, "correction"):
            numbers.positive(sigma_data=sigma_data)

            def scale(sigma: Tensor) -> Tensor:
                variance = widen(sigma) ** 2
                return correction * (variance + sigma_data**2) / (variance * sigma_data**2)

            self.guided = GradientGuidedDenoiser(model, self.error, scale)

    def error(self, denoised: Tensor) -> Tensor:
        """Half of the squared error outside of the mask, (n,). denoised: (n, ...)."""
        difference = widen(denoised) - widen(self.image)
        return difference.masked_fill(self.mask, 0).square().flatten(1).sum(1) / 2

    def estimates(self, ask: Ask, x: Tensor, sigma: Tensor, **cond: Any) -> tuple[Tensor, ...]:
        """Those of the model, with the image outside of the mask. x: (n, ...), sigma: (n,)."""
        return tuple(map(self.keep, ask(self.guided, x, sigma, **cond)))

    def keep(self, x: Tensor) -> Tensor:
        """x within the mask and the image outside of it, to the bit. x: (n, ...)."""
        return paste(x, self.image, self.mask)


def paste(images: Tensor, image: Tensor, mask: Tensor) -> Tensor:
    """Images where a mask is True, and elsewhere another one to the bit, (n, c, h, w).

    images: (n, c, h, w). image: (1, c, h, w), the original. mask: (1, 1, h, w).
    """
    return torch.where(mask, images, image.to(images.dtype))


def check_mask(mask: Tensor, image: Tensor) -> Tensor:
    """A mask as booleans, of the image's number of dimensions.

    mask: (h, w) or (1, 1, h, w). image: (n, c, h, w). Raises ValueError for other sizes, and for
    values other than 0 and 1.
    """
    got, want = tuple(mask.shape[-2:]), tuple(image.shape[-2:])
    if got != want:
        raise ValueError(
            f"a mask must be as large as the image, {want}, got {got}; resize it without smoothing"
        )
    if not ((mask == 0) | (mask == 1)).all():
        raise ValueError(
            f"a mask must be binary, 1 where to paint and 0 where to keep, got values from "
            f"{float(mask.min()):g} to {float(mask.max()):g}; threshold it"
        )
    mask = mask.to(image.device, torch.bool)[(None,) * (image.ndim - mask.ndim)]
    # one image may have many masks, but its channels can't
    sizes = enumerate(zip(mask.shape, image.shape))
    if mask.ndim > image.ndim or any(m not in (1, i) and (i != 1 or at) for at, (m, i) in sizes):
        raise ValueError(
            f"a mask of shape {tuple(mask.shape)} fits no image of shape {tuple(image.shape)}; "
            "pass (h, w)"
        )
    return mask
