"""Errors of all samplers against model evaluations, on a Gaussian mixture with an exact denoiser.

Prints the tables and, with --write, puts them between the markers of docs/samplers.md and draws
docs/images/convergence.png. In float64 on the CPU, one core, under a minute.

    python benchmarks/convergence.py [--write]
"""

import k_diffusion.common.threads  # before torch, which loads OpenMP

# isort: split
import argparse
import math
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from harness import budgets, page
from harness.budgets import BUDGETS, ROOT, SAMPLERS
from harness.page import Rows
from scipy import special

import k_diffusion as K

sys.path.insert(0, str(ROOT / "tests"))
import problems

SIGMA_MIN, SIGMA_MAX = 0.03, 40.0
MIXTURE = problems.mixture()
SCHEDULES = [n for n in K.sampling.SCHEDULES if n != "polyexponential"]
sample = partial(budgets.sample, MIXTURE, sigma_min=SIGMA_MIN, sigma_max=SIGMA_MAX)


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


def measure(n: int) -> tuple[Rows, Rows, Rows, float]:
    """Errors of ODE samplers and of schedules, distances of all, each by budget; and the floor."""
    x = data(n, 0) + SIGMA_MAX * problems.normal(1, n, 2, dtype=torch.float64)
    few = x[:256]
    exact = MIXTURE.ode_map(few, SIGMA_MAX, SIGMA_MIN)
    exact = MIXTURE(exact, torch.full((len(few),), SIGMA_MIN, dtype=torch.float64))
    errors: Rows = {}
    distances: Rows = {}
    schedules: Rows = {}
    for name, info in SAMPLERS.items():
        distances[name] = []
        for budget in BUDGETS:
            torch.manual_seed(0)
            y = sample(name, budget, x)
            distances[name].append(distance(y))
            if not info.stochastic:
                errors.setdefault(name, []).append(problems.rms(y[:256] - exact))
    for schedule in SCHEDULES:
        samples = [sample("dpmpp_2m", budget, few, schedule=schedule) for budget in BUDGETS]
        schedules[schedule] = [problems.rms(y - exact) for y in samples]
    floor = sum(distance(data(n, seed)) for seed in range(2, 6)) / 4
    return errors, distances, schedules, floor


def table(head: str, rows: Rows, floor: float = 0.0) -> str:
    """Rows by the middle budget, the best of each budget, or all that reach the floor, in bold."""
    rows = dict(sorted(rows.items(), key=lambda item: item[1][2]))
    best = [max(min(column), floor) for column in zip(*rows.values())]
    bold = ((name, i) for name, row in rows.items() for i, b in enumerate(best) if row[i] <= b)
    return page.table(head, rows, bold)


def plot(errors: Rows, distances: Rows, floor: float, path: Path) -> None:
    """Both tables as curves."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError('the plot needs matplotlib: pip install "k-diffusion[train]"') from error

    noisy = {name: row for name, row in distances.items() if SAMPLERS[name].stochastic}
    panels = (
        (errors, "ODE samplers", "RMS error against the exact solution"),
        (noisy, "Samplers that add noise", "sliced Wasserstein distance to the data"),
    )
    figure, axes = plt.subplots(1, 2, figsize=(13, 5.2), layout="constrained")
    styles = ["-", "--", ":"]
    for ax, (rows, title, label) in zip(axes, panels):
        # In the order of the curves' right ends, so that the legend reads like the plot.
        for i, (name, row) in enumerate(sorted(rows.items(), key=lambda item: -item[1][-1])):
            style, colour = styles[i // 10], plt.cm.tab10(i % 10)
            ax.loglog(BUDGETS, row, style, color=colour, marker="o", markersize=3, label=name)
        ax.set(title=title, xlabel="model evaluations", ylabel=label, xticks=BUDGETS)
        ax.set_xticks([], minor=True)
        ax.set_xticklabels(BUDGETS)
        ax.grid(alpha=0.3)
    axes[1].axhline(floor, color="k", linewidth=0.8)
    axes[1].text(BUDGETS[0], floor, "exact samples", va="bottom", fontsize=8)
    for ax in axes:
        ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("-n", type=int, default=10000, help="samples that distances are measured on")
    p.add_argument("--write", action="store_true", help="into docs/samplers.md, with the plot")
    args = p.parse_args()

    torch.set_num_threads(1)
    start = time.perf_counter()
    errors, distances, schedules, floor = measure(args.n)
    sections = {
        "errors": table("RMS error", errors),
        "distances": table("distance", distances, floor)
        + f"\n\n{args.n} exact samples of the mixture are at a distance of {floor:.2g}.",
        "schedules": table("RMS error of `dpmpp_2m`", schedules),
    }
    for section in sections.values():
        print(section, end="\n\n")
    print(f"{time.perf_counter() - start:.0f} s on one core")
    if args.write:
        page.write("convergence.py", sections)
        plot(errors, distances, floor, ROOT / "docs" / "images" / "convergence.png")


if __name__ == "__main__":
    main()
