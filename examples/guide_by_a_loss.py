#!/usr/bin/env python3
"""Sample a trained model towards a loss of your own: here, images whose left half is dark.

    python examples/guide_by_a_loss.py digits_00000600.pth [--scale 20]

Any differentiable function of the clean image will do: the distance to a sketch, a classifier's
log-probability, a text's by CLIP (sample_clip_guided.py).
"""

import argparse

import torch

import k_diffusion as K
from k_diffusion.common.images import image_grid

p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
p.add_argument("checkpoint", help="a training (.pth) or inference (.safetensors) checkpoint")
p.add_argument("--scale", type=float, default=20.0, help="strength of the guidance; 0 for none")
p.add_argument("-n", type=int, default=16)
p.add_argument("--steps", type=int, default=50)
p.add_argument("--output", default="guided.png")
args = p.parse_args()
device = "cuda" if torch.cuda.is_available() else "cpu"


def loss(images: torch.Tensor) -> torch.Tensor:
    """images: (n, c, h, w) in [-1, 1], the model's estimates of the clean ones. Returns (n,)."""
    left = images[..., : images.shape[-1] // 2]
    return (left + 1).square().mean(dim=(1, 2, 3))  # -1 is black


model = K.load(args.checkpoint, device=device)
guided = K.guidance.GradientGuidedDenoiser(model, lambda x: loss(model.decode(x)), args.scale)

torch.manual_seed(0)
sigmas = K.sampling.get_sigmas_karras(args.steps, model.sigma_min, model.sigma_max, device=device)
x = torch.randn(args.n, *model.shape, device=device) * sigmas[0]
label = torch.arange(args.n, device=device) % (model.num_classes or 1)
cond = {"class_cond": label} if model.num_classes else {}
images = model.decode(K.sampling.sample_dpmpp_2m(guided, x, sigmas, extra_args=cond))
image_grid(images).save(args.output)
print(f"mean loss {loss(images.clamp(-1, 1)).mean():.4f}; wrote {args.output}")
