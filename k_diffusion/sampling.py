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
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm, trange

from . import solvers
from .common.tensors import append_dims
from .common.text import unknown_name
from .likelihood import bits_per_dim as bits_per_dim, log_likelihood as log_likelihood
from .noise import (
    BatchedBrownianTree as BatchedBrownianTree,
    BrownianTreeNoiseSampler as BrownianTreeNoiseSampler,
    SeededNoiseSampler as SeededNoiseSampler,
    ask,
    randn_per_seed as randn_per_seed,
)
from .schedules import (
    SCHEDULES as SCHEDULES,
    TABLE_SCHEDULES as TABLE_SCHEDULES,
    Sigmas,
    append_zero as append_zero,
    check_range,
    discard_penultimate as discard_penultimate,
    get_sigmas_align_your_steps as get_sigmas_align_your_steps,
    get_sigmas_beta as get_sigmas_beta,
    get_sigmas_cosine as get_sigmas_cosine,
    get_sigmas_ddim_uniform as get_sigmas_ddim_uniform,
    get_sigmas_exponential as get_sigmas_exponential,
    get_sigmas_karras as get_sigmas_karras,
    get_sigmas_kl_optimal as get_sigmas_kl_optimal,
    get_sigmas_laplace as get_sigmas_laplace,
    get_sigmas_linear as get_sigmas_linear,
    get_sigmas_linear_quadratic as get_sigmas_linear_quadratic,
    get_sigmas_normal as get_sigmas_normal,
    get_sigmas_polyexponential as get_sigmas_polyexponential,
    get_sigmas_sgm_uniform as get_sigmas_sgm_uniform,
    get_sigmas_simple as get_sigmas_simple,
    get_sigmas_vp as get_sigmas_vp,
    make_sigmas as make_sigmas,
    positive_range,
    read_sigmas,
)
from .solvers import (
    PIDStepSizeController as PIDStepSizeController,
    adams_bashforth,
    context,
    dpmpp,
    er_sde,
    exponential_adams,
    get_ancestral_step as get_ancestral_step,
    linear_multistep_coeff as linear_multistep_coeff,
    noise_plan,
    runge_kutta,
    seeds,
)
from .solvers.context import Args, Callback, Model, NoiseSampler, check_order
from .solvers.noise_plan import NO_NOISE, Noise
from .solvers.registry import (
    SAMPLERS as SAMPLERS,
    SamplerInfo as SamplerInfo,
    get_sampler as get_sampler,
    sampler,
)


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


# ------------------------------------------------------------------------------ samplers of the ODE


@sampler(
    order=1,
    evaluations=1,
    paper="Karras et al. 2022 (arXiv:2206.00364), algorithm 2",
    noise="independent",
)
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
    noise = noise_plan.churn(s_churn, s_tmin, s_tmax, s_noise, noise_sampler)
    return _run(runge_kutta.euler, model, x, sigmas, extra_args, callback, disable, noise)


@sampler(
    order=2,
    evaluations=2,
    paper="Karras et al. 2022 (arXiv:2206.00364), algorithm 2",
    noise="independent",
)
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
    noise = noise_plan.churn(s_churn, s_tmin, s_tmax, s_noise, noise_sampler)
    return _run(runge_kutta.heun, model, x, sigmas, extra_args, callback, disable, noise)


@sampler(
    order=2, evaluations=2, paper="DPM-Solver-2 (arXiv:2206.00927), with churn", noise="independent"
)
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
    noise = noise_plan.churn(s_churn, s_tmin, s_tmax, s_noise, noise_sampler)
    return _run(runge_kutta.dpm_2, model, x, sigmas, extra_args, callback, disable, noise)


