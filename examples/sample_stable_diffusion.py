#!/usr/bin/env python3
"""Sample Stable Diffusion's weights with any sampler, schedule and guidance of this library.

    python examples/sample_stable_diffusion.py FOLDER "a lighthouse at night" [--scale 5]

FOLDER, or a repository of the Hugging Face hub, has a Stable Diffusion 1 or 2 in the format of
diffusers (pip install diffusers transformers).
"""

import argparse

import torch
from diffusers import StableDiffusionPipeline

import k_diffusion as K
from k_diffusion.common.images import image_grid

p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
p.add_argument("model")
p.add_argument("prompt")
p.add_argument("--negative", default="", help="prompt to guide away from")
p.add_argument("--scale", type=float, default=5.0, help="of classifier-free guidance")
p.add_argument("-n", type=int, default=4)
p.add_argument("--steps", type=int, default=25)
p.add_argument("--seed", type=int, default=0)
p.add_argument("--output", default="samples.png")
args = p.parse_args()
device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)

pipe = StableDiffusionPipeline.from_pretrained(
    args.model, torch_dtype=dtype, safety_checker=None, requires_safety_checker=False
).to(device)


def embed(text: str) -> torch.Tensor:
    """The text encoder's states, (1, 77, width)."""
    options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    tokens = pipe.tokenizer(text, max_length=pipe.tokenizer.model_max_length, **options)
    return pipe.text_encoder(tokens.input_ids.to(device))[0]


with torch.no_grad():
    denoiser = K.external.make_diffusers_denoiser(pipe.unet, pipe.scheduler)
    negative = embed(args.negative)
    guided = K.guidance.CFGDenoiser(denoiser, args.scale, encoder_hidden_states=negative)
    sigmas = K.sampling.get_sigmas_karras(args.steps, denoiser.sigma_min, denoiser.sigma_max)
    seeds, size = range(args.seed, args.seed + args.n), pipe.unet.config.sample_size
    x = K.sampling.randn_per_seed(seeds, (4, size, size), device=device) * sigmas[0].item()
    cond = {"encoder_hidden_states": embed(args.prompt).repeat(args.n, 1, 1)}
    latents = K.sampling.sample(guided, x, sigmas, "dpmpp_2m", seeds, extra_args=cond)
    images = pipe.vae.decode(latents.to(dtype) / pipe.vae.config.scaling_factor).sample
image_grid(images.float()).save(args.output)
print(f"wrote {args.output}")
