"""ER-SDE solvers: an extended reverse-time SDE with a noise scale of one's choice.

arXiv:2309.06169, in variance-exploding form. A noise scale phi(sigma) = sigma g(sigma), g not
falling, gives an SDE with the same marginals; phi = sigma is the ODE, sigma^2 the usual SDE.
"""

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..common.text import unknown_name
from .context import Context
from .exponential import toward
from .noise_plan import Split
from .quadrature import integral

# log g of noise scales; eta multiplies it, and so leads from the ODE at 0 to each of them at 1.
Scale: TypeAlias = Callable[[Any], Any]
NOISE_SCALES: dict[str, Scale] = {
    "er_sde": lambda sigma: np.logaddexp(sigma**0.3, math.log(10)),
    "sde": lambda sigma: np.log(sigma),
}


def log_scale(noise_scale: str | Scale) -> Scale:
    """log g of a noise scale, a row of NOISE_SCALES or the function phi itself."""
    if not callable(noise_scale):
        if noise_scale not in NOISE_SCALES:
            raise unknown_name("noise_scale", noise_scale, NOISE_SCALES)
        return NOISE_SCALES[noise_scale]

    def log_g(sigma: Any) -> Any:
        phi = noise_scale(torch.as_tensor(np.asarray(sigma, dtype=np.float64)))
        return np.log(np.asarray(phi, dtype=np.float64)) - np.log(sigma)

    return log_g


def er_split(eta: float, log_g: Scale) -> Split:
    """Down by phi(sigma_next) / phi(sigma), the rest is noise, as the exact solution has it."""

    def split(sigma: float, sigma_next: float) -> tuple[float, float]:
        if not eta or sigma_next == 0:
            return sigma_next, 0.0
        log_ratio = eta * float(log_g(sigma_next) - log_g(sigma))
        return sigma_next * math.exp(log_ratio), sigma_next * math.sqrt(-math.expm1(2 * log_ratio))

    return split


def er_sde(
    ctx: Context,
    x: Tensor,
    sigma: float,
    sigma_next: float,
    denoised: Tensor,
    state: Any,
    eta: float = 1.0,
    log_g: Scale = NOISE_SCALES["er_sde"],
    order: int = 3,
    lower_order_final: bool = True,
) -> tuple[Tensor, Any]:
    """ER-SDE-Solver-1 to -3: the Taylor expansion of D in sigma.

    Its derivatives are those of the polynomial through the last values of D.
    """
    if sigma_next == 0:
        return denoised, None
    target = ctx.ahead(sigma)[0]
    x = toward(x, denoised, sigma, sigma_next)
    values = ((sigma, denoised), *(state or ()))[:order]
    n = min(ctx.order(sigma, order, lower_order_final), len(values))
    if n > 1:
        end = float(log_g(target))

        def phi_integral(power: int) -> float:
            """phi(target) times the integral of (s - sigma)^power / phi(s), target to sigma."""

            def in_log(u: np.ndarray) -> np.ndarray:
                s = np.exp(u)
                return (s - sigma) ** power * np.exp(eta * (end - log_g(s)))

            return target * integral(in_log, math.log(target), math.log(sigma))

        sigma_1, denoised_1 = values[1]
        slope = (denoised - denoised_1) * (1 / (sigma - sigma_1))
        if n > 2:
            sigma_2, denoised_2 = values[2]
            slope_1 = (denoised_1 - denoised_2) * (1 / (sigma_1 - sigma_2))
            half_curve = (slope - slope_1) * (1 / (sigma - sigma_2))
            slope = slope + half_curve * (sigma - sigma_1)
            x = x + half_curve * ((target - sigma) ** 2 + 2 * phi_integral(1))
        x = x + slope * (target - sigma + phi_integral(0))
    return x, values
