"""SEEDS: exponential Runge-Kutta steps of the reverse-time SDE (arXiv:2305.14267), in D.

With eta the time is stretched: all exponentials run over (1 + eta) h, h = log(sigma / sigma_next),
which at eta = 0 leaves the ODE. The noise of a stage is what one path of the SDE has gathered on
the way to it.
"""

import math
from typing import Any

from torch import Tensor

from .context import Context
from .exponential import phi_1, phi_2, stage, toward
from .noise_plan import get_sde_step


def _gather(
    ctx: Context, noise: Tensor | float, sigma: float, sigma_next: float, eta: float
) -> Tensor | float:
    """The noise gathered by sigma_next, from that at sigma: it decays, and more is added."""
    down, up = get_sde_step(sigma, sigma_next, eta)
    return noise * (down / sigma) + ctx.noise(sigma, sigma_next) * up if up else noise


def _first(
    ctx: Context, x: Tensor, sigma: float, sigma_2: float, denoised: Tensor, eta: float
) -> tuple[Tensor, Tensor | float]:
    """The first stage: D at sigma_2, and the noise gathered by then."""
    noise = _gather(ctx, 0.0, sigma, sigma_2, eta)
    x_2 = toward(x, denoised, sigma, get_sde_step(sigma, sigma_2, eta)[0]) + noise
    return ctx.denoise(x_2, sigma_2), noise


def seeds_2(
    ctx: Context,
    x: Tensor,
    sigma: float,
    sigma_next: float,
    denoised: Tensor,
    state: Any,
    eta: float = 1.0,
    r: float = 0.5,
    solver_type: str = "phi_1",
) -> tuple[Tensor, Any]:
    """SEEDS-2: two stages, the second at the fraction r of the step."""
    if sigma_next == 0:
        return denoised, None
    sigma_2 = sigma_next if r == 1 else stage(sigma, sigma_next, r)
    denoised_2, noise = _first(ctx, x, sigma, sigma_2, denoised, eta)
    noise = _gather(ctx, noise, sigma_2, sigma_next, eta)
    x = toward(x, denoised, sigma, get_sde_step(sigma, sigma_next, eta)[0])
    weight = SOLVER_TYPES[solver_type]((1 + eta) * math.log(sigma / sigma_next)) / r
    return x + (denoised_2 - denoised) * weight + noise, None


# The weight of the second stage at r = 1: half of phi_1, or the exact one of a linear D.
SOLVER_TYPES = {
    "phi_1": lambda h: phi_1(h) / 2,
    "phi_2": phi_2,
}


def seeds_3(
    ctx: Context,
    x: Tensor,
    sigma: float,
    sigma_next: float,
    denoised: Tensor,
    state: Any,
    eta: float = 1.0,
    r_1: float = 1 / 3,
    r_2: float = 2 / 3,
) -> tuple[Tensor, Any]:
    """SEEDS-3: three stages, at the fractions r_1 and r_2 of the step."""
    if sigma_next == 0:
        return denoised, None
    sigma_2, sigma_3 = (stage(sigma, sigma_next, r) for r in (r_1, r_2))
    h = (1 + eta) * math.log(sigma / sigma_next)
    denoised_2, noise = _first(ctx, x, sigma, sigma_2, denoised, eta)
    slope = (denoised_2 - denoised) * (1 / r_1)
    noise = _gather(ctx, noise, sigma_2, sigma_3, eta)
    x_3 = toward(x, denoised, sigma, get_sde_step(sigma, sigma_3, eta)[0])
    x_3 = x_3 + slope * (r_2 * phi_2(r_2 * h)) + noise
    slope = (ctx.denoise(x_3, sigma_3) - denoised) * (1 / r_2)
    noise = _gather(ctx, noise, sigma_3, sigma_next, eta)
    x = toward(x, denoised, sigma, get_sde_step(sigma, sigma_next, eta)[0])
    return x + slope * phi_2(h) + noise, None
