"""What exponential solvers share: exact steps in lambda = -log sigma for a polynomial D.

With a constant D the ODE's exact solution is x' = r x + (1 - r) D, r = sigma' / sigma = exp(-h).
"""

import math

from torch import Tensor


def phi_1(h: float) -> float:
    """The integral of e^(u - h) from 0 to h: the weight of a constant D."""
    return -math.expm1(-h)


def phi_2(h: float) -> float:
    """The integral of e^(u - h) u / h from 0 to h: the weight of a linear term that ends at 1."""
    return 1 + math.expm1(-h) / h


def toward(x: Tensor, denoised: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """The exact solution for a constant denoiser: x' = r x + (1 - r) D, r = sigma_next / sigma.

    x, denoised: (n, ...).
    """
    return x * (sigma_next / sigma) + denoised * ((sigma - sigma_next) / sigma)


def stage(sigma: float, sigma_next: float, r: float) -> float:
    """The noise level at the fraction r of a step in log sigma."""
    return sigma * (sigma_next / sigma) ** r
