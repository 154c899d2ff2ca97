import math

import pytest

from k_diffusion.solvers import er_sde


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize(("sigma", "sigma_next"), [(80.0, 20.0), (3.0, 1.1), (0.2, 0.05)])
def test_the_papers_noise_scale(eta, sigma, sigma_next):
    """phi(sigma) = sigma (exp(sigma^0.3) + 10), the best of arXiv:2309.06169."""
    ratio = (math.exp(sigma_next**0.3) + 10) / (math.exp(sigma**0.3) + 10)
    down = sigma_next * ratio**eta
    up = math.sqrt(sigma_next**2 - down**2)
    got = er_sde.er_split(eta, er_sde.NOISE_SCALES["er_sde"])(sigma, sigma_next)
    assert got == pytest.approx((down, up), rel=1e-9)
