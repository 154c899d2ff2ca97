"""Time per image beside a pipeline of diffusers, with the same random model on the same steps.

DDIM without noise is Euler's method, so `DDIMPipeline` and `sample_euler` through
`make_diffusers_denoiser` evaluate one model at the same times, and their images agree; the script
says how well. Both begin with noise of a seed and end with PIL images. Measured in turn, eager, or
compiled, in one run; sizes below 1 of ours by theirs are what one gains.

    python benchmarks/pipeline.py [--device cpu] [--size 32] [--steps 50] [--compile] [--idle]
"""

import k_diffusion.common.cpu  # before torch, which loads OpenMP

# isort: split
import argparse
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from harness import bench
from PIL import Image

import k_diffusion as K
from k_diffusion.common.images import to_pil_image
from k_diffusion.common.text import need

Images = list[Image.Image]


def make_unet(size: int, channels: int) -> torch.nn.Module:
    """A U-Net of two levels with random weights, for images of 3 channels."""
    diffusers = need("diffusers", "this benchmark", "diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=size,
        block_out_channels=(channels, 2 * channels),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=8,
    )
    return unet.eval().requires_grad_(False)


def idle(sample: torch.Tensor, timestep: Any, return_dict: bool = True, **_: Any) -> Any:
    """In place of a U-Net's forward, to see what is beside it. sample: (n, c, h, w)."""
    noise = sample * 0.1
    return SimpleNamespace(sample=noise) if return_dict else (noise,)


class Both:
    """The two ways to one batch of images."""

    def __init__(self, unet: torch.nn.Module, size: int, batch: int, steps: int, device: str):
        diffusers = need("diffusers", "this benchmark", "diffusers")
        scheduler = diffusers.DDIMScheduler(timestep_spacing="trailing", clip_sample=False)
        self.pipe = diffusers.DDIMPipeline(unet, scheduler).to(device)
        self.pipe.set_progress_bar_config(disable=True)
        self.denoiser = K.external.make_diffusers_denoiser(unet, scheduler)
        scheduler.set_timesteps(steps)
        times = scheduler.timesteps.to(device)
        sigmas = self.denoiser.t_to_sigma(times.float())
        self.sigmas = torch.cat([sigmas, sigmas.new_zeros(1)])
        self.shape, self.steps, self.device = (batch, 3, size, size), steps, device

    def pipeline(self) -> Images:
        generator = torch.Generator(self.device).manual_seed(1)
        return self.pipe(self.shape[0], generator, num_inference_steps=self.steps).images

    @torch.no_grad()
    def ours(self) -> Images:
        generator = torch.Generator(self.device).manual_seed(1)
        x = torch.randn(self.shape, generator=generator, device=self.device)
        x = x * (1 + self.sigmas[0] ** 2).sqrt()
        images = K.sampling.sample_ddim(self.denoiser, x, self.sigmas, disable=True)
        return [to_pil_image(image) for image in images]

    def difference(self) -> int:
        """The largest difference of a pixel of 8 bits."""
        a, b = (np.stack([np.asarray(i, int) for i in run()]) for run in (self.pipeline, self.ours))
        return int(abs(a - b).max())


def main() -> None:
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    p.add_argument("--device", default="cpu")
    p.add_argument("--size", type=int, default=32, help="of the images, in pixels (default: 32)")
    p.add_argument("--channels", type=int, default=32, help="of the first level (default: 32)")
    p.add_argument("--batch", type=int, default=4, help="images at a time (default: 4)")
    p.add_argument("--steps", type=int, default=50, help="(default: 50)")
    p.add_argument("--compile", action="store_true", help="the U-Net, for both")
    p.add_argument("--idle", action="store_true", help="a U-Net that computes nothing")
    args = p.parse_args()
    unet = make_unet(args.size, args.channels).to(args.device)
    if args.idle:
        unet.forward = idle
    if args.compile:
        K.models.compile_model(unet)
    both = Both(unet, args.size, args.batch, args.steps, args.device)
    apart = both.difference()
    runs: dict[str, bench.Run] = {"diffusers": both.pipeline, "k-diffusion": both.ours}
    times = bench.in_turn(runs, torch.device(args.device), budget=20.0)
    for name, seconds in times.items():
        print(f"{name:<12} {seconds / args.batch * 1000:8.2f} ms an image")
    print(f"ratio        {times['k-diffusion'] / times['diffusers']:8.3f}")
    print(f"pixels of 8 bits are at most {apart} apart")


if __name__ == "__main__":
    main()
