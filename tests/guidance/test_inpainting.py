"""Inpainting against the exact conditional law of Gaussian pixels."""

import math

import pytest
import torch
from problems import normal
from torch import nn

from k_diffusion import sampling
from k_diffusion.guidance import CFGDenoiser, InpaintingDenoiser


class Gaussian(nn.Module):
    """The exact denoiser of two pixels of variance `std`^2 and correlation rho."""

    def __init__(self, rho, std=1.0):
        super().__init__()
        self.cov = std**2 * torch.tensor([[1, rho], [rho, 1]], dtype=torch.float64)

    def forward(self, x, sigma):
        noise = sigma[0].double() ** 2 * torch.eye(2, dtype=torch.float64)
        gain = self.cov @ torch.linalg.inv(self.cov + noise)
        return (x.flatten(1).double() @ gain.T).reshape(x.shape).to(x.dtype)


IMAGE = torch.tensor([[[[1.0, 7.0]]]], dtype=torch.float64)
MASK = torch.tensor([[0, 1]])
SIGMAS = sampling.get_sigmas_karras(40, 0.01, 20)


def noised(n, seed=0):
    """Noise, around the image where it is known."""
    return normal(seed, n, 1, 1, 2).double() * SIGMAS[0] + IMAGE * (1 - MASK)


@pytest.mark.parametrize(
    "sampler", ["euler", "dpmpp_2m", "heun", "dpmpp_3m_sde", "euler_ancestral"]
)
def test_the_known_part_stays_the_image_noised_as_the_rest(sampler):
    model = InpaintingDenoiser(Gaussian(0.9), IMAGE, MASK)
    x = noised(400)
    z = []

    def watch(info):
        z.append((info["x"][..., 0] - 1) / info["sigma"])

    done = sampling.sample(model, x, SIGMAS, sampler, callback=watch, disable=True)
    torch.testing.assert_close(done[..., 0], torch.ones(400, 1, 1).double(), atol=1e-6, rtol=0)
    for at in z[::8]:
        assert at.std() == pytest.approx(1, abs=0.12)
    if not sampling.get_sampler(sampler).stochastic:
        torch.testing.assert_close(z[-1], z[0], atol=1e-4, rtol=0)


def test_independent_pixels_keep_their_law_and_the_correction_is_exact():
    """Of independent pixels the rest learns nothing, and the corrected estimate is the image."""
    plain = Gaussian(0.0, 0.5)
    model = InpaintingDenoiser(plain, IMAGE, MASK, correction=1, sigma_data=0.5)
    x, sigma = normal(1, 6, 1, 1, 2).double(), torch.full((6,), 3.0)
    corrected, without = model.guided(x, sigma), plain(x, sigma)
    torch.testing.assert_close(corrected[..., 0], torch.ones(6, 1, 1).double())
    assert torch.equal(corrected[..., 1], without[..., 1])


def test_the_correction_brings_the_rest_nearer_to_its_conditional_law():
    """The rest is N(0.9, 0.19), were it sampled exactly; replacement alone knows too little."""
    means = []
    for correction in (0, 1):
        model = InpaintingDenoiser(Gaussian(0.9), IMAGE, MASK, correction)
        x = sampling.sample_euler(model, noised(2000), SIGMAS, disable=True)[..., 1]
        means.append(float(x.mean()))
    assert means[0] < 0.7
    assert means[1] == pytest.approx(0.9, abs=0.1)
    assert float(x.std()) == pytest.approx(math.sqrt(0.19), abs=0.06)


def test_an_empty_mask_gives_the_image_to_the_bit_and_a_full_one_plain_sampling():
    image, model = normal(1, 1, 1, 1, 2), Gaussian(0.5)
    x = normal(2, 5, 1, 1, 2) * SIGMAS[0]
    empty = InpaintingDenoiser(model, image, torch.zeros(1, 2))
    done = empty.keep(sampling.sample_heun(empty, x + image, SIGMAS, disable=True))
    assert torch.equal(done, image.expand(5, 1, 1, 2))
    full = InpaintingDenoiser(model, image, torch.ones(1, 2, dtype=torch.bool))
    done = full.keep(sampling.sample_heun(full, x, SIGMAS, disable=True))
    assert torch.equal(done, sampling.sample_heun(model, x, SIGMAS, disable=True))


class Shifted(Gaussian):
    def forward(self, x, sigma, shift):
        return super().forward(x, sigma) + shift[:, None, None, None]


@pytest.mark.parametrize("sampler", [name for name in sampling.SAMPLERS if "cfg_pp" in name])
def test_empty_and_full_masks_of_cfg_plus_plus(sampler):
    guided = CFGDenoiser(Shifted(0.5), 0.6, shift=torch.zeros(1))
    x, image = normal(2, 3, 1, 1, 2) * SIGMAS[0], normal(1, 1, 1, 1, 2)
    run = {"extra_args": {"shift": torch.ones(3)}, "disable": True}

    def sample(model, name=sampler):
        return sampling.sample(model, x, SIGMAS, name, [1, 2, 3], **run)

    full = InpaintingDenoiser(guided, image, torch.ones(1, 2))
    assert torch.equal(sample(full), sample(guided))
    assert not torch.allclose(sample(full), sample(full, sampler.removesuffix("_cfg_pp")), atol=0.1)
    empty = InpaintingDenoiser(guided, image, torch.zeros(1, 2))
    assert torch.equal(empty.keep(sample(empty)), image.expand(3, 1, 1, 2))


def test_it_goes_around_guidance_and_moves_with_its_module():
    guided = CFGDenoiser(Shifted(0.5), 3.0, shift=torch.zeros(1))
    model = InpaintingDenoiser(guided, IMAGE, MASK, correction=1)
    x, sigma = normal(3, 2, 1, 1, 2).double(), torch.full((2,), 0.5)
    out = model(x, sigma, shift=torch.ones(2))
    assert torch.equal(out[..., 0], torch.ones(2, 1, 1).double())
    assert not torch.equal(out[..., 1], guided(x, sigma, shift=torch.ones(2))[..., 1])
    assert model.to("meta").mask.device.type == "meta"
    assert not model.state_dict()


@pytest.mark.parametrize(
    ("mask", "says"),
    [
        (torch.zeros(2, 2), r"as large as the image, \(1, 2\), got \(2, 2\)"),
        (torch.tensor([[0.5, 1]]), "must be binary, .* got values from 0.5 to 1; threshold it"),
        (torch.zeros(1, 3, 1, 2), r"shape \(1, 3, 1, 2\) fits no image of shape \(2, 2, 1, 2\)"),
        (torch.zeros(3, 1, 1, 2), r"shape \(3, 1, 1, 2\) fits no image of shape \(2, 2, 1, 2\)"),
        (torch.zeros(1, 1, 1, 1, 2), r"shape \(1, 1, 1, 1, 2\) fits no image"),
    ],
)
def test_masks_that_fit_no_image(mask, says):
    with pytest.raises(ValueError, match=says):
        InpaintingDenoiser(Gaussian(0.5), torch.zeros(2, 2, 1, 2), mask)


def test_corrections_that_can_not_be():
    with pytest.raises(ValueError, match="correction"):
        InpaintingDenoiser(Gaussian(0.5), IMAGE, MASK, math.nan)
    with pytest.raises(ValueError, match="sigma_data must be a finite number above 0, got 0"):
        InpaintingDenoiser(Gaussian(0.5), IMAGE, MASK, 1, sigma_data=0)
