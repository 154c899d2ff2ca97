"""DPM-Solver++ (arXiv:2211.01095): single-step, multistep, for the ODE and its SDE.

Steps are in lambda = -log sigma and in D, the denoised sample.
"""

import math
from functools import partial
from typing import Any

from torch import Tensor

from .context import Context
from .exponential import phi_1, phi_2, stage, toward
from .noise_plan import get_ancestral_step
from .runge_kutta import euler


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
        # By its slope, which in half precision widens x, as published.
        return euler(ctx, x, sigma, sigma_next, denoised, state)

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


def dpmpp_2s_flow(
    ctx: Context, x: Tensor, sigma: float, sigma_next: float, denoised: Tensor, state: Any
) -> tuple[Tensor, Any]:
    """DPM-Solver++(2S) of a rectified flow: sigma is a time t, lambda = log((1 - t) / t).

    From t = 1, where lambda isn't finite, the second evaluation is at t = 0.9999.
    """
    if sigma_next == 0:
        return euler(ctx, x, sigma, sigma_next, denoised, state)
    middle = 0.9999
    if sigma < 1:
        odds = sigma / (1 - sigma) * sigma_next / (1 - sigma_next)
        middle = math.sqrt(odds) / (1 + math.sqrt(odds))
    denoised_2 = ctx.denoise(toward(x, denoised, sigma, middle), middle)
    return toward(x, denoised_2, sigma, sigma_next), None


def dpmpp_2m(
    ctx: Context,
    x: Tensor,
    sigma: float,
    sigma_next: float,
    denoised: Tensor,
    state: Any,
    solver_type: str = "midpoint",
    lower_order_final: bool = False,
) -> tuple[Tensor, Any]:
    """DPM-Solver++(2M), second order (arXiv:2211.01095, algorithm 2).

    It serves the SDE as well: there the levels stretch every h by 1 + eta, and the ratios of
    neighbouring h, which are all that a multistep formula needs, stay as they are.
    lower_order_final: the last step is of first order, wherever it ends.
    """
    if sigma_next == 0:
        return toward(x, denoised, sigma, sigma_next), None
    h = math.log(sigma / sigma_next)
    x = toward(x, denoised, sigma, sigma_next)
    last = lower_order_final and len(ctx.ahead(sigma)) == 1
    if state is not None and not last:
        old_denoised, h_last = state
        x = x + (denoised - old_denoised) * (SOLVER_TYPES[solver_type](h) * h / h_last)
    return x, (denoised, h)


# The weight of the backward difference of D: half of phi_1, or phi_2 as an exponential Heun has it.
SOLVER_TYPES = {
    "midpoint": lambda h: phi_1(h) / 2,
    "heun": phi_2,
}


def dpmpp_3m(
    ctx: Context,
    x: Tensor,
    sigma: float,
    sigma_next: float,
    denoised: Tensor,
    state: Any,
    lower_order_final: bool = False,
) -> tuple[Tensor, Any]:
    """DPM-Solver++(3M): the third-order multistep form of arXiv:2211.01095.

    As published in k-diffusion the second divided difference has half of its Taylor weight, which
    makes it a second-order method with a smaller error constant.
    """
    if sigma_next == 0:
        return toward(x, denoised, sigma, sigma_next), None
    h = math.log(sigma / sigma_next)
    x = toward(x, denoised, sigma, sigma_next)
    w_2 = phi_2(h)
    w_3 = w_2 / h - 0.5
    past: tuple[tuple[Tensor, float], ...] = state or ()
    history = past[: ctx.order(sigma, 3, lower_order_final) - 1]
    if len(history) == 1:
        ((denoised_1, h_1),) = history
        x = x + (denoised - denoised_1) * (w_2 * h / h_1)
    elif len(history) == 2:
        (denoised_1, h_1), (denoised_2, h_2) = history
        r_0, r_1 = h_1 / h, h_2 / h
        d1_0 = (denoised - denoised_1) / r_0
        d1_1 = (denoised_1 - denoised_2) / r_1
        d2 = (d1_0 - d1_1) / (r_0 + r_1)
        x = x + (d1_0 + d2 * r_0) * w_2 - d2 * w_3
    return x, ((denoised, h), *past)[:2]
