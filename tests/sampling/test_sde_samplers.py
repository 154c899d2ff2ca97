"""The later stochastic samplers: exact laws, weak orders, methods that are one."""

import math
from functools import partial
from itertools import pairwise

import numpy as np
import problems
import pytest
import torch
from problems import HI, LO, grid, impulses
from scipy import integrate

from k_diffusion import sampling as S
from k_diffusion.solvers import er_sde, noise_plan

STD = 0.7
HI_STD = math.hypot(STD, HI)


def sampler(name, **options):
    return partial(S.get_sampler(name).function, disable=True, **options)


def variances(run, problem, sigmas, std):
    """The exact variance of a linear sampler's sample before each step, and at the end."""
    noise = impulses(sigmas)
    seen = []
    y = run(problem, noise.start(std), sigmas, callback=seen.append, noise_sampler=noise)
    return [d["x"].pow(2).sum().item() for d in seen] + [y.pow(2).sum().item()]


# ------------------------------------------------------------------------------- weak orders


@pytest.mark.parametrize(
    ("order", "name", "options"),
    [
        (1, "ddpm", {}),
        (1, "ddim", {"eta": 0.5}),
        (2, "res_multistep_ancestral", {}),
        (2, "res_multistep_ancestral", {"eta": 0.5}),
        (2, "res_multistep_ancestral", {"order": 3}),
        (1, "er_sde", {"order": 1}),
        (2, "er_sde", {"order": 2}),
        (2, "er_sde", {"noise_scale": "sde"}),
        (2, "seeds_2", {}),
        (2, "seeds_2", {"eta": 0.5}),
        (2, "exp_heun_2_x0_sde", {}),
        (2, "exp_heun_2_x0_sde", {"solver_type": "phi_1"}),
        (2, "sa_solver_pece", {}),
        (2, "dpmpp_2m_sde_heun", {}),
        (2, "seeds_3", {"eta": 0.5}),
        (2, "sa_solver", {}),
        (2, "sa_solver", {"predictor_order": 2, "corrector_order": 0}),
        (2, "sa_solver", {"predictor_order": 1, "corrector_order": 2}),
    ],
)
def test_weak_order_on_gaussian_data(order, name, options):
    def error(n):
        end = variances(sampler(name, **options), problems.Gaussian(0, STD), grid(n), HI_STD)[-1]
        return abs(end - STD**2 - LO**2)

    assert math.log2(error(96) / error(192)) == pytest.approx(order, abs=0.2)


# --------------------------------------------------------------------------------- exact laws


@pytest.mark.parametrize("name", ["ddpm", "lcm"])
def test_variance_is_exact_for_a_constant_denoiser(name):
    sigmas = grid(7)
    got = variances(sampler(name), problems.Constant(), sigmas, HI)
    assert got == pytest.approx([s * s for s in sigmas.tolist()], rel=1e-9)


def test_ddpm_draws_from_the_posterior():
    """Its mean and variance as DDPM's equations 6 and 7 have them, in variance-preserving form."""
    sigma, sigma_next = 3.0, 1.2
    x, denoised = 2.0, 0.4
    a, a_next = 1 / (1 + sigma**2), 1 / (1 + sigma_next**2)  # cumulative products
    alpha, beta = a / a_next, 1 - a / a_next
    x_t = x * math.sqrt(a)
    mean = math.sqrt(a_next) * beta * denoised + math.sqrt(alpha) * (1 - a_next) * x_t
    mean, variance = mean / (1 - a), (1 - a_next) / (1 - a) * beta
    for noise in (0.0, 1.0):
        y = S.sample_ddpm(
            problems.Constant(denoised),
            torch.full((1, 1), x, dtype=torch.float64),
            torch.tensor([sigma, sigma_next], dtype=torch.float64),
            disable=True,
            noise_sampler=lambda a, b, noise=noise: torch.full((1, 1), noise, dtype=torch.float64),
        )
        want = (mean + math.sqrt(variance) * noise) / math.sqrt(a_next)
        assert y.item() == pytest.approx(want, rel=1e-12)


def test_lcm_denoises_and_adds_noise_anew():
    problem = problems.Gaussian(0.0, STD)
    sigmas = grid(6)
    want = [HI_STD**2]
    for sigma, sigma_next in pairwise(sigmas.tolist()):
        shrink = STD**2 / (STD**2 + sigma**2)
        want.append(want[-1] * shrink**2 + sigma_next**2)
    assert variances(sampler("lcm"), problem, sigmas, HI_STD) == pytest.approx(want, rel=1e-9)
    x = torch.ones(1, 2)
    y = S.sample_lcm(problem, x, [4.0, 0.0], disable=True)
    assert torch.equal(y, problem(x, torch.tensor([4.0])))


