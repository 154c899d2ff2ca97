#!/usr/bin/env python3
"""Train a small transformer on a folder of images in a plain loop, then draw samples of it.

python examples/train_on_your_folder.py FOLDER [--size 32] [--steps 5000]
"""

import argparse
import copy

import torch

import k_diffusion as K
from k_diffusion.common.images import image_grid
from k_diffusion.data.stream import Stream, make_loader
from k_diffusion.data.training_data import make_training_data

p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
p.add_argument("folder")
p.add_argument("--size", type=int, default=32, help="of the images, in pixels; a multiple of 8")
p.add_argument("--steps", type=int, default=5000)
p.add_argument("--width", type=int, default=128, help="features of a token; a multiple of 64")
args = p.parse_args()
device = "cuda" if torch.cuda.is_available() else "cpu"

model_config = {
    "type": "image_transformer_v2",  # two levels: neighborhood attention, then global
    "input_channels": 3,
    "input_size": args.size,
    "patch_size": 4,
    "depths": [2, 4],
    "widths": [args.width, 2 * args.width],
    "self_attns": [{"type": "neighborhood", "kernel_size": 3}, {"type": "global"}],
    "sigma_data": 0.5,  # the standard deviation of the pixels on [-1, 1]
    "sigma_sample_density": {"type": "cosine-interpolated"},
}
data = {"type": "imagefolder", "location": args.folder}
config = K.config.load_config({"model": model_config, "dataset": data})
model = K.config.make_denoiser_wrapper(config)(K.config.make_model(config)).to(device)
averaged, decay = copy.deepcopy(model).eval(), K.utils.EMAWarmup(power=2 / 3, max_value=0.999)
density = K.config.make_sample_density(config["model"])
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, betas=(0.9, 0.99))

data = make_training_data(config)
batches = make_loader(data, Stream(len(data), batch_size=32, seed=0))
for step, batch in zip(range(args.steps), batches):
    images = batch["image"].to(device)
    sigma = density([len(images)], device=device)
    loss = model.loss(images, torch.randn_like(images), sigma).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    K.utils.ema_update(model, averaged, decay.get_value())
    decay.step()
    if step % 100 == 0:
        print(f"step {step}: loss {loss.item():.4f}", flush=True)

sigmas = K.sampling.get_sigmas_karras(50, 0.01, 80.0, device=device)
x = torch.randn(16, 3, args.size, args.size, device=device) * sigmas[0]
image_grid(K.sampling.sample_dpmpp_2m(averaged, x, sigmas)).save("samples.png")
