"""The controller of the step size, and the end of a stochastic run."""

import math

import problems
import pytest
import torch

from k_diffusion import sampling as S


@pytest.mark.parametrize("order", [1.5, 3])
def test_the_step_size_follows_the_pid_controllers_law(order):
    """Söderlind 2003: powers of the last three errors, of the coefficients over the order."""
    p, i, d = 0.2, 0.7, 0.1
    pid = S.PIDStepSizeController(0.1, p, i, d, order, accept_safety=0.0, eps=0.0)
    errors = [0.9, 1.3, 0.4, 2.0, 0.7]
    h, last, before = 0.1, errors[0], errors[0]
    for error in errors:
        assert pid.propose_step(error)
        factor = error ** -(p + i + d) * last ** (p + 2 * d) * before**-d
        h *= 1 + math.atan(factor ** (1 / order) - 1)
        assert pid.h == pytest.approx(h, rel=1e-9)
        last, before = error, last


def adaptive(eta, **options):
    """The error, kept from 0, and the next step size of each step of an adaptive run."""
    seen = []
    noise = problems.normal(2, 4, 3, dtype=torch.float64)
    S.sample_dpm_adaptive(
        problems.Gaussian(0.2, 0.5),
        problems.normal(1, 4, 3, dtype=torch.float64) * 10,
        0.1,
        10.0,
        eta=eta,
        noise_sampler=lambda sigma, sigma_next: noise,
        callback=lambda d: seen.append((float(d["error"]) + 1e-8, d["h"])),
        disable=True,
        **options,
    )
    return seen


@pytest.mark.parametrize(
    ("eta", "solver_order", "order"), [(0.0, 2, 2), (0.0, 3, 3), (0.7, 2, 1.5), (0.7, 3, 1.5)]
)
@pytest.mark.parametrize("dcoeff", [0.0, 0.1])
def test_an_adaptive_run_controls_the_order_of_its_error(eta, solver_order, order, dcoeff):
    """That of the solver for the ODE; for the SDE, 1.5: noise has a strong order of its own."""
    seen = adaptive(eta, order=solver_order, dcoeff=dcoeff, h_init=0.2, accept_safety=0.0)
    assert len(seen) > 3
    h, last, before = 0.2, seen[0][0], seen[0][0]
    for error, next_h in seen:
        factor = error ** -(1 + dcoeff) * last ** (2 * dcoeff) * before**-dcoeff
        h *= 1 + math.atan(factor ** (1 / order) - 1)
        assert next_h == pytest.approx(h, rel=1e-5)
        last, before = error, last


@pytest.mark.parametrize("eta", [0.4, 1.0])
@pytest.mark.parametrize("name", ["dpm_fast", "dpm_adaptive"])
def test_the_last_step_ends_at_sigma_min_without_noise(name, eta):
    """No step goes below it, not even to come back up by noise."""
    levels = []

    class Model(problems.Gaussian):
        def __call__(self, x, sigma):
            levels.append(sigma.max().item())
            return super().__call__(x, sigma)

    def noise(sigma, sigma_next):
        return torch.full((4, 3), math.nan if float(sigma_next) < 0.1001 else 0.5)

    options = {"n": 9} if name == "dpm_fast" else {}
    sample = S.get_sampler(name).function
    x = problems.normal(1, 4, 3) * 10
    y = sample(Model(), x, 0.1, 10.0, eta=eta, noise_sampler=noise, disable=True, **options)
    assert y.isfinite().all()
    assert min(levels) >= 0.1 * (1 - 1e-6)
