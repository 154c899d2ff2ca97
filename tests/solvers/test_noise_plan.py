"""How far down a step goes, how much noise follows, and where a restart begins."""

import math

import pytest
import torch

from k_diffusion import sampling as S
from k_diffusion.solvers import noise_plan


@pytest.mark.parametrize("eta", [0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize(("sigma", "sigma_next"), [(10.0, 9.0), (3.0, 1.0), (1.0, 0.1)])
def test_ancestral_noise_is_eta_times_that_of_the_posterior(eta, sigma, sigma_next):
    """DDIM (arXiv:2010.02502), equation 16, divided by the square root of alpha bar."""
    alpha, alpha_next = 1 / (1 + sigma**2), 1 / (1 + sigma_next**2)
    up = eta * math.sqrt((1 - alpha_next) / (1 - alpha) * (1 - alpha / alpha_next) / alpha_next)
    down = math.sqrt(sigma_next**2 - up**2)
    assert S.get_ancestral_step(sigma, sigma_next, eta) == pytest.approx((down, up), rel=1e-12)
    wide = (torch.tensor(s, dtype=torch.float64) for s in (sigma, sigma_next))
    got = torch.stack(S.get_ancestral_step(*wide, eta))
    torch.testing.assert_close(got, torch.tensor([down, up], dtype=torch.float64))


def test_a_restart_begins_at_the_level_nearest_in_ratio():
    """2.2 is nearer to 1 in difference, and nearer to 4 in ratio."""
    hops = noise_plan.restarted([16.0, 4.0, 1.0, 0.0], [noise_plan.Restart(2.2, 8.0, 1, 1)])
    assert hops == [(16.0, 16.0, 4.0), (4.0, 8.0, 4.0), (4.0, 4.0, 1.0), (1.0, 1.0, 0.0)]
