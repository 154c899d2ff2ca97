"""PNDM (Liu et al. 2022, arXiv:2202.09778): pseudo numerical methods for the ODE, in sigma.

The paper's transfer part is DDIM, which in sigma moves along a straight line: its methods are the
classical ones for dx/dsigma.
"""

from typing import Any

from torch import Tensor

from .adams_bashforth import ipndm_weights
from .context import Context
from .runge_kutta import euler


def runge_kutta_4(ctx: Context, x: Tensor, sigma: float, sigma_next: float, d: Tensor) -> Tensor:
    """A step by the average of four slopes, d and three new ones. x, d: (n, ...)."""
    h, middle = sigma_next - sigma, (sigma + sigma_next) / 2

    def slope(d: Tensor, at: float) -> Tensor:
        y = x + d * (at - sigma)
        return ctx.to_d(y, at, ctx.denoise(y, at))

    d_2 = slope(d, middle)
    d_3 = slope(d_2, middle)
    d_4 = slope(d_3, sigma_next)
    return x + (d + (d_2 + d_3) * 2 + d_4) * (h / 6)


def pndm(
    ctx: Context, x: Tensor, sigma: float, sigma_next: float, denoised: Tensor, state: Any
) -> tuple[Tensor, Any]:
    """F-PNDM: three Runge-Kutta steps, then Adams-Bashforth's of order 4."""
    if sigma_next == 0:
        return euler(ctx, x, sigma, sigma_next, denoised, state)
    sigmas, slopes = state or ((), ())
    sigmas, slopes = (sigma, *sigmas)[:4], (ctx.to_d(x, sigma, denoised), *slopes)[:4]
    if len(slopes) < 4:
        return runge_kutta_4(ctx, x, sigma, sigma_next, slopes[0]), (sigmas, slopes)
    for w, d in zip(ipndm_weights(sigmas, sigma_next), slopes):
        x = x + d * w
    return x, (sigmas, slopes)
