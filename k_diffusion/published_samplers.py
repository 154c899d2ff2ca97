"""k-diffusion's own samplers: those of the published package.

`sampling` re-exports them, and says what they share.
"""

import math
from functools import partial
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

from .schedules import Sigmas, check_range, unknown_name
from .solvers import DPMSolver, door, exponential, multistep, one_step
from .solvers.door import Args, Callback, Model, NoiseSampler
from .solvers.registry import sampler


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
    return door.run(one_step.euler, model, x, sigmas, extra_args, callback, disable, noise)


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
    return door.run(one_step.euler, model, x, sigmas, extra_args, callback, disable, noise)


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
    return door.run(one_step.heun, model, x, sigmas, extra_args, callback, disable, noise)


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
    return door.run(one_step.dpm_2, model, x, sigmas, extra_args, callback, disable, noise)


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
    return door.run(one_step.dpm_2, model, x, sigmas, extra_args, callback, disable, noise)


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
    return door.run(step, model, x, sigmas, extra_args, callback, disable)


def _with_sigma(callback: Callback) -> Callback:
    """A callback for DPMSolver, which knows times, as other samplers call it."""
    if callback is None:
        return None
    return lambda info: callback(
        {"sigma": info["t"].neg().exp(), "sigma_hat": info["t_up"].neg().exp(), **info}
    )


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
    return door.run(exponential.dpmpp_2s, model, x, sigmas, extra_args, callback, disable, noise)


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
    noise = door.Noise("brownian", noise_sampler, s_noise, active=bool(eta))
    return door.run(
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
    return door.run(multistep.dpmpp_2m, model, x, sigmas, extra_args, callback, disable)


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
    return door.run(step, model, x, sigmas, extra_args, callback, disable, noise)


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
    return door.run(step, model, x, sigmas, extra_args, callback, disable, noise)
