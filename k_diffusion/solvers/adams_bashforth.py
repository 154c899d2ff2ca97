"""Adams-Bashforth methods in sigma: one model evaluation per step, order from earlier slopes."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor

from .context import Context
from .quadrature import lagrange_integrals
from .vp import EDM_BETA_D, EDM_BETA_MIN, vp_time


def linear_multistep_coeff(order: int, t: Sequence[float], i: int, j: int) -> float:
    """The weight of the slope at t[i - j] in an Adams-Bashforth step from t[i] to t[i + 1].

    It is the integral of the Lagrange basis polynomial on t[i], ..., t[i - order + 1] that is 1 at
    t[i - j]. Raises ValueError if order > i + 1: there aren't as many slopes yet.
    """
    if order - 1 > i:
        raise ValueError(f"step {i} has {i + 1} slopes, too few for order {order}; lower the order")
    origin = float(t[i])
    h = float(t[i + 1]) - origin
    nodes = [float(t[i - k]) - origin for k in range(order)]
    basis = [1.0]  # coefficients of powers of the distance from t[i]
    for k, node in enumerate(nodes):
        if k != j:
            scale = 1 / (nodes[j] - node)
            basis = [(a - node * b) * scale for a, b in zip([0.0, *basis], [*basis, 0.0])]
    integral = 0.0
    for m in reversed(range(order)):
        integral = integral * h + basis[m] / (m + 1)
    return integral * h


# (noise levels of the slopes, newest first; sigma_next) -> the weights of the slopes
Weights: TypeAlias = Callable[[Sequence[float], float], list[float]]


def adams_bashforth(sigmas: Sequence[float], sigma_next: float) -> list[float]:
    """The integrals over sigma of the Lagrange polynomials in sigma."""
    n = len(sigmas)
    grid = (*reversed(sigmas), sigma_next)
    return [linear_multistep_coeff(n, grid, n - 1, j) for j in range(n)]


def lms(
    ctx: Context,
    x: Tensor,
    sigma: float,
    sigma_next: float,
    denoised: Tensor,
    state: Any,
    order: int = 4,
    lower_order_final: bool = False,
    weights: Weights = adams_bashforth,
    euler_to_0: bool = False,
) -> tuple[Tensor, Any]:
    """Adams-Bashforth in sigma, of order 1 at first and then up to `order`.

    weights: of the slopes, newest first, from their noise levels and sigma_next; by default the
    integrals of their Lagrange polynomials in sigma. euler_to_0: a step to 0 is of order 1.
    """
    sigmas, slopes = state or ((), ())
    sigmas = (sigma, *sigmas)[:order]
    slopes = (ctx.to_d(x, sigma, denoised), *slopes)[:order]
    n = min(ctx.order(sigma, order, lower_order_final), len(slopes))
    n = 1 if euler_to_0 and sigma_next == 0 else n
    for w, d in zip(weights(sigmas[:n], sigma_next), slopes):
        x = x + d * w
    return x, (sigmas, slopes)


def ipndm_weights(sigmas: Sequence[float], sigma_next: float) -> list[float]:
    """Adams-Bashforth's weights on an even grid, whatever the grid is."""
    n = len(sigmas)
    h = sigma_next - sigmas[0]
    return [h * linear_multistep_coeff(n, range(n + 1), n - 1, j) for j in range(n)]


def deis_weights(sigmas: Sequence[float], sigma_next: float, time: str) -> list[float]:
    """The integrals over sigma of the Lagrange polynomials in a time: tAB-DEIS (2204.13902)."""
    to_time = DEIS_TIMES[time]
    nodes = [float(to_time(np.float64(sigma))) for sigma in sigmas]
    return lagrange_integrals(nodes, sigmas[0], sigma_next, np.ones_like, to_time)


# The times in which DEIS extrapolates eps.
DEIS_TIMES: dict[str, Callable[[Any], Any]] = {
    "tab": partial(vp_time, beta_d=EDM_BETA_D, beta_min=EDM_BETA_MIN),
    "vp": vp_time,
    "log_rho": np.log,
    "rho": lambda sigma: sigma,
    "rhoab": lambda sigma: sigma,
}


def gradient_estimation(
    ctx: Context,
    x: Tensor,
    sigma: float,
    sigma_next: float,
    denoised: Tensor,
    state: Any,
    gamma: float = 2.0,
) -> tuple[Tensor, Any]:
    """Euler's method along gamma times the slope less gamma - 1 times the last one.

    Permenter & Yuan 2023 (arXiv:2306.04848), algorithm 2. The step to 0 is plain.
    """
    d = ctx.to_d(x, sigma, denoised)
    slope = d if state is None or sigma_next == 0 else d * gamma + state * (1 - gamma)
    return x + slope * (sigma_next - sigma), d
