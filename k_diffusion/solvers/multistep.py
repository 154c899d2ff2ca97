"""Multistep solvers: one model evaluation a step, a higher order from the steps before."""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .context import Context
from .exponential import toward


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


def lms(
    ctx: Context,
    x: Tensor,
    sigma: float,
    sigma_next: float,
    denoised: Tensor,
    state: Any,
    order: int = 4,
) -> tuple[Tensor, Any]:
    """Adams-Bashforth on an uneven grid in sigma, of order 1 at first and then up to `order`."""
    sigmas, slopes = state or ((), ())
    sigmas = (*sigmas, sigma)[-order:]
    slopes = (*slopes, ctx.to_d(x, sigma, denoised))[-order:]
    grid, n = (*sigmas, sigma_next), len(slopes)
    for j, d in enumerate(reversed(slopes)):
        x = x + d * linear_multistep_coeff(n, grid, n - 1, j)
    return x, (sigmas, slopes)


def dpmpp_2m(
    ctx: Context,
    x: Tensor,
    sigma: float,
    sigma_next: float,
    denoised: Tensor,
    state: Any,
    solver_type: str = "midpoint",
) -> tuple[Tensor, Any]:
    """DPM-Solver++(2M), second order (arXiv:2211.01095, algorithm 2).

    It serves the SDE as well: there the levels stretch every h by 1 + eta, and the ratios of
    neighbouring h, which are all that a multistep formula needs, stay as they are.
    """
    if sigma_next == 0:
        return toward(x, denoised, sigma, sigma_next), None
    h = math.log(sigma / sigma_next)
    x = toward(x, denoised, sigma, sigma_next)
    if state is not None:
        old_denoised, h_last = state
        x = x + (denoised - old_denoised) * (SOLVER_TYPES[solver_type](h) * h / h_last)
    return x, (denoised, h)


# The weight of the backward difference of D: half of phi_1, or phi_2 as an exponential Heun has it.
SOLVER_TYPES = {
    "midpoint": lambda h: -math.expm1(-h) / 2,
    "heun": lambda h: 1 + math.expm1(-h) / h,
}


def dpmpp_3m(
    ctx: Context, x: Tensor, sigma: float, sigma_next: float, denoised: Tensor, state: Any
) -> tuple[Tensor, Any]:
    """DPM-Solver++(3M): the third-order multistep form of arXiv:2211.01095.

    As published in k-diffusion the second divided difference has half of its Taylor weight, which
    makes it a second-order method with a smaller error constant.
    """
    if sigma_next == 0:
        return toward(x, denoised, sigma, sigma_next), None
    h = math.log(sigma / sigma_next)
    x = toward(x, denoised, sigma, sigma_next)
    phi_2 = 1 + math.expm1(-h) / h
    phi_3 = phi_2 / h - 0.5
    history: tuple[tuple[Tensor, float], ...] = state or ()
    if len(history) == 1:
        ((denoised_1, h_1),) = history
        x = x + (denoised - denoised_1) * (phi_2 * h / h_1)
    elif len(history) == 2:
        (denoised_1, h_1), (denoised_2, h_2) = history
        r_0, r_1 = h_1 / h, h_2 / h
        d1_0 = (denoised - denoised_1) / r_0
        d1_1 = (denoised_1 - denoised_2) / r_1
        d2 = (d1_0 - d1_1) / (r_0 + r_1)
        x = x + (d1_0 + d2 * r_0) * phi_2 - d2 * phi_3
    return x, ((denoised, h), *history)[:2]