@sampler(order=1, evaluations=1, paper="DDIM (arXiv:2010.02502)", noise="independent")
def sample_ddim(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: Args = None,
    callback: Callback = None,
    disable: bool | None = None,
    eta: float = 0.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """DDIM (equation 12), which in sigma is Euler's method: first order, one evaluation a step.

    eta: how much of the noise is fresh, 0 for the ODE, 1 for DDPM; s_noise: its scale.
    """
    noise = noise_plan.ancestral(eta, s_noise, noise_sampler) if eta else NO_NOISE
    return _run(runge_kutta.euler, model, x, sigmas, extra_args, callback, disable, noise)


@sampler(order=3, evaluations=3, paper="Kutta's order conditions at noise levels ahead")
def sample_heunpp2(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: Args = None,
    callback: Callback = None,
    disable: bool | None = None,
) -> Tensor:
    """Heun++: slopes at the next noise level and beyond it; third order, three evaluations a step.

    A step that more than halves the noise level is Heun's, a step to 0 Euler's. The name comes from
    applications, where it stands for weights without a derivation; these meet the order conditions,
    so images differ from theirs.
    """
    return _run(runge_kutta.heunpp2, model, x, sigmas, extra_args, callback, disable)


@sampler(
    order=4,
    evaluations=1,
    paper="Adams-Bashforth on an uneven grid (Liu et al. 2022, arXiv:2202.09778)",
)
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
    step = partial(adams_bashforth.lms, order=order, lower_order_final=lower_order_final)
    return _run(step, model, x, sigmas, extra_args, callback, disable)


@sampler(order=2, evaluations=1, paper="iPNDM (arXiv:2204.13902)")
def sample_ipndm(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: Args = None,
    callback: Callback = None,
    disable: bool | None = None,
    order: int = 4,
    lower_order_final: bool = True,
) -> Tensor:
    """Improved PNDM: Adams-Bashforth with the weights of even steps; one evaluation a step.

    They are exact on a schedule that is linear in sigma; on others it's of second order.
    lower_order_final: lower orders on the last steps to 0. Raises ValueError for an order other
    than 1 to 4.
    """
    check_order(order, 4)
    step = partial(
        adams_bashforth.lms,
        order=order,
        lower_order_final=lower_order_final,
        weights=adams_bashforth.ipndm_weights,
    )
    return _run(step, model, x, sigmas, extra_args, callback, disable)


@sampler(order=4, evaluations=1, paper="iPNDM (arXiv:2204.13902), variable steps")
def sample_ipndm_v(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: Args = None,
    callback: Callback = None,
    disable: bool | None = None,
    order: int = 4,
    lower_order_final: bool = True,
) -> Tensor:
    """Improved PNDM with the weights of its uneven steps: order `order`, one evaluation a step.

    That is LMS. lower_order_final: lower orders on the last steps to 0. Raises ValueError for an
    order other than 1 to 4.
    """
    check_order(order, 4)
    step = partial(adams_bashforth.lms, order=order, lower_order_final=lower_order_final)
    return _run(step, model, x, sigmas, extra_args, callback, disable)


@sampler(order=3, evaluations=1, paper="DEIS (arXiv:2204.13902)")
def sample_deis(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: Args = None,
    callback: Callback = None,
    disable: bool | None = None,
    order: int = 3,
    time: str = "vp",
    lower_order_final: bool = True,
) -> Tensor:
    """DEIS, Adams-Bashforth for eps in another time: order `order`, one evaluation a step.

    x' = x + sum C_j eps_j, C_j the integral over sigma of the Lagrange polynomial l_j(t(sigma)).
    time: "vp", the VP schedule's (tAB-DEIS), "rho", sigma itself (which is LMS), or "log_rho".
    lower_order_final: lower orders on the last steps to 0. Raises ValueError for an order other
    than 1 to 4 or another time.
    """
    check_order(order, 4)
    if time not in adams_bashforth.DEIS_TIMES:
        raise unknown_name("time", time, adams_bashforth.DEIS_TIMES)
    weights = partial(adams_bashforth.deis_weights, time=time)
    step = partial(
        adams_bashforth.lms, order=order, lower_order_final=lower_order_final, weights=weights
    )
    return _run(step, model, x, sigmas, extra_args, callback, disable)


@sampler(order=1, evaluations=1, paper="Permenter & Yuan 2023 (arXiv:2306.04848)")
def sample_gradient_estimation(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: Args = None,
    callback: Callback = None,
    disable: bool | None = None,
    gamma: float = 2.0,
) -> Tensor:
    """DDIM along gamma eps + (1 - gamma) eps_1, a better estimate of the gradient of the distance.

    eps_1 is the last step's. Of first order, with less error than DDIM; of second on even steps at
    gamma = 1.5; DDIM at gamma = 1. One evaluation a step.
    """
    step = partial(adams_bashforth.gradient_estimation, gamma=gamma)
    return _run(step, model, x, sigmas, extra_args, callback, disable)


@sampler(order=2, evaluations=1, paper="DPM-Solver++ (arXiv:2211.01095), 2M")
def sample_dpmpp_2m(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: Args = None,
    callback: Callback = None,
    disable: bool | None = None,
) -> Tensor:
    """DPM-Solver++(2M): second order, multistep, one evaluation a step."""
    return _run(dpmpp.dpmpp_2m, model, x, sigmas, extra_args, callback, disable)


@sampler(order=2, evaluations=1, paper="RES (arXiv:2308.02157), multistep")
def sample_res_multistep(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: Args = None,
    callback: Callback = None,
    disable: bool | None = None,
    order: int = 2,
    lower_order_final: bool = True,
) -> Tensor:
    """The refined exponential solver, multistep: order `order`, one evaluation a step.

    x' = e^-h x + h (b_1 D + b_2 D_1 ...) with phi functions of -h for weights, so that the order
    conditions hold. At order 2 it is DPM-Solver++(2M) with the weight "heun". lower_order_final:
    lower orders on the last steps to 0. Raises ValueError for an order other than 1 to 4.
    """
    check_order(order, 4)
    step = partial(
        exponential_adams.exponential_adams, order=order, lower_order_final=lower_order_final
    )
    return _run(step, model, x, sigmas, extra_args, callback, disable)


@sampler(order=4, evaluations=1, paper="UniPC (arXiv:2302.04867)")
def sample_uni_pc(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: Args = None,
    callback: Callback = None,
    disable: bool | None = None,
    order: int = 3,
    variant: str = "bh2",
    corrector: bool = True,
    lower_order_final: bool = True,
) -> Tensor:
    """UniPC: multistep, a predictor and a corrector from one evaluation a step; order `order` + 1.

    x' = e^-h x + (1 - e^-h) D + B(h) sum a_m (D_m - D) / r_m, with the order conditions on a.
    variant: "bh1", B(h) = h, or "bh2", B(h) = 1 - e^-h; they differ where there's only one D_m.
    corrector: False for UniP alone, of order `order`. lower_order_final: lower orders on the last
    steps to 0. Raises ValueError for an order other than 1 to 3 or another variant.
    """
    check_order(order, 3)
    if variant not in exponential_adams.UNI_PC_B:
        raise unknown_name("variant", variant, exponential_adams.UNI_PC_B)
    step = exponential_adams.uni_pc(variant, order, corrector, lower_order_final)
    return _run(step, model, x, sigmas, extra_args, callback, disable)


# ------------------------------------------------------------------------------- ancestral samplers


@sampler(
    order=1,
    evaluations=1,
    paper="DDPM (arXiv:2006.11239) in sigma",
    noise="independent",
    stochastic=True,
)
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
    noise = noise_plan.ancestral(eta, s_noise, noise_sampler)
    return _run(runge_kutta.euler, model, x, sigmas, extra_args, callback, disable, noise)


@sampler(
    order=2,
    evaluations=2,
    paper="DPM-Solver-2 (arXiv:2206.00927), ancestral",
    noise="independent",
    stochastic=True,
)
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
    noise = noise_plan.ancestral(eta, s_noise, noise_sampler)
    return _run(runge_kutta.dpm_2, model, x, sigmas, extra_args, callback, disable, noise)


@sampler(
    order=2,
    evaluations=2,
    paper="DPM-Solver++ (arXiv:2211.01095), 2S, ancestral",
    noise="independent",
    stochastic=True,
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
    noise = noise_plan.ancestral(eta, s_noise, noise_sampler)
    return _run(dpmpp.dpmpp_2s, model, x, sigmas, extra_args, callback, disable, noise)


@sampler(
    order=1, evaluations=1, paper="DDPM (arXiv:2006.11239)", noise="independent", stochastic=True
)
def sample_ddpm(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: Args = None,
    callback: Callback = None,
    disable: bool | None = None,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """DDPM's ancestral sampling: first order, one evaluation a step.

    The next sample is drawn from the posterior given the denoised one (equations 6 and 7), as
    sample_euler_ancestral does at eta = 1. s_noise: the noise's scale.
    """
    noise = noise_plan.ancestral(1.0, s_noise, noise_sampler)
    return _run(runge_kutta.euler, model, x, sigmas, extra_args, callback, disable, noise)


@sampler(
    order=1, evaluations=1, paper="LCM (arXiv:2310.04378)", noise="independent", stochastic=True
)
def sample_lcm(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: Args = None,
    callback: Callback = None,
    disable: bool | None = None,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """Sampling of consistency models: denoise all the way, add noise anew; one evaluation a step.

    x' = D + sigma' noise (Song et al. 2023, arXiv:2303.01469, algorithm 1). For models distilled to
    give a sample in one step; of others it makes blurred ones. s_noise: the noise's scale.
    """
    noise = noise_plan.Noise(
        "independent", noise_sampler, s_noise, split=noise_plan.renoise, active=True
    )
    return _run(runge_kutta.leap, model, x, sigmas, extra_args, callback, disable, noise)


@sampler(
    order=2,
    evaluations=1,
    paper="RES (arXiv:2308.02157), ancestral",
    noise="independent",
    stochastic=True,
)
def sample_res_multistep_ancestral(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: Args = None,
    callback: Callback = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    order: int = 2,
    lower_order_final: bool = True,
) -> Tensor:
    """Ancestral sampling with multistep RES steps: order `order` at eta = 0, one evaluation a step.

    eta: how much of the noise is fresh, 0 for the ODE; s_noise: its scale. lower_order_final: lower
    orders on the last steps to 0. Raises ValueError for an order other than 1 to 4.
    """
    check_order(order, 4)
    step = partial(
        exponential_adams.exponential_adams, order=order, lower_order_final=lower_order_final
    )
    noise = noise_plan.ancestral(eta, s_noise, noise_sampler)
    return _run(step, model, x, sigmas, extra_args, callback, disable, noise)


# ------------------------------------------------------------------------------ samplers of the SDE


# (sigma_min, sigma_max, steps, times) each, as `sample_restart` takes them.
Restarts = Sequence[tuple[float, float, int, int]]


def _check_fractions(*fractions: float) -> None:
    """Raises ValueError unless they rise between 0 and 1."""
    if not all(a < b for a, b in pairwise((0.0, *fractions, 1.0))):
        raise ValueError(f"stages must lie at rising fractions between 0 and 1, got {fractions}")


@sampler(
    order=2,
    evaluations=2,
    paper="DPM-Solver++ (arXiv:2211.01095), stochastic",
    noise="brownian",
    stochastic=True,
)
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
    noise = noise_plan.Noise("brownian", noise_sampler, s_noise, active=bool(eta))
    return _run(
        partial(dpmpp.dpmpp_sde, eta=eta, r=r),
        model,
        x,
        sigmas,
        extra_args,
        callback,
        disable,
        noise,
    )


@sampler(
    order=2,
    evaluations=1,
    paper="DPM-Solver++ (arXiv:2211.01095), SDE 2M",
    noise="brownian",
    stochastic=True,
)
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
    if solver_type not in dpmpp.SOLVER_TYPES:
        raise unknown_name("solver_type", solver_type, dpmpp.SOLVER_TYPES)
    step = partial(dpmpp.dpmpp_2m, solver_type=solver_type)
    noise = noise_plan.sde(eta, s_noise, noise_sampler)
    return _run(step, model, x, sigmas, extra_args, callback, disable, noise)


@sampler(
    order=2,
    evaluations=1,
    paper="DPM-Solver++ (arXiv:2211.01095), SDE 3M",
    noise="brownian",
    stochastic=True,
)
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
    step = partial(dpmpp.dpmpp_3m, lower_order_final=lower_order_final)
    noise = noise_plan.sde(eta, s_noise, noise_sampler)
    return _run(step, model, x, sigmas, extra_args, callback, disable, noise)


@sampler(
    order=3, evaluations=1, paper="ER-SDE (arXiv:2309.06169)", noise="brownian", stochastic=True
)
def sample_er_sde(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: Args = None,
    callback: Callback = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    noise_scale: str = "er_sde",
    order: int = 3,
    lower_order_final: bool = True,
) -> Tensor:
    """ER-SDE solvers, for an SDE with less noise at low levels; multistep, one evaluation a step.

    Of order `order` at eta = 0. The noise scale is phi(sigma) = sigma g(sigma)^eta. noise_scale:
    "er_sde", g = exp(sigma^0.3) + 10, or "sde", g = sigma, the usual SDE. eta: 0 for the ODE;
    s_noise: the noise's scale. lower_order_final: lower orders on the last steps to 0. Raises
    ValueError for an order other than 1 to 3 or another noise scale.
    """
    check_order(order, 3)
    if noise_scale not in er_sde.NOISE_SCALES:
        raise unknown_name("noise_scale", noise_scale, er_sde.NOISE_SCALES)
    step = partial(
        er_sde.er_sde,
        eta=eta,
        noise_scale=noise_scale,
        order=order,
        lower_order_final=lower_order_final,
    )
    split = er_sde.er_split(eta, noise_scale)
    noise = noise_plan.Noise("brownian", noise_sampler, s_noise, split=split, active=bool(eta))
    return _run(step, model, x, sigmas, extra_args, callback, disable, noise)


@sampler(
    order=2,
    evaluations=2,
    paper="SEEDS (arXiv:2305.14267), SEEDS-2",
    noise="brownian",
    stochastic=True,
)
def sample_seeds_2(
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
    """SEEDS-2: two stages of the reverse-time SDE, the second one at the fraction r of the step.

    Second order, two evaluations a step, one for a step to 0. eta: how much of the noise is fresh,
    0 for the ODE; s_noise: its scale. Raises ValueError unless 0 < r < 1.
    """
    _check_fractions(r)
    step = partial(seeds.seeds_2, eta=eta, r=r)
    noise = noise_plan.Noise("brownian", noise_sampler, s_noise, active=bool(eta))
    return _run(step, model, x, sigmas, extra_args, callback, disable, noise)


@sampler(
    order=3,
    evaluations=3,
    paper="SEEDS (arXiv:2305.14267), SEEDS-3",
    noise="brownian",
    stochastic=True,
)
def sample_seeds_3(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: Args = None,
    callback: Callback = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    r_1: float = 1 / 3,
    r_2: float = 2 / 3,
) -> Tensor:
    """SEEDS-3: three stages of the reverse-time SDE, at the fractions r_1 and r_2 of the step.

    Third order at eta = 0 and r_2 = 2/3, three evaluations a step, one for a step to 0. eta: how
    much of the noise is fresh, 0 for the ODE; s_noise: its scale. Raises ValueError unless
    0 < r_1 < r_2 < 1.
    """
    _check_fractions(r_1, r_2)
    step = partial(seeds.seeds_3, eta=eta, r_1=r_1, r_2=r_2)
    noise = noise_plan.Noise("brownian", noise_sampler, s_noise, active=bool(eta))
    return _run(step, model, x, sigmas, extra_args, callback, disable, noise)


@sampler(
    order=4, evaluations=1, paper="SA-Solver (arXiv:2309.05019)", noise="brownian", stochastic=True
)
def sample_sa_solver(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: Args = None,
    callback: Callback = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    predictor_order: int = 3,
    corrector_order: int = 4,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    lower_order_final: bool = True,
) -> Tensor:
    """SA-Solver, a stochastic Adams method: predictor and corrector of one evaluation a step.

    x' = e^-H x + (integral of e^(u - H) D du) + noise, H = (1 + tau^2) h, with the polynomial
    through the last predictor_order values of D, and then through corrector_order with the new one,
    0 for no corrector. eta: tau^2, 1 for the usual SDE, 0 for the ODE; s_noise: the noise's scale;
    s_tmin, s_tmax: the noise levels between which it is added. lower_order_final: lower orders on
    the last steps to 0. Raises ValueError for orders other than 1 to 4.
    """
    check_order(predictor_order, 4, "predictor_order")
    if corrector_order:
        check_order(corrector_order, 4, "corrector_order")
    step = partial(
        exponential_adams.exponential_adams,
        order=predictor_order,
        correct=lambda order: min(corrector_order, order + 1),
        lower_order_final=lower_order_final,
    )
    noise = noise_plan.sde(eta, s_noise, noise_sampler, s_tmin, s_tmax)
    return _run(step, model, x, sigmas, extra_args, callback, disable, noise)


@sampler(
    order=2, evaluations=2, paper="Restart (arXiv:2306.14878)", noise="independent", stochastic=True
)
def sample_restart(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: Args = None,
    callback: Callback = None,
    disable: bool | None = None,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    restarts: Restarts = ((0.1, 2.0, 10, 2),),
) -> Tensor:
    """Heun's method, and again through some intervals: up by fresh noise, down by the ODE.

    restarts: (sigma_min, sigma_max, steps, times) each: on coming to the noise level nearest to
    sigma_min, noise takes the sample up to sigma_max, and steps of Karras et al.'s schedule down
    again. One that isn't inside of the schedule is left out. Its steps count in the progress bar
    and the callback's `i`. s_noise: the noise's scale. Raises ValueError for an impossible restart.
    """
    intervals = [noise_plan.Restart(*r) for r in restarts]
    noise = noise_plan.restart(intervals, s_noise, noise_sampler)
    return _run(runge_kutta.heun, model, x, sigmas, extra_args, callback, disable, noise)


# ------------------------------------------- DPM-Solver: a number of evaluations, or adaptive steps


class DPMSolver(solvers.DPMSolver):
    """DPM-Solver whose noise, where the caller passes none, is `default_noise_sampler`'s."""

    def _default_noise(self, x: Tensor, noise_sampler: Any) -> Any:
        # Looked up when called: applications replace it.
        return default_noise_sampler(x) if noise_sampler is None else noise_sampler


def _with_sigma(callback: Callback) -> Callback:
    """A callback for DPMSolver, which knows times, as other samplers call it."""
    if callback is None:
        return None
    return lambda info: callback(
        {"sigma": info["t"].neg().exp(), "sigma_hat": info["t_up"].neg().exp(), **info}
    )


@sampler(
    order=2,
    evaluations=1,
    paper="DPM-Solver (arXiv:2206.00927), DPM-Solver-fast",
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
    with tqdm(total=n, disable=disable) as progress:
        solver = DPMSolver(model, extra_args, progress.update, _with_sigma(callback))
        return solver.dpm_solver_fast(x, solver.t(hi), solver.t(lo), n, eta, s_noise, noise_sampler)


@sampler(
    order=3,
    evaluations=3,
    paper="DPM-Solver (arXiv:2206.00927), adaptive step size",
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

    The error norm is the whole batch's, so here alone an image depends on its batch, also where
    its noise is its seed's; run images one at a time for the same ones in any batch. The callback's
    dict also has `t`, `t_up`, `error`, `h`, and the counts `steps`, `nfe`, `n_accept`, `n_reject`,
    which return_info returns beside the sample. Other arguments: DPMSolver.dpm_solver_adaptive.
    """
    lo, hi = check_range(sigma_min, sigma_max)
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
