import math
from itertools import pairwise

import pytest
import torch
from problems import Gaussian, mixture, normal
from torch import nn

from k_diffusion import Denoiser, external, sampling
from k_diffusion.external import RectifiedFlowDenoiser

ABAR = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)


def column(t):
    return t[:, None]


class Velocity(nn.Module):
    """The optimal velocity of a problem: x_t = (1 - t) x0 + t eps has sigma = t / (1 - t)."""

    def __init__(self, problem, time_scale=1.0):
        super().__init__()
        self.problem, self.time_scale, self.seen = problem, time_scale, []

    def forward(self, x_t, t, **kwargs):
        self.seen.append((x_t.dtype, t, kwargs))
        t = t / self.time_scale
        denoised = self.problem(x_t / column(1 - t), t / (1 - t))
        return ((x_t - denoised) / column(t)).to(x_t.dtype)


# ------------------------------------------------------------------------------------ the denoiser


def test_exact_velocity_gives_the_denoiser():
    problem, x = Gaussian(0.4, 0.7), normal(0, 4, 3, dtype=torch.float64)
    sigma = torch.tensor([0.01, 0.6, 5.0, 1000.0], dtype=torch.float64)
    for time_scale in (1.0, 1000.0):
        model = RectifiedFlowDenoiser(Velocity(problem, time_scale), time_scale=time_scale)
        torch.testing.assert_close(model(x, sigma, y=1), problem(x, sigma))
        _, t, kwargs = model.inner_model.seen[0]
        torch.testing.assert_close(t, sigma / (1 + sigma) * time_scale)
        assert kwargs == {"y": 1}


def test_sigma_zero_gives_the_input_back_and_pure_noise_is_finite():
    model, x = RectifiedFlowDenoiser(lambda x, t: x + t[:, None]), normal(0, 2, 3)
    assert torch.equal(model(x, torch.zeros(2)), x)
    assert model(x * model.sigma_max, torch.full((2,), model.sigma_max)).isfinite().all()


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_in_sigma_is_euler_of_the_flow(shift):
    """x' = x + (t' - t) v, from t = 1 on: pure noise has no x0 in it."""
    inner, n = Velocity(mixture()), 7
    model = RectifiedFlowDenoiser(inner, shift, sigma_max=1e7)
    x = normal(0, 5, 2, dtype=torch.float64)
    sigmas = model.get_sigmas(n).double()
    y = sampling.sample_euler(model, x * sigmas[0], sigmas, disable=True)
    t = [1 - i / n for i in range(n + 1)]
    t = [shift * u / (1 + (shift - 1) * u) for u in t]
    t[0] -= 1e-7
    for a, b in pairwise(t):
        x = x + (b - a) * inner(x, torch.full((5,), a, dtype=torch.float64))
    torch.testing.assert_close(y, x, rtol=1e-5, atol=1e-5)


