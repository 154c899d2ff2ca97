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
