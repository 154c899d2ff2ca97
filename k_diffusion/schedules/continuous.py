"""Noise level schedules: `n` steps from `sigma_max` down to `sigma_min`, then 0.

Every schedule is a 1-D tensor of n + 1 strictly decreasing values that ends in 0. It is computed on
the CPU (so that every device gets the same numbers), is float32, and is moved to `device`. All of
them raise ValueError unless n >= 1 and 0 < sigma_min < sigma_max < inf. Those that start from a
model's table of noise levels are in `table`.
"""

import math

import numpy as np
import torch
from torch import Tensor

from ..common import numbers
from .grid import Number, append_zero, check_schedule, finish


def get_sigmas_karras(
    n: int,
    sigma_min: Number,
    sigma_max: Number,
    rho: float = 7.0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Equally spaced in sigma^(1 / rho): Karras et al. 2022, equation 5.

    A larger rho puts more steps at low noise levels. Returns (n + 1,).
    """
    lo, hi = check_schedule(n, sigma_min, sigma_max)
    if not 0 < rho < math.inf:
        raise ValueError(f"rho must be positive and finite, got {rho}")
    root_min, root_max = lo ** (1 / rho), hi ** (1 / rho)
    ramp = torch.linspace(0, 1, n, dtype=torch.float32)
    return append_zero((root_max + ramp * (root_min - root_max)) ** rho).to(device)


def get_sigmas_exponential(
    n: int, sigma_min: Number, sigma_max: Number, device: torch.device | str = "cpu"
) -> Tensor:
    """Equally spaced in log sigma. Returns (n + 1,)."""
    lo, hi = check_schedule(n, sigma_min, sigma_max)
    log_sigmas = torch.linspace(math.log(hi), math.log(lo), n, dtype=torch.float32)
    return append_zero(log_sigmas.exp()).to(device)


def get_sigmas_polyexponential(
    n: int,
    sigma_min: Number,
    sigma_max: Number,
    rho: float = 1.0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Polynomial in log sigma, of degree rho; exponential at rho = 1. Returns (n + 1,)."""
    lo, hi = check_schedule(n, sigma_min, sigma_max)
    if not 0 < rho < math.inf:
        raise ValueError(f"rho must be positive and finite, got {rho}")
    ramp = torch.linspace(1, 0, n, dtype=torch.float32) ** rho
    log_sigmas = ramp * (math.log(hi) - math.log(lo)) + math.log(lo)
    return append_zero(log_sigmas.exp()).to(device)


def get_sigmas_vp(
    n: int,
    beta_d: float = 19.9,
    beta_min: float = 0.1,
    eps_s: float = 1e-3,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The continuous VP schedule, equally spaced in time from 1 to eps_s.

    sigma(t)^2 = exp(beta_d t^2 / 2 + beta_min t) - 1: Karras et al. 2022, table 1. Returns
    (n + 1,).
    """
    if n < 1:
        raise ValueError(f"a schedule needs at least one step, got n = {n}")
    if not 0 < eps_s < 1:
        raise ValueError(f"eps_s must lie between 0 and 1, got {eps_s}")
    numbers.non_negative(beta_d=beta_d, beta_min=beta_min)
    t = torch.linspace(1, eps_s, n, dtype=torch.float32)
    return append_zero(torch.sqrt(torch.exp(beta_d * t**2 / 2 + beta_min * t) - 1)).to(device)


def vp_between(
    n: int,
    sigma_min: Number,
    sigma_max: Number,
    eps_s: float | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The VP schedule whose noise levels at times 1 and eps_s are sigma_max and sigma_min.

    Karras et al. 2022, appendix C: two linear equations in beta_d and beta_min. eps_s: 1e-3, or as
    late as it takes for beta, whose integral is log(1 + sigma^2), not to fall with time. Raises
    ValueError for an eps_s at which sigma would.
    """
    lo, hi = check_schedule(n, sigma_min, sigma_max)
    log_lo, log_hi = math.log1p(lo**2), math.log1p(hi**2)
    eps_s = max(1e-3, log_lo / log_hi) if eps_s is None else eps_s
    if not 0 < eps_s < 1:
        raise ValueError(f"eps_s must lie between 0 and 1, got {eps_s}")
    beta_d = 2 * (log_lo / eps_s - log_hi) / (eps_s - 1)
    beta_min = log_hi - beta_d / 2
    if beta_min + beta_d < 0:
        raise ValueError(
            f"no VP schedule falls from {hi:g} to {lo:g} with eps_s = {eps_s:g}; pass a larger one"
        )
    t = np.linspace(1, eps_s, n)
    return finish(np.sqrt(np.expm1(beta_d * t**2 / 2 + beta_min * t)), device)


def get_sigmas_linear(
    n: int, sigma_min: Number, sigma_max: Number, device: torch.device | str = "cpu"
) -> Tensor:
    """Equally spaced in sigma. Returns (n + 1,)."""
    lo, hi = check_schedule(n, sigma_min, sigma_max)
    return finish(np.linspace(hi, lo, n), device)


def get_sigmas_kl_optimal(
    n: int,
    sigma_min: Number,
    sigma_max: Number,
    sigma_data: float = 1.0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Equally spaced in atan(sigma / sigma_data): Align Your Steps (arXiv:2404.14507), theorem 3.1.

    For Gaussian data of standard deviation sigma_data no other levels bring the samples of DDIM
    (Euler's method) closer to the data in KL divergence. Returns (n + 1,).
    """
    lo, hi = check_schedule(n, sigma_min, sigma_max)
    if not 0 < sigma_data < math.inf:
        raise ValueError(f"sigma_data must be positive, got {sigma_data}")
    angles = np.linspace(math.atan(hi / sigma_data), math.atan(lo / sigma_data), n)
    return finish(sigma_data * np.tan(angles), device)


def get_sigmas_cosine(
    n: int, sigma_min: Number, sigma_max: Number, device: torch.device | str = "cpu"
) -> Tensor:
    """The cosine schedule of Nichol & Dhariwal 2021 (arXiv:2102.09672), equally spaced in time.

    Its signal rate is cos^2 of an angle, so sigma is the angle's tangent, which the KL-optimal
    schedule for sigma_data = 1 spaces equally as well. Returns (n + 1,).
    """
    return get_sigmas_kl_optimal(n, sigma_min, sigma_max, device=device)


def get_sigmas_laplace(
    n: int,
    sigma_min: Number,
    sigma_max: Number,
    mu: float = 0.0,
    beta: float = 0.5,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Quantiles of a Laplace distribution of log sigma: Hang et al. 2024 (arXiv:2407.03297).

    mu: its location, around which steps are densest. beta: its scale. It is truncated to the ends,
    so that no step is wasted beyond them. Returns (n + 1,).
    """
    lo, hi = check_schedule(n, sigma_min, sigma_max)
    if not 0 < beta < math.inf or not math.isfinite(mu):
        raise ValueError(f"mu must be finite and beta positive, got mu = {mu} and beta = {beta}")

    def tails(log_sigma: float) -> tuple[float, float]:
        """The probabilities below and above."""
        near = 0.5 * math.exp(-abs(log_sigma - mu) / beta)
        return (near, 1 - near) if log_sigma < mu else (1 - near, near)

    # Both tails are interpolated: 1 - p would lose the small one's digits.
    below, above = (np.linspace(a, b, n) for a, b in zip(tails(math.log(hi)), tails(math.log(lo))))
    # A tail that underflows to 0 gives levels that aren't finite, which `finish` reports.
    with np.errstate(divide="ignore", over="ignore"):
        small = np.log(2 * np.minimum(below, above))
        levels = np.exp(mu + beta * np.where(below < above, small, -small))
    return finish(levels, device)


def get_sigmas_linear_quadratic(
    n: int,
    sigma_min: Number,
    sigma_max: Number,
    threshold: float = 0.025,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Short even steps at first, then growing ones: Movie Gen (arXiv:2410.13720).

    In the time of a flow model, t = sigma / (1 + sigma), the first half of the steps covers the
    share `threshold` of the way, the second half is a parabola that goes on from there without a
    kink. Returns (n + 1,). Raises ValueError unless 0 < threshold < 1/3.
    """
    lo, hi = check_schedule(n, sigma_min, sigma_max)
    if not 0 < threshold < 1 / 3:
        raise ValueError(f"threshold must lie between 0 and 1/3, got {threshold}")
    linear = (n - 1) // 2
    steps = np.arange(n)
    if linear:
        rest = n - 1 - linear
        slope = threshold / linear
        curve = (1 - threshold - slope * rest) / rest**2
        way = slope * steps + curve * np.maximum(steps - linear, 0) ** 2
    else:
        way = steps.astype(np.float64)
    start, end = hi / (1 + hi), lo / (1 + lo)
    t = start + (end - start) * way
    return finish(t / (1 - t), device)
