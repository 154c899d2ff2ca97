"""How many class-conditional samples of a digits model are recognised as their class.

The judge is scikit-learn's SVC, fitted to the real digits; the model never sees it. For scale,
the script first prints how well the same kind of judge, fitted to half of the real digits, reads
the other half.

    python benchmarks/digits_accuracy.py digits_00001000.pth [-n 1000] [--cfg-scale 1]
"""

import k_diffusion.common.threads  # before torch, which loads OpenMP

# isort: split
import argparse
import time

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC

import k_diffusion as K
from k_diffusion import generation, guidance, loading


def judge(images: np.ndarray, classes: np.ndarray) -> SVC:
    """A classifier of flat 8 x 8 digits with values 0 to 16."""
    return SVC(gamma=0.001, C=10).fit(images, classes)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("checkpoint", help="a training (.pth) or inference (.safetensors) checkpoint")
    p.add_argument("-n", type=int, default=1000, help="samples, dealt out to the ten classes")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--steps", type=int, default=50)
    p.add_argument("--sampler", default="dpmpp_2m")
    p.add_argument("--cfg-scale", type=float, default=1.0)
    args = p.parse_args()

    digits = load_digits()
    half = train_test_split(
        digits.data, digits.target, test_size=0.5, random_state=0, stratify=digits.target
    )
    real = judge(half[0], half[2]).score(half[1], half[3])
    print(f"real digits, half read by a judge of the other half: {real:.1%}")

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
    pixels = (images.clamp(-1, 1).flatten(1).numpy() + 1) * 8
    right = judge(digits.data, digits.target).predict(pixels) == np.array(classes)
    per_class = " ".join(f"{c}:{right[c::10].mean():.0%}" for c in range(10))
    print(f"samples read as their class: {right.mean():.1%} of {args.n} ({per_class})")
    print(f"{args.sampler}, {args.steps} steps, guidance {args.cfg_scale}: {seconds:.1f} s")


if __name__ == "__main__":
    main()
