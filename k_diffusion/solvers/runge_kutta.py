"""Runge-Kutta steps of dx/dsigma = (x - D(x; sigma)) / sigma, in sigma."""

import math
from typing import Any

from torch import Tensor

from .context import Context


def euler(
    ctx: Context, x: Tensor, sigma: float, sigma_next: float, denoised: Tensor, state: Any
) -> tuple[Tensor, Any]:
    """Euler's method, first order."""
    return x + ctx.to_d(x, sigma, denoised) * (sigma_next - sigma), None


def leap(
    ctx: Context, x: Tensor, sigma: float, sigma_next: float, denoised: Tensor, state: Any
) -> tuple[Tensor, Any]:
    """All the way down: the denoised sample."""
    return denoised, None


def heun(
    ctx: Context, x: Tensor, sigma: float, sigma_next: float, denoised: Tensor, state: Any
) -> tuple[Tensor, Any]:
    """Heun's method, second order: Karras et al. 2022 (arXiv:2206.00364), algorithm 1."""
    d = ctx.to_d(x, sigma, denoised)
    dt = sigma_next - sigma
    x_2 = x + d * dt
    if sigma_next == 0:
        return x_2, None
    d_2 = ctx.to_d(x_2, sigma_next, ctx.denoise(x_2, sigma_next))
    return x + (d + d_2) * (dt / 2), None


def dpm_2(
    ctx: Context, x: Tensor, sigma: float, sigma_next: float, denoised: Tensor, state: Any
) -> tuple[Tensor, Any]:
    """The midpoint method with its midpoint in log sigma, second order.

    After DPM-Solver-2 (arXiv:2206.00927, algorithm 1).
    """
    d = ctx.to_d(x, sigma, denoised)
    if sigma_next == 0:
        return x - d * sigma, None
    sigma_mid = math.sqrt(sigma * sigma_next)
    x_2 = x + d * (sigma_mid - sigma)
    d_2 = ctx.to_d(x_2, sigma_mid, ctx.denoise(x_2, sigma_mid))
    return x + d_2 * (sigma_next - sigma), None


def heunpp2(
    ctx: Context, x: Tensor, sigma: float, sigma_next: float, denoised: Tensor, state: Any
) -> tuple[Tensor, Any]:
    """Heun's method with a second look ahead, to the noise level beyond sigma_next: third order.

    The slopes at 0, 1 and c = 1 + q of the step, q = sigma_next / sigma, have the only weights that
    meet the order conditions (Hairer, Nørsett & Wanner 1993, section II.1). They grow as 1 / q:
    where a step more than halves the noise level it is Heun's.
    """
    q = sigma_next / sigma
    if q < 0.5:
        return heun(ctx, x, sigma, sigma_next, denoised, state)
    d = ctx.to_d(x, sigma, denoised)
    dt = sigma_next - sigma
    x_2 = x + d * dt
    d_2 = ctx.to_d(x_2, sigma_next, ctx.denoise(x_2, sigma_next))
    c, sigma_3 = 1 + q, sigma_next * q
    x_3 = x + d * (c**2 * dt) - d_2 * (c * q * dt)
    d_3 = ctx.to_d(x_3, sigma_3, ctx.denoise(x_3, sigma_3))
    b_2, b_3 = 0.5 + 1 / (6 * q), -1 / (6 * c * q)
    return x + d * ((1 - b_2 - b_3) * dt) + d_2 * (b_2 * dt) + d_3 * (b_3 * dt), None