def test_sa_solver_adds_noise_between_its_levels_alone():
    sigmas = [20.0, 8.0, 4.0, 2.0, 1.0, 0.5, 0.0]
    asked = []

    def noise(sigma, sigma_next):
        asked.append((float(sigma), float(sigma_next)))
        return torch.zeros(1, 2)

    run = sampler("sa_solver", s_tmin=1.0, s_tmax=8.0, noise_sampler=noise)
    run(problems.Gaussian(), torch.ones(1, 2), sigmas)
    assert asked == [(8.0, 4.0), (4.0, 2.0), (2.0, 1.0), (1.0, 0.5)]
    # and keeps the variance where tau changes
    got = variances(sampler("sa_solver", s_tmin=1.0, s_tmax=8.0), problems.Constant(), grid(9), HI)
    assert got == pytest.approx([s * s for s in grid(9).tolist()], rel=1e-9)


@pytest.mark.parametrize(
    "name", ["er_sde", "seeds_2", "seeds_3", "sa_solver", "res_multistep_ancestral"]
)
def test_no_noise_at_eta_0(name):
    problem, x, _ = problems.reference()
    run = sampler(name, eta=0.0, noise_sampler=lambda a, b: torch.full_like(x, math.nan))
    assert run(problem, x, S.append_zero(grid(8))).isfinite().all()


# ------------------------------------------------------------------------ methods that are one


def test_ddim_and_ddpm_are_ancestral_sampling():
    problem, x, _ = problems.reference()
    sigmas = S.append_zero(grid(8))
    for first, second in (
        (sampler("ddim", eta=0.4), sampler("euler_ancestral", eta=0.4)),
        (sampler("ddpm"), sampler("euler_ancestral")),
    ):
        torch.manual_seed(0)
        want = second(problem, x, sigmas)
        torch.manual_seed(0)
        assert torch.equal(first(problem, x, sigmas), want)


def test_ddim_draws_nothing_at_eta_0():
    state = torch.get_rng_state()
    sampler("ddim")(problems.Gaussian(), torch.ones(1, 2), [4.0, 2.0, 0.0])
    assert torch.equal(state, torch.get_rng_state())


def test_exponential_eulers_of_the_sde_are_one():
    problem, x, _ = problems.reference()
    noise = problems.normal(7, 16, 2, dtype=torch.float64)
    runs = [
        sampler("er_sde", order=1, noise_scale="sde"),
        sampler("sa_solver", predictor_order=1, corrector_order=0),
        sampler("res_multistep_ancestral", order=1),
        sampler("ddpm"),  # at eta = 1 the splits are one, too
    ]
    samples = [run(problem, x, grid(8), noise_sampler=lambda a, b: noise) for run in runs]
    for y in samples[1:]:
        torch.testing.assert_close(y, samples[0], rtol=1e-10, atol=1e-10)


def test_res_multistep_ancestral_is_2m_sde_at_eta_1():
    problem, x, _ = problems.reference()
    noise = problems.normal(7, 16, 2, dtype=torch.float64)
    options = {"noise_sampler": lambda a, b: noise}
    got = sampler("res_multistep_ancestral", **options)(problem, x, grid(8))
    want = sampler("dpmpp_2m_sde", solver_type="heun", **options)(problem, x, grid(8))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


# -------------------------------------------------------------------------------------- ER-SDE


@pytest.mark.parametrize("noise_scale", sorted(er_sde.NOISE_SCALES))
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_er_sde_is_exact_where_denoised_is_quadratic_in_sigma(noise_scale, eta):
    polynomial = np.polynomial.Polynomial([0.3, -1.2, 0.5])
    sigmas = [3.0, 2.6, 1.7, 1.1]
    seen = []
    run = sampler("er_sde", eta=eta, noise_scale=noise_scale, s_noise=0.0)
    y = run(
        lambda x, sigma: torch.full_like(x, float(polynomial(sigma[0].item()))),
        torch.ones(1, 1, dtype=torch.float64),
        torch.tensor(sigmas, dtype=torch.float64),
        callback=lambda d: seen.append(d["x"].item()),
    )
    # x' = phi' / phi x + the integral of (phi(end) / phi) (phi' / phi) D, downwards
    log_g = er_sde.NOISE_SCALES[noise_scale]

    def log_phi(s):
        return math.log(s) + eta * float(log_g(s))

    def slope(s, h=1e-5):
        return (log_phi(s + h) - log_phi(s - h)) / (2 * h)

    start, end = sigmas[2], sigmas[3]
    moved, _ = integrate.quad(
        lambda s: math.exp(log_phi(end) - log_phi(s)) * slope(s) * polynomial(s), end, start
    )
    want = math.exp(log_phi(end) - log_phi(start)) * seen[2] + moved
    assert y.item() == pytest.approx(want, rel=1e-8)


def test_er_sdes_noise_lies_between_the_odes_and_the_sdes():
    for sigma, sigma_next in pairwise([80.0, 20.0, 5.0, 1.0, 0.2, 0.02]):
        _, er = er_sde.er_split(1.0, er_sde.log_scale("er_sde"))(sigma, sigma_next)
        _, sde = er_sde.er_split(1.0, er_sde.log_scale("sde"))(sigma, sigma_next)
        assert er > 0
        if sigma <= 5:
            assert er < sde
        down, up = noise_plan.get_sde_step(sigma, sigma_next, 0.7)
        assert er_sde.er_split(0.7, er_sde.log_scale("sde"))(sigma, sigma_next) == pytest.approx(
            (down, up)
        )


