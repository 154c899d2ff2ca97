"""Where diffusers publishes a scheduler for the same method, both walk the same path."""

import inspect
import math

import problems
import pytest
import torch

from k_diffusion import sampling as S

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore")  # theirs about numpy

TABLE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
KARRAS = {**TABLE, "use_karras_sigmas": True}
TO_0 = {**KARRAS, "final_sigmas_type": "zero"}


def start() -> torch.Tensor:
    return problems.normal(0, 8, 2, dtype=torch.float64)


def noise(dtype: torch.dtype = torch.float64):
    """The noise that a scheduler draws when it gets a generator of seed 0."""
    generator = torch.Generator().manual_seed(0)
    return lambda sigma, sigma_next: torch.randn(8, 2, dtype=dtype, generator=generator).double()


def theirs(scheduler, sigmas, stop=None, **options):
    """Drives a scheduler with the mixture's eps. Returns our schedule and their sample in VE form.

    stop: how many steps to leave out, where they don't step to 0.
    """
    model, x = problems.mixture(), start() * sigmas[0]
    if "generator" in inspect.signature(scheduler.step).parameters:
        options["generator"] = torch.Generator().manual_seed(0)
    # Euler's scheduler works in variance-exploding form, the others in variance-preserving form.
    exploding = hasattr(scheduler, "scale_model_input") and "Euler" in type(scheduler).__name__
    scale = [1.0 if exploding else math.sqrt(1 + s * s) for s in sigmas.tolist()]
    timesteps = scheduler.timesteps[:stop]
    sample = x / scale[0]
    for i, t in enumerate(timesteps):
        scheduler.scale_model_input(sample, t)
        sigma, x = sigmas[i], sample * scale[i]
        eps = (x - model(x, sigma.expand(8))) / sigma
        sample = scheduler.step(eps, t, sample, **options).prev_sample
    n = len(timesteps)
    return sigmas[: n + 1], sample * scale[n]


def check(scheduler, n, sample, stop=None, tolerance=2e-6, **options):
    scheduler.set_timesteps(n)
    sigmas, want = theirs(scheduler, scheduler.sigmas.double(), stop)
    got = sample(problems.mixture(), start() * sigmas[0], sigmas, disable=True, **options)
    # Their coefficients are float32.
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("n", [8, 20])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("corrector", [False, True])
def test_uni_pc_bh2(n, order, corrector):
    off = [] if corrector else list(range(n))
    scheduler = diffusers.UniPCMultistepScheduler(
        **TO_0, solver_order=order, solver_type="bh2", disable_corrector=off
    )
    check(scheduler, n, S.sample_uni_pc, order=order, corrector=corrector)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_uni_pc_bh1(order):
    # Theirs is NaN on the step to 0, so it's left out.
    scheduler = diffusers.UniPCMultistepScheduler(
        **TO_0, solver_order=order, solver_type="bh1", lower_order_final=False
    )
    check(scheduler, 8, S.sample_uni_pc, stop=-1, order=order, variant="bh1")


@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis(order):
    scheduler = diffusers.DEISMultistepScheduler(
        **KARRAS, solver_order=order, lower_order_final=False
    )
    check(scheduler, 20, S.sample_deis, stop=-1, tolerance=2e-5, order=order, time="log_rho")


@pytest.mark.parametrize("n", [8, 20])
@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
def test_dpmpp_2m(n, solver_type):
    scheduler = diffusers.DPMSolverMultistepScheduler(**TO_0, solver_type=solver_type)
    if solver_type == "midpoint":
        check(scheduler, n, S.sample_dpmpp_2m)
    else:
        check(scheduler, n, S.sample_res_multistep)


@pytest.mark.parametrize("n", [8, 20])
@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
def test_dpmpp_2m_sde(n, solver_type):
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **TO_0, algorithm_type="sde-dpmsolver++", solver_type=solver_type
    )
    options = {"noise_sampler": noise(torch.float32), "solver_type": solver_type}
    check(scheduler, n, S.sample_dpmpp_2m_sde, **options)


@pytest.mark.parametrize("n", [8, 20])
def test_dpmpp_3m(n):
    scheduler = diffusers.DPMSolverMultistepScheduler(**TO_0, solver_order=3, solver_type="heun")
    # They lower the order at the end where there are fewer than 15 steps.
    options = {"eta": 0.0, "lower_order_final": n < 15}
    check(scheduler, n, S.sample_dpmpp_3m_sde, tolerance=2e-5, **options)


@pytest.mark.parametrize(("predictor", "corrector"), [(1, 1), (3, 3), (3, 4)])
@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0])
def test_sa_solver(predictor, corrector, tau):
    # At order 2 theirs trades the exact weight for another one of second order.
    scheduler = diffusers.SASolverScheduler(
        **KARRAS,
        predictor_order=predictor,
        corrector_order=corrector,
        tau_func=lambda t: tau,
        lower_order_final=False,
    )
    orders = {"predictor_order": predictor, "corrector_order": corrector}
    options = {"eta": tau**2, "noise_sampler": noise(), **orders}
    check(scheduler, 20, S.sample_sa_solver, stop=-1, tolerance=3e-4, **options)


def test_euler():
    check(diffusers.EulerDiscreteScheduler(**KARRAS), 20, S.sample_euler)


@pytest.mark.parametrize(
    ("scheduler", "theirs_too", "sample", "options"),
    [
        ("DDIMScheduler", {"eta": 0.0}, S.sample_ddim, {}),
        ("DDIMScheduler", {"eta": 0.5}, S.sample_ddim, {"eta": 0.5}),
        ("DDPMScheduler", {}, S.sample_ddpm, {}),
        ("LCMScheduler", {}, S.sample_lcm, {}),
    ],
)
def test_schedulers_on_their_table(scheduler, theirs_too, sample, options):
    scheduler = getattr(diffusers, scheduler)(**TABLE, clip_sample=False)
    scheduler.set_timesteps(10)
    alphas = scheduler.alphas_cumprod.double()[scheduler.timesteps]
    sigmas = S.append_zero(((1 - alphas) / alphas).sqrt())
    sigmas, want = theirs(scheduler, sigmas, **theirs_too)
    got = sample(
        problems.mixture(),
        start() * sigmas[0],
        sigmas,
        disable=True,
        **({"noise_sampler": noise()} | options),
    )
    # LCM's also mixes in a little of the input, which consistency models do inside.
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
