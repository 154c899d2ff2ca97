"""The later ODE samplers: orders of convergence, methods that are one, exactness, weights."""

import math
from functools import partial

import numpy as np
import problems
import pytest
import torch
from problems import grid, rms
from scipy import integrate

from k_diffusion import sampling as S
from k_diffusion.solvers import adams_bashforth, exponential_adams, quadrature
from k_diffusion.solvers.context import Context

LATER = ["uni_pc", "deis", "ipndm", "ipndm_v", "res_multistep", "gradient_estimation", "heunpp2"]


def sampler(name, **options):
    return partial(S.get_sampler(name).function, disable=True, **options)


# ------------------------------------------------------------------------------------- orders


@pytest.mark.parametrize(
    ("order", "name", "options"),
    [
        (1, "ddim", {}),
        (3, "heunpp2", {}),
        (2, "uni_pc", {"order": 1, "variant": "bh1"}),
        (2, "uni_pc", {"order": 1, "variant": "bh2"}),
        (3, "uni_pc", {"order": 2, "variant": "bh1"}),
        (3, "uni_pc", {"order": 2, "variant": "bh2"}),
        (4, "uni_pc", {}),
        (2, "uni_pc", {"order": 2, "corrector": False}),
        (2, "uni_pc", {"order": 2, "corrector": False, "variant": "bh1"}),
        (3, "uni_pc", {"corrector": False}),
        (2, "deis", {"order": 2}),
        (3, "deis", {}),
        (4, "deis", {"order": 4}),
        (3, "deis", {"time": "vp"}),
        (2, "exponential_rk", {"tableau": "res_2s"}),
        (3, "exponential_rk", {"tableau": "dpmpp_3s"}),
        (3, "exponential_rk", {"tableau": "etd3"}),
        (4, "exponential_rk", {"tableau": "hochbruck_ostermann"}),
        (2, "seeds_2", {"eta": 0, "r": 1.0}),
        (2, "seeds_2", {"eta": 0, "solver_type": "phi_2"}),
        (2, "exp_heun_2_x0", {"solver_type": "phi_1"}),
        (3, "sa_solver_pece", {"eta": 0, "predictor_order": 2, "corrector_order": 3}),
        (2, "sa_solver_pece", {"eta": 0, "predictor_order": 2, "corrector_order": 0}),
        (3, "deis", {"time": "rho"}),
        (3, "deis", {"time": "log_rho"}),
        (2, "ipndm", {}),
        (4, "ipndm_v", {}),
        (2, "res_multistep", {}),
        (3, "res_multistep", {"order": 3}),
        (2, "res_multistep_ancestral", {"eta": 0}),
        (1, "gradient_estimation", {}),
        (2, "gradient_estimation", {"gamma": 1.5}),
        (1, "er_sde", {"eta": 0, "order": 1}),
        (2, "er_sde", {"eta": 0, "order": 2}),
        (3, "er_sde", {"eta": 0}),
        (2, "seeds_2", {"eta": 0}),
        (2, "seeds_2", {"eta": 0, "r": 0.7}),
        (3, "seeds_3", {"eta": 0}),
        (2, "sa_solver", {"eta": 0, "predictor_order": 2, "corrector_order": 0}),
        (3, "sa_solver", {"eta": 0, "predictor_order": 3, "corrector_order": 0}),
        (3, "sa_solver", {"eta": 0, "predictor_order": 2, "corrector_order": 3}),
        (4, "sa_solver", {"eta": 0}),
        (2, "restart", {"restarts": ()}),
    ],
)
def test_order_of_convergence(order, name, options):
    mixture, x, want = problems.reference()
    coarse, fine = (rms(sampler(name, **options)(mixture, x, grid(n)) - want) for n in (256, 512))
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


# ------------------------------------------------------------------------- methods that are one


def both(first, second, sigmas=None):
    mixture, x, _ = problems.reference()
    sigmas = S.append_zero(grid(9)) if sigmas is None else sigmas
    return first(mixture, x, sigmas), second(mixture, x, sigmas)


