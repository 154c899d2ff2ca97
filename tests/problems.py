"""Problems whose exact answer is known: denoisers in closed form, and what follows from them.

All are called as a model, `problem(x, sigma)` with sigma: (n,), and take x of any shape (n, ...).
"""

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


def wide(sigma: Tensor, x: Tensor) -> Tensor:
    return sigma.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


@dataclass
class Constant:
    """A data set of one point: D = c. The ODE's paths are straight lines in sigma."""

    c: float = 0.0

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        return torch.full_like(x, self.c)


@dataclass
class Gaussian:
    """Data from N(mean, std^2 I)."""

    mean: float = 0.0
    std: float = 1.0

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        s2, sigma2 = self.std**2, wide(sigma, x) ** 2
        return (s2 * x + sigma2 * self.mean) / (s2 + sigma2)

    def ode_map(self, x: Tensor, sigma: float, sigma_next: float) -> Tensor:
        """Where the probability-flow ODE takes x from one noise level to another."""
        s2 = self.std**2
        ratio = math.sqrt((s2 + sigma_next**2) / (s2 + sigma**2))
        return self.mean + (x - self.mean) * ratio

    def log_density(self, x: Tensor, sigma: float) -> Tensor:
        std = math.hypot(self.std, sigma)
        normal = torch.distributions.Normal(self.mean, std)
        return normal.log_prob(x).flatten(1).sum(1)


class Mixture:
    """Data from a mixture of isotropic Gaussians. weights, stds: (k,); means: (k, *shape)."""

    def __init__(self, weights: Tensor, means: Tensor, stds: Tensor):
        self.log_weights = weights.log()
        self.shape = means.shape[1:]
        self.means, self.stds = means.flatten(1), stds

    def responsibilities(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """log N(x; mean_k, std_k^2 + sigma^2) + log weight_k, and those variances, both (n, k)."""
        var = self.stds[None].to(x) ** 2 + sigma.to(x)[:, None] ** 2
        sq = (x.flatten(1)[:, None] - self.means[None].to(x)).pow(2).sum(-1)
        d = self.means.shape[1]
        logs = -sq / (2 * var) - d / 2 * (2 * math.pi * var).log()
        return logs + self.log_weights.to(x), var

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        logs, var = self.responsibilities(x, sigma)
        s2, sigma2 = self.stds.to(x) ** 2, sigma.to(x)[:, None] ** 2
        r = logs.softmax(1) / var
        own = (r * s2).sum(1)[:, None] * x.flatten(1)
        means = (r * sigma2) @ self.means.to(x)
        return (own + means).reshape(x.shape)

    def log_density(self, x: Tensor, sigma: float) -> Tensor:
        logs, _ = self.responsibilities(x, torch.full((len(x),), sigma))
        return logs.logsumexp(1)

    def ode_map(self, x: Tensor, sigma: float, sigma_next: float, steps: int = 2000) -> Tensor:
        """A reference solution in log sigma by Runge-Kutta of order 4; give it float64."""
        t, h = math.log(sigma), (math.log(sigma_next) - math.log(sigma)) / steps

        def slope(t: float, x: Tensor) -> Tensor:
            return x - self(x, torch.full((len(x),), math.exp(t), dtype=x.dtype))

        for i in range(steps):
            u = t + i * h
            k1 = slope(u, x)
            k2 = slope(u + h / 2, x + k1 * (h / 2))
            k3 = slope(u + h / 2, x + k2 * (h / 2))
            k4 = slope(u + h, x + k3 * h)
            x = x + (k1 + 2 * k2 + 2 * k3 + k4) * (h / 6)
        return x


def data_set(data: Tensor) -> Mixture:
    """The denoiser of a finite data set (n, ...): softmax(-|x - x_i|^2 / 2 sigma^2) over it."""
    n = len(data)
    return Mixture(torch.full((n,), 1 / n), data, torch.zeros(n))


def mixture() -> Mixture:
    """The mixture that orders are measured on: three components in two dimensions, float64."""
    return Mixture(
        torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64),
        torch.tensor([[-1.0, 0.4], [0.8, 1.1], [0.5, -1.2]], dtype=torch.float64),
        torch.tensor([0.3, 0.5, 0.4], dtype=torch.float64),
    )


def normal(seed: int, *shape: int, std: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) * std


# Where orders of convergence are measured: far above the mixture's size, and below its parts'.
HI, LO = 40.0, 0.1


def grid(n: int) -> Tensor:
    """Karras et al.'s schedule of n steps from HI to LO, in float64, without a final 0."""
    return torch.linspace(HI ** (1 / 7), LO ** (1 / 7), n + 1, dtype=torch.float64) ** 7


@functools.cache
def reference() -> tuple[Mixture, Tensor, Tensor]:
    """The mixture, samples at HI, and where its ODE takes them at LO."""
    problem, x = mixture(), normal(0, 16, 2, dtype=torch.float64) * HI
    return problem, x, problem.ode_map(x, HI, LO)


def rms(x: Tensor) -> float:
    return x.pow(2).mean().sqrt().item()


class Impulses:
    """A noise sampler for exact variances: a Brownian path's increments as unit vectors.

    Between neighbouring `times` the path's increment is a row of the batch of its own, so a linear
    sampler's output, summed in squares over the batch, is its output's exact variance. Row 0 is for
    the initial noise. Times must hold every noise level that the sampler asks for.
    """

    def __init__(self, times: list[float]):
        self.times = sorted(set(times))

    def start(self, std: float) -> Tensor:
        x = torch.zeros(len(self.times), 1, dtype=torch.float64)
        x[0] = std
        return x

    def nearest(self, t: float) -> int:
        return min(range(len(self.times)), key=lambda i: abs(self.times[i] - float(t)))

    def __call__(self, sigma: float, sigma_next: float) -> Tensor:
        hi, lo = self.nearest(sigma), self.nearest(sigma_next)
        noise = torch.zeros(len(self.times), 1, dtype=torch.float64)
        for i in range(lo, hi):
            noise[i + 1] = math.sqrt(self.times[i + 1] - self.times[i])
        return noise / math.sqrt(self.times[hi] - self.times[lo])


def impulses(sigmas: Tensor, fractions: Iterable[float] = (1 / 3, 1 / 2, 2 / 3)) -> Impulses:
    """Impulses at a schedule's noise levels, and at fractions of its steps in log sigma."""
    host = sigmas.tolist()
    stages = [a * (b / a) ** r for a, b in pairwise(host) for r in fractions if b > 0]
    return Impulses([*host, *stages])
