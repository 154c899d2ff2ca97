import math

import golden
import problems
import pytest
import torch
from scipy import stats

from k_diffusion import guidance, likelihood, sampling as S


def toy(x, sigma, **extra):
    s = sigma.view(-1, 1, 1, 1)
    y = x + 0.3 * torch.roll(x, 1, -1)
    return torch.tanh(1.5 * y / (1 + s)) * 0.8 + 0.1 * torch.sin(3 * x / (1 + s))


def test_published_numbers():
    want, _ = golden.load("log_likelihood")
    torch.manual_seed(3)
    x = problems.normal(50, 2, 1, 4, 4) * 0.5
    ll, info = S.log_likelihood(toy, x, 1e-2, 20.0)
    torch.testing.assert_close(ll, want["ll"], rtol=1e-5, atol=0)
    assert info["fevals"] == info["nfe"] > 20


@pytest.mark.parametrize("probe", ["rademacher", "gaussian"])
def test_gaussian_data_in_closed_form(probe):
    problem = problems.Gaussian(0.0, 0.5)
    x = problems.normal(0, 5, 1, 4, 4, dtype=torch.float64) * 0.5
    torch.manual_seed(0)
    ll, info = S.log_likelihood(
        problem,
        x,
        0.01,
        80.0,
        atol=1e-7,
        rtol=1e-7,
        probes=64 if probe == "gaussian" else 1,
        probe=probe,
        prior_std=math.hypot(0.5, 80.0),
    )
    want = problem.log_density(x, 0.01)
    if probe == "rademacher":  # no variance: the Jacobian is diagonal
        torch.testing.assert_close(ll, want, rtol=1e-5, atol=1e-4)
    else:
        error = info["probe_standard_error"]
        assert (error > 0.1).all()
        assert ((ll - want).abs() < 5 * error).all()


def test_the_prior_is_that_of_pure_noise_unless_given():
    problem = problems.Gaussian(0.0, 0.5)
    x = problems.normal(0, 3, 6, dtype=torch.float64) * 0.5
    exact, _ = S.log_likelihood(problem, x, 0.01, 2.0, prior_std=math.hypot(0.5, 2.0))
    plain, _ = S.log_likelihood(problem, x, 0.01, 2.0)
    latents = problem.ode_map(x, 0.01, 2.0)
    normal = torch.distributions.Normal
    want = normal(0.0, 2.0).log_prob(latents) - normal(0.0, math.hypot(0.5, 2.0)).log_prob(latents)
    torch.testing.assert_close(plain - exact, want.sum(1), rtol=1e-3, atol=1e-3)


def test_mixture_with_many_probes():
    mixture = problems.mixture()
    x = torch.tensor([[-1.0, 0.3], [0.6, 1.0], [0.0, 0.0]], dtype=torch.float64)
    torch.manual_seed(0)
    ll, info = S.log_likelihood(mixture, x, 0.05, 80.0, probes=64)
    error = 5 * info["probe_standard_error"] + 0.01
    assert ((ll - mixture.log_density(x, 0.05)).abs() < error).all()


@pytest.mark.parametrize("probe", sorted(likelihood.PROBES))
def test_probes_stay_fixed_over_a_solve(monkeypatch, probe):
    drawn, draw = [], likelihood.PROBES[probe]
    monkeypatch.setitem(likelihood.PROBES, probe, lambda x: drawn.append(draw(x)) or drawn[-1])
    x = problems.normal(0, 2, 500)
    _, info = S.log_likelihood(problems.Gaussian(), x, 0.01, 10.0, probes=3, probe=probe)
    assert info["nfe"] > 3 == len(drawn)
    for v in drawn:
        assert v.mean().abs() < 0.2
        assert (v**2).mean().item() == pytest.approx(1, abs=0.2)
    assert not torch.equal(drawn[0], drawn[1])
    if probe == "rademacher":
        assert set(drawn[0].flatten().tolist()) == {-1.0, 1.0}


def test_a_tighter_tolerance_costs_more_evaluations():
    x = problems.normal(0, 2, 3)
    loose, tight = (
        S.log_likelihood(problems.Gaussian(), x, 0.01, 10.0, atol=tol, rtol=tol)[1]["nfe"]
        for tol in (1e-2, 1e-6)
    )
    assert tight > loose


def test_wrapped_models_and_extra_arguments():
    seen = []

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def forward(self, x, sigma, cond):
            seen.append((cond, sigma.shape))
            return self.scale * problems.Gaussian()(x, sigma)

    model = Model()
    ll, _ = S.log_likelihood(model, torch.zeros(2, 3), 0.1, 10.0, {"cond": 5})
    assert not ll.requires_grad
    assert model.scale.grad is None
    assert set(seen) == {(5, (2,))}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_the_models_alone(dtype):
    seen = set()

    def model(x, sigma):
        seen.update((x.dtype, sigma.dtype))
        return problems.Gaussian(0.0, 0.5)(x, sigma)

    x = (problems.normal(0, 3, 6) * 0.5).to(dtype)
    ll, _ = S.log_likelihood(model, x, 0.01, 80.0)
    assert seen == {dtype}
    assert ll.dtype == torch.float32
    want, _ = S.log_likelihood(problems.Gaussian(0.0, 0.5), x.float(), 0.01, 80.0)
    torch.testing.assert_close(ll, want, rtol=0, atol=0.2)