def test_loss_is_the_squared_error_of_the_velocity():
    model = RectifiedFlowDenoiser(lambda x, t: x * column(t))
    x, noise = (normal(seed, 4, 3, dtype=torch.float64) for seed in (0, 1))
    t = torch.tensor([0.0, 0.2, 0.7, 0.99], dtype=torch.float64)
    x_t = column(1 - t) * x + column(t) * noise
    want = (x_t * column(t) - (noise - x)).pow(2).mean(1)
    torch.testing.assert_close(model.loss(x, noise, model.t_to_sigma(t)), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    """The model gets x's dtype, and times in float32; the largest noise fits into float16."""
    model = RectifiedFlowDenoiser(Velocity(Gaussian(0.4, 0.7)))
    sigma = torch.tensor([0.5, 8.0, 4096.0])
    x = (Gaussian(0.4, 0.7)(normal(0, 3, 3), sigma) + column(sigma) * normal(1, 3, 3)).to(dtype)
    y = model(x, sigma.to(dtype))
    assert y.dtype == model.inner_model.seen[0][0] == dtype
    assert model.inner_model.seen[0][1].dtype == torch.float32
    assert y.isfinite().all()
    want = Gaussian(0.4, 0.7)(x[:1].float(), sigma[:1])
    torch.testing.assert_close(y[:1].float(), want, rtol=0.05, atol=0.05)


# ------------------------------------------------------------------------------------ the schedule


def test_round_trips_and_clamping():
    model = RectifiedFlowDenoiser(nn.Identity(), shift=3.0, sigma_max=100.0)
    t = torch.tensor([0.0, 1e-3, 0.5, 0.9], dtype=torch.float64)
    torch.testing.assert_close(model.sigma_to_t(model.t_to_sigma(t)), t)
    assert model.t_to_sigma(torch.tensor([0.999, 1.0])).tolist() == [100, 100]
    torch.testing.assert_close(model.t_to_sigma(torch.tensor(0.5)), torch.tensor(1.0))


def test_shift_multiplies_sigma():
    """SD3 writes it in t; a table of its first thousandth is sigma_min."""
    plain, shifted = (RectifiedFlowDenoiser(nn.Identity(), s) for s in (1.0, 3.0))
    t = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    moved = 3 * t / (1 + 2 * t)
    torch.testing.assert_close(shifted.t_to_sigma(moved), 3 * plain.t_to_sigma(t))
    assert plain.sigma_min == pytest.approx(0.001 / 0.999)
    assert shifted.sigma_min == pytest.approx(3 * plain.sigma_min)


@pytest.mark.parametrize("shift", [0.5, 1.0, 12.0])
@pytest.mark.parametrize("n", [1, 4, 5000])
def test_get_sigmas(n, shift):
    model = RectifiedFlowDenoiser(nn.Identity(), shift)
    sigmas = model.get_sigmas(n)
    assert sigmas.shape == (n + 1,)
    assert sigmas.dtype == torch.float32
    assert sigmas[0].item() == pytest.approx(model.sigma_max)
    assert sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()
    t = model.sigma_to_t(sigmas.double() / shift)  # without the shift
    torch.testing.assert_close(t.diff(), -t[0].expand(n) / n, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("options", [{"shift": 0.0}, {"time_scale": -1}, {"sigma_max": math.inf}])
def test_bad_options_are_errors(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be positive and finite"):
        RectifiedFlowDenoiser(nn.Identity(), **options)
    with pytest.raises(ValueError, match="n must be at least 1"):
        RectifiedFlowDenoiser(nn.Identity()).get_sigmas(0)


# --------------------------------------------------------------------- one model, however it's told


def on_table(kind):
    """The network that wrapper `kind` needs to be the mixture's denoiser, between nodes as well."""
    wrapper = getattr(external, f"Discrete{kind}DDPMDenoiser")

    def network(x, t):
        sigma = model.t_to_sigma(t)
        s = column(sigma)
        z = x * (1 + s**2).sqrt()
        denoised = mixture()(z, sigma)
        eps = (z - denoised) / s
        v = (eps - s * denoised) / (1 + s**2).sqrt()
        return {"Eps": eps, "V": v, "Sample": denoised}[kind]

    model = wrapper(network, ABAR, quantize=False)
    return model


def native():
    class Network(nn.Module):
        def forward(self, x, sigma):
            c_skip, c_out, c_in = (column(c) for c in model.get_scalings(sigma))
            z = x / c_in
            return (mixture()(z, sigma) - c_skip * z) / c_out

    model = Denoiser(Network(), sigma_data=0.8)
    return model


def continuous_v():
    def network(x, t):
        sigma = model.t_to_sigma(t)
        s = column(sigma)
        z = x * (1 + s**2).sqrt()
        denoised = mixture()(z, sigma)
        return ((z - denoised) / s - s * denoised) / (1 + s**2).sqrt()

    model = external.VDenoiser(network)
    return model


@pytest.mark.parametrize(
    "make",
    [
        lambda: on_table("Eps"),
        lambda: on_table("V"),
        lambda: on_table("Sample"),
        continuous_v,
        native,
        lambda: RectifiedFlowDenoiser(Velocity(mixture())),
    ],
    ids=["eps", "v", "sample", "continuous v", "native", "flow"],
)
def test_one_model_in_every_parametrisation_gives_equal_samples(make):
    sigmas = sampling.get_sigmas_karras(9, 0.02, 40).double()
    x = normal(0, 6, 2, std=40.0, dtype=torch.float64)
    for sample in (sampling.sample_heun, sampling.sample_dpmpp_2m):
        want = sample(mixture(), x, sigmas, disable=True)
        got = sample(make(), x, sigmas, disable=True)
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", sampling.SAMPLERS)
def test_every_sampler_takes_a_flow(name):
    """It samples as the denoiser that it is, from its own schedule, with noise and without."""
    info, model = sampling.get_sampler(name), RectifiedFlowDenoiser(Velocity(mixture()), 3.0)
    sigmas = model.get_sigmas(8).double()
    levels = sigmas if info.takes_sigmas else torch.tensor([80.0, model.sigma_min])
    x = normal(0, 6, 2, dtype=torch.float64) * (sigmas[0] if info.takes_sigmas else 80.0)
    got, want = (
        sampling.sample(
            each,
            x,
            levels,
            name,
            **({"n": 9} if name == "dpm_fast" else {}),
            **({"s_churn": 2.0} if name == "euler" else {}),
            **({"noise_sampler": Fixed(x)} if info.noise else {}),
            disable=True,
        )
        for each in (model, mixture())
    )
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


class Fixed:
    """The same noise at the same call."""

    def __init__(self, x):
        self.x, self.calls = x, 0

    def __call__(self, sigma, sigma_next):
        self.calls += 1
        return normal(self.calls, *self.x.shape, dtype=self.x.dtype)
