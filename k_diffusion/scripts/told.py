"""The flags of the sampling scripts on texts and images that a model is told."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .. import conditions
from ..checkpoints.runs import folder_of
from ..common import options
from ..encoders.autoencoder import Autoencoder


def add_arguments(p: argparse.ArgumentParser) -> None:
    """Adds the flags of texts and images."""
    some: dict[str, Any] = {"nargs": "+", "default": []}
    add = p.add_argument_group("what to tell models of texts and images").add_argument
    text = "what the images show, in turn; else text.prompts of the config"
    add("--prompt", dest="prompts", type=options.text, metavar="TEXT", **some, help=text)
    text = "the text encoder, if not where the config says"
    add("--text-encoder", type=options.text, metavar="PATH", help=text)
    text = (
        "images to start from in turn: small ones for super-resolution, or others of the images' "
    )
    text += "size, of which the model's part is taken"
    add("--condition-image", type=options.path, metavar="FILE", **some, help=text)


def prepare(
    args: argparse.Namespace,
    config: dict[str, Any],
    size: Sequence[int],
    device: torch.device,
    say: Callable[[str], object],
    autoencoder: Autoencoder | None = None,
) -> conditions.Given | None:
    """The conditions that the flags name; None for a model without any.

    args: with `told_images` where the script has images to tell without --condition-image. size:
    (h, w) of the images. say: is told what the user is to know. autoencoder: of a latent model.
    Raises OSError or ValueError for what is missing, can't be used, or that the model doesn't take.
    """
    files = getattr(args, "condition_image", [])
    read = [conditions.read_image_condition(config, file, size, say, autoencoder) for file in files]
    images = torch.cat(read) if read else getattr(args, "told_images", None)
    where = getattr(args, "text_encoder", None)
    encoder = conditions.make_text_encoder(config, device, where, [folder_of(args.checkpoint), "."])
    return conditions.given(config, encoder, getattr(args, "prompts", []), images, device)
