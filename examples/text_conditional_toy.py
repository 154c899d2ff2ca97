#!/usr/bin/env python3
"""Train a model on captions from scratch: "red left" is a picture whose left half is red.

    python examples/text_conditional_toy.py [--steps 400] "red left" "blue top"

The words' vectors are learned with the model, which sees them through cross-attention. A model of
real texts takes those of a frozen text encoder: docs/conditioning.md.
"""

import argparse

import torch

import k_diffusion as K
from k_diffusion.common.images import image_grid
from k_diffusion.models import image_transformer_v2 as v2

WORDS = ["red", "green", "blue", "left", "right", "top", "bottom"]
PARTS = [(..., slice(4)), (..., slice(4, 8)), slice(4), slice(4, 8)]

p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
p.add_argument("prompts", nargs="*", default=["red left", "green right", "blue top", "red bottom"])
p.add_argument("--steps", type=int, default=400)
args = p.parse_args()


def draw(captions: torch.Tensor) -> torch.Tensor:
    """The pictures (n, 3, 8, 8) in [-1, 1] of captions (n, 2), numbers of their words."""
    images = torch.full((len(captions), 3, 8, 8), -1.0)
    for image, (colour, half) in zip(images, captions.tolist()):
        image[colour][PARTS[half - 3]] = 1
    return images


torch.manual_seed(0)
level = v2.LevelSpec(2, 64, 128, v2.GlobalAttentionSpec(32), 0.0, cross_attn=True)
mapping = v2.MappingSpec(1, 64, 128, 0.0)
model = v2.ImageTransformerDenoiserModelV2([level], mapping, 3, 3, (2, 2), cross_cond_dim=16)
denoiser, words = K.Denoiser(model, sigma_data=0.8), torch.nn.Embedding(len(WORDS), 16)
opt = torch.optim.AdamW([*denoiser.parameters(), *words.parameters()], lr=2e-3)
for _ in range(args.steps):
    captions = torch.stack([torch.randint(3, (64,)), torch.randint(3, 7, (64,))], dim=1)
    absent = (torch.rand(64, 1) < 0.1).expand(-1, 2)  # at times no caption, for guidance
    cond = {"cross_cond": words(captions), "cross_cond_padding": absent}
    sigma, images = (torch.randn(64) * 1.2 - 0.5).exp(), draw(captions)
    loss = denoiser.loss(images, torch.randn_like(images), sigma, **cond).mean()
    opt.zero_grad()
    loss.backward()
    opt.step()

captions = torch.tensor([[WORDS.index(word) for word in text.split()] for text in args.prompts])
cond = {"cross_cond": words(captions).detach(), "cross_cond_padding": torch.zeros_like(captions)}
null = {name: torch.ones_like(x[:1]) for name, x in cond.items()}  # nothing but padding
guided = K.guidance.CFGDenoiser(denoiser.eval(), 1.5, **null)
sigmas = K.sampling.get_sigmas_karras(20, 0.01, 40.0)
x = torch.randn(len(captions), 3, 8, 8) * sigmas[0]
images = K.sampling.sample_dpmpp_2m(guided, x, sigmas, extra_args=cond)
image_grid(images).save("toy.png")
print(f"wrote toy.png; mean error {(images - draw(captions)).abs().mean():.3f}")