@pytest.mark.parametrize(
    "first",
    [
        sampler("uni_pc", order=1, corrector=False),
        sampler("deis", order=1),
        sampler("ipndm", order=1),
        sampler("ipndm_v", order=1),
        sampler("res_multistep", order=1),
        sampler("gradient_estimation", gamma=1.0),
        sampler("ddim"),
    ],
    ids=lambda f: f.func.__name__,
)
def test_first_order_is_eulers_method(first):
    got, want = both(first, sampler("euler"))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (sampler("uni_pc", order=2, corrector=False), sampler("dpmpp_2m")),
        (sampler("res_multistep"), sampler("dpmpp_2m_sde", eta=0.0, solver_type="heun")),
        (sampler("ipndm_v", lower_order_final=True), sampler("lms", lower_order_final=True)),
        (sampler("dpmpp_3s"), sampler("seeds_3", eta=0.0)),
        (
            sampler("exponential_rk", tableau="res_2s"),
            sampler("seeds_2", eta=0.0, solver_type="phi_2"),
        ),
        (sampler("exp_heun_2_x0"), sampler("exp_heun_2_x0_sde", eta=0.0)),
        (
            sampler("exp_heun_2_x0_sde", eta=0.0),
            sampler("seeds_2", eta=0.0, r=1.0, solver_type="phi_2"),
        ),
        (
            sampler("sa_solver_pece", eta=0.0, corrector_order=0),
            sampler("sa_solver", eta=0.0, corrector_order=0),
        ),
        (sampler("deis", time="rhoab"), sampler("deis", deis_mode="rho")),
        (sampler("ipndm", order=2), sampler("ipndm", max_order=2)),
        (sampler("gradient_estimation", gamma=1.5), sampler("gradient_estimation", ge_gamma=1.5)),
        (sampler("er_sde", eta=0.0, order=2), sampler("er_sde", eta=0.0, max_stage=2)),
        (sampler("tcd", eta=0.0), sampler("ddim")),
        (sampler("deis", order=4, time="rho"), sampler("ipndm_v")),
        (
            sampler("sa_solver", eta=0.0, predictor_order=3, corrector_order=0),
            sampler("res_multistep", order=3),
        ),
        (sampler("restart", restarts=()), sampler("heun")),
        (sampler("er_sde", eta=0.0, order=1), sampler("euler")),
    ],
    ids=lambda f: f.func.__name__.removeprefix("sample_"),
)
def test_two_names_of_one_method(first, second):
    got, want = both(first, second)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


def test_ipndm_is_ipndm_v_on_even_steps():
    sigmas = torch.linspace(4, 0, 9, dtype=torch.float64)
    got, want = both(sampler("ipndm"), sampler("ipndm_v"), sigmas)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


def test_unipcs_variants_differ_where_there_is_one_difference_alone():
    bh1, bh2 = both(sampler("uni_pc", variant="bh1"), sampler("uni_pc"))
    assert not torch.equal(bh1, bh2)  # at low order, in the first steps
    nodes, h = [0.0, -0.7, 0.5], 0.5
    assert exponential_adams.uni_pc_weights(nodes, h, "bh1") == (
        exponential_adams.uni_pc_weights(nodes, h, "bh2")
    )


# ------------------------------------------------------------------------------------ exactness