# ------------------------------------------------------------------------------------- restart


def test_restart_keeps_the_variance_of_every_noise_level():
    sigmas = grid(12)
    seen, rows = [], iter(torch.eye(8, dtype=torch.float64)[1:, :, None])
    x = torch.zeros(8, 1, dtype=torch.float64)
    x[0] = HI
    y = S.sample_restart(
        problems.Constant(),
        x,
        sigmas,
        callback=seen.append,
        disable=True,
        noise_sampler=lambda sigma, sigma_hat: next(rows),
        restarts=[(0.5, 3.0, 4, 3), (4.0, 12.0, 2, 2)],
    )
    for d in seen:
        assert d["x"].pow(2).sum().item() == pytest.approx(float(d["sigma_hat"]) ** 2)
    assert y.pow(2).sum().item() == pytest.approx(LO**2)
    assert [d["i"] for d in seen] == list(range(12 + 3 * 4 + 2 * 2))
    up = [(d["sigma"].item(), d["sigma_hat"].item()) for d in seen if d["sigma"] != d["sigma_hat"]]
    nearest = [min(sigmas.tolist(), key=lambda s: abs(math.log(s / at))) for at in (4.0, 0.5)]
    assert up == [(nearest[0], 12.0)] * 2 + [(nearest[1], 3.0)] * 3


def test_restart_converges_to_the_datas_variance():
    problem = problems.Gaussian(0.0, STD)

    def error(n):
        sigmas = grid(n)
        x = torch.zeros(4, 1, dtype=torch.float64)
        x[0] = HI_STD
        rows = iter(torch.eye(4, dtype=torch.float64)[1:, :, None])
        y = sampler("restart", restarts=[(0.5, 3.0, n // 4, 3)])(
            problem, x, sigmas, noise_sampler=lambda sigma, sigma_hat: next(rows)
        )
        return abs(y.pow(2).sum().item() - STD**2 - LO**2)

    # at each n another noise level is the nearest to 0.5
    assert math.log2(error(128) / error(512)) / 2 == pytest.approx(2, abs=0.3)


def test_restart_draws_for_restarts_alone():
    x = torch.ones(2, 3)
    torch.manual_seed(0)
    sampler("restart", restarts=[(1.0, 3.0, 2, 4)])(problems.Gaussian(), x, [4.0, 2.0, 1.0, 0.0])
    got = torch.get_rng_state()
    torch.manual_seed(0)
    for _ in range(4):
        torch.randn_like(x)
    assert torch.equal(got, torch.get_rng_state())


def hops(sigmas, *restarts):
    return noise_plan.restarted(sigmas, [noise_plan.Restart(*r) for r in restarts])


def test_plans_of_restarts():
    assert hops([4.0, 2.0, 1.0, 0.0], (1.0, 3.0, 1, 2)) == [
        (4.0, 4.0, 2.0),
        (2.0, 2.0, 1.0),
        (1.0, 3.0, 1.0),
        (1.0, 3.0, 1.0),
        (1.0, 1.0, 0.0),
    ]
    straight = noise_plan.straight([4.0, 2.0, 1.0, 0.0])
    # outside of the schedule, at its start, and upside down on a schedule this coarse
    for restart in ((0.5, 2.0, 3, 1), (1.0, 5.0, 3, 1), (3.9, 4.0, 3, 1), (1.1, 1.3, 3, 0)):
        assert hops([4.0, 2.0, 1.0, 0.0], restart) == straight
    assert hops([4.0, 0.0], (0.1, 2.0, 10, 2)) == [(4.0, 4.0, 0.0)]
    # a repeated noise level restarts once
    assert len(hops([4.0, 1.0, 1.0, 1.0, 0.0], (1.0, 3.0, 5, 1))) == 4 + 5


# -------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "restart", [(2.0, 1.0, 3, 1), (0.0, 1.0, 3, 1), (1.0, math.inf, 3, 1), (1.0, 2.0, 0, 1)]
)
def test_impossible_restarts(restart):
    with pytest.raises(ValueError, match="a restart is"):
        sampler("restart", restarts=[restart])(problems.Gaussian(), torch.ones(1, 2), [4.0, 0.0])


def test_bad_options():
    model, x, sigmas = problems.Gaussian(), torch.ones(1, 2), [4.0, 1.0, 0.0]
    with pytest.raises(ValueError, match="unknown noise_scale 'er' "):
        sampler("er_sde", noise_scale="er")(model, x, sigmas)
    with pytest.raises(ValueError, match=r"at a fraction above 0 and up to 1, got 1.5"):
        sampler("seeds_2", r=1.5)(model, x, sigmas)
    with pytest.raises(ValueError, match="fractions between 0 and 1"):
        sampler("seeds_3", r_1=0.7, r_2=0.5)(model, x, sigmas)
    with pytest.raises(ValueError, match="predictor_order must be 1 to 4, got 5"):
        sampler("sa_solver", predictor_order=5)(model, x, sigmas)
    with pytest.raises(ValueError, match="corrector_order must be 1 to 4, got -1"):
        sampler("sa_solver", corrector_order=-1)(model, x, sigmas)
