"""How many class-conditional samples of a digits model are recognised as their class.

The judge is the encoder `digits`, scikit-learn's SVC fitted to the real digits; the model never
sees it. For scale, the script first prints how well a judge of four fifths of the real digits reads
the others.

    python benchmarks/digits_accuracy.py digits_00000600.pth [-n 1000] [--cfg-scale 1]
"""

import k_diffusion.common.cpu  # before torch, which loads OpenMP

# isort: split
import argparse
import time

import numpy as np
import torch

import k_diffusion as K
from k_diffusion import generation, guidance, loading
from k_diffusion.data.datasets import Digits
from k_diffusion.encoders.digits import Recognizer


def judge(split: str = "all") -> Recognizer:
    """The classifier fitted to the real digits of a split."""
    return Recognizer(*real(split))


def real(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The real digits of a split, (n, 1, 8, 8) in [-1, 1], and their classes."""
    digits = Digits(np.asarray, split)
    return torch.tensor(digits.images)[:, None] / 127.5 - 1, torch.tensor(digits.classes)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("checkpoint", help="a training (.pth) or inference (.safetensors) checkpoint")
    p.add_argument("-n", type=int, default=1000, help="samples, dealt out to the ten classes")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--steps", type=int, default=50)
    p.add_argument("--sampler", default="dpmpp_2m")
    p.add_argument("--cfg-scale", type=float, default=1.0)
    args = p.parse_args()

    share = judge("train").accuracy(*real("test"))
    print(f"held-out real digits, read by a judge of the others: {share:.1%}")

    denoiser, config = loading.load_denoiser(args.checkpoint)
    model = config["model"]
    if args.cfg_scale != 1:
        no_class = torch.tensor([10])
        denoiser = guidance.CFGDenoiser(denoiser, args.cfg_scale, class_cond=no_class)
    classes = [i % 10 for i in range(args.n)]
    sigmas = K.sampling.get_sigmas_karras(args.steps, model["sigma_min"], model["sigma_max"])
    start = time.perf_counter()
    images = torch.cat(
        list(
            generation.generate(
                denoiser,
                (1, 8, 8),
                range(args.seed, args.seed + args.n),
                sigmas,
                classes=classes,
                num_classes=10,
                sampler=args.sampler,
                batch_size=250,
            )
        )
    )
    seconds = time.perf_counter() - start
    right = (judge().classify(images) == torch.tensor(classes)).double()
    per_class = " ".join(f"{c}:{right[c::10].mean():.0%}" for c in range(10))
    print(f"samples read as their class: {right.mean():.1%} of {args.n} ({per_class})")
    print(f"{args.sampler}, {args.steps} steps, guidance {args.cfg_scale}: {seconds:.1f} s")


if __name__ == "__main__":
    main()
