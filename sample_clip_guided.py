#!/usr/bin/env python3
"""Sample images that CLIP finds to match texts or images.

For several processes: accelerate launch ...
"""

import k_diffusion.common.cpu  # before torch, which loads OpenMP

# isort: split
import argparse
import math
from typing import Any

import torch
from torch import nn

import k_diffusion as K
from k_diffusion.common import options
from k_diffusion.common.images import from_pil_image, open_image
from k_diffusion.encoders import clip
from k_diffusion.encoders.autoencoder import find_autoencoder
from k_diffusion.scripts import sample


def parse_args() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=options.HelpFormatter)
    p.add_argument("prompt", nargs="?", type=options.text, help="the text")
    sample.add_arguments(p, sampler="dpmpp_2s_ancestral", steps=100)
    text = "strength of the guidance by the text"
    p.add_argument("--clip-guidance-scale", "-cgs", type=options.finite, default=500.0, help=text)
    text = f"one of {', '.join(clip.MODELS)}"
    p.add_argument(
        "--clip-model",
        type=options.of(clip.model_name),
        default="ViT-B/16",
        metavar="NAME",
        help=text,
    )
    text = "a file of its weights; else OpenAI's are downloaded"
    p.add_argument("--clip-weights", type=options.path, metavar="FILE", help=text)
    more: dict[str, Any] = {"nargs": 2, "action": "append", "default": []}
    text = "another text and its weight, that of the first being 1; a negative one pushes away"
    p.add_argument("--add-prompt", metavar=("TEXT", "WEIGHT"), **more, help=text)
    text = "an image as a prompt, and its weight"
    p.add_argument("--image-prompt", metavar=("FILE", "WEIGHT"), **more, help=text)
    flag = argparse.BooleanOptionalAction
    text = "show CLIP each estimate shifted at random, by up to 1/14 of its size"
    p.add_argument("--shifts", action=flag, default=True, help=text)
    text = "clamp the guided estimates to [-1, 1]"
    p.add_argument("--threshold", action=flag, default=True, help=text)
    return p.parse_args()


def read_prompts(args: argparse.Namespace) -> dict[str, Any]:
    """The prompts of the flags, as `clip.prompt_loss` takes them. Raises ValueError without any."""
    texts = [] if args.prompt is None else [(args.prompt, 1.0)]
    texts += [(text, weight(given)) for text, given in args.add_prompt]
    images = [(file, weight(given)) for file, given in args.image_prompt]
    if not texts and not images:
        raise ValueError("nothing to guide by: pass a text, or --image-prompt FILE WEIGHT")
    return {
        "texts": [text for text, _ in texts],
        "weights": [given for _, given in texts + images],
        "images": [from_pil_image(open_image(file)) for file, _ in images],
    }


def weight(text: str) -> float:
    """A prompt's weight. Raises ValueError for what isn't a finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"a prompt's weight must be a number, got {text!r}")
    return value


@options.friendly_errors
def main() -> None:
    args = parse_args()
    prompts = read_prompts(args)

    def guide(denoiser: nn.Module, device: torch.device) -> nn.Module:
        weights = "openai" if args.clip_weights is None else str(args.clip_weights)
        encoder = clip.load_clip(args.clip_model, device, weights)
        loss = clip.prompt_loss(encoder, **prompts, shift=1 / 14 if args.shifts else 0.0)
        scale = args.clip_guidance_scale
        autoencoder = find_autoencoder(denoiser)
        if autoencoder is not None:  # CLIP sees images, and latents have no range to stay in
            return K.guidance.GradientGuidedDenoiser(
                denoiser, lambda x: loss(autoencoder.decode(x)), scale
            )
        guided = K.guidance.GradientGuidedDenoiser(denoiser, loss, scale)
        return K.guidance.ThresholdedDenoiser(guided) if args.threshold else guided

    sample.run(args, guide)


if __name__ == "__main__":
    main()
