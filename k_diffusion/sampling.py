"""Samplers: from noise to samples by a denoiser, one step after the other.

    sigmas = get_sigmas_karras(50, sigma_min, sigma_max)
    x = sample_euler(model, torch.randn(shape) * sigmas[0], sigmas)

What all samplers share:

model: (x, sigma, **extra_args) -> denoised, all shaped (n, ...) but sigma: (n,).
x: (n, ...), noise of standard deviation sigmas[0], or a noisy sample to go on from.
sigmas: (steps + 1,), decreasing, usually ending in 0; float16 to float64, on any device, or a
    sequence of floats. Equal neighbours are a step of no length. Ascending sigmas run an ODE
    sampler backwards, from a sample to its noise.
extra_args: keyword arguments for the model.
callback: called each step with a dict of `x` (before the step), `i`, `sigma`, `sigma_hat` (the
    noise level after churn), `denoised`. Whatever it raises ends the sampling and propagates.
disable: hides the progress bar; None hides it where there's no terminal.
noise_sampler: (sigma, sigma_next) -> unit Gaussian noise like x; see `make_noise_sampler`.

They return the sample at sigmas[-1], and raise ValueError where sigmas are no schedule (not 1-D,
NaN, negative, going up and down, ascending though noise is added), or the model returns another
shape.

Noise levels are read once, and all coefficients computed in float64 on the host: no step waits for
the device. Pass sigmas as a sequence of floats to compile a whole run with `fullgraph=True`.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import trange

from .likelihood import bits_per_dim as bits_per_dim
from .likelihood import log_likelihood as log_likelihood
from .noise import BatchedBrownianTree as BatchedBrownianTree
from .noise import BrownianTreeNoiseSampler as BrownianTreeNoiseSampler
from .noise import SeededNoiseSampler as SeededNoiseSampler
from .noise import ask
from .noise import randn_per_seed as randn_per_seed
from .ode_samplers import sample_ddim as sample_ddim
from .ode_samplers import sample_deis as sample_deis
from .ode_samplers import sample_gradient_estimation as sample_gradient_estimation
from .ode_samplers import sample_heunpp2 as sample_heunpp2
from .ode_samplers import sample_ipndm as sample_ipndm
from .ode_samplers import sample_ipndm_v as sample_ipndm_v
from .ode_samplers import sample_res_multistep as sample_res_multistep
from .ode_samplers import sample_uni_pc as sample_uni_pc
from .published_samplers import sample_dpm_2 as sample_dpm_2
from .published_samplers import sample_dpm_2_ancestral as sample_dpm_2_ancestral
from .published_samplers import sample_dpm_adaptive as sample_dpm_adaptive
from .published_samplers import sample_dpm_fast as sample_dpm_fast
from .published_samplers import sample_dpmpp_2m as sample_dpmpp_2m
from .published_samplers import sample_dpmpp_2m_sde as sample_dpmpp_2m_sde
from .published_samplers import sample_dpmpp_2s_ancestral as sample_dpmpp_2s_ancestral
from .published_samplers import sample_dpmpp_3m_sde as sample_dpmpp_3m_sde
from .published_samplers import sample_dpmpp_sde as sample_dpmpp_sde
from .published_samplers import sample_euler as sample_euler
from .published_samplers import sample_euler_ancestral as sample_euler_ancestral
from .published_samplers import sample_heun as sample_heun
from .published_samplers import sample_lms as sample_lms
from .schedules import SCHEDULES as SCHEDULES
from .schedules import Sigmas, positive_range, read_sigmas
from .schedules import append_zero as append_zero
from .schedules import discard_penultimate as discard_penultimate
from .schedules import get_sigmas_cosine as get_sigmas_cosine
from .schedules import get_sigmas_exponential as get_sigmas_exponential
from .schedules import get_sigmas_karras as get_sigmas_karras
from .schedules import get_sigmas_kl_optimal as get_sigmas_kl_optimal
from .schedules import get_sigmas_laplace as get_sigmas_laplace
from .schedules import get_sigmas_linear as get_sigmas_linear
from .schedules import get_sigmas_linear_quadratic as get_sigmas_linear_quadratic
from .schedules import get_sigmas_polyexponential as get_sigmas_polyexponential
from .schedules import get_sigmas_vp as get_sigmas_vp
from .schedules import make_sigmas as make_sigmas
from .sde_samplers import sample_ddpm as sample_ddpm
from .sde_samplers import sample_er_sde as sample_er_sde
from .sde_samplers import sample_lcm as sample_lcm
from .sde_samplers import sample_res_multistep_ancestral as sample_res_multistep_ancestral
from .sde_samplers import sample_restart as sample_restart
from .sde_samplers import sample_sa_solver as sample_sa_solver
from .sde_samplers import sample_seeds_2 as sample_seeds_2
from .sde_samplers import sample_seeds_3 as sample_seeds_3
from .solvers import DPMSolver as DPMSolver
from .solvers import PIDStepSizeController as PIDStepSizeController
from .solvers import context
from .solvers import get_ancestral_step as get_ancestral_step
from .solvers import linear_multistep_coeff as linear_multistep_coeff
from .solvers.door import NO_NOISE, Args, Callback, Model, Noise, NoiseSampler
from .solvers.registry import SAMPLERS as SAMPLERS
from .solvers.registry import SamplerInfo as SamplerInfo
from .solvers.registry import get_sampler as get_sampler
from .table_schedules import TABLE_SCHEDULES as TABLE_SCHEDULES
from .table_schedules import get_sigmas_align_your_steps as get_sigmas_align_your_steps
from .table_schedules import get_sigmas_beta as get_sigmas_beta
from .table_schedules import get_sigmas_ddim_uniform as get_sigmas_ddim_uniform
from .table_schedules import get_sigmas_normal as get_sigmas_normal
from .table_schedules import get_sigmas_sgm_uniform as get_sigmas_sgm_uniform
from .table_schedules import get_sigmas_simple as get_sigmas_simple
from .utils import append_dims


def to_d(x: Tensor, sigma: Tensor | float, denoised: Tensor) -> Tensor:
    """The slope dx/dsigma of the probability-flow ODE: Karras et al. 2022, equation 3.

    x, denoised: (n, ...). sigma: (n,), 0-d, or a float. A tensor takes part in type promotion: bf16
    x and fp32 sigma give fp32.
    """
    return (x - denoised) / (append_dims(sigma, x.ndim) if isinstance(sigma, Tensor) else sigma)


def default_noise_sampler(x: Tensor) -> NoiseSampler:
    """Independent Gaussian noise from torch's global generator."""
    return lambda sigma, sigma_next: torch.randn_like(x)


