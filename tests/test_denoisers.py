import math

import golden
import pytest
import torch
from scipy import fft
from torch import nn

from k_diffusion import Denoiser
from k_diffusion.denoisers import (
    WEIGHTINGS,
    DenoiserWithVariance,
    SimpleLossDenoiser,
    XPredictionDenoiser,
    dct,
    frequency_weights,
    sigmoid_weighting,
)

SIGMA = torch.tensor([0.02, 0.3, 2.0, 40.0], dtype=torch.float64)


class Fn(nn.Module):
    """A network given by a function."""

    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, x, sigma, **kwargs):
        return self.fn(x, sigma, **kwargs)


ZERO = Fn(lambda x, sigma: torch.zeros_like(x))
NETWORK = Fn(lambda x, sigma: torch.tanh(x + torch.cos(sigma.log() / 4)[:, None, None, None]))


def data(seed=0, shape=(4, 3, 8, 8), dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def mean(x):
    return x.flatten(1).mean(1)


def per_sample(x):
    return x[:, None, None, None]


# ---------------------------------------------------------------- preconditioning


def test_scalings_are_those_of_edm():
    """arXiv:2206.00364, appendix B.6: unit input, unit target, smallest c_out."""
    s = 0.7
    c_skip, c_out, c_in = Denoiser(ZERO, sigma_data=s).get_scalings(SIGMA)
    torch.testing.assert_close(c_in**2 * (s**2 + SIGMA**2), torch.ones_like(SIGMA))
    target_variance = (1 - c_skip) ** 2 * s**2 + c_skip**2 * SIGMA**2
    torch.testing.assert_close(target_variance / c_out**2, torch.ones_like(SIGMA))
    slope = -2 * (1 - c_skip) * s**2 + 2 * c_skip * SIGMA**2  # of c_out^2 in c_skip
    torch.testing.assert_close(slope, torch.zeros_like(SIGMA))


def test_zero_network_is_exact_for_gaussian_data():
    """For data N(0, s^2) the optimal D is s^2 x / (s^2 + sigma^2), so the optimal F is 0."""
    x, s = data(), 0.5
    expected = per_sample(s**2 / (s**2 + SIGMA**2)) * x
    torch.testing.assert_close(Denoiser(ZERO, sigma_data=s)(x, SIGMA), expected)


def test_exact_denoiser_of_shifted_gaussian_data_from_its_network():
    """F = (D* - c_skip x) / c_out of the exact D* comes out as D* again, at c_in x and sigma."""
    mu, s, sigma_data = 0.8, 0.3, 0.5

    def exact(x, sigma):
        return (sigma**2 * mu + s**2 * x) / (s**2 + sigma**2)

    def network(x_in, sigma):
        c_skip, c_out, c_in = model.get_scalings(per_sample(sigma))
        x = x_in / c_in
        return (exact(x, per_sample(sigma)) - c_skip * x) / c_out

    model = Denoiser(Fn(network), sigma_data)
    torch.testing.assert_close(model(data(), SIGMA), exact(data(), per_sample(SIGMA)))


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("cls", [Denoiser, SimpleLossDenoiser])
def test_sigma_zero_gives_the_input_back_and_a_finite_loss(cls, weighting):
    """Also through a network that takes log sigma."""
    model = cls(NETWORK, sigma_data=0.5, weighting=weighting)
    x, sigma = data(dtype=torch.float32), torch.tensor([0.0, 1.0, 0.0, 2.0])
    x.requires_grad_()
    y = model(x, sigma)
    assert torch.equal(y[sigma == 0], x[sigma == 0])
    loss = model.loss(x, data(1, dtype=torch.float32), sigma)
    (grad,) = torch.autograd.grad(loss.sum() + y.sum(), x)
    assert loss.isfinite().all()
    assert grad.isfinite().all()


def test_loss_is_accurate_at_small_sigma():
    """Subtracting c_skip x from the data would lose all digits in float32."""
    model = Denoiser(ZERO, sigma_data=0.5)
    sigma = torch.full((4,), 1e-5)
    x, noise = data(dtype=torch.float32), data(1, dtype=torch.float32)
    torch.testing.assert_close(model.loss(x, noise, sigma), mean(noise**2), rtol=1e-4, atol=0)


def test_keyword_arguments_reach_the_network():
    seen = []
    model = Denoiser(Fn(lambda x, sigma, **kw: seen.append(kw) or x))
    model(data(), SIGMA, class_cond=1)
    model.loss(data(), data(1), SIGMA, class_cond=2)
    assert seen == [{"class_cond": 1}, {"class_cond": 2}]


def test_is_a_module_around_inner_model():
    model = Denoiser(nn.Linear(2, 2))
    assert list(model.state_dict()) == ["inner_model.weight", "inner_model.bias"]


@pytest.mark.parametrize("shape", [(2, 5), (2, 3, 7), (2, 3, 4, 6), (2, 1, 2, 4, 6)])
def test_any_number_of_dimensions(shape):
    model = Denoiser(Fn(lambda x, sigma: x))
    x, sigma = data(shape=shape), SIGMA[:2]
    assert model(x, sigma).shape == shape
    assert model.loss(x, data(1, shape), sigma).shape == (2,)


# ---------------------------------------------------------------- losses


def test_karras_loss_of_the_zero_network_is_one():
    """Data N(0, sigma_data^2) and F = 0 (arXiv:2206.00364, appendix B.6)."""
    shape, s = (4, 200_000), 0.5
    loss = Denoiser(ZERO, sigma_data=s).loss(s * data(0, shape), data(1, shape), SIGMA)
    assert loss.tolist() == pytest.approx([1] * 4, abs=0.02)  # 6 standard errors


@pytest.mark.parametrize("scales", [1, 3])
def test_losses_are_weighted_squared_errors_of_the_denoised_image(scales):
    x, noise, s = data(), data(1), 0.6
    weights = {
        "karras": 1 / SIGMA**2 + 1 / s**2,
        "soft-min-snr": 1 / (SIGMA**2 + s**2),
        "snr": 1 / SIGMA**2,
        sigmoid_weighting(0.7, s): 1 / (SIGMA**2 + math.exp(-0.7)),
        sigmoid_weighting(-2 * math.log(s), s): 1 / (SIGMA**2 + s**2),
        (lambda sigma: sigma**3): SIGMA**3 * (1 / SIGMA**2 + 1 / s**2),
    }
    assert set(WEIGHTINGS) < set(weights)
    for weighting, weight in weights.items():
        model = Denoiser(NETWORK, s, weighting, scales)
        error = dct(model(x + noise * per_sample(SIGMA), SIGMA) - x) ** 2
        expected = weight * mean(error * frequency_weights(x, scales))
        torch.testing.assert_close(model.loss(x, noise, SIGMA), expected)


@pytest.mark.parametrize("make", [Denoiser, XPredictionDenoiser])
def test_a_learned_weighting_is_least_at_the_log_of_the_loss(make):
    """L / e^u + u is 1 + ln L there, and its gradient by the network that of ln L."""
    x, noise = data(), data(1)
    plain = make(NETWORK, 0.5).loss(x, noise, SIGMA)
    u = plain.log().requires_grad_()

    def network(x, sigma, return_uncertainty=False):
        return (NETWORK(x, sigma), u) if return_uncertainty else NETWORK(x, sigma)

    model = make(Fn(network), 0.5, learned_weighting=True)
    loss = model.loss(x, noise, SIGMA)
    torch.testing.assert_close(loss, 1 + plain.log())
    (grad,) = torch.autograd.grad(loss.sum(), u)
    torch.testing.assert_close(grad, torch.zeros(4).double(), atol=1e-12, rtol=0)
    assert torch.equal(model(x, SIGMA), make(NETWORK, 0.5)(x, SIGMA))


@pytest.mark.parametrize("s", [1.0, 2.0])
def test_x_prediction_is_the_network_and_its_loss_that_of_v(s):
    """By JiT's formulas: z = t x + (1 - t) s e, sigma = s (1 - t) / t, v = (x - z) / (1 - t)."""
    x, noise = data(), data(1)
    t = torch.tensor([0.05, 0.3, 0.9, 0.99], dtype=x.dtype)
    sigma = s * (1 - t) / t
    model = XPredictionDenoiser(NETWORK, noise_scale=s)
    z = per_sample(t) * x + per_sample(1 - t) * s * noise
    estimate = NETWORK(z, sigma)
    torch.testing.assert_close(model(x + noise * per_sample(sigma), sigma), estimate)
    # both velocities with a denominator of at least 0.05
    below = per_sample((1 - t).clamp(min=0.05))
    expected = mean(((estimate - z) / below - (x - z) / below) ** 2)
    torch.testing.assert_close(model.loss(x, noise, sigma), expected)


def test_x_prediction_has_a_finite_loss_at_sigma_zero():
    model, zero = XPredictionDenoiser(NETWORK), torch.zeros(4)
    x, noise = data(dtype=torch.float32), data(1, dtype=torch.float32)
    torch.testing.assert_close(model.loss(x, noise, zero), 400 * mean((model(x, zero) - x) ** 2))
    with pytest.raises(ValueError, match="noise_scale must be"):
        XPredictionDenoiser(NETWORK, noise_scale=0)


def test_simple_loss_is_the_squared_error_of_the_noise_and_equals_snr_weighting():
    x, noise = data(), data(1)
    noised = x + noise * per_sample(SIGMA)
    model = SimpleLossDenoiser(NETWORK, 0.5, weighting="karras")
    estimate = (noised - model(noised, SIGMA)) / per_sample(SIGMA)
    loss = model.loss(x, noise, SIGMA)
    torch.testing.assert_close(loss, mean((estimate - noise) ** 2))
    torch.testing.assert_close(loss, Denoiser(NETWORK, 0.5, "snr").loss(x, noise, SIGMA))


def test_variance_loss_is_least_at_the_log_of_the_error():
    x, noise = data(), data(1)
    plain = Denoiser(NETWORK, 0.5).loss(x, noise, SIGMA)

    def loss(logvar):
        network = Fn(lambda x, sigma, return_variance: (NETWORK(x, sigma), logvar))
        return DenoiserWithVariance(network, 0.5).loss(x, noise, SIGMA)

    logvar = plain.log().requires_grad_()
    torch.testing.assert_close(loss(logvar), (1 + plain.log()) / 2)  # a Gaussian's likelihood
    (slope,) = torch.autograd.grad(loss(logvar).sum(), logvar)
    torch.testing.assert_close(slope, torch.zeros_like(slope))
    torch.testing.assert_close(loss(torch.zeros(4)), plain / 2)


def test_variance_is_asked_for_in_the_loss_only():
    model = DenoiserWithVariance(Fn(lambda x, sigma, return_variance=False: x + return_variance))
    expected = Denoiser(Fn(lambda x, sigma: x))
    assert torch.equal(model(data(), SIGMA), expected(data(), SIGMA))


# ---------------------------------------------------------------- discrete cosine transform


@pytest.mark.parametrize("shape", [(2, 3, 1), (2, 3, 7), (2, 3, 8, 5), (2, 3, 4, 6, 3)])
def test_dct_is_the_orthonormal_one(shape):
    x = data(shape=shape)
    expected = fft.dctn(x.numpy(), type=2, norm="ortho", axes=range(2, x.ndim))
    y = dct(x, dims=range(2, x.ndim))
    torch.testing.assert_close(y, torch.from_numpy(expected))
    torch.testing.assert_close(mean(y**2), mean(x**2))  # Parseval
    # the published one takes the channels of signals
    default = dct(x.mT).mT if x.ndim == 3 else dct(x)
    torch.testing.assert_close(default, y)


def test_frequency_weights():
    weights = frequency_weights(torch.zeros(1, 1, 64, 16, dtype=torch.float64), 3)
    assert weights.shape == (64, 16)
    assert weights[0, 0] == 3  # the lowest frequency, limited to `scales`
    assert weights[-1].tolist() == pytest.approx([1.0] * 16)  # f = 1/2 on one axis is enough
    f = 0.5 / 64 + 20 * (0.5 - 0.5 / 64) / 63
    assert weights[20, 0].item() == pytest.approx(-math.log2(f))
    assert torch.equal(frequency_weights(torch.zeros(1, 1, 9, 9), 1), torch.ones(9, 9))


def test_dct_needs_spatial_dimensions():
    with pytest.raises(ValueError, match="at least 3 dimensions"):
        dct(torch.zeros(2, 3))


# ---------------------------------------------------------------- bad input, golden numbers


def test_bad_options_are_errors():
    with pytest.raises(ValueError, match=r"unknown loss weighting 'min-snr'.*karras, soft-min-snr"):
        Denoiser(ZERO, weighting="min-snr")
    with pytest.raises(ValueError, match="sigma_data must be positive"):
        Denoiser(ZERO, sigma_data=0.0)
    with pytest.raises(ValueError, match="scales must be at least 1"):
        Denoiser(ZERO, scales=0)


def golden_network(x, sigma, return_variance=False):
    s = per_sample(sigma)
    y = x + 0.3 * torch.roll(x, 1, -1)
    y = torch.tanh(1.5 * y / (1 + s)) * 0.8 + 0.1 * torch.sin(3 * x / (1 + s))
    return (y, mean(y)) if return_variance else y


@pytest.mark.parametrize(
    ("name", "cls", "options"),
    [
        ("karras", Denoiser, {"sigma_data": 0.5}),
        ("soft_min_snr", Denoiser, {"sigma_data": 0.7, "weighting": "soft-min-snr"}),
        ("snr", Denoiser, {"sigma_data": 0.5, "weighting": "snr"}),
        ("multiscale", Denoiser, {"sigma_data": 0.5, "weighting": "soft-min-snr", "scales": 4}),
        ("simple", SimpleLossDenoiser, {"sigma_data": 0.5}),
        ("variance", DenoiserWithVariance, {"sigma_data": 0.5}),
    ],
)
def test_published_numbers(name, cls, options):
    model = cls(Fn(golden_network), **options)
    x, noise = data(20, dtype=torch.float32), data(21, dtype=torch.float32)
    sigma = SIGMA.float()
    got = {"y": model(x, sigma), "loss": model.loss(x, noise, sigma)}
    torch.testing.assert_close(got, golden.load(f"denoiser_{name}")[0], rtol=1e-5, atol=1e-6)


def test_float16_holds_at_high_noise():
    """The square of a noise level above 255 doesn't fit into float16."""
    model = Denoiser(nn.Identity(), sigma_data=0.5)
    for sigma in (80.0, 1000.0, 30000.0):
        level = torch.tensor([sigma], dtype=torch.float16)
        for got, want in zip(model.get_scalings(level), model.get_scalings(level.double())):
            assert got.dtype == torch.float16
            torch.testing.assert_close(got.double(), want, rtol=2e-3, atol=1e-7)
        x, noise = torch.ones(1, 2).half(), torch.full((1, 2), 0.5).half()
        wide = (x.double(), noise.double(), level.double())
        torch.testing.assert_close(
            model._target(x, noise, level).double(), model._target(*wide), rtol=2e-3, atol=1e-3
        )


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_the_estimated_variance_is_that_of_the_error_whatever_the_weighting(weighting):
    """A weight on the error alone would have the network estimate the weighted one."""
    x, noise = data(), data(1)
    logvar = Denoiser(NETWORK, 0.5).loss(x, noise, SIGMA).log().requires_grad_()
    network = Fn(lambda x, sigma, return_variance: (NETWORK(x, sigma), logvar))
    loss = DenoiserWithVariance(network, 0.5, weighting).loss(x, noise, SIGMA)
    (slope,) = torch.autograd.grad(loss.sum(), logvar)
    torch.testing.assert_close(slope, torch.zeros_like(slope))
