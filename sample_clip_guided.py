#!/usr/bin/env python3
"""Sample images that CLIP finds to match a text. For several processes: accelerate launch ..."""

import k_diffusion.common.threads  # before torch, which loads OpenMP

# isort: split
import argparse

import torch
from torch import nn

import k_diffusion as K
from k_diffusion.common import options
from k_diffusion.encoders import clip
from k_diffusion.scripts import sample


def parse_args() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=options.HelpFormatter)
    p.add_argument("prompt", help="the text")
    sample.add_arguments(p, sampler="dpmpp_2s_ancestral", steps=100)
    text = "strength of the guidance by the text"
    p.add_argument("--clip-guidance-scale", "-cgs", type=float, default=500.0, help=text)
    text = f"one of {', '.join(clip.MODELS)}"
    p.add_argument("--clip-model", default="ViT-B/16", metavar="NAME", help=text)
    return p.parse_args()


@options.friendly_errors
def main() -> None:
    args = parse_args()

    def guide(denoiser: nn.Module, device: torch.device) -> nn.Module:
        encoder = clip.load_clip(args.clip_model, device)
        loss = clip.prompt_loss(encoder, args.prompt)
        return K.guidance.GradientGuidedDenoiser(denoiser, loss, args.clip_guidance_scale)

    sample.run(args, guide)


if __name__ == "__main__":
    main()
