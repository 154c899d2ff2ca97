"""Samplers of the probability-flow ODE that came after k-diffusion's own.

`sampling` re-exports them, and says what they share.
"""

from functools import partial

from torch import Tensor

from .schedules import Sigmas, unknown_name
from .solvers import door, exponential_adams, multistep, one_step
from .solvers.door import Args, Callback, Model, NoiseSampler, check_order
from .solvers.registry import sampler


@sampler(1, 1, "DDIM (arXiv:2010.02502)", noise="independent")
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
    noise = door.ancestral(eta, s_noise, noise_sampler) if eta else door.NO_NOISE
    return door.run(one_step.euler, model, x, sigmas, extra_args, callback, disable, noise)


@sampler(3, 3, "Kutta's order conditions at noise levels ahead")
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
    return door.run(one_step.heunpp2, model, x, sigmas, extra_args, callback, disable)


@sampler(4, 1, "UniPC (arXiv:2302.04867)")
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
    return door.run(step, model, x, sigmas, extra_args, callback, disable)


@sampler(3, 1, "DEIS (arXiv:2204.13902)")
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
    if time not in multistep.DEIS_TIMES:
        raise unknown_name("time", time, multistep.DEIS_TIMES)
    weights = partial(multistep.deis_weights, time=time)
    step = partial(multistep.lms, order=order, lower_order_final=lower_order_final, weights=weights)
    return door.run(step, model, x, sigmas, extra_args, callback, disable)


@sampler(2, 1, "iPNDM (arXiv:2204.13902)")
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
        multistep.lms,
        order=order,
        lower_order_final=lower_order_final,
        weights=multistep.ipndm_weights,
    )
    return door.run(step, model, x, sigmas, extra_args, callback, disable)


@sampler(4, 1, "iPNDM (arXiv:2204.13902), variable steps")
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
    step = partial(multistep.lms, order=order, lower_order_final=lower_order_final)
    return door.run(step, model, x, sigmas, extra_args, callback, disable)


@sampler(2, 1, "RES (arXiv:2308.02157), multistep")
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
    return door.run(step, model, x, sigmas, extra_args, callback, disable)


@sampler(1, 1, "Permenter & Yuan 2023 (arXiv:2306.04848)")
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
    step = partial(multistep.gradient_estimation, gamma=gamma)
    return door.run(step, model, x, sigmas, extra_args, callback, disable)
