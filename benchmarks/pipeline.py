"""Time per image beside a pipeline of diffusers, with the same random model on the same steps.

`DDIMPipeline` and `sample_ddim` through `make_diffusers_denoiser` evaluate one model at the same
times, and their images agree; the table says how well. Both begin with noise of a seed and end with
PIL images. Measured in turn in one run: the U-Net eager, with --compile compiled, and one that
computes nothing, which leaves what is beside it.

    python benchmarks/pipeline.py [--device cpu] [--size 32] [--steps 50] [--compile] [--write]
"""

import k_diffusion.common.cpu  # before torch, which loads OpenMP

# isort: split
import argparse
from collections.abc import Sequence
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

COLUMNS: bench.Columns = {
    "network": ("U-Net", str),
    "theirs": ("the pipeline, ms an image", bench.digits),
    "ours": ("k-diffusion, ms an image", bench.digits),
    "ratio": ("k-diffusion / the pipeline", bench.digits),
    "apart": ("levels of 255 apart, at most", str),
}


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

    def __init__(self, unet: Any, size: int, batch: int, steps: int, device: torch.device | str):
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
        self.dtype = unet.dtype

    def pipeline(self) -> Images:
        generator = torch.Generator(self.device).manual_seed(1)
        return self.pipe(self.shape[0], generator, num_inference_steps=self.steps).images

    @torch.no_grad()
    def ours(self) -> Images:
        generator = torch.Generator(self.device).manual_seed(1)
        x = torch.randn(self.shape, generator=generator, device=self.device, dtype=self.dtype)
        x = x * (1 + self.sigmas[0] ** 2).sqrt()
        images = K.sampling.sample_ddim(self.denoiser, x, self.sigmas, disable=True)
        return [to_pil_image(image) for image in images]

    def difference(self) -> int:
        """The largest difference of a pixel of 8 bits."""
        a, b = (np.stack([np.asarray(i, int) for i in run()]) for run in (self.pipeline, self.ours))
        return int(abs(a - b).max())


def measure(args: argparse.Namespace) -> bench.Section:
    """Each kind of network under both, in turn."""
    section: bench.Section = {"on": args.on, "rows": []}
    for network in ["eager", *(["compiled"] if args.compile else []), "computes nothing"]:
        unet = make_unet(args.size, args.channels)
        torch.nn.Module.to(unet, args.device, bench.DTYPES[args.dtype])  # diffusers' own warns
        if network == "compiled":
            K.models.compile_model(unet)
        elif network != "eager":
            unet.forward = idle
        both = Both(unet, args.size, args.batch, args.steps, args.device)
        apart = both.difference()
        runs: dict[str, bench.Run] = {"theirs": both.pipeline, "ours": both.ours}
        times = bench.in_turn(runs, args.device, 0.0 if args.quick else 20.0)
        row = {name: seconds / args.batch * 1000 for name, seconds in times.items()}
        ratio = times["ours"] / times["theirs"]
        section["rows"].append({"network": network, **row, "ratio": ratio, "apart": apart})
    return section


def main(argv: Sequence[str] | None = None) -> None:
    p = bench.parser(__doc__)
    p.add_argument("--size", type=int, default=32, help="of the images, in pixels (default: 32)")
    p.add_argument("--channels", type=int, default=32, help="of the first level (default: 32)")
    p.add_argument("--batch", type=int, default=4, help="images at a time (default: 4)")
    p.add_argument("--steps", type=int, default=50, help="(default: 50)")
    p.add_argument("--compile", action="store_true", help="a compiled network, too: a minute")
    args = bench.parse(p, argv)
    if args.quick:
        args.size, args.channels, args.steps = 16, 8, 2
    name = f"{args.size} x {args.size}, batch of {args.batch}, {args.steps} steps of DDIM"
    sections = {} if args.no_run else {name: measure(args)}
    for name, section in sections.items():
        print(bench.text(name, section, COLUMNS))
    bench.finish("pipeline", "pipeline.py", args, sections, COLUMNS)


if __name__ == "__main__":
    main()
