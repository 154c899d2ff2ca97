"""Orders of convergence, exact laws, and the parts that solvers are made of."""

import inspect
import math
from functools import partial

import problems
import pytest
import torch
from problems import HI, LO, grid, impulses, rms
from scipy import integrate

from k_diffusion import sampling as S
from k_diffusion.solvers import noise_plan


@pytest.fixture(scope="module")
def reference():
    return problems.reference()


@pytest.mark.parametrize(
    ("order", "name", "options"),
    [
        (1, "euler", {}),
        (1, "euler_ancestral", {"eta": 0}),
        (2, "heun", {}),
        (2, "dpm_2", {}),
        (2, "dpm_2_ancestral", {"eta": 0}),
        (1, "lms", {"order": 1}),
        (2, "lms", {"order": 2}),
        (3, "lms", {"order": 3}),
        (4, "lms", {"order": 4}),
        (2, "dpmpp_2s_ancestral", {"eta": 0}),
        (2, "dpmpp_sde", {"eta": 0}),
        (2, "dpmpp_sde", {"eta": 0, "r": 0.7}),
        (2, "dpmpp_2m", {}),
        (2, "dpmpp_2m_sde", {"eta": 0}),
        (2, "dpmpp_2m_sde", {"eta": 0, "solver_type": "heun"}),
        (2, "dpmpp_3m_sde", {"eta": 0}),
    ],
)
def test_order_of_convergence(reference, order, name, options):
    mixture, x, want = reference
    sample = partial(S.get_sampler(name).function, mixture, x, disable=True, **options)
    coarse, fine = (rms(sample(grid(n)) - want) for n in (128, 256))
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


def test_order_of_dpm_fast(reference):
    mixture, x, want = reference
    coarse, fine = (
        rms(S.sample_dpm_fast(mixture, x, LO, HI, n, disable=True) - want) for n in (192, 384)
    )
    assert math.log2(coarse / fine) == pytest.approx(2, abs=0.15)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_order_of_dpm_solver_steps(reference, order):
    mixture, x, want = reference
    solver = S.DPMSolver(mixture)
    step = getattr(solver, f"dpm_solver_{order}_step")

    def error(n: int) -> float:
        y, h = x, math.log(HI / LO) / n
        for i in range(n):
            y, _ = step(y, -math.log(HI) + i * h, -math.log(HI) + (i + 1) * h)
        return rms(y - want)

    assert math.log2(error(96) / error(192)) == pytest.approx(order, abs=0.15)


def test_dpm_adaptive_follows_its_tolerance(reference):
    mixture, x, want = reference
    errors, evaluations = [], []
    for tolerance in (1e-2, 1e-3, 1e-4):
        y, info = S.sample_dpm_adaptive(
            mixture, x, LO, HI, rtol=tolerance, atol=tolerance, return_info=True, disable=True
        )
        errors.append(rms(y - want))
        evaluations.append(info["nfe"])
        assert info["steps"] == info["n_accept"] + info["n_reject"]
    assert errors[0] > 5 * errors[1] > 25 * errors[2]
    assert evaluations[0] < evaluations[1] < evaluations[2]


def without_noise(name):
    """The options that leave a sampler with its ODE; None where it has none."""
    info = S.get_sampler(name)
    parameters = inspect.signature(info.function).parameters
    if not info.takes_sigmas:
        return None
    if not info.stochastic:
        return {}
    return {"eta": 0.0} if "eta" in parameters else {"restart": {"restarts": ()}}.get(name)


ODE = [name for name in S.SAMPLERS if without_noise(name) is not None]


def test_all_samplers_but_these_have_an_ode_on_a_schedule():
    """Those have tests of their own: of tolerance, order, and exact laws."""
    others = {"dpm_fast", "dpm_adaptive", "ddpm", "lcm", "consistency", "predictor_corrector"}
    assert set(S.SAMPLERS) - set(ODE) == others


@pytest.mark.parametrize("name", ODE)
def test_the_table_says_the_order(reference, name):
    mixture, x, want = reference
    sample = partial(S.get_sampler(name).function, mixture, x, disable=True, **without_noise(name))
    coarse, fine = (rms(sample(grid(n)) - want) for n in (256, 512))
    assert math.log2(coarse / fine) == pytest.approx(S.get_sampler(name).order, abs=0.2)


