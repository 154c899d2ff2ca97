"""How good all samplers' digits are, by model evaluations: samples of a trained model against
real digits that it was not trained on.

Prints the tables and, with --write, puts them between their markers in docs/samplers.md. About ten
minutes on two free cores, after the model's training, whose command stands there:

    python benchmarks/digits_samplers.py digits_split_00002000.pth [--write]
"""

import k_diffusion.common.cpu  # before torch, which loads OpenMP

# isort: split
import argparse
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from digits_accuracy import judge
from harness import budgets, page
from harness.budgets import BUDGETS
from harness.page import Rows
from tqdm.auto import tqdm

import k_diffusion as K
from k_diffusion import loading
from k_diffusion.data.datasets import Digits

BATCH = 100
# With their defaults these two take the same steps as `euler` and `euler_ancestral`.
SAMPLERS = {n: i for n, i in budgets.SAMPLERS.items() if n not in ("ddim", "ddpm")}


class Images(NamedTuple):
    """Digits as rows of 64 values in [-1, 1], with their classes."""

    pixels: np.ndarray
    classes: np.ndarray


def real(split: str) -> Images:
    """The real digits of a split."""
    digits = Digits(np.asarray, split)
    return Images(digits.images.reshape(-1, 64) / 127.5 - 1, np.array(digits.classes))


def draw(model: Any, config: dict[str, Any], name: str, budget: int, n: int) -> Images:
    """Samples of the seeds 0 to n - 1, dealt out to the ten classes."""
    lo, hi = config["model"]["sigma_min"], config["model"]["sigma_max"]
    batches = []
    for seeds in torch.arange(n).split(BATCH):
        x = K.sampling.randn_per_seed(seeds.tolist(), (1, 8, 8)) * hi
        cond = {"class_cond": seeds % 10}
        x = budgets.sample(model, name, budget, x, lo, hi, extra_args=cond, seeds=seeds.tolist())
        batches.append(x.flatten(1).clamp(-1, 1))
    return Images(torch.cat(batches).double().numpy(), np.arange(n) % 10)


def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Euclidean distances of all rows of a to all rows of b."""
    return torch.cdist(
        torch.from_numpy(a), torch.from_numpy(b), compute_mode="donot_use_mm_for_euclid_dist"
    ).numpy()


def energy(some: Images, others: Images) -> tuple[float, float]:
    """The squared energy distance of two sets of digits, the mean of their ten classes' distances:
    2 E|x - y| - E|x - x'| - E|y - y'|, without bias.

    Returns it with its standard error over draws of `some`, from each image's influence on it.
    """
    total, influence = 0.0, np.zeros(len(some.classes))
    for c in range(10):
        x, y = (images.pixels[images.classes == c] for images in (some, others))
        across = distances(x, y).mean(1)
        within = distances(x, x).sum(1) / (len(x) - 1)
        total += 2 * across.mean() - within.mean()
        total -= distances(y, y).sum() / (len(y) * (len(y) - 1))
        influence[some.classes == c] = 2 * (across - across.mean() - within + within.mean())
    return total / 10, influence.std() / len(influence) ** 0.5


class Result(NamedTuple):
    """What a sampler's images at one budget are worth.

    distance: to the held-out digits, less that of the training digits. error: its standard error.
    share: of the images that are read as their class.
    """

    distance: float
    error: float
    share: float

    def worse_than(self, other: "Result") -> bool:
        """By more than two standard errors of the difference."""
        return self.distance - other.distance > 2 * math.hypot(self.error, other.error)


Results = dict[str, list[Result]]


def limit(results: Results) -> Result:
    """The model's own: of the exact solution of its ODE, which this is on the mixture to 1e-4."""
    return results["uni_pc"][-1]


def bold(results: Results) -> set[tuple[str, int]]:
    """The samplers and columns that can't be told from the limit, or from their budget's best where
    that is worse."""
    out = set()
    for i, column in enumerate(zip(*results.values())):
        best = min(column, key=lambda r: r.distance)
        reference = max(best, limit(results), key=lambda r: r.distance)
        out |= {(name, i) for name, r in zip(results, column) if not r.worse_than(reference)}
    return out


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("checkpoint", help="of a model trained with --set dataset.split=train")
    p.add_argument("-n", type=int, default=500, help="samples of each sampler and budget")
    p.add_argument("--write", action="store_true", help="into docs/samplers.md")
    args = p.parse_args()
    if args.n < 20:
        p.error(f"-n: distances need two samples of each class, 20 in all, got {args.n}")

    model, config = loading.load_denoiser(args.checkpoint)
    if (config["dataset"]["type"], config["dataset"].get("split")) != ("digits", "train"):
        p.error("the model must know the training digits only: train it as this script's head says")
    train, held_out = real("train"), real("test")
    classifier = judge("train")

    def share(images: Images) -> float:
        pixels = torch.from_numpy(images.pixels).view(-1, 1, 8, 8)
        return classifier.accuracy(pixels, torch.from_numpy(images.classes))

    floor, floor_error = energy(train, held_out)
    torch.set_num_threads(1)  # a thread for each sampler is faster
    start = time.perf_counter()

    def measure(job: tuple[str, int]) -> Result:
        images = draw(model, config, *job, args.n)
        distance, error = energy(images, held_out)
        return Result(distance - floor, error, share(images))

    jobs = [(name, budget) for name in SAMPLERS for budget in BUDGETS]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = dict(zip(jobs, tqdm(pool.map(measure, jobs), total=len(jobs), unit="run")))
    results = {name: [done[name, budget] for budget in BUDGETS] for name in SAMPLERS}
    results = dict(sorted(results.items(), key=lambda item: item[1][2].distance))

    exact = limit(results)
    figures: Rows = {name: [r.distance for r in row] for name, row in results.items()}
    shares: Rows = {name: [r.share for r in row] for name, row in results.items()}
    sections = {
        "digits distances": page.table("distance", figures, bold(results))
        + f"\n\nFrom {args.n} samples each. The model's limit, the exact solution of its ODE, is at"
        f" {exact.distance:.2g} with a standard error of {exact.error:.2g}; the zero, that of the "
        f"{len(train.classes):,} training digits, has one of {floor_error:.2g}.",
        "digits shares": page.table("read as their class", shares, (), ".1%")
        + f"\n\nOf the {len(held_out.classes)} held-out digits {share(held_out):.1%} are read as "
        "their class.",
    }
    for section in sections.values():
        print(section, end="\n\n")
    print(f"{time.perf_counter() - start:.0f} s in {os.cpu_count()} threads")
    if args.write:
        page.write("digits_samplers.py", sections)


if __name__ == "__main__":
    main()
