"""Editing images that are there: from a noised copy, within a mask, by their own noise.

    sigmas = partial_schedule(sigmas, 0.6)                         # image-to-image
    model = guidance.InpaintingDenoiser(model, image, mask)        # inpainting
    x = invert(model, image, sigmas)                               # inversion

`docs/editing.md` shows each whole. Images are tensors (n, c, h, w) in [-1, 1], or latents. What is
sampled of a latent model and decoded gets the image's own pixels outside of a mask by `paste`.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .. import sampling
from ..common.images import convert_mode, open_image
from ..common.seeds import derive_seed
from ..data.transforms import fitted
from ..encoders.autoencoder import Autoencoder
from ..guidance.inpainting import paste as paste
from ..noise import randn_per_seed
from ..solvers.context import Args, Callback, Model


def read_image(
    path: str | Path, shape: Sequence[int], say: Callable[[str], object] = print
) -> Tensor:
    """An image from a file as a model of images (c, h, w) takes it: (1, c, h, w) in [-1, 1].

    One of another size is scaled to cover h x w and cropped around its centre, which `say` is told.
    Raises OSError for a file that can't be read, ValueError for channels that pictures don't have.
    """
    return fitted(open_image(path, None), str(path), shape, say)


def read_mask(path: str | Path, size: Sequence[int]) -> Tensor:
    """A black and white picture as a mask, (1, 1, h, w), True where it is white: where to paint.

    Raises OSError for a file that can't be read, ValueError for another size than (h, w), levels
    between black and white, or transparent pixels: programs differ in whether these are painted.
    """
    h, w = size
    image = open_image(path, None)
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    if alpha and (clear := int((np.asarray(alpha) < 255).sum())):
        raise ValueError(
            f"the mask {path} must be opaque, white where to paint and black elsewhere; {clear} of "
            f"its {alpha.width * alpha.height} pixels are transparent; flatten it"
        )
    image = convert_mode(image, "L")
    if image.size != (w, h):
        raise ValueError(
            f"the mask {path} has {image.height} x {image.width} pixels, the images {h} x {w}; "
            "resize it without smoothing"
        )
    levels = np.asarray(image)
    if between := int(((levels > 0) & (levels < 255)).sum()):
        raise ValueError(
            f"the mask {path} must be black and white, white where to paint; {between} of its "
            f"{levels.size} pixels are between; threshold it"
        )
    return torch.from_numpy(levels == 255)[None, None]


def latent_mask(mask: Tensor, autoencoder: Autoencoder | None) -> Tensor:
    """A mask of pixels as that of a model's samples: a latent is painted where any pixel of it is.

    mask: (1, 1, h, w). autoencoder: of a latent model, by whose factor h and w get smaller.
    """
    return mask if autoencoder is None else F.max_pool2d(mask.float(), autoencoder.factor) > 0


def partial_schedule(sigmas: Tensor, strength: float) -> Tensor:
    """The last part of a schedule, from which image-to-image starts (SDEdit, arXiv:2108.01073).

    sigmas: (steps + 1,). strength: the share of the steps, at least one of them; 1 is all. Raises
    ValueError unless 0 < strength <= 1.
    """
    if not 0 < strength <= 1:
        raise ValueError(f"strength must be above 0 and at most 1, got {strength}")
    steps = len(sigmas) - 1
    return sigmas[steps - max(1, round(steps * strength)) :]


def invert(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    sampler: str = "heun",
    *,
    callback: Callback = None,
    extra_args: Args = None,
    disable: bool | None = None,
) -> Tensor:
    """The noise that a deterministic sampler makes images of: the ODE run backwards.

    DDIM's inversion (arXiv:2010.02502, section 4.3) with any sampler without noise. x: (n, ...),
    the images, taken to be at the least noise level above 0. sigmas: (steps + 1,), the schedule of
    sampling. Returns x at sigmas[0], (n, ...), from which the same sampler comes back to the images
    but for the error of its steps. Raises ValueError for a stochastic sampler.
    """
    if sampling.get_sampler(sampler).stochastic:
        raise ValueError(f"{sampler} adds noise, so it can't be inverted; use heun or dpmpp_2m")
    ascending = sigmas[sigmas > 0].flip(0)
    options: dict[str, Any] = {"extra_args": extra_args, "disable": disable}
    return sampling.sample(model, x, ascending, sampler, callback=callback, **options)


def sample_resampled(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    sampler: str,
    seeds: Sequence[int],
    *,
    resample: int = 10,
    jump: int = 10,
    callback: Callback = None,
    extra_args: Args = None,
    disable: bool | None = None,
    **options: Any,
) -> Tensor:
    """Sampling that goes back up and down again, with which inpainted parts fit better.

    RePaint's resampling (arXiv:2201.09865, section 4.2): each `jump` steps are taken `resample`
    times, with noise up to where they began between. x: (n, ...), at sigmas[0]. sigmas:
    (steps + 1,). seeds: n of them; image i's noise depends on its own alone. Other arguments: as of
    `sampling.sample`. Returns (n, ...) at sigmas[-1]. Raises ValueError for counts below 1.
    """
    if resample < 1 or jump < 1:
        raise ValueError(f"resample and jump must be at least 1, got {resample} and {jump}")
    options |= {"callback": callback, "extra_args": extra_args, "disable": disable}
    run = 0
    for start in range(0, len(sigmas) - 1, jump):
        part = sigmas[start : start + jump + 1]
        up = math.sqrt(float(part[0]) ** 2 - float(part[-1]) ** 2)
        for again in range(resample):
            run += 1
            fresh = [derive_seed(seed, run) for seed in seeds]  # noise of its own for each run
            if again:
                noise = randn_per_seed(fresh, x.shape[1:], dtype=x.dtype, device=x.device)
                x = x + up * noise
            x = sampling.sample(model, x, part, sampler, fresh, **options)
    return x
