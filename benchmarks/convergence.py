"""Errors of all samplers against model evaluations, on a Gaussian mixture with an exact denoiser.

Prints the tables and, with --write, puts them between the markers of docs/samplers.md and draws
docs/images/convergence.png. In float64 on the CPU, one core, in two minutes.

    python benchmarks/convergence.py [--write]
"""

import k_diffusion.common.cpu  # before torch, which loads OpenMP

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
DASHES = ["-", "--", "-.", ":"]
MARKERS = "osD^v<>pP*X"
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
    """Exact samples of the mixture: their distance is the least that a sampler can reach."""
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


def merge_equal(rows: Rows) -> Rows:
    """Rows from the largest to the smallest last figure; equal ones, such as those of `euler` and
    `ddim`, as one row with both names."""
    merged: dict[tuple[str, ...], tuple[str, list[float]]] = {}
    for name, row in sorted(rows.items(), key=lambda item: -item[1][-1]):
        key = tuple(f"{value:.4g}" for value in row)
        names = f"{merged[key][0]} = {name}" if key in merged else name
        merged[key] = names, row
    return dict(merged.values())


def spread(positions: list[float], gap: float) -> list[float]:
    """Descending positions moved as little as keeps them `gap` apart, for labels."""
    # Neighbours that are too close form a block around their mean (isotonic regression).
    blocks: list[list[float]] = []
    for i, position in enumerate(positions):
        blocks.append([position + i * gap])
        while len(blocks) > 1 and np.mean(blocks[-2]) < np.mean(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    flat = [float(np.mean(block)) for block in blocks for _ in block]
    return [position - i * gap for i, position in enumerate(flat)]


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
    figure, axes = plt.subplots(2, 1, figsize=(9, 14), layout="constrained")
    for ax, (rows, title, label) in zip(axes, panels):
        curves = merge_equal(rows)
        logs = np.log10(list(curves.values()))
        ends = spread(logs[:, -1].tolist(), gap=0.03 * (logs.max() - logs.min()))
        for i, ((name, row), end) in enumerate(zip(curves.items(), ends)):
            # Ten colours, and eleven markers, hollow from the eleventh line on: no two are alike.
            colour, dashes = plt.cm.tab10(i % 10), DASHES[i % 4]
            face = colour if i < 10 else "white"
            style = {"color": colour, "marker": MARKERS[i % 11], "mfc": face, "markersize": 5.5}
            ax.loglog(BUDGETS, row, dashes, lw=1.4, **style)
            # A leader to the label, which shows the marker again.
            at = [BUDGETS[-1], 1.3 * BUDGETS[-1]]
            ax.plot(at, [row[-1], 10**end], color=colour, lw=0.6, clip_on=False)
            ax.plot(at[1], 10**end, clip_on=False, **style)
            ax.text(1.08 * at[1], 10**end, name, color=colour, fontsize=9, va="center")
        ax.set(title=title, xlabel="model evaluations", ylabel=label, xticks=BUDGETS)
        ax.set_xlim(0.9 * BUDGETS[0], 1.05 * BUDGETS[-1])
        ax.set_xticks([], minor=True)
        ax.set_xticklabels(BUDGETS)
        ax.grid(alpha=0.3)
    axes[1].axhline(floor, color="k", linewidth=0.8)
    axes[1].text(BUDGETS[0], floor, "exact samples", va="bottom", fontsize=9)
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
