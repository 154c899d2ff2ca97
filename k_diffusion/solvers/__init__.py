"""Solvers of the probability-flow ODE and its SDEs, as pure steps.

A step takes the sample from one noise level to the next one and reads like its paper:

    def euler(ctx, x, sigma, sigma_next, denoised, state):
        return x + ctx.to_d(x, sigma, denoised) * (sigma_next - sigma), None

It draws no random numbers and knows no progress bar or callback. Noise levels are Python floats,
so coefficients cost the device nothing. `denoised` is the model's output at (x, sigma); `state` is
what the step returned last time, None at first. The loop, and every draw, live in `sampling.py`. It
never calls a step of no length (sigma_next == sigma).
"""

from .adams_bashforth import gradient_estimation, linear_multistep_coeff, lms
from .context import Context, Step
from .dpm_solver import DPMSolver, PIDStepSizeController
from .dpmpp import dpmpp_2m, dpmpp_2s, dpmpp_3m, dpmpp_sde
from .noise_plan import get_ancestral_step, get_sde_step
from .runge_kutta import dpm_2, euler, heun, heunpp2, leap
from .seeds import seeds_2, seeds_3

__all__ = [
    "Context",
    "DPMSolver",
    "PIDStepSizeController",
    "Step",
    "dpm_2",
    "dpmpp_2m",
    "dpmpp_2s",
    "dpmpp_3m",
    "dpmpp_sde",
    "euler",
    "get_ancestral_step",
    "get_sde_step",
    "gradient_estimation",
    "heun",
    "heunpp2",
    "leap",
    "linear_multistep_coeff",
    "lms",
    "seeds_2",
    "seeds_3",
]