def test_under_inference_mode():
    class Model(torch.nn.Module):
        def forward(self, x, sigma, scale):
            return scale * problems.Gaussian(0.0, 0.5)(x, sigma)

    x, scale = problems.normal(0, 3, 6) * 0.5, torch.ones(3, 1)
    want, _ = S.log_likelihood(Model(), x, 0.01, 80.0, {"scale": scale})
    with torch.inference_mode():
        got, _ = S.log_likelihood(Model(), x.clone(), 0.01, 80.0, {"scale": scale.clone()})
    torch.testing.assert_close(got, want)


def test_a_guided_model():
    """Guidance between Gaussians is a Gaussian, in its interval here."""

    class Model(torch.nn.Module):
        def forward(self, x, sigma, mean):
            own = problems.Gaussian(0.0, 0.5)(x, sigma)
            return own + problems.wide(sigma, x) ** 2 / (0.25 + problems.wide(sigma, x) ** 2) * mean

    cfg = guidance.CFGDenoiser(Model(), 3.0, mean=torch.zeros(1, 1, dtype=torch.float64))
    model = guidance.IntervalDenoiser(cfg, 1e-9, 1e9)
    x = problems.normal(0, 3, 6, dtype=torch.float64) * 0.5
    cond = {"mean": torch.full((3, 1), 0.2, dtype=torch.float64)}
    std = math.hypot(0.5, 80.0)
    ll, _ = S.log_likelihood(model, x, 0.01, 800.0, cond, 1e-6, 1e-6, prior_std=std * 10)
    torch.testing.assert_close(
        ll, problems.Gaussian(0.6, 0.5).log_density(x, 0.01), rtol=1e-3, atol=0
    )


def test_models_that_give_no_likelihood():
    x, gaussian = torch.zeros(2, 3), problems.Gaussian()
    for model, match in (
        (
            lambda x, sigma: gaussian(x, sigma)[:, :1],
            r"shaped as its input, \(2, 3\), got \(2, 1\)",
        ),
        (torch.no_grad()(lambda x, sigma: gaussian(x, sigma)), "has no gradient"),
        (lambda x, sigma: x * math.nan, "at sigma = 0.1 isn't finite"),
        (guidance.GradientGuidedDenoiser(gaussian, lambda d: d.sum(1)), "guidance by a loss"),
    ):
        with pytest.raises(ValueError, match=match):
            S.log_likelihood(model, x, 0.1, 10.0)


def test_bad_arguments():
    model, x = problems.Gaussian(), torch.zeros(2, 3)
    with pytest.raises(ValueError, match="sigma_min < sigma_max"):
        S.log_likelihood(model, x, 1.0, 1.0)
    with pytest.raises(ValueError, match="did you mean 'rademacher'"):
        S.log_likelihood(model, x, 0.1, 1.0, probe="rademaker")
    with pytest.raises(ValueError, match="at least one probe, got 0"):
        S.log_likelihood(model, x, 0.1, 1.0, probes=0)
    with pytest.raises(ValueError, match=r"must lie in \[-1, 1\], got \[0, 255\]"):
        S.bits_per_dim(model, torch.tensor([[0.0, 255.0]]), 0.1, 1.0)
    with pytest.raises(ValueError, match="at least 2 bins, got 1"):
        S.bits_per_dim(model, x, 0.1, 1.0, bins=1)


def test_bits_per_dim_of_gaussian_images():
    # N(0, 0.3^2) has a differential entropy, so the bits of its fine quantisation are known.
    std, n, d = 0.3, 64, 64
    x = (problems.normal(0, n, d) * std).clamp(-1, 1)
    x = ((x + 1) * 127.5).round() / 127.5 - 1
    torch.manual_seed(0)
    bits, info = S.bits_per_dim(problems.Gaussian(0.0, std), x, 0.002, 80.0, sigma_data=std)
    entropy = 0.5 * math.log2(2 * math.pi * math.e * std**2) + 7
    assert bits.shape == (n,)
    assert info["mean"] == pytest.approx(bits.mean().item())
    assert info["standard_error"] == pytest.approx(bits.std().item() / 8)
    assert abs(info["mean"] - entropy) < 5 * info["standard_error"]
    assert info["standard_error"] < 0.02


def test_bits_per_dim_of_a_density_equal_to_8_bits():
    # A far wider prior than the images, at every noise level: bits = -log2 p + 7 per dimension.
    x = torch.zeros(1, 4)
    bits, info = S.bits_per_dim(problems.Gaussian(0.0, 100.0), x, 0.01, 1.0, sigma_data=100.0)
    want = 0.5 * math.log2(2 * math.pi * (100.0**2 + 0.01**2)) + 7
    assert bits.item() == pytest.approx(want, abs=1e-3)
    assert math.isnan(info["standard_error"])


@pytest.mark.parametrize("bins", [2, 256])
def test_a_level_spreads_evenly_over_its_bin(bins, monkeypatch):
    seen = []

    def record(model, x, *args, **kwargs):
        seen.append(x)
        return torch.zeros(len(x)), {}

    monkeypatch.setattr(likelihood, "log_likelihood", record)
    torch.manual_seed(0)
    level = torch.randint(bins, (4, 2000)).double()
    likelihood.bits_per_dim(None, 2 * level / (bins - 1) - 1, 0.01, 1.0, bins=bins)
    place = (seen[0] + 1) * bins / 2 - level
    assert stats.kstest(place.flatten().numpy(), "uniform").pvalue > 0.01
