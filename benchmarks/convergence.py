"""Errors of all samplers against model evaluations, on a Gaussian mixture with an exact denoiser.

Prints the tables and, with --write, puts them between the markers of docs/samplers.md and draws
docs/images/convergence.png. In float64 on the CPU, one core, under a minute.

    python benchmarks/convergence.py [--write]
"""

import argparse
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from scipy import special

import k_diffusion as K

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
import problems  # noqa: E402

BUDGETS = [4, 8, 16, 32, 64]
SIGMA_MIN, SIGMA_MAX = 0.03, 40.0
MIXTURE = problems.mixture()
# Its step size follows a tolerance, so it can't be given a budget.
SAMPLERS = {n: i for n, i in K.sampling.SAMPLERS.items() if n != "dpm_adaptive"}
SCHEDULES = [n for n in K.sampling.SCHEDULES if n != "polyexponential"]


class Counted:
    """The mixture's denoiser, which counts its evaluations."""

    def __init__(self):
        self.calls = 0

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return MIXTURE(x, sigma)


def sample(name: str, budget: int, x: torch.Tensor, schedule: str = "karras") -> torch.Tensor:
    """Samples by at most `budget` evaluations, the last of them for the step from sigma_min to 0."""
    info, model = SAMPLERS[name], Counted()
    if name == "dpm_fast":
        x = info.function(model, x, SIGMA_MIN, SIGMA_MAX, budget - 1, disable=True)
        x = model(x, torch.full((len(x),), SIGMA_MIN).to(x))
    else:
        left, options = budget - 1, {}
        if name == "restart":
            again = budget // 8 if budget >= 16 else 0
            options["restarts"] = [(0.1, 2.0, again, 1)] if again else []
            left -= again * info.evaluations
        sigmas = K.sampling.make_sigmas(
            schedule, left // info.evaluations + 1, SIGMA_MIN, SIGMA_MAX
        ).double()
        x = info.function(model, x, sigmas, disable=True, **options)
    assert model.calls <= budget, (name, budget, model.calls)
    return x


def quantiles(direction: torch.Tensor, n: int) -> torch.Tensor:
    """The (i + 1/2) / n quantiles of the mixture seen along a direction."""
    means = (MIXTURE.means @ direction).numpy()
    stds, weights = MIXTURE.stds.numpy(), MIXTURE.log_weights.exp().numpy()
    at = np.linspace(-5, 5, 20001)
    cdf = (weights * special.ndtr((at[:, None] - means) / stds)).sum(1)
    return torch.from_numpy(np.interp((np.arange(n) + 0.5) / n, cdf, at))


def distance(samples: torch.Tensor, directions: int = 8) -> float:
    """The sliced Wasserstein-1 distance of samples (n, 2) to the mixture."""
    total = 0.0
    for i in range(directions):
        angle = math.pi * i / directions
        direction = torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)
        seen = (samples @ direction).sort().values
        total += (seen - quantiles(direction, len(samples))).abs().mean().item()
    return total / directions


def data(n: int, seed: int) -> torch.Tensor:
    """Exact samples of the mixture: what even the best sampler's distance is limited to."""
    g = torch.Generator().manual_seed(seed)
    k = torch.multinomial(MIXTURE.log_weights.exp(), n, replacement=True, generator=g)
    noise = torch.randn(n, 2, generator=g, dtype=torch.float64)
    return MIXTURE.means[k] + MIXTURE.stds[k, None] * noise


Rows = dict[str, list[float]]


def measure(n: int) -> tuple[Rows, Rows, Rows, float]:
    """Errors of ODE samplers and of schedules, distances of all, each by budget; and the floor."""
    x = data(n, 0) + SIGMA_MAX * problems.normal(1, n, 2, dtype=torch.float64)
    few = x[:256]
    exact = MIXTURE.ode_map(few, SIGMA_MAX, SIGMA_MIN)
    exact = MIXTURE(exact, torch.full((len(few),), SIGMA_MIN, dtype=torch.float64))
    errors: Rows = {}
    distances: Rows = {}
    for name, info in SAMPLERS.items():
        distances[name] = []
        for budget in BUDGETS:
            torch.manual_seed(0)
            y = sample(name, budget, x)
            distances[name].append(distance(y))
            if not info.stochastic:
                errors.setdefault(name, []).append(problems.rms(y[:256] - exact))
    schedules: Rows = {
        schedule: [
            problems.rms(MIXTURE_ERROR(sample("dpmpp_2m", budget, few, schedule)))
            for budget in BUDGETS
        ]
        for schedule in SCHEDULES
    }
    floor = sum(distance(data(n, seed)) for seed in range(1, 5)) / 4
    return errors, distances, schedules, floor
