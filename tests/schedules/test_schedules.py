import itertools
import math

import golden
import problems
import pytest
import torch
from scipy import stats

from k_diffusion import sampling, schedules
from k_diffusion.schedules import make_sigmas

NAMES = sorted(schedules.SCHEDULES)


def gaps(values: torch.Tensor) -> torch.Tensor:
    d = values.double().diff()
    return d / d.mean()


def test_published_numbers():
    want, _ = golden.load("schedules")
    got = {
        "karras": schedules.get_sigmas_karras(10, 0.01, 80.0),
        "karras5": schedules.get_sigmas_karras(7, 0.1, 10.0, rho=5.0),
        "exp": schedules.get_sigmas_exponential(10, 0.01, 80.0),
        "poly": schedules.get_sigmas_polyexponential(10, 0.01, 80.0, rho=0.7),
        "vp": schedules.get_sigmas_vp(10),
    }
    for name, sigmas in got.items():
        torch.testing.assert_close(sigmas, want[name], rtol=3e-7, atol=0, msg=name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n", [1, 2, 3, 50])
def test_every_schedule_falls_strictly_between_its_ends_then_to_0(name, n):
    sigmas = make_sigmas(name, n, 0.02, 30.0)
    assert sigmas.shape == (n + 1,)
    assert sigmas.dtype == torch.float32
    assert (sigmas.diff() < 0).all()
    assert sigmas[0].item() == pytest.approx(30, rel=1e-5)
    assert sigmas[-1] == 0
    if n > 1:
        assert sigmas[-2].item() == pytest.approx(0.02, rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_schedules_between_ends_of_all_sizes(name):
    for lo, ratio in itertools.product((1e-4, 0.03, 0.5, 10.0), (1.2, 30.0, 1e4)):
        for n in (2, 7, 300):
            sigmas = make_sigmas(name, n, lo, lo * ratio)
            assert (sigmas.diff() < 0).all()
            assert sigmas[[0, -2]].tolist() == pytest.approx([lo * ratio, lo], rel=1e-4)


def test_karras_is_equally_spaced_in_the_root():
    gaps = make_sigmas("karras", 20, 0.01, 80.0, rho=5.0)[:-1].double().pow(1 / 5).diff()
    torch.testing.assert_close(gaps, gaps.mean().expand(19), rtol=1e-4, atol=0)


def test_exponential_is_equally_spaced_in_the_logarithm_and_polyexponential_at_rho_1():
    sigmas = make_sigmas("exponential", 20, 0.01, 80.0)
    gaps = sigmas[:-1].double().log().diff()
    torch.testing.assert_close(gaps, gaps.mean().expand(19), rtol=1e-4, atol=0)
    torch.testing.assert_close(make_sigmas("polyexponential", 20, 0.01, 80.0), sigmas)


def test_vp_closed_form():
    t = torch.linspace(1, 1e-3, 10, dtype=torch.float64)
    want = (torch.exp(19.9 * t**2 / 2 + 0.1 * t) - 1).sqrt()
    # exp(...) - 1 cancels at low noise levels in float32
    torch.testing.assert_close(schedules.get_sigmas_vp(10)[:-1].double(), want, rtol=1e-3, atol=0)


def test_vp_between_ends_is_vp_and_never_turns():
    beta_d, beta_min = 19.9, 0.1
    lo, hi = (math.sqrt(math.expm1(beta_d * t**2 / 2 + beta_min * t)) for t in (1e-3, 1))
    torch.testing.assert_close(
        make_sigmas("vp", 9, lo, hi), schedules.get_sigmas_vp(9), rtol=5e-3, atol=0
    )
    # At t = 1e-3 a sigma of 0.5 would need a beta so large that it has to turn negative.
    logs = make_sigmas("vp", 9, 0.5, 5.0)[:-1].double().square().log1p()
    torch.testing.assert_close(gaps(logs), torch.ones(8).double(), rtol=1e-4, atol=0)
    with pytest.raises(ValueError, match="no VP schedule falls from 5 to 0.5 with eps_s = 0.001"):
        make_sigmas("vp", 9, 0.5, 5.0, eps_s=1e-3)
    with pytest.raises(ValueError, match="between 0 and 1, got 1"):
        make_sigmas("vp", 9, 0.5, 5.0, eps_s=1.0)


def test_ends_may_be_tensors():
    want = make_sigmas("karras", 5, 0.1, 10.0)
    got = make_sigmas("karras", 5, torch.tensor(0.1), torch.tensor(10.0))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("n", "lo", "hi"),
    [
        (0, 0.1, 1.0),
        (-1, 0.1, 1.0),
        (5, 1.0, 1.0),
        (5, 2.0, 1.0),
        (5, 0.0, 1.0),
        (5, -1.0, 1.0),
        (5, math.nan, 1.0),
        (5, 0.1, math.inf),
    ],
)
def test_impossible_schedules_are_errors(name, n, lo, hi):
    with pytest.raises(ValueError, match="at least one step" if n < 1 else "sigma_min < sigma_max"):
        make_sigmas(name, n, lo, hi)


def test_an_unknown_name_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'karras'"):
        make_sigmas("karas", 5, 0.1, 1.0)


def test_options_out_of_range_are_errors():
    for rho in (0.0, -1.0, math.nan, math.inf):
        for make in (schedules.get_sigmas_karras, schedules.get_sigmas_polyexponential):
            with pytest.raises(ValueError, match="rho must be positive and finite"):
                make(5, 0.1, 1.0, rho=rho)
    with pytest.raises(ValueError, match="eps_s"):
        schedules.get_sigmas_vp(5, eps_s=1.0)


def test_unit_ends_of_positive_range():
    assert schedules.positive_range([3.0, 1.0, 0.0]) == (1.0, 3.0)
    assert schedules.positive_range([0.0]) == (0.0, 0.0)


# ------------------------------------------------------------------------- spacings and options


def test_equal_spacings():
    linear = make_sigmas("linear", 20, 0.1, 40.0)[:-1]
    torch.testing.assert_close(gaps(linear), torch.ones(19).double(), rtol=1e-4, atol=0)
    angles = make_sigmas("kl_optimal", 20, 0.1, 40.0, sigma_data=0.5)[:-1].double() / 0.5
    torch.testing.assert_close(gaps(angles.atan()), torch.ones(19).double(), rtol=1e-4, atol=0)


def test_no_other_levels_serve_eulers_method_better_on_gaussian_data():
    problem, x = problems.Gaussian(0.0, 0.5), torch.ones(1, 1, dtype=torch.float64)

    def miss(sigmas):
        """How far the standard deviation of the samples is from the data's with noise, in logs."""
        y = sampling.sample_euler(problem, x, sigmas, disable=True) / problem.ode_map(x, 20.0, 0.05)
        return abs(math.log(y.item()))

    options = {"sigma_data": 0.5}
    sigmas = make_sigmas("kl_optimal", 12, 0.05, 20.0, **options)[:-1].double()
    best = miss(sigmas)
    for seed in range(5):
        other = sigmas.clone()
        other[1:-1] *= 1 + 0.02 * problems.normal(seed, 10, dtype=torch.float64)
        assert miss(other) > best
    # every step shrinks it by the cosine of its angle
    angle = (math.atan(20.0 / 0.5) - math.atan(0.05 / 0.5)) / 11
    assert best == pytest.approx(-11 * math.log(math.cos(angle)), rel=1e-4)


def test_cosine_is_equally_spaced_in_the_time_of_v_diffusion():
    t = make_sigmas("cosine", 20, 0.1, 40.0)[:-1].double().atan() * 2 / math.pi
    torch.testing.assert_close(gaps(t), torch.ones(19).double(), rtol=1e-4, atol=0)
    assert torch.equal(make_sigmas("cosine", 9, 0.1, 9.0), make_sigmas("kl_optimal", 9, 0.1, 9.0))


@pytest.mark.parametrize(("mu", "beta"), [(0.0, 0.5), (-1.0, 1.5)])
def test_laplace_steps_are_equally_likely(mu, beta):
    sigmas = make_sigmas("laplace", 40, 0.002, 80.0, mu=mu, beta=beta)[:-1].double()
    cdf = torch.from_numpy(stats.laplace.cdf(sigmas.log().numpy(), mu, beta))
    torch.testing.assert_close(gaps(cdf), torch.ones(39).double(), rtol=1e-3, atol=0)


def test_linear_quadratic():
    sigmas = make_sigmas("linear_quadratic", 21, 0.02, 50.0, threshold=0.1)[:-1].double()
    t = sigmas / (1 + sigmas)
    way = (t[0] - t) / (t[0] - t[-1])
    assert way[10].item() == pytest.approx(0.1, abs=1e-5)
    torch.testing.assert_close(way[:11], torch.linspace(0, 0.1, 11).double(), rtol=0, atol=1e-5)
    second = way.diff().diff()
    assert (second[:9].abs() < 1e-5).all()
    torch.testing.assert_close(second[10:], second[10:].mean().expand(9), rtol=1e-2, atol=0)


def test_discarding_the_penultimate_level():
    sigmas = make_sigmas("karras", 6, 0.1, 10.0)
    short = schedules.discard_penultimate(sigmas)
    assert short.tolist() == [*sigmas[:5].tolist(), 0.0]
    option = make_sigmas("karras", 5, 0.1, 10.0, penultimate=False)
    assert torch.equal(option, short)
    for bad in (torch.tensor([1.0, 0.0]), torch.ones(2, 3)):
        with pytest.raises(ValueError, match="two steps or more"):
            schedules.discard_penultimate(bad)
    with pytest.raises(ValueError, match="at least one step"):
        make_sigmas("karras", 0, 0.1, 10.0, penultimate=False)


def test_other_options_out_of_range():
    for name, options in (
        ("kl_optimal", {"sigma_data": 0.0}),
        ("laplace", {"beta": -1.0}),
        ("laplace", {"mu": math.nan}),
        ("linear_quadratic", {"threshold": 0.5}),
    ):
        with pytest.raises(ValueError, match=next(iter(options))):
            make_sigmas(name, 5, 0.1, 1.0, **options)


def test_levels_that_float32_cannot_tell_apart():
    with pytest.raises(ValueError, match="use fewer steps"):
        make_sigmas("linear", 100, 1.0, 1.000001)
    with pytest.raises(ValueError, match="options less extreme"):
        make_sigmas("laplace", 5, 0.02, 80.0, mu=50.0, beta=0.01)
