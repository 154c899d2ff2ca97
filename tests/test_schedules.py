import math

import golden
import pytest
import torch

from k_diffusion import schedules
from k_diffusion.schedules import make_sigmas

NAMES = sorted(schedules.SCHEDULES)


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
        assert sigmas[-2].item() == pytest.approx(0.02, rel=2e-3 if name == "vp" else 1e-5)


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
    with pytest.raises(ValueError, match="rho"):
        schedules.get_sigmas_karras(5, 0.1, 1.0, rho=0.0)
    with pytest.raises(ValueError, match="eps_s"):
        schedules.get_sigmas_vp(5, eps_s=1.0)


def test_unit_ends_of_positive_range():
    assert schedules.positive_range([3.0, 1.0, 0.0]) == (1.0, 3.0)
    assert schedules.positive_range([0.0]) == (0.0, 0.0)
