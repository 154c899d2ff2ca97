"""Samplers: from noise to samples by a denoiser, step by step.

    sigmas = get_sigmas_karras(50, sigma_min, sigma_max)
    x = sample_euler(model, torch.randn(shape) * sigmas[0], sigmas)

or, by a name and with a seed per image, `sample(model, x, sigmas, "euler", seeds=seeds)`.

`help(sample_euler)` tells what model, x, sigmas, extra_args, callback, disable and the result are;
all samplers share them. Here a sampler is a method: the decorator gives it those arguments, and
hands it the run, whose call is the loop.

Noise levels are read once, and all coefficients computed in float64 on the host: no step waits for
the device. Pass sigmas as a sequence of floats to compile a whole run with `fullgraph=True`.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm, trange

from . import solvers
from .common import numbers
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
    check_ends,
    discard_penultimate as discard_penultimate,
    get_sigmas_align_your_steps as get_sigmas_align_your_steps,
    get_sigmas_beta as get_sigmas_beta,
    get_sigmas_cosine as get_sigmas_cosine,
    get_sigmas_ddim_uniform as get_sigmas_ddim_uniform,
    get_sigmas_exponential as get_sigmas_exponential,
    get_sigmas_gits as get_sigmas_gits,
    get_sigmas_karras as get_sigmas_karras,
    get_sigmas_kl_optimal as get_sigmas_kl_optimal,
    get_sigmas_laplace as get_sigmas_laplace,
    get_sigmas_linear as get_sigmas_linear,
    get_sigmas_linear_quadratic as get_sigmas_linear_quadratic,
    get_sigmas_normal as get_sigmas_normal,
    get_sigmas_optimal_steps as get_sigmas_optimal_steps,
    get_sigmas_polyexponential as get_sigmas_polyexponential,
    get_sigmas_sgm_uniform as get_sigmas_sgm_uniform,
    get_sigmas_simple as get_sigmas_simple,
    get_sigmas_vp as get_sigmas_vp,
    make_sigmas as make_sigmas,
    positive_range,
    read_sigmas,
    search_levels as search_levels,
)
from .solvers import (
    PIDStepSizeController as PIDStepSizeController,
    adams_bashforth,
    context,
    dpmpp,
    er_sde,
    exponential_adams,
    exponential_rk,
    get_ancestral_step as get_ancestral_step,
    langevin,
    linear_multistep_coeff as linear_multistep_coeff,
    noise_plan,
    pndm,
    registry,
    runge_kutta,
    seeds,
)
from .solvers.context import Args, Callback, Model, NoiseSampler, check_order
from .solvers.noise_plan import NO_NOISE, Noise
from .solvers.registry import (
    FLOW_SAMPLERS as FLOW_SAMPLERS,
    SAMPLERS as SAMPLERS,
    SamplerInfo as SamplerInfo,
    get_sampler as get_sampler,
)


def to_d(x: Tensor, sigma: Tensor | float, denoised: Tensor) -> Tensor:
    """The slope dx/dsigma of the probability-flow ODE: Karras et al. 2022, equation 3.

    x, denoised: (n, ...). sigma: (n,), 0-d, or a float. A tensor takes part in type promotion: bf16
    x and fp32 sigma give fp32.
    """
    return (x - denoised) / (append_dims(sigma, x.ndim) if isinstance(sigma, Tensor) else sigma)


def default_noise_sampler(x: Tensor) -> NoiseSampler:
    """Independent Gaussian noise like x, (n, ...), from torch's global generator."""
    return lambda sigma, sigma_next: torch.randn_like(x)


# ------------------------------------------------------------------------------------ the loop


# What a sampler's noise is when the caller passes none. Names are looked up when called:
# applications replace them.
NOISE_SOURCES: dict[str, Callable[[Tensor, Tensor, Tensor], NoiseSampler]] = {
    "independent": lambda x, sigma_min, sigma_max: default_noise_sampler(x),
    "brownian": lambda x, sigma_min, sigma_max: BrownianTreeNoiseSampler(x, sigma_min, sigma_max),
}