def test_gradient_estimation_goes_by_two_slopes():
    slopes = iter([3.0, 5.0, 7.0])

    def model(x, sigma):
        return x - sigma * next(slopes)

    y = S.sample_gradient_estimation(
        model, torch.zeros(1, 1), [8.0, 6.0, 5.0, 0.0], gamma=1.8, disable=True
    )
    want = -2 * 3.0 - 1 * (1.8 * 5.0 - 0.8 * 3.0) - 5 * 7.0
    assert y.item() == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "options", "degree", "warm_up"),
    [
        ("heunpp2", {}, 2, 0),
        ("ipndm_v", {"order": 3}, 2, 2),
        ("deis", {"order": 4, "time": "rho"}, 3, 3),
    ],
)
def test_slopes_that_are_polynomials_in_sigma(name, options, degree, warm_up):
    polynomial = np.polynomial.Polynomial([0.3, -1.2, 0.5, 0.1][: degree + 1])
    seen = []

    def model(x, sigma):
        return x - sigma * float(polynomial(sigma[0].item()))

    sigmas = [3.0, 2.6, 1.7, 1.5, 0.9, 0.5]
    y = sampler(name, **options)(
        model,
        torch.zeros(1, 1, dtype=torch.float64),
        torch.tensor(sigmas, dtype=torch.float64),
        callback=lambda d: seen.append(d["x"].item()),
    )
    primitive = polynomial.integ()
    x, sigma = seen[warm_up], sigmas[warm_up]
    assert y.item() == pytest.approx(x + primitive(sigmas[-1]) - primitive(sigma), rel=1e-10)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("res_multistep", {"order": 3}),
        ("uni_pc", {"corrector": False}),
        ("sa_solver", {"eta": 0.0, "predictor_order": 3, "corrector_order": 0}),
    ],
)
def test_denoised_that_is_a_polynomial_in_log_sigma(name, options):
    polynomial = np.polynomial.Polynomial([0.3, -1.2, 0.5])
    seen = []

    def model(x, sigma):
        return torch.full_like(x, float(polynomial(-math.log(sigma[0].item()))))

    sigmas = [3.0, 2.6, 1.7, 1.5, 0.9, 0.5]
    y = sampler(name, **options)(
        model,
        torch.ones(1, 1, dtype=torch.float64),
        torch.tensor(sigmas, dtype=torch.float64),
        callback=lambda d: seen.append(d["x"].item()),
    )
    # x' = e^-h x + the integral of e^(u - h) D, from the third step on
    a, b = -math.log(sigmas[2]), -math.log(sigmas[-1])
    moved, _ = integrate.quad(lambda t: math.exp(t - b) * polynomial(t), a, b, epsabs=1e-13)
    assert y.item() == pytest.approx(math.exp(a - b) * seen[2] + moved, rel=1e-10)


# -------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("h", [1e-3, 0.3, 2.0, 12.0, -0.5])
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_adams_weights_integrate_polynomials(h, n):
    nodes = [0.0, -0.4 * h, -1.1 * h, -2.0 * h][:n]
    weights = exponential_adams.adams_weights(nodes, h)
    for k in range(n):
        want, _ = integrate.quad(lambda u, k=k: math.exp(u - h) * u**k, 0, h, epsabs=1e-14)
        assert sum(w * u**k for w, u in zip(weights, nodes)) == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("r", [-0.8, 1.0])
def test_unipcs_weights_meet_the_order_conditions(variant, r):
    def defect(h):
        weights = exponential_adams.uni_pc_weights([0.0, r * h], h, variant)
        assert sum(weights) == pytest.approx(-math.expm1(-h))
        return abs(weights[1] * r * h - (h + math.expm1(-h)))

    # a_1 = 1/2 leaves a defect of third order in the condition of second order
    assert math.log2(defect(0.02) / defect(0.01)) == pytest.approx(3, abs=0.1)


def test_integrals():
    assert quadrature.integral(np.cos, 0.0, 2.0) == pytest.approx(math.sin(2.0), rel=1e-13)
    nodes, time = [2.0, 3.0, 5.0], np.log1p
    weights = quadrature.lagrange_integrals(
        [float(time(n)) for n in nodes], 2.0, 1.0, np.ones_like, time
    )
    for k in range(3):
        want, _ = integrate.quad(lambda s, k=k: math.log1p(s) ** k, 2.0, 1.0)
        got = sum(w * math.log1p(n) ** k for w, n in zip(weights, nodes))
        assert got == pytest.approx(want, rel=1e-11)


def test_vp_time_inverts_the_vp_schedule():
    sigmas = S.get_sigmas_vp(50)[:-1].double().numpy()
    np.testing.assert_allclose(adams_bashforth.vp_time(sigmas), np.linspace(1, 1e-3, 50), rtol=2e-3)


# ------------------------------------------------------------------------- the last steps to 0


