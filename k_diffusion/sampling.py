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
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm, trange

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
from .schedules import SCHEDULES as SCHEDULES
from .schedules import Sigmas, check_range, positive_range, read_sigmas, unknown_name
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
from .solvers import context, door, exponential, multistep, one_step
from .solvers import get_ancestral_step as get_ancestral_step
from .solvers import linear_multistep_coeff as linear_multistep_coeff
from .solvers.door import NO_NOISE, Args, Callback, Model, Noise, NoiseSampler
from .solvers.registry import SAMPLERS as SAMPLERS
from .solvers.registry import SamplerInfo as SamplerInfo
from .solvers.registry import get_sampler as get_sampler
from .solvers.registry import sampler
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


def _with_sigma(callback: Callback) -> Callback:
    """A callback for DPMSolver, which knows times, as other samplers call it."""
    if callback is None:
        return None
    return lambda info: callback(
        {"sigma": info["t"].neg().exp(), "sigma_hat": info["t_up"].neg().exp(), **info}
    )


# --------------------------------------------------------------------------------- the samplers


def make_noise_sampler(
    sampler: str | Callable[..., Any],
    x: Tensor,
    sigmas: Sigmas | None,
    seeds: Iterable[int] | None,
) -> NoiseSampler | None:
    """The noise sampler that makes image i of a run depend on seeds[i] alone.

    Not on the batch, the image's place in it or the number of processes; and not on the initial
    noise from `randn_per_seed(seeds, ...)`, which has another stream. sampler: a name, or its
    function. x: (n, ...). sigmas: the run's schedule, None for samplers without. Returns None for
    samplers that take no noise, and for seeds None. Raises ValueError unless there are n seeds,
    all >= 0.
    """
    info = get_sampler(sampler if isinstance(sampler, str) else sampler.__name__)
    if seeds is None or not info.noise:
        return None
    if info.noise == "independent":
        return SeededNoiseSampler(x, seeds)
    _, host = read_sigmas(() if sigmas is None else sigmas, x.device, True)
    return BrownianTreeNoiseSampler(x, *positive_range(host), seed=list(seeds))