# ------------------------------------------------------------------------------------ the loop


# What a sampler's noise is when the caller passes none. Names are looked up when called:
# applications replace them.
NOISE_SOURCES: dict[str, Callable[[Tensor, Tensor, Tensor], NoiseSampler]] = {
    "independent": lambda x, sigma_min, sigma_max: default_noise_sampler(x),
    "brownian": lambda x, sigma_min, sigma_max: BrownianTreeNoiseSampler(x, sigma_min, sigma_max),
}


def _run(
    step: context.Step,
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: Args,
    callback: Callback,
    disable: bool | None,
    noise: Noise = NO_NOISE,
) -> Tensor:
    """The loop of all samplers that get a schedule; all their draws are made here."""
    grid, host = read_sigmas(sigmas, x.device, noise.active)
    if len(host) < 2:
        return x
    extra_args = {} if extra_args is None else extra_args
    sigma_dtype = x.dtype  # x may be promoted on the way, what the model gets as sigma stays
    noise_sampler = noise.sampler
    if noise.source and noise_sampler is None:
        ends = torch.tensor(positive_range(host), dtype=grid.dtype)
        noise_sampler = NOISE_SOURCES[noise.source](x, *ends)

    def denoise(x: Tensor, sigma: float) -> Tensor:
        return context.evaluate(model, x, sigma, sigma_dtype, **extra_args)

    def level(sigma: float) -> Tensor:
        return torch.full((), sigma, dtype=grid.dtype, device=x.device)

    def slope(x: Tensor, sigma: float, denoised: Tensor) -> Tensor:
        return to_d(x, level(sigma), denoised)

    def draw(sigma: float, sigma_next: float) -> Tensor:
        assert noise_sampler is not None
        return ask(noise_sampler, sigma, sigma_next, grid) * noise.s_noise

    ctx = context.Context(denoise, slope, draw, tuple(dict.fromkeys(host)))
    hops = noise.plan(host)
    context.start_run(model)
    steps = len(hops)
    state = None
    for i in range(steps) if torch.compiler.is_compiling() else trange(steps, disable=disable):
        sigma, sigma_hat, sigma_next = hops[i]
        if noise.churns or sigma_hat > sigma:
            # Churn draws even when unused: seeds depend on it.
            eps = torch.randn_like(x) if noise_sampler is None else None
            if sigma_hat > sigma:
                eps = draw(sigma, sigma_hat) if eps is None else eps * noise.s_noise
                x = x + eps * math.sqrt(sigma_hat**2 - sigma**2)
        denoised = denoise(x, sigma_hat)
        if callback is not None:
            info = {"sigma": level(sigma), "sigma_hat": level(sigma_hat)}
            callback({"x": x, "i": i, **info, "denoised": denoised})
        sigma_down, sigma_up = noise.split(sigma_hat, sigma_next)
        if sigma_down != sigma_hat:
            x, state = step(ctx, x, sigma_hat, sigma_down, denoised, state)
        if sigma_up or (noise.source == "independent" and sigma_next > 0):
            # Ancestral samplers draw even when eta is 0: seeds depend on it.
            eps = draw(sigma_hat, sigma_next)
            x = x + eps * sigma_up if sigma_up else x
    return x


# --------------------------------------------------------------------------------- their seeds


def make_noise_sampler(
    sampler: str | Callable[..., Any],
    x: Tensor,
    sigmas: Sigmas | None,
    seeds: Iterable[int] | None,
) -> NoiseSampler | None:
    """The noise sampler that makes image i of a run depend on seeds[i] alone.

    Not on the batch, the image's place in it or the number of processes; and not on the initial
    noise from `randn_per_seed(seeds, ...)`, which has another stream. `dpm_adaptive` is the one
    exception: the whole batch decides how long its steps are. sampler: a name, or its function.
    x: (n, ...). sigmas: the run's schedule, None for samplers without. Returns None for samplers
    that take no noise, and for seeds None. Raises ValueError unless there are n seeds, all >= 0,
    and a schedule where the sampler takes one.
    """
    info = get_sampler(sampler if isinstance(sampler, str) else sampler.__name__)
    if seeds is None or not info.noise:
        return None
    if info.noise == "independent":
        return SeededNoiseSampler(x, seeds)
    if sigmas is None:
        raise ValueError(f"the noise of {info.name!r} spans its schedule; pass sigmas")
    _, host = read_sigmas(sigmas, x.device, True)
    return BrownianTreeNoiseSampler(x, *positive_range(host), seed=list(seeds))