@dataclass  # not frozen: torch 2.8 can't compile the making of a frozen one
class Run:
    """A run of a sampler: the arguments that all samplers share, and the loop, which is its call.

    noise_sampler: serves methods that get none of their own.
    """

    model: Model
    x: Tensor
    sigmas: Sigmas
    extra_args: Args = None
    callback: Callback = None
    disable: bool | None = None
    noise_sampler: NoiseSampler | None = None

    def __call__(
        self,
        step: context.Step,
        noise: Noise | None = None,
        *,
        slope_first: bool = False,
        plus_plus: bool = False,
    ) -> Tensor:
        """The loop of all samplers that get a schedule; all their draws are made here.

        slope_first: the slope at the start of a step is computed before the callback, which may
        then edit x in place and move the start of the step alone. plus_plus: steps of CFG++
        (arXiv:2406.08070), which follow the unconditional estimate and add the guided one's
        difference from it.
        """
        model, x, noise = self.model, self.x, noise or NO_NOISE
        grid, host = read_sigmas(self.sigmas, x.device, noise.active)
        if len(host) < 2:
            return x
        extra_args = {} if self.extra_args is None else self.extra_args
        sigma_dtype = x.dtype  # x may be promoted on the way, what the model gets as sigma stays
        noise_sampler = self.noise_sampler if noise.sampler is None else noise.sampler
        if noise.source and noise_sampler is None:
            ends = torch.tensor(positive_range(host), dtype=grid.dtype)
            noise_sampler = NOISE_SOURCES[noise.source](x, *ends)

        def denoise(x: Tensor, sigma: float) -> Tensor:
            if plus_plus:
                return context.evaluate_both(model, x, sigma, sigma_dtype, **extra_args)[1]
            return context.evaluate(model, x, sigma, sigma_dtype, **extra_args)

        def level(sigma: float) -> Tensor:
            return torch.full((), sigma, dtype=grid.dtype, device=x.device)

        early: dict[str, Tensor] = {}

        def slope(x: Tensor, sigma: float, denoised: Tensor) -> Tensor:
            if early and denoised is early["denoised"]:
                return early["slope"]
            return to_d(x, level(sigma), denoised)

        def draw(sigma: float, sigma_next: float) -> Tensor:
            assert noise_sampler is not None
            return ask(noise_sampler, sigma, sigma_next, grid) * noise.s_noise

        ctx = context.Context(denoise, slope, draw, tuple(dict.fromkeys(host)))
        hops = noise.plan(host)
        context.start_run(model)
        steps = len(hops)
        state = None
        compiling = torch.compiler.is_compiling()
        for i in range(steps) if compiling else trange(steps, disable=self.disable):
            sigma, sigma_hat, sigma_next = hops[i]
            if noise.churns or sigma_hat > sigma:
                # Churn draws even when unused: seeds depend on it.
                eps = torch.randn_like(x) if noise_sampler is None else None
                if sigma_hat > sigma:
                    eps = draw(sigma, sigma_hat) if eps is None else eps * noise.s_noise
                    x = x + eps * math.sqrt(sigma_hat**2 - sigma**2)
            if plus_plus:
                args = (model, x, sigma_hat, sigma_dtype)
                denoised, target = context.evaluate_both(*args, **extra_args)
            else:
                denoised = target = denoise(x, sigma_hat)
            if self.callback is not None:
                if slope_first:
                    early.clear()
                    early.update(slope=slope(x, sigma_hat, denoised), denoised=denoised)
                info = {"sigma": level(sigma), "sigma_hat": level(sigma_hat)}
                self.callback({"x": x, "i": i, **info, "denoised": denoised})
            sigma_down, sigma_up = noise.split(sigma_hat, sigma_next)
            if sigma_down != sigma_hat:
                x, state = step(ctx, x, sigma_hat, sigma_down, target, state)
                x = x + (denoised - target) if plus_plus else x
                if noise.rescale is not None:
                    x = x * noise.rescale(sigma_down, sigma_next)
            if sigma_up or (noise.asks and sigma_next > 0):
                # Ancestral samplers draw even when eta is 0: seeds depend on it.
                eps = draw(sigma_hat, sigma_next)
                x = x + eps * sigma_up if sigma_up else x
        return x


sampler = partial(registry.sampler, Run)
KARRAS_2 = "Karras et al. 2022 (arXiv:2206.00364), algorithm 2"
DPMPP = "DPM-Solver++ (arXiv:2211.01095)"
IPNDM = "iPNDM, in DEIS (arXiv:2204.13902)"
CFG_PP = "CFG++ (arXiv:2406.08070)"
stochastic = partial(sampler, stochastic=True)
brownian = partial(stochastic, noise="brownian")
ancestral = partial(stochastic, noise="independent")


# ------------------------------------------------------------------------------ samplers of the ODE