@pytest.mark.parametrize("name", ODE)
def test_ascending_sigmas_run_the_ode_backwards(name):
    problem = problems.Gaussian(0.3, 0.5)
    x = problems.normal(1, 4, 3, dtype=torch.float64) * 0.5 + 0.3
    sigmas = grid(400).flip(0)
    sample = partial(S.get_sampler(name).function, problem, disable=True, **without_noise(name))
    noise = sample(x, sigmas)
    tolerance = 0.03 if S.get_sampler(name).order == 1 else 1e-3
    torch.testing.assert_close(noise, problem.ode_map(x, LO, HI), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(sample(noise, sigmas.flip(0)), x, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------- noise

WITH_ETA = [
    name
    for name, info in S.SAMPLERS.items()
    if info.takes_sigmas and "eta" in inspect.signature(info.function).parameters
]


@pytest.mark.parametrize("name", WITH_ETA)
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0, 3.0])
def test_variance_is_exact_for_a_constant_denoiser(name, eta):
    sigmas = grid(7)
    noise = impulses(sigmas)
    seen = []
    S.get_sampler(name).function(
        problems.Constant(),
        noise.start(HI),
        sigmas,
        callback=lambda d: seen.append(d["x"].pow(2).sum().item()),
        disable=True,
        eta=eta,
        noise_sampler=noise,
    )
    assert seen == pytest.approx([s * s for s in sigmas[:-1].tolist()], rel=1e-9)


@pytest.mark.parametrize("name", ["euler", "heun", "dpm_2"])
@pytest.mark.parametrize("churn", [0.0, 1.0, 100.0])
def test_variance_is_exact_with_churn(name, churn):
    sigmas = grid(7)
    x = torch.zeros(8, 1, dtype=torch.float64)
    x[0] = HI
    rows = iter(torch.eye(8, dtype=torch.float64)[1:, :, None])
    seen = []
    S.sample(
        problems.Constant(),
        x,
        sigmas,
        name,
        callback=lambda d: seen.append((d["x"].pow(2).sum().item(), float(d["sigma_hat"]))),
        disable=True,
        s_churn=churn,
        noise_sampler=lambda sigma, sigma_hat: next(rows),
    )
    for (variance, sigma_hat), sigma in zip(seen, sigmas.tolist()):
        gamma = min(churn / 7, math.sqrt(2) - 1)
        assert sigma_hat == pytest.approx(sigma * (1 + gamma))
        assert variance == pytest.approx(sigma_hat**2, rel=1e-9)


@pytest.mark.parametrize(
    ("order", "name", "options"),
    [
        (1, "euler_ancestral", {}),
        (2, "dpm_2_ancestral", {}),
        (2, "dpmpp_2s_ancestral", {}),
        (2, "dpmpp_sde", {}),
        (2, "dpmpp_2m_sde", {}),
        (2, "dpmpp_2m_sde", {"solver_type": "heun"}),
        (2, "dpmpp_3m_sde", {}),
    ],
)
def test_weak_order_on_gaussian_data(order, name, options):
    problem = problems.Gaussian(0.0, 0.7)
    want = 0.7**2 + LO**2

    def error(n: int) -> float:
        sigmas = grid(n)
        noise = impulses(sigmas)
        x = S.get_sampler(name).function(
            problem,
            noise.start(math.hypot(0.7, HI)),
            sigmas,
            disable=True,
            noise_sampler=noise,
            **options,
        )
        return abs(x.pow(2).sum().item() - want)

    assert math.log2(error(128) / error(256)) == pytest.approx(order, abs=0.15)


def test_noise_is_added_where_a_step_goes_all_the_way_down():
    # eta = 3 makes sigma_down 0 at a sigma_next above it.
    assert S.get_ancestral_step(2.0, 1.0, 3.0) == (0.0, 1.0)
    x = torch.zeros(1, 1)
    noise = lambda sigma, sigma_next: torch.ones(1, 1)  # noqa: E731
    for name in ("euler_ancestral", "dpm_2_ancestral", "dpmpp_2s_ancestral"):
        sample = S.get_sampler(name).function
        y = sample(problems.Constant(), x, [2.0, 1.0], eta=3.0, noise_sampler=noise, disable=True)
        assert y.item() == 1.0