@sampler(1, 1, "Karras et al. 2022 (arXiv:2206.00364), algorithm 2", noise="independent")
def sample_euler(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: Args = None,
    callback: Callback = None,
    disable: bool | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """Euler's method with churn: first order, one evaluation a step.

    s_churn: how much noise to add over the run, at levels s_tmin to s_tmax; s_noise: its scale.
    """
    noise = door.churn(s_churn, s_tmin, s_tmax, s_noise, noise_sampler)
    return _run(one_step.euler, model, x, sigmas, extra_args, callback, disable, noise)


@sampler(1, 1, "DDPM (arXiv:2006.11239) in sigma", noise="independent", stochastic=True)
def sample_euler_ancestral(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: Args = None,
    callback: Callback = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """Ancestral sampling with Euler steps: first order, one evaluation a step.

    eta: how much of the noise is fresh, 0 for the ODE; s_noise: its scale.
    """
    noise = door.ancestral(eta, s_noise, noise_sampler)
    return _run(one_step.euler, model, x, sigmas, extra_args, callback, disable, noise)


@sampler(2, 2, "Karras et al. 2022 (arXiv:2206.00364), algorithm 2", noise="independent")
def sample_heun(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: Args = None,
    callback: Callback = None,
    disable: bool | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """Heun's method with churn: second order, two evaluations a step, one for a step to 0.

    s_churn: how much noise to add over the run, at levels s_tmin to s_tmax; s_noise: its scale.
    """
    noise = door.churn(s_churn, s_tmin, s_tmax, s_noise, noise_sampler)
    return _run(one_step.heun, model, x, sigmas, extra_args, callback, disable, noise)


@sampler(2, 2, "DPM-Solver-2 (arXiv:2206.00927), with churn", noise="independent")
def sample_dpm_2(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: Args = None,
    callback: Callback = None,
    disable: bool | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """The midpoint method in log sigma, with churn: second order, two evaluations a step.

    s_churn: how much noise to add over the run, at levels s_tmin to s_tmax; s_noise: its scale.
    """
    noise = door.churn(s_churn, s_tmin, s_tmax, s_noise, noise_sampler)
    return _run(one_step.dpm_2, model, x, sigmas, extra_args, callback, disable, noise)


@sampler(2, 2, "DPM-Solver-2 (arXiv:2206.00927), ancestral", noise="independent", stochastic=True)
def sample_dpm_2_ancestral(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: Args = None,
    callback: Callback = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """Ancestral sampling with midpoint steps: second order at eta = 0, two evaluations a step.

    eta: how much of the noise is fresh, 0 for the ODE; s_noise: its scale.
    """
    noise = door.ancestral(eta, s_noise, noise_sampler)
    return _run(one_step.dpm_2, model, x, sigmas, extra_args, callback, disable, noise)


@sampler(4, 1, "Adams-Bashforth on an uneven grid (Liu et al. 2022, arXiv:2202.09778)")
def sample_lms(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: Args = None,
    callback: Callback = None,
    disable: bool | None = None,
    order: int = 4,
    lower_order_final: bool = False,
) -> Tensor:
    """Linear multistep: up to `order`, from the slopes of as many steps; one evaluation a step.

    lower_order_final: a lower order on the last steps to 0, the last one then Euler's, instead of
    the published extrapolation. Raises ValueError for order < 1.
    """
    if order < 1:
        raise ValueError(f"order must be at least 1, got {order}")
    step = partial(multistep.lms, order=order, lower_order_final=lower_order_final)
    return _run(step, model, x, sigmas, extra_args, callback, disable)


@sampler(
    2,
    1,
    "DPM-Solver (arXiv:2206.00927), DPM-Solver-fast",
    noise="independent",
    takes_sigmas=False,
)
def sample_dpm_fast(
    model: Model,
    x: Tensor,
    sigma_min: float,
    sigma_max: float,
    n: int,
    extra_args: Args = None,
    callback: Callback = None,
    disable: bool | None = None,
    eta: float = 0.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """DPM-Solver-fast: n evaluations in steps of third order, finished by lower ones.

    Steps are equal in log sigma, from sigma_max to sigma_min, both positive. The callback's dict
    also has `t` and `t_up`. eta: ancestral noise. Raises ValueError for n < 1 or bad noise levels.
    """
    lo, hi = check_range(sigma_min, sigma_max)
    if n < 1:
        raise ValueError(f"dpm_fast needs at least one evaluation, got n = {n}")
    noise_sampler = default_noise_sampler(x) if noise_sampler is None else noise_sampler
    with tqdm(total=n, disable=disable) as progress:
        solver = DPMSolver(model, extra_args, progress.update, _with_sigma(callback))
        return solver.dpm_solver_fast(x, solver.t(hi), solver.t(lo), n, eta, s_noise, noise_sampler)


@sampler(
    3,
    3,
    "DPM-Solver (arXiv:2206.00927), adaptive step size",
    noise="independent",
    takes_sigmas=False,
)
def sample_dpm_adaptive(
    model: Model,
    x: Tensor,
    sigma_min: float,
    sigma_max: float,
    extra_args: Args = None,
    callback: Callback = None,
    disable: bool | None = None,
    order: int = 3,
    rtol: float = 0.05,
    atol: float = 0.0078,
    h_init: float = 0.05,
    pcoeff: float = 0.0,
    icoeff: float = 1.0,
    dcoeff: float = 0.0,
    accept_safety: float = 0.81,
    eta: float = 0.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    return_info: bool = False,
) -> Any:
    """DPM-Solver-12 or -23 with adaptive steps from sigma_max to sigma_min, both positive.

    The error norm is the whole batch's, so here an image does depend on its batch. The callback's
    dict also has `t`, `t_up`, `error`, `h`, and the counts `steps`, `nfe`, `n_accept`, `n_reject`,
    which return_info returns beside the sample. Other arguments: DPMSolver.dpm_solver_adaptive.
    """
    lo, hi = check_range(sigma_min, sigma_max)
    noise_sampler = default_noise_sampler(x) if noise_sampler is None else noise_sampler
    with tqdm(disable=disable) as progress:
        solver = DPMSolver(model, extra_args, progress.update, _with_sigma(callback))
        x, info = solver.dpm_solver_adaptive(
            x,
            solver.t(hi),
            solver.t(lo),
            order,
            rtol,
            atol,
            h_init,
            pcoeff,
            icoeff,
            dcoeff,
            accept_safety,
            eta,
            s_noise,
            noise_sampler,
        )
    return (x, info) if return_info else x


@sampler(
    2, 2, "DPM-Solver++ (arXiv:2211.01095), 2S, ancestral", noise="independent", stochastic=True
)
def sample_dpmpp_2s_ancestral(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: Args = None,
    callback: Callback = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """Ancestral sampling with DPM-Solver++(2S) steps: second order at eta = 0, two evaluations.

    eta: how much of the noise is fresh, 0 for the ODE; s_noise: its scale.
    """
    noise = door.ancestral(eta, s_noise, noise_sampler)
    return _run(exponential.dpmpp_2s, model, x, sigmas, extra_args, callback, disable, noise)


@sampler(2, 2, "DPM-Solver++ (arXiv:2211.01095), stochastic", noise="brownian", stochastic=True)
def sample_dpmpp_sde(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: Args = None,
    callback: Callback = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    r: float = 0.5,
) -> Tensor:
    """DPM-Solver++ (stochastic): two evaluations a step, the second one at the fraction r of it.

    eta: how much of the noise is fresh, 0 for the ODE; s_noise: its scale.
    """
    noise = Noise("brownian", noise_sampler, s_noise, active=bool(eta))
    return _run(
        partial(exponential.dpmpp_sde, eta=eta, r=r),
        model,
        x,
        sigmas,
        extra_args,
        callback,
        disable,
        noise,
    )


@sampler(2, 1, "DPM-Solver++ (arXiv:2211.01095), 2M")
def sample_dpmpp_2m(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: Args = None,
    callback: Callback = None,
    disable: bool | None = None,
) -> Tensor:
    """DPM-Solver++(2M): second order, multistep, one evaluation a step."""
    return _run(multistep.dpmpp_2m, model, x, sigmas, extra_args, callback, disable)


@sampler(2, 1, "DPM-Solver++ (arXiv:2211.01095), SDE 2M", noise="brownian", stochastic=True)
def sample_dpmpp_2m_sde(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: Args = None,
    callback: Callback = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    solver_type: str = "midpoint",
) -> Tensor:
    """DPM-Solver++(2M) for the reverse-time SDE: one evaluation a step.

    eta: how much of the noise is fresh, 0 for the ODE; s_noise: its scale. solver_type:
    "midpoint" or "heun", the weight of the second-order term. Raises ValueError for another.
    """
    if solver_type not in multistep.SOLVER_TYPES:
        raise unknown_name("solver_type", solver_type, multistep.SOLVER_TYPES)
    step = partial(multistep.dpmpp_2m, solver_type=solver_type)
    noise = door.sde(eta, s_noise, noise_sampler)
    return _run(step, model, x, sigmas, extra_args, callback, disable, noise)


@sampler(2, 1, "DPM-Solver++ (arXiv:2211.01095), SDE 3M", noise="brownian", stochastic=True)
def sample_dpmpp_3m_sde(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: Args = None,
    callback: Callback = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    lower_order_final: bool = False,
) -> Tensor:
    """DPM-Solver++(3M) for the reverse-time SDE, as published: second order, one evaluation a step.

    eta: how much of the noise is fresh, 0 for the ODE; s_noise: its scale. lower_order_final: a
    lower order on the last steps to 0, for few steps.
    """
    step = partial(multistep.dpmpp_3m, lower_order_final=lower_order_final)
    noise = door.sde(eta, s_noise, noise_sampler)
    return _run(step, model, x, sigmas, extra_args, callback, disable, noise)
