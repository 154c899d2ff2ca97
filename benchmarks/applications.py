"""How far apart samplers are that share a name with an application's and differ by derivation.

On scikit-learn's handwritten digits, each blurred by Gaussian noise, whose denoiser is exact. Both
sides get the same noise and the same noise levels, in float64. With --write the tables go between
the markers of docs/samplers.md. A minute on one core; needs diffusers for `sa_solver`.

    python benchmarks/applications.py [--write]
"""

import k_diffusion.common.cpu  # before torch, which loads OpenMP

# isort: split
import argparse
import math
import sys
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from harness import page
from harness.budgets import ROOT
from torch import Tensor

import k_diffusion as K
from k_diffusion.common.text import need
from k_diffusion.data.datasets import Digits

sys.path.insert(0, str(ROOT / "tests"))
import problems

STEPS = [10, 20, 50]
EXACT = 400  # steps of order 4 to the exact solution
STD = 0.25  # of the noise around each digit, whose pixels are in [-1, 1]
SIGMA_MIN, SIGMA_MAX = 0.03, 14.6


def digits_denoiser() -> problems.Mixture:
    """The exact denoiser of the blurred digits."""
    images = torch.from_numpy(Digits(np.asarray).images[:, None] / 127.5 - 1)
    n = len(images)
    weights, stds = (torch.full((n,), value, dtype=torch.float64) for value in (1 / n, STD))
    return problems.Mixture(weights, images, stds)


def fixed_noise(like: Tensor) -> Callable[[float, float], Tensor]:
    """Noise that is the same for the same step, whoever asks for it. like: (n, ...)."""

    def noise(sigma: float, sigma_next: float) -> Tensor:
        seed = round(1e6 * float(sigma_next))
        return problems.normal(seed, *like.shape, dtype=like.dtype)

    return noise


def paper_er_sde(model, x: Tensor, sigmas: Tensor, noise, order: int) -> Tensor:
    """ER-SDE-Solver-1 to -3 as the paper has them (arXiv:2309.06169, section 4 and appendix):
    differences of first order for both derivatives, integrals by 200 rectangles. x: (n, ...)."""
    phi = lambda s: s * (torch.exp(s**0.3) + 10)  # noqa: E731
    old = None  # the last noise level, estimate and slope
    for a, b, after in zip(sigmas[:-1], sigmas[1:], range(len(sigmas))):
        denoised = model(x, a.expand(len(x)))
        if b == 0:
            return denoised
        ratio = phi(b) / phi(a)
        y, slope = ratio * x + (1 - ratio) * denoised, None
        if order > 1 and old is not None:
            at = b + (a - b) / 200 * torch.arange(200, dtype=torch.float64)
            last_sigma, last_denoised, last_slope = old
            slope = (denoised - last_denoised) / (a - last_sigma)
            integral = ((a - b) / 200 / phi(at)).sum()
            y = y + (b - a + phi(b) * integral) * slope
            if order > 2 and last_slope is not None:
                curve = (slope - last_slope) / ((a - sigmas[after - 2]) / 2)
                integral = ((a - b) / 200 * (at - a) / phi(at)).sum()
                y = y + ((b - a) ** 2 / 2 + phi(b) * integral) * curve
        x = y + (b**2 - a**2 * ratio**2).clamp(min=0).sqrt() * noise(a, b)
        old = a, denoised, slope
    return x


def scheduler_sa_solver(model, x: Tensor, sigmas: Tensor, noise, orders, tau: float) -> Tensor:
    """diffusers' SA-Solver on our noise levels, with its defaults. x: (n, ...)."""
    diffusers = need("diffusers", "the comparison of sa_solver")
    scheduler = diffusers.SASolverScheduler(
        predictor_order=orders[0], corrector_order=orders[1], tau_func=lambda t: tau
    )
    scheduler.set_timesteps(len(sigmas) - 1)
    scheduler.sigmas = sigmas  # those of the run; its time steps only count them
    scheduler.timesteps = torch.arange(len(sigmas) - 1, 0, -1)
    module = sys.modules[type(scheduler).__module__]
    drawn, module.randn_tensor = module.randn_tensor, lambda *a, **k: noise(*step)
    try:
        x = x / (1 + sigmas[0] ** 2).sqrt()  # variance-preserving form
        for i, t in enumerate(scheduler.timesteps[:-1]):
            step = a, _ = sigmas[i], sigmas[i + 1]
            y = x * (1 + a**2).sqrt()
            eps = (y - model(y, a.expand(len(y)))) / a
            x = scheduler.step(eps, t, x).prev_sample
    finally:
        module.randn_tensor = drawn
    y = x * (1 + sigmas[-2] ** 2).sqrt()
    return model(y, sigmas[-2].expand(len(y)))


