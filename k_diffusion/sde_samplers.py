"""Samplers that add noise, which came after k-diffusion's own.

`sampling` re-exports them, and says what they share.
"""

import math
from collections.abc import Sequence
from functools import partial
from itertools import pairwise

from torch import Tensor

from .schedules import Sigmas, unknown_name
from .solvers import door, er_sde, exponential_adams, levels, one_step, seeds
from .solvers.door import Args, Callback, Model, NoiseSampler, check_order
from .solvers.registry import sampler


def check_fractions(*fractions: float) -> None:
    """Raises ValueError unless they rise between 0 and 1."""
    if not all(a < b for a, b in pairwise((0.0, *fractions, 1.0))):
        raise ValueError(f"stages must lie at rising fractions between 0 and 1, got {fractions}")


# Arguments as `restart` takes them: (sigma_min, sigma_max, steps, times).
Restarts = Sequence[tuple[float, float, int, int]]


@sampler(1, 1, "DDPM (arXiv:2006.11239)", noise="independent", stochastic=True)
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
    noise = door.ancestral(1.0, s_noise, noise_sampler)
    return door.run(one_step.euler, model, x, sigmas, extra_args, callback, disable, noise)


@sampler(1, 1, "LCM (arXiv:2310.04378)", noise="independent", stochastic=True)
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
    noise = door.Noise("independent", noise_sampler, s_noise, split=levels.renoise, active=True)
    return door.run(one_step.leap, model, x, sigmas, extra_args, callback, disable, noise)


@sampler(2, 2, "Restart (arXiv:2306.14878)", noise="independent", stochastic=True)
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
    intervals = [levels.Restart(*r) for r in restarts]
    plan = partial(levels.restart, intervals=intervals)
    noise = door.Noise("", noise_sampler, s_noise, plan, active=bool(intervals))
    return door.run(one_step.heun, model, x, sigmas, extra_args, callback, disable, noise)


@sampler(2, 1, "RES (arXiv:2308.02157), ancestral", noise="independent", stochastic=True)
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
    noise = door.ancestral(eta, s_noise, noise_sampler)
    return door.run(step, model, x, sigmas, extra_args, callback, disable, noise)


@sampler(3, 1, "ER-SDE (arXiv:2309.06169)", noise="brownian", stochastic=True)
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
    split = er_sde.er_levels(eta, noise_scale)
    noise = door.Noise("brownian", noise_sampler, s_noise, split=split, active=bool(eta))
    return door.run(step, model, x, sigmas, extra_args, callback, disable, noise)


@sampler(2, 2, "SEEDS (arXiv:2305.14267), SEEDS-2", noise="brownian", stochastic=True)
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
    check_fractions(r)
    step = partial(seeds.seeds_2, eta=eta, r=r)
    noise = door.Noise("brownian", noise_sampler, s_noise, active=bool(eta))
    return door.run(step, model, x, sigmas, extra_args, callback, disable, noise)


@sampler(3, 3, "SEEDS (arXiv:2305.14267), SEEDS-3", noise="brownian", stochastic=True)
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
    check_fractions(r_1, r_2)
    step = partial(seeds.seeds_3, eta=eta, r_1=r_1, r_2=r_2)
    noise = door.Noise("brownian", noise_sampler, s_noise, active=bool(eta))
    return door.run(step, model, x, sigmas, extra_args, callback, disable, noise)


@sampler(4, 1, "SA-Solver (arXiv:2309.05019)", noise="brownian", stochastic=True)
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
    noise = door.sde(eta, s_noise, noise_sampler, s_tmin, s_tmax)
    return door.run(step, model, x, sigmas, extra_args, callback, disable, noise)