@sampler(order=1, evaluations=1, paper=KARRAS_2, noise="independent")
def sample_euler(
    run: Run,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Tensor:
    """Euler's method with churn: first order."""
    noise = noise_plan.churn(s_churn, s_tmin, s_tmax, s_noise)
    return run(runge_kutta.euler, noise, slope_first=True)


@sampler(order=2, evaluations=2, paper=KARRAS_2, noise="independent")
def sample_heun(
    run: Run,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Tensor:
    """Heun's method with churn: second order. A step to 0 is Euler's, of one evaluation."""
    noise = noise_plan.churn(s_churn, s_tmin, s_tmax, s_noise)
    return run(runge_kutta.heun, noise, slope_first=True)


@sampler(
    order=2,
    evaluations=2,
    paper="DPM-Solver-2 (arXiv:2206.00927), algorithm 1, with churn",
    noise="independent",
)
def sample_dpm_2(
    run: Run,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Tensor:
    """The midpoint method in log sigma, with churn: second order."""
    noise = noise_plan.churn(s_churn, s_tmin, s_tmax, s_noise)
    return run(runge_kutta.dpm_2, noise, slope_first=True)


@sampler(order=1, evaluations=1, paper="DDIM (arXiv:2010.02502), equation 12", noise="independent")
def sample_ddim(
    run: Run,
    eta: float = 0.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """DDIM, which in sigma is Euler's method: first order. At eta = 1 it is DDPM."""
    noise = noise_plan.ancestral(eta, s_noise, noise_sampler) if eta else NO_NOISE
    return run(runge_kutta.euler, noise)


@sampler(
    order=3,
    evaluations=3,
    paper="Kutta's order conditions at noise levels ahead",
    noise="independent",
)
def sample_heunpp2(
    run: Run,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Tensor:
    """Heun++, with slopes at the next noise level and beyond it: third order.

    A step that more than halves the noise level is Heun's, a step to 0 Euler's. The name comes from
    applications, where it stands for weights without a derivation; these meet the order conditions,
    so images differ from theirs.
    """
    noise = noise_plan.churn(s_churn, s_tmin, s_tmax, s_noise) if s_churn else NO_NOISE
    return run(runge_kutta.heunpp2, noise)


@sampler(
    order=4,
    evaluations=1,
    paper="Adams-Bashforth on an uneven grid (Liu et al. 2022, arXiv:2202.09778)",
)
def sample_lms(run: Run, order: int = 4, lower_order_final: bool = False) -> Tensor:
    """Linear multistep in sigma, from the slopes of as many steps as its order.

    The last step to 0 extrapolates, as published, unless lower_order_final. Raises ValueError for
    order < 1.
    """
    if order < 1:
        raise ValueError(f"order must be at least 1, got {order}")
    step = partial(adams_bashforth.lms, order=order, lower_order_final=lower_order_final)
    return run(step, slope_first=True)


@sampler(order=2, evaluations=1, paper=IPNDM, aliases={"max_order": "order"})
def sample_ipndm(run: Run, order: int = 4, lower_order_final: bool = False) -> Tensor:
    """Improved PNDM: Adams-Bashforth with the weights of even steps.

    They are exact on a schedule that is linear in sigma; on others it is of second order. A step to
    0 is Euler's. Raises ValueError for an order other than 1 to 4.
    """
    return run(_adams(order, lower_order_final, adams_bashforth.ipndm_weights))


@sampler(order=4, evaluations=1, paper=f"{IPNDM}, variable steps", aliases={"max_order": "order"})
def sample_ipndm_v(run: Run, order: int = 4, lower_order_final: bool = False) -> Tensor:
    """Improved PNDM with the weights of its uneven steps, which is LMS with an Euler step to 0.

    Raises ValueError for an order other than 1 to 4.
    """
    return run(_adams(order, lower_order_final, adams_bashforth.adams_bashforth))


@sampler(
    order=3,
    evaluations=1,
    paper="tAB-DEIS (arXiv:2204.13902)",
    aliases={"max_order": "order", "deis_mode": "time"},
)
def sample_deis(
    run: Run, order: int = 3, time: str = "tab", lower_order_final: bool = False
) -> Tensor:
    """DEIS: Adams-Bashforth for eps in another time.

    x' = x + sum C_j eps_j, C_j the integral over sigma of the Lagrange polynomial l_j(t(sigma)). A
    step to 0 is Euler's. Raises ValueError for an order other than 1 to 4 or another time.

    Args:
        time: "tab", that of the VP schedule from 0.002 to 80 (tAB-DEIS), "vp", that of
            `get_sigmas_vp`, "rhoab" or "rho", sigma itself, or "log_rho".
    """
    if time not in adams_bashforth.DEIS_TIMES:
        raise unknown_name("time", time, adams_bashforth.DEIS_TIMES)
    weights = partial(adams_bashforth.deis_weights, time=time)
    return run(_adams(order, lower_order_final, weights))


def _adams(order: int, lower_order_final: bool, weights: adams_bashforth.Weights) -> context.Step:
    """A step of Adams-Bashforth that ends in Euler's step to 0."""
    check_order(order, 4)
    return partial(
        adams_bashforth.lms,
        order=order,
        lower_order_final=lower_order_final,
        weights=weights,
        euler_to_0=True,
    )


@sampler(order=2, evaluations=1, paper="F-PNDM (arXiv:2202.09778)")
def sample_pndm(run: Run) -> Tensor:
    """PNDM: three Runge-Kutta steps of four evaluations, then Adams-Bashforth of order 4.

    Its transfer part is DDIM's, which in sigma is Euler's; its weights are those of even steps. So
    it is of fourth order on a schedule that is linear in sigma, and of second on others.
    """
    return run(pndm.pndm)


@sampler(
    order=1,
    evaluations=1,
    paper="Permenter & Yuan 2023 (arXiv:2306.04848), algorithm 2",
    aliases={"ge_gamma": "gamma"},
)
def sample_gradient_estimation(run: Run, gamma: float = 2.0) -> Tensor:
    """DDIM along gamma eps + (1 - gamma) eps_1, a better estimate of the gradient of the distance.

    Of first order, with less error than DDIM; of second on even steps at gamma = 1.5.

    Args:
        gamma: the weight of this step's eps against the last one's; 1 is DDIM.
    """
    return run(partial(adams_bashforth.gradient_estimation, gamma=gamma))


@sampler(order=2, evaluations=1, paper=f"{DPMPP}, algorithm 2")
def sample_dpmpp_2m(run: Run, lower_order_final: bool = False) -> Tensor:
    """DPM-Solver++(2M): second order, multistep.

    Args:
        lower_order_final: the last step is of first order also where the schedule ends above 0.
    """
    return run(partial(dpmpp.dpmpp_2m, lower_order_final=lower_order_final))


@sampler(order=3, evaluations=3, paper=f"{DPMPP}, 3S: DPM-Solver-3 in the denoised sample")
def sample_dpmpp_3s(run: Run) -> Tensor:
    """DPM-Solver++(3S): third order, single-step. A step to 0 takes one evaluation."""
    return run(exponential_rk.step("dpmpp_3s"))


@sampler(order=4, evaluations=4, paper="Krogstad 2005 (doi:10.1016/j.jcp.2004.08.006), ETDRK4-B")
def sample_exponential_rk(run: Run, tableau: str = "krogstad") -> Tensor:
    """An exponential Runge-Kutta method from a table of phi functions: order and cost are its own.

    A step to 0 takes one evaluation. Raises ValueError for an unknown tableau.

    Args:
        tableau: a row of `solvers.exponential_rk.TABLEAUS`: "res_2s", "dpmpp_3s", "etd3",
            "krogstad", "hochbruck_ostermann", or one added by `add_tableau`.
    """
    return run(exponential_rk.step(tableau))


@sampler(order=2, evaluations=1, paper="RES (arXiv:2308.02157), multistep")
def sample_res_multistep(run: Run, order: int = 2, lower_order_final: bool = True) -> Tensor:
    """The refined exponential solver, multistep: of order `order`.

    x' = e^-h x + h (b_1 D + b_2 D_1 ...) with phi functions of -h for weights, so that the order
    conditions hold. At order 2 it is DPM-Solver++(2M) with the weight "heun". Raises ValueError for
    an order other than 1 to 4.
    """
    return run(_res_multistep(order, lower_order_final))


def _res_multistep(order: int, lower_order_final: bool) -> context.Step:
    check_order(order, 4)
    return partial(
        exponential_adams.exponential_adams, order=order, lower_order_final=lower_order_final
    )


@sampler(order=4, evaluations=1, paper="UniPC (arXiv:2302.04867), algorithms 1 and 2")
def sample_uni_pc(
    run: Run,
    order: int = 3,
    variant: str = "bh2",
    corrector: bool = True,
    lower_order_final: bool = True,
) -> Tensor:
    """UniPC: multistep, a predictor and a corrector from one evaluation; of order `order` + 1.

    x' = e^-h x + (1 - e^-h) D + B(h) sum a_m (D_m - D) / r_m, with the order conditions on a.
    Raises ValueError for an order other than 1 to 3 or another variant.

    Args:
        variant: "bh1", B(h) = h, or "bh2", B(h) = 1 - e^-h; they differ where D_m is alone.
        corrector: False for UniP alone, of order `order`.
    """
    check_order(order, 3)
    if variant not in exponential_adams.UNI_PC_B:
        raise unknown_name("variant", variant, exponential_adams.UNI_PC_B)
    return run(exponential_adams.uni_pc(variant, order, corrector, lower_order_final))


@sampler(order=2, evaluations=2, paper="SEEDS-2 at eta = 0 and r = 1 (arXiv:2305.14267)")
def sample_exp_heun_2_x0(run: Run, solver_type: str = "phi_2") -> Tensor:
    """An exponential Heun method in the denoised sample: second order.

    Raises ValueError for another solver_type.

    Args:
        solver_type: "phi_2" or "phi_1", the weight of the second evaluation.
    """
    return run(_seeds_2(0.0, 1.0, solver_type))


# ------------------------------------------------------------------------------- ancestral samplers


@ancestral(order=1, evaluations=1, paper="DDPM (arXiv:2006.11239) in sigma")
def sample_euler_ancestral(
    run: Run,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """Ancestral sampling with Euler steps: first order."""
    return run(runge_kutta.euler, noise_plan.ancestral(eta, s_noise, noise_sampler))


@ancestral(order=2, evaluations=2, paper="DPM-Solver-2 (arXiv:2206.00927), ancestral")
def sample_dpm_2_ancestral(
    run: Run,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """Ancestral sampling with midpoint steps in log sigma: second order at eta = 0."""
    return run(runge_kutta.dpm_2, noise_plan.ancestral(eta, s_noise, noise_sampler))


@ancestral(order=2, evaluations=2, paper=f"{DPMPP}, algorithm 1, ancestral")
def sample_dpmpp_2s_ancestral(
    run: Run,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """Ancestral sampling with DPM-Solver++(2S) steps: second order at eta = 0."""
    return run(dpmpp.dpmpp_2s, noise_plan.ancestral(eta, s_noise, noise_sampler))


@ancestral(order=1, evaluations=1, paper="DDPM (arXiv:2006.11239), equations 6 and 7")
def sample_ddpm(
    run: Run, s_noise: float = 1.0, noise_sampler: NoiseSampler | None = None
) -> Tensor:
    """DDPM's ancestral sampling: the posterior given the denoised sample.

    That is sample_euler_ancestral at eta = 1.
    """
    return run(runge_kutta.euler, noise_plan.ancestral(1.0, s_noise, noise_sampler))


@ancestral(order=1, evaluations=1, paper="LCM (arXiv:2310.04378), algorithm 3")
def sample_lcm(run: Run, s_noise: float = 1.0, noise_sampler: NoiseSampler | None = None) -> Tensor:
    """Sampling of consistency models: denoise all the way, add noise anew: x' = D + sigma' noise.

    For models distilled to give a sample in one step, those of TrigFlow (sCM, arXiv:2410.11081)
    among them; of others it makes blurred ones.
    """
    return run(runge_kutta.leap, noise_plan.renoise(0.0, s_noise, noise_sampler))


@ancestral(order=1, evaluations=1, paper="Consistency models (arXiv:2303.01469), algorithm 1")
def sample_consistency(
    run: Run,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    sigma_min: float = 0.002,
) -> Tensor:
    """Multistep consistency sampling: x' = D + sqrt(sigma'^2 - sigma_min^2) noise.

    Args:
        sigma_min: the noise level of what the model returns, 0.002 in the paper; at 0 it is `lcm`.
    """
    numbers.non_negative(sigma_min=sigma_min)
    return run(runge_kutta.leap, noise_plan.renoise(sigma_min, s_noise, noise_sampler))


@ancestral(order=1, evaluations=1, paper="TCD (arXiv:2402.19159), strategic stochastic sampling")
def sample_tcd(
    run: Run,
    eta: float = 0.3,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """Trajectory consistency distillation: DDIM down to the time (1 - eta) t', then noise up to t'.

    Time is the VP schedule's, that of `get_sigmas_vp`. For models distilled with it; of others it
    is DDIM with noise.

    Args:
        eta: gamma in the paper: 0 is DDIM, 1 `lcm`.
    """
    return run(runge_kutta.euler, noise_plan.tcd(eta, s_noise, noise_sampler))


@ancestral(order=1, evaluations=2, paper="Song et al. 2021 (arXiv:2011.13456), algorithms 2 and 4")
def sample_predictor_corrector(
    run: Run,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    snr: float = 0.16,
    corrector_steps: int = 1,
) -> Tensor:
    """Predictor-corrector sampling: an ancestral step, then Langevin steps at its noise level.

    The norms that set the step size are each image's own, the paper's the batch's mean. Raises
    ValueError for snr <= 0 or corrector_steps < 0.

    Args:
        snr: the ratio of a corrector step's noise to its score.
        corrector_steps: of Langevin dynamics, one evaluation each.
    """
    if not snr > 0 or corrector_steps < 0:
        raise ValueError(
            f"snr must be positive and corrector_steps >= 0, got {snr} and {corrector_steps}"
        )
    step = partial(langevin.predictor_corrector, snr=snr, corrector_steps=corrector_steps)
    return run(step, Noise("independent", noise_sampler, s_noise, active=True))


@ancestral(order=2, evaluations=1, paper="RES (arXiv:2308.02157), ancestral")
def sample_res_multistep_ancestral(
    run: Run,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    order: int = 2,
    lower_order_final: bool = True,
) -> Tensor:
    """Ancestral sampling with multistep RES steps: order `order` at eta = 0.

    Raises ValueError for an order other than 1 to 4.
    """
    noise = noise_plan.ancestral(eta, s_noise, noise_sampler)
    return run(_res_multistep(order, lower_order_final), noise)


# --------------------------------------------------------------------------------------- CFG++
#
# A step of the plain sampler by the unconditional estimate U, then the guided estimate less U is
# added. They ask the model for both, `guidance.CFGDenoiser` has them; any other model has no
# guidance to tell, and takes the plain sampler's steps.


@sampler(order=1, evaluations=1, paper=f"{CFG_PP}, algorithm 2")
def sample_euler_cfg_pp(run: Run) -> Tensor:
    """CFG++ with Euler (DDIM) steps: x' = D + sigma' (x - U) / sigma.

    model is a `guidance.CFGDenoiser` with a scale between 0 and 1, U its unconditional estimate.
    """
    return run(runge_kutta.euler, plus_plus=True)


@ancestral(order=1, evaluations=1, paper=f"{CFG_PP}, ancestral")
def sample_euler_ancestral_cfg_pp(
    run: Run,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """CFG++ with ancestral Euler steps; see sample_euler_cfg_pp for the model."""
    noise = noise_plan.ancestral(eta, s_noise, noise_sampler)
    return run(runge_kutta.euler, noise, plus_plus=True)


@sampler(order=2, evaluations=1, paper=f"{CFG_PP} with {DPMPP}, 2M")
def sample_dpmpp_2m_cfg_pp(run: Run) -> Tensor:
    """CFG++ with DPM-Solver++(2M) steps; see sample_euler_cfg_pp for the model."""
    return run(dpmpp.dpmpp_2m, plus_plus=True)


@ancestral(order=2, evaluations=2, paper=f"{CFG_PP} with {DPMPP}, 2S")
def sample_dpmpp_2s_ancestral_cfg_pp(
    run: Run,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """CFG++ with ancestral DPM-Solver++(2S) steps; see sample_euler_cfg_pp for the model."""
    noise = noise_plan.ancestral(eta, s_noise, noise_sampler)
    return run(dpmpp.dpmpp_2s, noise, plus_plus=True)


@sampler(order=2, evaluations=1, paper=f"{CFG_PP} with RES (arXiv:2308.02157)")
def sample_res_multistep_cfg_pp(run: Run) -> Tensor:
    """CFG++ with multistep RES steps; see sample_euler_cfg_pp for the model."""
    return run(_res_multistep(2, True), plus_plus=True)


@ancestral(order=2, evaluations=1, paper=f"{CFG_PP} with RES (arXiv:2308.02157), ancestral")
def sample_res_multistep_ancestral_cfg_pp(
    run: Run,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """CFG++ with ancestral multistep RES steps; see sample_euler_cfg_pp for the model."""
    noise = noise_plan.ancestral(eta, s_noise, noise_sampler)
    return run(_res_multistep(2, True), noise, plus_plus=True)


@sampler(
    order=1,
    evaluations=1,
    paper=f"{CFG_PP} with Permenter & Yuan 2023 (arXiv:2306.04848)",
    aliases={"ge_gamma": "gamma"},
)
def sample_gradient_estimation_cfg_pp(run: Run, gamma: float = 2.0) -> Tensor:
    """CFG++ with gradient estimation; see sample_euler_cfg_pp for the model.

    Args:
        gamma: the weight of this step's eps against the last one's.
    """
    return run(partial(adams_bashforth.gradient_estimation, gamma=gamma), plus_plus=True)


# ------------------------------------------------- rectified flows in their own parametrisation


@ancestral(order=1, evaluations=1, paper="Rectified flow (arXiv:2209.03003), ancestral", flow=True)
def sample_euler_ancestral_RF(
    run: Run,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """Ancestral Euler steps of a rectified flow, x = (1 - t) data + t noise: first order.

    sigmas are times t from 1 to 0, and model, (x, t) -> data, takes x in that form.
    """
    return run(runge_kutta.euler, noise_plan.flow(eta, s_noise, noise_sampler))


@ancestral(
    order=2, evaluations=2, paper="DPM-Solver-2 (arXiv:2206.00927), ancestral in a flow", flow=True
)
def sample_dpm_2_ancestral_RF(
    run: Run,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """Ancestral midpoint steps of a rectified flow; see sample_euler_ancestral_RF."""
    return run(runge_kutta.dpm_2, noise_plan.flow(eta, s_noise, noise_sampler))


@ancestral(order=2, evaluations=2, paper=f"{DPMPP}, 2S, ancestral in a flow", flow=True)
def sample_dpmpp_2s_ancestral_RF(
    run: Run,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """Ancestral DPM-Solver++(2S) steps of a rectified flow; see sample_euler_ancestral_RF."""
    return run(dpmpp.dpmpp_2s_flow, noise_plan.flow(eta, s_noise, noise_sampler))


# ------------------------------------------------------------------------------ samplers of the SDE


# (sigma_min, sigma_max, steps, times) each, as `sample_restart` takes them.
Restarts = Sequence[tuple[float, float, int, int]]


@brownian(order=2, evaluations=2, paper=f"{DPMPP}, stochastic")
def sample_dpmpp_sde(
    run: Run,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    r: float = 0.5,
) -> Tensor:
    """DPM-Solver++ (stochastic), single-step: second order.

    Args:
        r: the fraction of the step at which the second evaluation is.
    """
    numbers.positive(r=r)
    noise = noise_plan.inside(eta, s_noise, noise_sampler)
    return run(partial(dpmpp.dpmpp_sde, eta=eta, r=r), noise)


@brownian(order=2, evaluations=1, paper=f"{DPMPP}, SDE-DPM-Solver++(2M)")
def sample_dpmpp_2m_sde(
    run: Run,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    solver_type: str = "midpoint",
) -> Tensor:
    """DPM-Solver++(2M) for the reverse-time SDE. Raises ValueError for another solver_type.

    Args:
        solver_type: "midpoint" or "heun", the weight of the second-order term.
    """
    return run(_dpmpp_2m_sde(solver_type), noise_plan.sde(eta, s_noise, noise_sampler))


def _dpmpp_2m_sde(solver_type: str) -> context.Step:
    if solver_type not in dpmpp.SOLVER_TYPES:
        raise unknown_name("solver_type", solver_type, dpmpp.SOLVER_TYPES)
    return partial(dpmpp.dpmpp_2m, solver_type=solver_type)


@brownian(order=2, evaluations=1, paper=f"{DPMPP}, SDE-DPM-Solver++(2M)")
def sample_dpmpp_2m_sde_heun(
    run: Run,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    solver_type: str = "heun",
) -> Tensor:
    """DPM-Solver++(2M) for the reverse-time SDE with the weight of an exponential Heun method.

    Args:
        solver_type: "heun" or "midpoint", the weight of the second-order term.
    """
    return run(_dpmpp_2m_sde(solver_type), noise_plan.sde(eta, s_noise, noise_sampler))


@brownian(order=2, evaluations=1, paper=f"{DPMPP}, 3M for the SDE")
def sample_dpmpp_3m_sde(
    run: Run,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    lower_order_final: bool = False,
) -> Tensor:
    """DPM-Solver++(3M) for the reverse-time SDE, as published: second order."""
    step = partial(dpmpp.dpmpp_3m, lower_order_final=lower_order_final)
    return run(step, noise_plan.sde(eta, s_noise, noise_sampler))


@brownian(
    order=3,
    evaluations=1,
    paper="ER-SDE-Solver-3 (arXiv:2309.06169)",
    aliases={"max_stage": "order", "noise_scaler": "noise_scale"},
)
def sample_er_sde(
    run: Run,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    noise_scale: str | er_sde.Scale = "er_sde",
    order: int = 3,
    lower_order_final: bool = True,
) -> Tensor:
    """ER-SDE solvers, multistep, for an SDE with less noise at low levels.

    Of order `order` at eta = 0. The noise scale is phi(sigma) = sigma g(sigma)^eta. Raises
    ValueError for an order other than 1 to 3 or another noise scale.

    Args:
        noise_scale: "er_sde", g = exp(sigma^0.3) + 10, "sde", g = sigma, the usual SDE, or the
            function phi of a 0-d float64 tensor.
    """
    check_order(order, 3)
    log_g = er_sde.log_scale(noise_scale)
    step = partial(
        er_sde.er_sde, eta=eta, log_g=log_g, order=order, lower_order_final=lower_order_final
    )
    split = er_sde.er_split(eta, log_g)
    noise = Noise("brownian", noise_sampler, s_noise, split=split, active=bool(eta))
    return run(step, noise)


def _seeds_2(eta: float, r: float, solver_type: str) -> context.Step:
    if not 0 < r <= 1:
        raise ValueError(f"the second stage must lie at a fraction above 0 and up to 1, got {r}")
    if solver_type not in seeds.SOLVER_TYPES:
        raise unknown_name("solver_type", solver_type, seeds.SOLVER_TYPES)
    return partial(seeds.seeds_2, eta=eta, r=r, solver_type=solver_type)


@brownian(order=2, evaluations=2, paper="SEEDS-2 (arXiv:2305.14267)")
def sample_seeds_2(
    run: Run,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    r: float = 0.5,
    solver_type: str = "phi_1",
) -> Tensor:
    """SEEDS-2: two stages of the reverse-time SDE; second order.

    A step to 0 takes one evaluation. Raises ValueError unless 0 < r <= 1, or for another
    solver_type.

    Args:
        r: the fraction of the step at which the second stage is.
        solver_type: "phi_1" or "phi_2", the weight of the second stage.
    """
    return run(_seeds_2(eta, r, solver_type), noise_plan.inside(eta, s_noise, noise_sampler))


@brownian(order=2, evaluations=2, paper="SEEDS-2 at r = 1 (arXiv:2305.14267)")
def sample_exp_heun_2_x0_sde(
    run: Run,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    solver_type: str = "phi_2",
) -> Tensor:
    """An exponential Heun method for the reverse-time SDE: second order.

    Raises ValueError for another solver_type.

    Args:
        solver_type: "phi_2" or "phi_1", the weight of the second evaluation.
    """
    return run(_seeds_2(eta, 1.0, solver_type), noise_plan.inside(eta, s_noise, noise_sampler))


@brownian(order=3, evaluations=3, paper="SEEDS-3 (arXiv:2305.14267)")
def sample_seeds_3(
    run: Run,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    r_1: float = 1 / 3,
    r_2: float = 2 / 3,
) -> Tensor:
    """SEEDS-3: three stages of the reverse-time SDE; third order at eta = 0 and r_2 = 2/3.

    A step to 0 takes one evaluation. Raises ValueError unless 0 < r_1 < r_2 < 1.

    Args:
        r_1: the fraction of the step at which the second stage is.
        r_2: that of the third stage.
    """
    if not 0 < r_1 < r_2 < 1:
        raise ValueError(f"stages must lie at rising fractions between 0 and 1, got {(r_1, r_2)}")
    step = partial(seeds.seeds_3, eta=eta, r_1=r_1, r_2=r_2)
    return run(step, noise_plan.inside(eta, s_noise, noise_sampler))


@brownian(order=4, evaluations=1, paper="SA-Solver (arXiv:2309.05019), algorithm 1")
def sample_sa_solver(
    run: Run,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    predictor_order: int = 3,
    corrector_order: int = 4,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    lower_order_final: bool = True,
    tau_func: Callable[[float], float] | None = None,
) -> Tensor:
    """SA-Solver, a stochastic Adams method: predictor and corrector from one evaluation (PEC).

    x' = e^-H x + (integral of e^(u - H) D du) + noise, H = (1 + tau^2) h, with the polynomial
    through the last predictor_order values of D, and then through corrector_order with the new one.
    Raises ValueError for orders other than 1 to 4.

    Args:
        eta: tau^2, 1 for the usual SDE, 0 for the ODE.
        predictor_order: values of D that the predictor takes.
        corrector_order: values of D that the corrector takes; 0 for none.
        tau_func: tau by the noise level, instead of eta and its interval.
    """
    step = exponential_adams.sa_solver(predictor_order, corrector_order, lower_order_final)
    tau = noise_plan.between(eta, s_tmin, s_tmax) if tau_func is None else tau_func
    squared = tau if tau_func is None else lambda sigma: float(tau(sigma)) ** 2
    active = bool(eta) or tau_func is not None
    return run(step, noise_plan.sde(squared, s_noise, noise_sampler, active))


@brownian(order=4, evaluations=2, paper="SA-Solver (arXiv:2309.05019), PECE")
def sample_sa_solver_pece(
    run: Run,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    predictor_order: int = 3,
    corrector_order: int = 4,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    lower_order_final: bool = True,
    tau_func: Callable[[float], float] | None = None,
) -> Tensor:
    """SA-Solver that evaluates the corrected sample too: predict, evaluate, correct, evaluate.

    Raises ValueError for orders other than 1 to 4.

    Args:
        eta: tau^2, 1 for the usual SDE, 0 for the ODE.
        predictor_order: values of D that the predictor takes.
        corrector_order: values of D that the corrector takes; 0 for none.
        tau_func: tau by the noise level, instead of eta and its interval.
    """
    tau = noise_plan.between(eta, s_tmin, s_tmax) if tau_func is None else tau_func
    squared = tau if tau_func is None else lambda sigma: float(tau(sigma)) ** 2
    step = exponential_adams.sa_solver_pece(
        predictor_order, corrector_order, lower_order_final, squared
    )
    return run(step, noise_plan.inside(bool(eta) or tau_func is not None, s_noise, noise_sampler))


@ancestral(order=2, evaluations=2, paper="Restart (arXiv:2306.14878), algorithm 1")
def sample_restart(
    run: Run,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    restarts: Restarts = ((0.1, 2.0, 10, 2),),
) -> Tensor:
    """Heun's method, and again through some intervals: up by fresh noise, down by the ODE.

    Its added steps count in the progress bar and the callback's `i`. Raises ValueError for an
    impossible restart.

    Args:
        restarts: (sigma_min, sigma_max, steps, times) each: at the noise level nearest to
            sigma_min, noise takes the sample up to sigma_max, and steps of Karras et al.'s schedule
            down again. One that isn't inside of the schedule is left out.
    """
    intervals = [noise_plan.Restart(*r) for r in restarts]
    return run(runge_kutta.heun, noise_plan.restart(intervals, s_noise, noise_sampler))


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

    x: (n, ...). Steps are equal in log sigma, from sigma_max to sigma_min, both positive. The
    callback's dict also has `t` and `t_up`. Raises ValueError for n < 1 or bad noise levels.

    Args:
        n: model evaluations in all.
    """
    lo, hi = check_ends(sigma_min, sigma_max)
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

    x: (n, ...). The error norm is the whole batch's, so here alone an image depends on its batch,
    also where its noise is its seed's; run images one at a time for the same ones in any batch. The
    callback's dict also has `t`, `t_up`, `error`, `h`, and the counts `steps`, `nfe`, `n_accept`,
    `n_reject`.

    Args:
        order: 3 or 2.
        rtol: the relative tolerance of a step.
        atol: its absolute tolerance, in the units of x.
        h_init: the length of the first step in log sigma.
        pcoeff: of the PID controller of the step size, its proportional part.
        icoeff: its integral part.
        dcoeff: its derivative part.
        accept_safety: a step is accepted if the next one may be this many times as long.
        return_info: returns (sample, counts) instead of the sample.
    """
    lo, hi = check_ends(sigma_min, sigma_max)
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


# --------------------------------------------------------------------- any of them, and their seeds


@torch.no_grad()
def sample(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    sampler: str = "dpmpp_2m",
    seeds: Iterable[int] | None = None,
    noise_sampler: NoiseSampler | None = None,
    callback: Callback = None,
    *,
    extra_args: Args = None,
    disable: bool | None = None,
    **options: Any,
) -> Tensor:
    """Sample with the sampler of a name, and if wanted with a seed per image.

    Args:
        model: (x, sigma, **extra_args) -> the estimate of the clean sample; sigma: (n,).
        x: (n, ...), noise of standard deviation sigmas[0], such as `randn_per_seed(seeds, shape) *
            sigmas[0]`, or a noisy sample to start from.
        sigmas: (steps + 1,), the schedule. dpm_fast and dpm_adaptive take its ends alone, and
            dpm_fast as many evaluations as it has steps to levels above 0.
        sampler: a row of SAMPLERS.
        seeds: n integers: image i depends on seeds[i], not on the batch; `make_noise_sampler`.
        noise_sampler: (sigma, sigma_next) -> unit Gaussian noise like x, instead of seeds.
        callback: called in each step with a dict of `x`, `i`, `sigma`, `sigma_hat`, `denoised`.
        extra_args: keyword arguments for the model.
        disable: hides the progress bar; None hides it where there is no terminal.
        options: of the sampler, by the names that its signature has.

    Returns:
        The sample at sigmas[-1], shaped as x.

    Raises:
        ValueError: for an unknown sampler or option, for both seeds and a noise_sampler, for a
            noise_sampler where the sampler adds no noise, and where sigmas is no schedule.
    """
    info = get_sampler(sampler)
    known = inspect.signature(info.function).parameters
    if unknown := [name for name in options if name not in known or name in RUN_FIELDS]:
        raise unknown_name(f"option of {info.name}", unknown[0], list(known)[6:])
    if noise_sampler is not None and (seeds is not None or not info.noise):
        why = "its seeds make one" if info.noise else f"{info.name} adds no noise"
        raise ValueError(f"no noise_sampler is taken here, as {why}; leave it out")
    if noise_sampler is None:
        noise_sampler = make_noise_sampler(info.name, x, sigmas, seeds)
    if info.body is not None:
        run = Run(model, x, sigmas, extra_args, callback, disable, noise_sampler)
        return info.body(run, **registry.own_names(info, options))
    _, host = read_sigmas(sigmas, x.device, bool(options.get("eta")))
    if len(host) < 2:
        return x
    ends = host[-1] or host[-2], host[0]
    if info.name == "dpm_fast":
        options = {"n": sum(s > 0 for s in host) - 1, **options}
    options |= {"extra_args": extra_args, "callback": callback, "disable": disable}
    return info.function(model, x, *ends, noise_sampler=noise_sampler, **options)


RUN_FIELDS = {"model", "x", "sigmas", "sigma_min", "sigma_max", "noise_sampler"}


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
