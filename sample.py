#!/usr/bin/env python3
"""Sample images of a trained model: sample.py --checkpoint CHECKPOINT -n 64 --grid grid.png"""

import argparse
import secrets
from contextlib import nullcontext
from pathlib import Path

import torch

import k_diffusion as K
from k_diffusion import cli, generation
from k_diffusion.training import demo


def parse_args() -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("--checkpoint", type=Path, required=True,
                   help="an inference checkpoint (.safetensors) or a training checkpoint (.pth)")
    p.add_argument("--config", type=Path, help="the config; by default the checkpoint's own")
    p.add_argument("-n", type=cli.positive, default=64, help="the number of images")
    p.add_argument("--batch-size", type=cli.positive, default=64, help="images at a time")
    p.add_argument("--seed", type=cli.seed,
                   help="image i has seed SEED + i; by default a new one, which is printed")
    p.add_argument("--class", dest="classes", nargs="+", default=["all"], metavar="ID",
                   help="class ids, dealt out to the images in turn, or 'all'")
    p.add_argument("--cfg-scale", type=float, default=1.0,
                   help="strength of classifier-free guidance; 1 is none")
    p.add_argument("--sampler", default="dpmpp_2m",
                   help="one of " + ", ".join(n for n, s in K.sampling.SAMPLERS.items()
                                              if s.takes_sigmas))
    p.add_argument("--schedule", default="karras",
                   help="one of " + ", ".join(K.sampling.SCHEDULES))
    p.add_argument("--steps", type=cli.positive, default=50, help="denoising steps")
    p.add_argument("--size", type=cli.size, metavar="HxW", help="by default the config's")
    p.add_argument("--prefix", default="out", help="images are written to PREFIX_00000.png ...")
    p.add_argument("--grid", type=Path, help="write one picture of all images there instead")
    p.add_argument("--dtype", choices=["fp32", "fp16", "bf16"], default="fp32",
                   help="precision of the model's matrix products")
    p.add_argument("--device", help="by default the accelerator's")
    return p.parse_args()


@cli.friendly_errors
def main() -> None:
    args = parse_args()
    from accelerate import Accelerator
    from accelerate.utils import broadcast_object_list

    accelerator = Accelerator()
    device = torch.device(args.device) if args.device else accelerator.device
    cli.writable(args.grid or Path(f"{args.prefix}_00000.png"))
    denoiser, config = generation.load_denoiser(args.checkpoint, args.config)
    denoiser.to(device)

    # what to sample: image i has seed + i and the classes in turn, whoever samples it
    seed = broadcast_object_list([secrets.randbits(31) if args.seed is None else args.seed])[0]
    model, num_classes = config["model"], config["dataset"]["num_classes"]
    classes = generation.parse_classes(args.classes, num_classes)
    mine = range(accelerator.process_index, args.n, accelerator.num_processes)
    shape = (model["input_channels"], *(args.size or model["input_size"]))
    sigmas = K.sampling.make_sigmas(
        args.schedule, args.steps, model["sigma_min"], model["sigma_max"]
    )
    accelerator.print(
        f"{args.n} images of {shape[1]} x {shape[2]} from {args.checkpoint}: {args.sampler}, "
        f"{args.steps} steps, seed {seed}"
    )

    dtypes = {"fp16": torch.float16, "bf16": torch.bfloat16}
    low = args.dtype in dtypes
    with torch.autocast(device.type, dtypes[args.dtype]) if low else nullcontext():
        batches = generation.generate(
            denoiser,
            shape,
            [seed + i for i in mine],
            sigmas,
            classes=classes and [classes[i % len(classes)] for i in mine],
            num_classes=num_classes,
            cfg_scale=args.cfg_scale,
            sampler=args.sampler,
            batch_size=args.batch_size,
            device=device,
            disable=not accelerator.is_main_process,
        )
        done = [torch.empty(0, *shape, device=device)]
        for batch in batches:
            if not args.grid:
                at = sum(map(len, done))
                for i, image in zip(mine[at:], batch):
                    K.utils.to_pil_image(image).save(f"{args.prefix}_{i:05}.png")
            done.append(batch.float())

    if args.grid:
        images = demo.gather_shares(accelerator, torch.cat(done), args.n)
        if images is not None:
            columns = demo.grid_columns(len(classes or ()), args.n)
            demo.image_grid(images, columns).save(args.grid)
            print(f"wrote {args.grid}")
    else:
        accelerator.print(f"wrote {args.prefix}_00000.png to {args.prefix}_{args.n - 1:05}.png")
    accelerator.end_training()


if __name__ == "__main__":
    main()
