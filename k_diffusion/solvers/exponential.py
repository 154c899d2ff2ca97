"""DPM-Solver++ steps of one interval each, in lambda = -log sigma (arXiv:2211.01095).

With a constant D the ODE's exact solution is x' = r x + (1 - r) D, r = sigma' / sigma = exp(-h).
"""

from typing import Any

from torch import Tensor

from .context import Context
from .levels import get_ancestral_step


def toward(x: Tensor, denoised: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """The exact solution for a constant denoiser: x' = r x + (1 - r) D, r = sigma_next / sigma."""
    return x * (sigma_next / sigma) + denoised * ((sigma - sigma_next) / sigma)


def dpmpp_2s(
    ctx: Context,
    x: Tensor,
    sigma: float,
    sigma_next: float,
    denoised: Tensor,
    state: Any,
    r: float = 0.5,
) -> tuple[Tensor, Any]:
    """DPM-Solver++(2S), second order: algorithm 1, evaluated at the fraction r of h."""
    if sigma_next == 0:
        return toward(x, denoised, sigma, sigma_next), None
    sigma_mid = sigma * (sigma_next / sigma) ** r
    denoised_2 = ctx.denoise(toward(x, denoised, sigma, sigma_mid), sigma_mid)
    fac = 1 / (2 * r)
    slope = denoised_2 if fac == 1 else denoised * (1 - fac) + denoised_2 * fac
    return toward(x, slope, sigma, sigma_next), None


def dpmpp_sde(
    ctx: Context,
    x: Tensor,
    sigma: float,
    sigma_next: float,
    denoised: Tensor,
    state: Any,
    eta: float = 1.0,
    r: float = 0.5,
) -> tuple[Tensor, Any]:
    """DPM-Solver++ (stochastic), two stages, each with an ancestral split of its interval.

    Both stages start at sigma, so their noise must be two increments of one Brownian path.
    """
    if sigma_next == 0:
        return toward(x, denoised, sigma, sigma_next), None
    sigma_mid = sigma * (sigma_next / sigma) ** r
    down, up = get_ancestral_step(sigma, sigma_mid, eta)
    x_2 = toward(x, denoised, sigma, down)
    if up:
        x_2 = x_2 + ctx.noise(sigma, sigma_mid) * up
    denoised_2 = ctx.denoise(x_2, sigma_mid)
    fac = 1 / (2 * r)
    slope = denoised_2 if fac == 1 else denoised * (1 - fac) + denoised_2 * fac
    down, up = get_ancestral_step(sigma, sigma_next, eta)
    x = toward(x, slope, sigma, down)
    if up:
        x = x + ctx.noise(sigma, sigma_next) * up
    return x, None