def weighted_heunpp2(model, x: Tensor, sigmas: Tensor) -> Tensor:
    """Heun++ as applications have it: a step along a mean of up to three slopes. x: (n, ...).

    The slopes are Euler's at this noise level and the next ones, s_i, with the weights
    s_i / (k s_0) for i >= 1, where k is the number of slopes and s_0 the schedule's first level;
    the first slope has the rest. No level of 0 has a slope.
    """
    for i, (a, b) in enumerate(pairwise(sigmas)):
        levels = [level for level in sigmas[i : i + 3] if level > 0]
        slopes, y = [], x
        for j, level in enumerate(levels):
            slopes.append((y - model(y, level.expand(len(y)))) / level)
            if j + 1 < len(levels):
                y = y + (levels[j + 1] - level) * slopes[-1]
        weights = [float(level / (len(levels) * sigmas[0])) for level in levels[1:]]
        weights.insert(0, 1 - sum(weights))
        x = x + (b - a) * sum(w * slope for w, slope in zip(weights, slopes))
    return x


def relative(x: Tensor, y: Tensor) -> tuple[float, float]:
    """The RMS difference of images over the RMS of y, and the PSNR of pixels in [-1, 1].

    x, y: (n, ...).
    """
    error = problems.rms(x - y)
    return error / problems.rms(y), 20 * math.log10(2 / max(error, 1e-300))


def rows(n: int) -> dict[str, list[tuple[float, float]]]:
    """For each pair of samplers its differences by number of steps."""
    model = digits_denoiser()
    start = problems.normal(0, n, 1, 8, 8, dtype=torch.float64)
    results: dict[str, list[tuple[float, float]]] = {}
    noise = fixed_noise(start)
    exact = model.ode_map(start * SIGMA_MAX, SIGMA_MAX, SIGMA_MIN, steps=EXACT)
    exact = model(exact, torch.full((n,), SIGMA_MIN, dtype=torch.float64))

    def compare(name: str, ours: Callable, theirs: Callable) -> None:
        results[name] = []
        for steps in STEPS:
            sigmas = K.sampling.get_sigmas_karras(steps, SIGMA_MIN, SIGMA_MAX).double()
            x = start * sigmas[0]
            results[name].append(relative(ours(model, x, sigmas), theirs(model, x, sigmas)))

    def ours(sampler: str, **options) -> Callable:
        return lambda model, x, sigmas: K.sampling.sample(
            model, x, sigmas, sampler, disable=True, **options
        )

    for order in (1, 2, 3):
        theirs = partial(paper_er_sde, noise=noise, order=order)
        er = partial(ours, "er_sde", order=order, noise_sampler=noise)
        compare(f"`er_sde`, order {order}, to the paper's formulas", er(), theirs)
    name = "`er_sde`, order 3, `lower_order_final=False`, to the paper's formulas"
    compare(name, er(lower_order_final=False), theirs)
    for orders, tau in (((2, 2), 1.0), ((3, 4), 1.0), ((2, 2), 0.0)):
        theirs = partial(scheduler_sa_solver, noise=noise, orders=orders, tau=tau)
        names = dict(zip(("predictor_order", "corrector_order"), orders))
        sa = ours("sa_solver", eta=tau**2, noise_sampler=noise if tau else None, **names)
        compare(f"`sa_solver`, orders {orders}, tau {tau:g}, to diffusers'", sa, theirs)
    name = "`heunpp2` to slopes weighted by noise levels"
    compare(name, ours("heunpp2"), weighted_heunpp2)
    for sampler in ("heunpp2", "heun"):
        compare(f"`{sampler}` to the exact solution", ours(sampler), lambda *_: exact)
    return results


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("-n", type=int, default=16, help="images")
    p.add_argument("--write", action="store_true", help="into docs/samplers.md")
    args = p.parse_args()
    torch.set_num_threads(1)
    lines = [
        "| relative RMS difference (PSNR) | " + " | ".join(f"{n} steps" for n in STEPS) + " |",
        "|---" * (1 + len(STEPS)) + "|",
    ]
    for name, values in rows(args.n).items():
        cells = (f"{r:.2g} ({psnr:.0f} dB)" for r, psnr in values)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    print("\n".join(lines))
    if args.write:
        page.write("applications.py", {"derivations": "\n".join(lines)})


if __name__ == "__main__":
    main()
