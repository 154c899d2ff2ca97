"""Classifier-free guidance of a model of two classes, of which all is known."""

import pytest
import torch
from torch import nn

import k_diffusion as K
from k_diffusion.guidance import CFGDenoiser

MEANS = torch.tensor([-1.0, 2.0, 0.3], dtype=torch.float64)  # the last one is "no class"
STD = 0.5


class Gaussians(nn.Module):
    """The exact denoiser of N(MEANS[class], STD^2)."""

    calls = 0

    def forward(self, x, sigma, class_cond, shift=None):
        self.calls += 1
        sigma, mean = sigma[:, None], MEANS[class_cond][:, None]
        mean = mean if shift is None else mean + shift
        return (sigma**2 * mean + STD**2 * x) / (STD**2 + sigma**2)


def inputs(n=6):
    x = torch.linspace(-3, 3, 2 * n, dtype=torch.float64).reshape(n, 2)
    return x, torch.linspace(0.1, 5, n, dtype=torch.float64), torch.arange(n) % 2


def null(n=6):
    return torch.full((n,), 2)


def test_scale_one_is_the_model_and_zero_the_unconditional_one():
    x, sigma, classes = inputs()
    model = Gaussians()
    one, zero = (CFGDenoiser(model, s, class_cond=null()) for s in (1.0, 0.0))
    given = model(x, sigma, class_cond=classes)
    torch.testing.assert_close(one(x, sigma, class_cond=classes), given, rtol=0, atol=0)
    without = model(x, sigma, class_cond=null())
    torch.testing.assert_close(zero(x, sigma, class_cond=classes), without, rtol=0, atol=0)


def test_guidance_between_gaussians_moves_the_mean():
    """D is linear in the mean: guidance is the model of mean_u + scale (mean_c - mean_u)."""
    x, sigma, classes = inputs()
    guided = CFGDenoiser(Gaussians(), 3.0, class_cond=null())(x, sigma, class_cond=classes)
    mean = MEANS[2] + 3 * (MEANS[classes] - MEANS[2])
    s2 = sigma[:, None] ** 2
    torch.testing.assert_close(guided, (s2 * mean[:, None] + STD**2 * x) / (STD**2 + s2))


def test_one_call_with_both_halves_and_other_conditions_in_each():
    x, sigma, classes = inputs()
    model = Gaussians()
    guided = CFGDenoiser(model, 2.0, class_cond=null())
    shift = torch.linspace(0, 1, 6, dtype=torch.float64)[:, None]
    got = guided(x, sigma, class_cond=classes, shift=shift)
    assert model.calls == 1
    want = [model(x, sigma, class_cond=c, shift=shift) for c in (null(), classes)]
    torch.testing.assert_close(got, torch.lerp(*want, 2.0))


def test_a_missing_condition():
    x, sigma, _ = inputs()
    with pytest.raises(ValueError, match="strengthens class_cond"):
        CFGDenoiser(Gaussians(), 2.0, class_cond=null())(x, sigma)


def test_it_composes_with_samplers():
    """The ODE of a Gaussian ends in its mean for noise that begins there."""
    guided = CFGDenoiser(Gaussians(), 2.0, class_cond=null(2))
    classes = torch.tensor([0, 1])
    mean = MEANS[2] + 2 * (MEANS[classes] - MEANS[2])
    sigmas = K.sampling.get_sigmas_karras(20, 0.01, 50.0).double()
    x = mean[:, None].expand(2, 3)
    for sampler in K.sampling.sample_heun, K.sampling.sample_dpmpp_2m:
        got = sampler(guided, x, sigmas, extra_args={"class_cond": classes}, disable=True)
        torch.testing.assert_close(got, x, atol=1e-6, rtol=0)