@pytest.mark.parametrize("split", [noise_plan.get_ancestral_step, noise_plan.get_sde_step])
def test_splits_keep_the_variance(split):
    for eta in (0.0, 0.5, 1.0, 2.0):
        for sigma, sigma_next in ((10.0, 9.0), (10.0, 0.1), (1.0, 1.0), (1.0, 0.0), (0.0, 0.0)):
            down, up = split(sigma, sigma_next, eta)
            assert down >= 0
            assert up >= 0
            assert math.hypot(down, up) == pytest.approx(sigma_next, abs=1e-12)


def test_ancestral_step_of_tensors_and_its_posterior_variance():
    assert S.get_ancestral_step(3.0, 2.0, eta=0) == (2.0, 0.0)
    down, up = S.get_ancestral_step(torch.tensor(3.0), torch.tensor(2.0))
    # DDPM's posterior variance between the noise levels: s'^2 (s^2 - s'^2) / s^2
    assert up.item() == pytest.approx(math.sqrt(4 * (9 - 4) / 9))
    assert down.item() == pytest.approx(4 / 3)
    assert S.get_ancestral_step(3.0, 2.0) == pytest.approx((down.item(), up.item()))


# -------------------------------------------------------------------------------------- parts


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_linear_multistep_coefficients_by_quadrature(order):
    t = [9.0, 5.0, 3.0, 1.0, 0.4, 0.0]
    i = 4
    for j in range(order):

        def basis(tau, j=j):
            others = [k for k in range(order) if k != j]
            return math.prod((tau - t[i - k]) / (t[i - j] - t[i - k]) for k in others)

        want, _ = integrate.quad(basis, t[i], t[i + 1], epsrel=1e-10)
        assert S.linear_multistep_coeff(order, t, i, j) == pytest.approx(want, rel=1e-9)


def test_linear_multistep_needs_enough_slopes():
    with pytest.raises(ValueError, match="too few for order 3"):
        S.linear_multistep_coeff(3, [3.0, 2.0, 1.0], 1, 0)


def test_step_size_controller():
    pid = S.PIDStepSizeController(0.1, 0.0, 1.0, 0.0, order=2)
    assert pid.propose_step(1.0)
    assert pid.h == pytest.approx(0.1)  # an error at the tolerance keeps the step
    assert pid.propose_step(torch.tensor(0.25))
    assert pid.h == pytest.approx(0.1 * (1 + math.atan(1.0)), rel=1e-6)
    assert not pid.propose_step(100.0)
    assert pid.h < 0.1


def test_dpm_solver_on_tensors_and_its_cache():
    problem = problems.Gaussian()
    calls = []
    solver = S.DPMSolver(problem, eps_callback=lambda: calls.append(1))
    t, t_next = solver.t(torch.tensor(2.0)), solver.t(torch.tensor(1.0))
    assert solver.sigma(t).item() == pytest.approx(2.0)
    x = problems.normal(0, 3, 2)
    low, cache = solver.dpm_solver_1_step(x, t, t_next)
    solver.dpm_solver_3_step(x, t, t_next, eps_cache=cache)
    assert len(calls) == 3
    # DPM-Solver-1 is Euler's method on the same interval
    torch.testing.assert_close(low, S.sample_euler(problem, x, [2.0, 1.0], disable=True))


def test_dpm_solver_runs_backwards_without_noise_only():
    problem = problems.Gaussian(0.0, 0.5)
    solver = S.DPMSolver(problem)
    x = problems.normal(0, 4, 2, dtype=torch.float64)
    up, _ = solver.dpm_solver_adaptive(x, solver.t(0.1), solver.t(5.0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(up, problem.ode_map(x, 0.1, 5.0), rtol=1e-2, atol=1e-2)
    with pytest.raises(ValueError, match="eta must be 0"):
        solver.dpm_solver_adaptive(x, solver.t(0.1), solver.t(5.0), eta=1.0)
    with pytest.raises(ValueError, match="order 2 or 3"):
        solver.dpm_solver_adaptive(x, solver.t(5.0), solver.t(0.1), order=4)


def test_dpm_adaptive_stops_at_a_broken_model():
    with pytest.raises(ValueError, match="NaN or inf"):
        S.sample_dpm_adaptive(lambda x, s: x * math.nan, torch.ones(1, 2), 0.1, 10.0, disable=True)
