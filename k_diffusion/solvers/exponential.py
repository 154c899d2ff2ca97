"""DPM-Solver++ steps of one interval each, in lambda = -log sigma (arXiv:2211.01095).

With a constant D the ODE's exact solution is x' = r x + (1 - r) D, r = sigma' / sigma = exp(-h).
"""

from functools import partial
from typing import Any

from torch import Tensor

from .context import Context
from .levels import get_ancestral_step


def toward(x: Tensor, denoised: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """The exact solution for a constant denoiser: x' = r x + (1 - r) D, r = sigma_next / sigma."""
    return x * (sigma_next / sigma) + denoised * ((sigma - sigma_next) / sigma)


def stage(sigma: float, sigma_next: float, r: float) -> float:
    """The noise level at the fraction r of a step in log sigma."""
    return sigma * (sigma_next / sigma) ** r


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

    def ancestral(denoised: Tensor, sigma_next: float) -> Tensor:
        down, up = get_ancestral_step(sigma, sigma_next, eta)
        y = toward(x, denoised, sigma, down)
        return y + ctx.noise(sigma, sigma_next) * up if up else y

    sigma_2 = stage(sigma, sigma_next, r)
    denoised_2 = ctx.denoise(ancestral(denoised, sigma_2), sigma_2)
    fac = 1 / (2 * r)
    mean = denoised_2 if fac == 1 else denoised * (1 - fac) + denoised_2 * fac
    return ancestral(mean, sigma_next), None


# DPM-Solver++(2S), second order: algorithm 1.
dpmpp_2s = partial(dpmpp_sde, eta=0.0)