def test_orders_fall_with_the_steps_that_are_left():
    ctx = Context(*[None] * 3, levels=(4.0, 3.0, 2.0, 1.0, 0.0))
    assert [ctx.order(s, 3, True) for s in (4.0, 3.0, 2.0, 1.0)] == [3, 3, 2, 1]
    assert [ctx.order(s, 3, False) for s in (2.0, 1.0)] == [3, 3]
    # a schedule that doesn't end in 0 has no such steps
    ctx = Context(*[None] * 3, levels=(3.0, 2.0, 1.0))
    assert ctx.order(2.0, 3, True) == 3
    assert ctx.ahead(3.0) == (2.0, 1.0)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("res_multistep", {"order": 3}),
        ("er_sde", {"eta": 0.0}),
        ("uni_pc", {"corrector": False}),
        ("sa_solver", {"eta": 0.0, "corrector_order": 0}),
        ("dpmpp_3m_sde", {"eta": 0.0}),
        ("lms", {"order": 3}),
        ("deis", {}),
        ("ipndm", {"order": 3}),
    ],
)
def test_lower_order_final(name, options):
    mixture, x, _ = problems.reference()
    # two steps are left from the third on, so it has order 2
    sigmas = torch.tensor([40.0, 6.0, 2.0, 0.4, 0.0], dtype=torch.float64)
    seen = {}
    for lower in (True, False):
        d = []
        run = sampler(name, **options, lower_order_final=lower)
        y = run(mixture, x, sigmas, callback=d.append)
        seen[lower] = [info["x"] for info in d]
        if lower:
            torch.testing.assert_close(y, d[-1]["denoised"], rtol=1e-9, atol=1e-9)
    same = [torch.equal(a, b) for a, b in zip(seen[True], seen[False])]
    assert same == [True, True, True, False]


def test_heunpp2_is_heuns_method_on_long_steps():
    got, want = both(sampler("heunpp2"), sampler("heun"), [40.0, 19.0, 9.0, 4.0, 1.9, 0.0])
    assert torch.equal(got, want)


# Heun's method itself isn't, with 0.03 next to 0.
@pytest.mark.parametrize("name", [name for name in LATER if name != "heunpp2"])
def test_few_steps_to_0_stay_sane(name):
    mixture, x, _ = problems.reference()
    for n in (1, 2, 3, 4):
        y = sampler(name)(mixture, x, S.get_sigmas_karras(n, 0.03, 40.0))
        assert y.abs().max() < 8


# -------------------------------------------------------------------------------------- errors


def test_bad_options():
    model, x, sigmas = problems.Gaussian(), torch.ones(1, 2), [1.0, 0.0]
    for name, most in (("uni_pc", 3), ("deis", 4), ("ipndm", 4), ("ipndm_v", 4), ("er_sde", 3)):
        for order in (0, most + 1):
            with pytest.raises(ValueError, match=f"order must be 1 to {most}, got {order}"):
                sampler(name, order=order)(model, x, sigmas)
    with pytest.raises(ValueError, match="unknown variant 'bh3' \\(did you mean 'bh"):
        S.sample_uni_pc(model, x, sigmas, variant="bh3")
    with pytest.raises(ValueError, match="unknown time 'logrho' \\(did you mean 'log_rho'"):
        S.sample_deis(model, x, sigmas, time="logrho")


def test_sampler_table():
    from k_diffusion.scripts.sample import sampler_table

    lines = sampler_table().splitlines()
    rows = [line.split()[0] for line in lines[1:]]
    assert sorted(rows) == sorted(S.SAMPLERS)
    uni_pc = next(line for line in lines if line.startswith("uni_pc "))
    assert uni_pc.split()[1:4] == ["4", "1", "no"]
    assert "2302.04867" in uni_pc
    assert next(line for line in lines if line.startswith("lcm ")).split()[3] == "yes"
    # columns are aligned
    for column in ("order", "evaluations", "stochastic", "paper"):
        at = lines[0].index(column)
        assert all(line[at - 1] == " " != line[at] for line in lines)
