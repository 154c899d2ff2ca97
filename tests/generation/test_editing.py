"""Inversion, resampling and partial schedules, where the answer is known; pictures from files."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from problems import normal

from k_diffusion import generation, sampling
from k_diffusion.generation import editing

STD = 0.5


def gaussian(x, sigma):
    """The exact denoiser of N(0, STD^2)."""
    return x * STD**2 / (STD**2 + sigma[:, None, None, None] ** 2)


def test_a_partial_schedule_is_the_end_of_it():
    sigmas = sampling.get_sigmas_karras(10, 0.1, 10)
    assert torch.equal(editing.partial_schedule(sigmas, 1), sigmas)
    assert torch.equal(editing.partial_schedule(sigmas, 0.6), sigmas[4:])
    assert torch.equal(editing.partial_schedule(sigmas, 0.001), sigmas[9:])
    for strength in (0, -1, 1.1, math.nan):
        with pytest.raises(ValueError, match="strength must be above 0 and at most 1"):
            editing.partial_schedule(sigmas, strength)


def test_image_to_image_keeps_as_much_as_strength_leaves():
    """From image + sigma noise, the ODE scales Gaussian data by a known factor."""
    image = torch.full((1, 1, 2, 2), 0.8)
    sigmas = editing.partial_schedule(sampling.get_sigmas_karras(200, 0.01, 20), 0.3)
    options = {"sampler": "heun", "disable": True}
    (made,) = generation.generate(gaussian_module(), (1, 2, 2), [4], sigmas, start=image, **options)
    noise = sampling.randn_per_seed([4], (1, 2, 2))
    factor = STD / math.sqrt(STD**2 + float(sigmas[0]) ** 2)
    torch.testing.assert_close(made, (image + noise * sigmas[0]) * factor, rtol=2e-3, atol=1e-3)


def gaussian_module():
    class Module(torch.nn.Module):
        def forward(self, x, sigma):
            return gaussian(x, sigma)

    return Module()


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m"])
def test_an_image_goes_to_its_noise_and_back(sampler):
    x = normal(0, 3, 1, 4, 4).double() * STD
    errors = []
    for steps in (20, 80):
        sigmas = sampling.get_sigmas_karras(steps, 0.01, 20).double()
        noise = editing.invert(gaussian, x, sigmas, sampler, disable=True)
        back = sampling.sample(gaussian, noise, sigmas, sampler, disable=True)
        errors.append(float((back - x).square().mean().sqrt()))
    exact = x * math.sqrt((STD**2 + 20**2) / (STD**2 + 0.01**2))
    torch.testing.assert_close(noise, exact, rtol=0.1 if sampler == "euler" else 0.01, atol=0)
    assert errors[1] < 0.5 * errors[0] < 0.1


def test_noise_of_an_image_takes_the_place_of_the_seeds():
    sigmas = sampling.get_sigmas_karras(5, 0.1, 10)
    noise = normal(1, 1, 1, 2, 2)
    options = {"noise": noise, "disable": True}
    (made,) = generation.generate(gaussian_module(), (1, 2, 2), [1, 2], sigmas, **options)
    want = sampling.sample_dpmpp_2m(gaussian, noise * sigmas[0], sigmas, disable=True)
    torch.testing.assert_close(made, want.expand(2, 1, 2, 2))


def test_a_stochastic_sampler_is_not_inverted():
    with pytest.raises(ValueError, match="euler_ancestral adds noise, so it can't be inverted"):
        editing.invert(gaussian, torch.zeros(1, 1, 2, 2), torch.ones(2), "euler_ancestral")


# ----------------------------------------------------------------------------------- resampling


def test_resampling_keeps_the_law_and_counts_its_steps():
    n, sigmas = 60, sampling.get_sigmas_karras(6, 0.05, 10)
    x = sampling.randn_per_seed(range(n), (1, 4, 4)) * sigmas[0]
    seen = []
    options = {"resample": 3, "jump": 4, "disable": True, "callback": seen.append}
    y = editing.sample_resampled(gaussian, x, sigmas, "heun", range(n), **options)
    assert len(seen) == 3 * 6
    assert [round(float(i["sigma"]), 4) for i in seen[:8]] == 2 * [
        round(float(s), 4) for s in sigmas[:4]
    ]
    assert float(y.std()) == pytest.approx(STD, rel=0.1)
    with pytest.raises(ValueError, match="must be at least 1, got 0 and 4"):
        editing.sample_resampled(gaussian, x, sigmas, "heun", range(n), resample=0, jump=4)


@pytest.mark.parametrize("sampler", ["euler_ancestral", "dpmpp_2m_sde"])
def test_resampled_noise_is_fresh_and_depends_on_the_images_own_seed(sampler):
    sigmas = sampling.get_sigmas_karras(4, 0.1, 10)
    x = sampling.randn_per_seed([1, 2], (1, 2, 2)) * sigmas[0]
    options = {"resample": 2, "jump": 2, "disable": True}
    both = editing.sample_resampled(gaussian, x, sigmas, sampler, [1, 2], **options)
    second = editing.sample_resampled(gaussian, x[1:], sigmas, sampler, [2], **options)
    torch.testing.assert_close(both[1:], second)
    once = sampling.sample(gaussian, x, sigmas, sampler, [1, 2], disable=True)
    assert not torch.allclose(both, once, atol=1e-2)


# ---------------------------------------------------------------------------------------- files


def test_an_image_of_another_size_is_fitted_and_that_is_said(tmp_path):
    levels = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    Image.fromarray(levels).save(tmp_path / "a.png")
    said = []
    image = editing.read_image(tmp_path / "a.png", (1, 8, 8), said.append)
    assert said == []
    assert torch.equal(image[0, 0], torch.from_numpy(levels / np.float32(255) * 2 - 1))
    image = editing.read_image(tmp_path / "a.png", (3, 4, 6), said.append)
    assert image.shape == (1, 3, 4, 6)
    assert said == [f"{tmp_path / 'a.png'} has 8 x 8 pixels: scaled and cropped to 4 x 6"]


def test_a_latent_is_painted_where_any_of_its_pixels_is():
    mask = torch.zeros(1, 1, 4, 6, dtype=torch.bool)
    mask[0, 0, 1, 3] = True
    latent = editing.latent_mask(mask, SimpleNamespace(factor=2))
    assert latent.tolist() == [[[[False, True, False], [False] * 3]]]
    assert editing.latent_mask(mask, None) is mask
    image = normal(0, 1, 3, 4, 6)
    pasted = editing.paste(torch.full((2, 3, 4, 6), 7.0), image, mask)
    assert torch.equal(pasted, image.masked_fill(mask, 7.0).expand(2, 3, 4, 6))


def test_masks_are_black_and_white_and_of_the_images_size(tmp_path):
    levels = np.zeros((2, 3), np.uint8)
    levels[0, 1] = 255
    for mode in ("L", "1", "RGB"):
        Image.fromarray(levels).convert(mode).save(tmp_path / "m.png")
        mask = editing.read_mask(tmp_path / "m.png", (2, 3))
        assert mask.dtype == torch.bool
        assert mask.tolist() == [[[[False, True, False], [False] * 3]]]
    with pytest.raises(ValueError, match="m.png has 2 x 3 pixels, the images 3 x 3; resize it"):
        editing.read_mask(tmp_path / "m.png", (3, 3))
    for opaque, of_six in (255, 0), (254, 6), (0, 6):
        Image.fromarray(levels).convert("LA").save(tmp_path / "m.png")
        with Image.open(tmp_path / "m.png") as image:
            image.putalpha(opaque)
            image.save(tmp_path / "m.png")
        if of_six:
            with pytest.raises(ValueError, match="must be opaque, .* 6 of its 6 pixels are transp"):
                editing.read_mask(tmp_path / "m.png", (2, 3))
        else:
            assert torch.equal(editing.read_mask(tmp_path / "m.png", (2, 3)), mask)
    Image.fromarray(levels).save(tmp_path / "m.png", transparency=255)
    with pytest.raises(ValueError, match="1 of its 6 pixels are transparent; flatten it"):
        editing.read_mask(tmp_path / "m.png", (2, 3))
    levels[1, 1] = 100
    Image.fromarray(levels).save(tmp_path / "m.png")
    with pytest.raises(ValueError, match="black and white, white where to paint; 1 of its 6 pix"):
        editing.read_mask(tmp_path / "m.png", (2, 3))
