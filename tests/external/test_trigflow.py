"""TrigFlow models as denoisers."""

import math

import problems
import pytest
import torch

from k_diffusion import sampling as S
from k_diffusion.external import TrigFlowDenoiser


def flow(x, t, sigma_data=0.5, std=0.4):
    """The exact F of data N(0, std^2): cos(t) z - sin(t) x_0 / sigma_data given x_t, as expected.

    x: x_t / sigma_data.
    """
    x_t = x * sigma_data
    cos, sin = t.cos()[:, None], t.sin()[:, None]
    variance = (cos * std) ** 2 + (sin * sigma_data) ** 2
    x_0, z = cos * std**2 * x_t / variance, sin * sigma_data * x_t / variance
    return cos * z - sin * x_0 / sigma_data


def test_it_is_the_denoiser_of_its_data():
    x, sigma = (
        problems.normal(0, 3, 5, dtype=torch.float64),
        torch.tensor([0.1, 1.0, 30.0]).double(),
    )
    got = TrigFlowDenoiser(flow)(x, sigma)
    torch.testing.assert_close(got, problems.Gaussian(0.0, 0.4)(x, sigma))


def test_its_sampler_is_scms():
    """x_t' = cos(t') D + sin(t') sigma_data z, of the paper's two steps."""
    model = TrigFlowDenoiser(flow)
    sigmas = model.get_sigmas([1.5, 1.1]).double()
    z = problems.normal(1, 3, 5, dtype=torch.float64)
    x = problems.normal(0, 3, 5, dtype=torch.float64) * sigmas[0]
    got = S.sample_lcm(model, x, sigmas, noise_sampler=lambda a, b: z, disable=True)

    def clean(x_t, t):
        t = torch.full((3,), t, dtype=torch.float64)
        return math.cos(t[0]) * x_t - math.sin(t[0]) * 0.5 * flow(x_t / 0.5, t)

    x_t = math.cos(1.1) * clean(x * math.cos(1.5), 1.5) + math.sin(1.1) * 0.5 * z
    torch.testing.assert_close(got, clean(x_t, 1.1), rtol=1e-5, atol=1e-6)


def test_errors():
    with pytest.raises(ValueError, match="sigma_data must be positive"):
        TrigFlowDenoiser(flow, 0.0)
    for times in ([], [1.6, 1.0], [1.0, 1.2]):
        with pytest.raises(ValueError, match="times must descend"):
            TrigFlowDenoiser(flow).get_sigmas(times)
