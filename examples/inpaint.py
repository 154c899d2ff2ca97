#!/usr/bin/env python3
"""Paint a part of an image anew: here, the half that a mask shows in white.

    python examples/inpaint.py digits_00000600.pth image.png mask.png [--class 3]

`sample.py --init-image --mask` does the same; this is what to start from for masks, images or
guidance of your own. docs/editing.md tells how it works.
"""

import argparse

import torch

import k_diffusion as K
from k_diffusion.common.images import image_grid

p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
p.add_argument("model", help="a checkpoint, a folder or a repository of the Hugging Face hub")
p.add_argument("image", help="scaled and cropped to the size of the model's")
p.add_argument("mask", help="black and white, of that size; white is painted")
p.add_argument("--class", dest="label", type=int, default=0)
p.add_argument("--correction", type=float, default=0.5, help="0 needs no gradient, and is faster")
p.add_argument("-n", type=int, default=16)
p.add_argument("--steps", type=int, default=50)
p.add_argument("--output", default="painted.png")
args = p.parse_args()
device = "cuda" if torch.cuda.is_available() else "cpu"

model = K.load(args.model, device=device)
picture = K.editing.read_image(args.image, model.image_shape).to(device)
white = K.editing.read_mask(args.mask, model.image_shape[1:]).to(device)
image = K.conditions.as_told(picture, model.autoencoder)  # its latents, where the model has such
mask = K.editing.latent_mask(white, model.autoencoder)
sigma_data = model.config["model"]["sigma_data"]
painter = K.guidance.InpaintingDenoiser(model, image, mask, args.correction, sigma_data)

torch.manual_seed(0)
sigmas = K.sampling.get_sigmas_karras(args.steps, model.sigma_min, model.sigma_max, device=device)
noise = torch.randn(args.n, *model.shape, device=device)
x = image * ~mask + noise * sigmas[0]  # the image noised where it is known, noise where not
label = torch.full((args.n,), args.label, device=device)
cond = {"class_cond": label} if model.num_classes else {}
x = K.sampling.sample_dpmpp_2m(painter, x, sigmas, extra_args=cond)
images = K.editing.paste(model.decode(x), picture, white)
image_grid(torch.cat([picture, images])).save(args.output)
print(f"wrote {args.output}: the image, then {args.n} ways to paint the mask")
