import pytest
import torch
from problems import wide
from torch import nn

import k_diffusion as K
from k_diffusion.guidance import (
    AutoguidedDenoiser,
    CFGDenoiser,
    CFGPlusPlus,
    GradientGuidedDenoiser,
    InpaintingDenoiser,
    IntervalDenoiser,
    ThresholdedDenoiser,
)


def test_cfg_plus_plus_goes_by_the_ratio_of_noise_levels():
    """Between 8 and 2 the middle is 4, not 5."""
    scale = CFGPlusPlus(0.6, [8.0, 2.0, 1.0, 0.0])
    got = scale(torch.tensor([4.5, 3.5, 1.5, 1.3])).tolist()
    assert got == pytest.approx([0.6 * 8 / 6, 0.6 * 2 / 1, 0.6 * 2 / 1, 0.6])


class Line(nn.Module):
    def forward(self, x, sigma, mean):
        return 0.5 * x + wide(mean, x)


def squared(denoised):
    return denoised.square().flatten(1).sum(1) / 2


IMAGE, MASK = torch.full((1, 1, 1, 3), 9.0), torch.tensor([[1, 0, 1]])
# Each with what it makes, at sigma = 2, of classifier-free guidance's estimate g, of that without
# guidance u, and of the conditional one c.
WRAPPERS = {
    "nothing": (lambda model: model, lambda g, u, c: (g, u)),
    "threshold": (
        lambda model: ThresholdedDenoiser(model, 0.7),
        lambda g, u, c: (g.clamp(-0.7, 0.7), u.clamp(-0.7, 0.7)),
    ),
    "interval within": (lambda model: IntervalDenoiser(model, 1), lambda g, u, c: (g, u)),
    "interval beyond": (lambda model: IntervalDenoiser(model, 3), lambda g, u, c: (c, c)),
    "gradient": (
        lambda model: GradientGuidedDenoiser(model, squared, 0.1),
        lambda g, u, c: (g - 0.1 * 4 * 0.5 * g, u - 0.1 * 4 * 0.5 * g),
    ),
    "autoguidance": (
        lambda model: AutoguidedDenoiser(model, Line(), 2.0),
        lambda g, u, c: (g + (g - c), u + (g - c)),
    ),
    "inpainting": (
        lambda model: InpaintingDenoiser(model, IMAGE, MASK),
        lambda g, u, c: (torch.where(MASK > 0, g, 9.0), torch.where(MASK > 0, u, 9.0)),
    ),
    "several": (
        lambda model: ThresholdedDenoiser(IntervalDenoiser(model, 1), 0.7),
        lambda g, u, c: (g.clamp(-0.7, 0.7), u.clamp(-0.7, 0.7)),
    ),
}


@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.parametrize("host", [{}, {"host_sigma": 2.0}], ids=["asked", "told"])
def test_wrappers_do_to_the_unconditional_estimate_what_they_do_to_the_guided_one(name, host):
    make, law = WRAPPERS[name]
    x, sigma, mean = torch.tensor([[[[-1.0, 0.5, 2.0]]]]), torch.tensor([2.0]), torch.ones(1)
    wrapped = make(CFGDenoiser(Line(), 0.6, mean=torch.zeros(1)))
    c, u = Line()(x, sigma, mean), Line()(x, sigma, torch.zeros(1))
    want = law(u + 0.6 * (c - u), u, c)
    torch.testing.assert_close(wrapped.both(x, sigma, mean=mean, **host), want)
    torch.testing.assert_close(wrapped(x, sigma, mean=mean, **host), want[0])


def test_a_model_of_ones_own_with_two_estimates_is_called_as_any():
    class Own(nn.Module):
        def forward(self, x, sigma):
            return 0 * x

        def both(self, x, sigma):
            return 0 * x, x

    x, sigmas = torch.ones(1, 2), torch.tensor([2.0, 1.0, 0.0])
    assert not K.sampling.sample_euler(Own(), x, sigmas, disable=True).any()
    assert K.sampling.sample_euler_cfg_pp(Own(), x, sigmas, disable=True).isfinite().all()


def test_intervals_of_both_estimates_are_of_each_samples_own_level():
    x, sigma, mean = torch.ones(2, 3), torch.tensor([0.5, 2.0]), torch.ones(2)
    guidance = CFGDenoiser(Line(), 0.6, mean=torch.zeros(1))
    both, plain = guidance.both(x, sigma, mean=mean), Line()(x, sigma, mean)
    for got, inside in zip(IntervalDenoiser(guidance, 1).both(x, sigma, mean=mean), both):
        assert torch.equal(got, torch.stack([plain[0], inside[1]]))
