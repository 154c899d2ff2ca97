"""sample.py's flags for editing an image, and what they do to sampling."""

import argparse
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import guidance, sampling
from ..common import options
from ..conditions import Given, as_told
from ..encoders.autoencoder import find_autoencoder
from ..generation import editing


class Edit(NamedTuple):
    """How to sample an edit: arguments of `generation.generate`, and what becomes of its images.

    denoiser: with inpainting where there is a mask. sigmas: (steps + 1,). options: of generate.
    finish: from (n, c, h, w) to the same, once they are decoded.
    """

    denoiser: nn.Module
    sigmas: Tensor
    options: dict[str, Any]
    finish: Callable[[Tensor], Tensor]


@options.of
def share(text: str) -> float:
    """An argparse type: a number above 0 and at most 1."""
    value = options.positive_number(text)
    if value > 1:
        raise ValueError(f"must be at most 1, got {text!r}")
    return value


def add_arguments(p: argparse.ArgumentParser) -> None:
    """Adds the flags of editing."""
    file: dict[str, Any] = {"type": options.path, "metavar": "FILE"}
    count: dict[str, Any] = {"type": options.positive, "metavar": "N"}
    add = p.add_argument_group("editing an image").add_argument
    add("--init-image", **file, help="start from this image instead of noise alone")
    text = "share of the steps, from which on it is sampled (default: 0.6, with --mask 1)"
    add("--strength", type=share, metavar="S", help=text)
    add("--mask", **file, help="inpainting: a black and white picture, white where to paint")
    text = "strength of the gradient by which the painted part follows the known one; 1 is a start"
    add(
        "--inpaint-correction",
        type=options.non_negative_number,
        default=0.0,
        metavar="X",
        help=text,
    )
    text = "how often to take each --jump steps of inpainting, for parts that fit better"
    add("--resample", default=1, **count, help=text)
    add("--jump", **count, help="steps between two returns of --resample (default: 10)")
    text = "start from the image's own noise, found by the sampler backwards; prints the error"
    add("--invert", action="store_true", help=text)
    text = "class of the image for --invert; else the first that is sampled"
    add("--init-class", type=options.non_negative, metavar="ID", help=text)


def check(args: argparse.Namespace) -> None:
    """Raises UsageError where the flags of editing don't go together."""
    given = {
        "--strength": args.strength is not None,
        "--mask": args.mask,
        "--invert": args.invert,
    }
    for flag, there in given.items():
        if there and not args.init_image:
            raise options.UsageError(f"{flag} needs an --init-image FILE")
    for flag, there in (
        ("--inpaint-correction", args.inpaint_correction),
        ("--resample", args.resample > 1),
        ("--jump", args.jump),
    ):
        if there and not args.mask:
            raise options.UsageError(f"{flag} needs a --mask FILE")
    if args.jump and args.resample == 1:
        raise options.UsageError("--jump needs a --resample N of 2 or more")
    if args.init_class is not None and not args.invert:
        raise options.UsageError("--init-class needs --invert")
    if args.invert and args.mask:
        raise options.UsageError("--invert keeps the whole image: leave out --mask")
    if args.invert and (sampling.get_sampler(args.sampler).stochastic or args.eta or args.churn):
        raise options.UsageError("--invert needs a sampler without noise, such as dpmpp_2m or heun")


def prepare(
    args: argparse.Namespace,
    denoiser: nn.Module,
    config: dict[str, Any],
    shape: tuple[int, ...],
    sigmas: Tensor,
    classes: list[int] | None,
    device: torch.device,
    say: Callable[[str], object],
    given: Given | None = None,
) -> Edit:
    """What the flags ask for, with the files read and checked; without any, nothing is changed.

    denoiser: of `config`, with its guidance. shape: (c, h, w) of the images. sigmas: (steps + 1,).
    classes: ids that are sampled. say: is told what the user is to know. given: further conditions.
    Raises OSError or ValueError for files that can't be used.
    """
    if getattr(args, "init_image", None) is None:
        return Edit(denoiser, sigmas, {}, lambda x: x)
    autoencoder = find_autoencoder(denoiser)
    pixels = shape if autoencoder is None else autoencoder.image_shape(shape)
    picture = editing.read_image(args.init_image, pixels, say).to(device)
    image = as_told(picture, autoencoder)
    default = 1.0 if args.mask or args.invert else 0.6
    sigmas = editing.partial_schedule(sigmas, args.strength or default)
    if args.invert:
        noise = _invert(args, denoiser, config, image, sigmas, classes, say, given)
        return Edit(denoiser, sigmas, {"noise": noise}, lambda x: x)
    if not args.mask:
        return Edit(denoiser, sigmas, {"start": image}, lambda x: x)
    white = editing.read_mask(args.mask, pixels[1:]).to(device)
    mask = editing.latent_mask(white, autoencoder)
    data = config["model"]["sigma_data"]
    painted = guidance.InpaintingDenoiser(denoiser, image, mask, args.inpaint_correction, data)
    # the whole schedule starts from noise alone within the mask
    start = image if (args.strength or 1) < 1 else image.masked_fill(mask, 0)
    again = {"resample": args.resample} | ({"jump": args.jump} if args.jump else {})
    finish = partial(editing.paste, image=picture, mask=white)
    return Edit(painted, sigmas, {"start": start, **again}, finish)


def _invert(
    args: argparse.Namespace,
    denoiser: nn.Module,
    config: dict[str, Any],
    image: Tensor,
    sigmas: Tensor,
    classes: list[int] | None,
    say: Callable[[str], object],
    given: Given | None,
) -> Tensor:
    """The image's noise in units of sigmas[0], (1, c, h, w); tells how well it comes back."""
    num_classes = config["dataset"]["num_classes"]
    of = classes[0] if args.init_class is None and classes else args.init_class
    if of is not None and not 0 <= of < (num_classes or 0):
        has = f"0 to {num_classes - 1}" if num_classes else "none"
        raise ValueError(f"--init-class {of} is out of range; classes are {has}")
    cond = {} if of is None else {"class_cond": torch.tensor([of], device=image.device)}
    if given is not None:
        cond |= given([0])
    run: dict[str, Any] = {"sampler": args.sampler, "extra_args": cond, "disable": True}
    with torch.no_grad():
        noise = editing.invert(denoiser, image, sigmas, **run)
        back = sampling.sample(denoiser, noise, sigmas, **run)
    error = (back - image).square().mean().sqrt()
    say(
        f"reconstruction: root mean square error {error:.4f} of "
        + (
            f"values in [-1, 1] (PSNR {20 * math.log10(2 / max(float(error), 1e-9)):.1f} dB)"
            if find_autoencoder(denoiser) is None
            else f"latents of standard deviation {config['model']['sigma_data']:g}"
        )
    )
    return noise / float(sigmas[0])
