"""Applications replace names of `k_diffusion.sampling`; samplers look them up when they run."""

import problems
import pytest
import torch

from k_diffusion import sampling as S

SIGMAS = torch.tensor([4.0, 2.0, 1.0, 0.0])


class Hijack:
    """torch with `randn_like(x)` replaced, everything else forwarded."""

    def __init__(self):
        self.calls = 0

    def __getattr__(self, item):
        if item == "randn_like":
            return self.randn_like
        return getattr(torch, item)

    def randn_like(self, x):  # exactly one positional argument
        self.calls += 1
        return torch.zeros_like(x)


@pytest.fixture
def x():
    return problems.normal(0, 2, 3) * 4


ANCESTRAL = ["ddim", "ddpm", "lcm"] + [n for n in S.SAMPLERS if n.endswith("_ancestral")]
BROWNIAN = [n for n, info in S.SAMPLERS.items() if info.noise == "brownian"]


@pytest.mark.parametrize("name", ["euler", "heun", "dpm_2", *ANCESTRAL, "restart"])
def test_torch(monkeypatch, x, name):
    hijack = Hijack()
    monkeypatch.setattr(S, "torch", hijack)
    options = {
        "ddim": {"eta": 1.0},
        "restart": {"restarts": [(1.0, 3.0, 2, 4)]},
        **{n: {"s_churn": 2.0} for n in ("euler", "heun", "dpm_2")},
    }.get(name, {})
    sample = getattr(S, f"sample_{name}")
    first = sample(problems.Gaussian(), x, SIGMAS, disable=True, **options)
    # every step draws, but an ancestral one to 0; restarts draw each time
    assert hijack.calls == (2 if name in ANCESTRAL else 4 if name == "restart" else 3)
    assert torch.equal(first, sample(problems.Gaussian(), x, SIGMAS, disable=True, **options))


@pytest.mark.parametrize("name", ["dpm_fast", "dpm_adaptive"])
def test_torch_in_dpm_solver(monkeypatch, x, name):
    hijack = Hijack()
    monkeypatch.setattr(S, "torch", hijack)
    options = {"n": 6} if name == "dpm_fast" else {}
    getattr(S, f"sample_{name}")(problems.Gaussian(), x, 0.1, 4.0, eta=1.0, disable=True, **options)
    assert hijack.calls >= 3


@pytest.mark.parametrize("name", [n for n, i in S.SAMPLERS.items() if i.takes_sigmas])
def test_trange(monkeypatch, x, name):
    calls = []

    def trange(n, disable=None):
        calls.append((n, disable))
        for i in range(n):
            if i == 2:
                return  # an application stops early
            yield i

    monkeypatch.setattr(S, "trange", trange)
    seen = []
    getattr(S, f"sample_{name}")(problems.Gaussian(), x, SIGMAS, callback=seen.append, disable=True)
    assert calls == [(3, True)]
    assert len(seen) == 2


SLOPES = "euler euler_ancestral heun dpm_2 dpm_2_ancestral lms heunpp2 ddim ddpm deis ipndm"


@pytest.mark.parametrize("name", [*SLOPES.split(), "ipndm_v", "gradient_estimation", "restart"])
def test_to_d(monkeypatch, x, name):
    seen = []

    def to_d(x, sigma, denoised):
        seen.append(sigma)
        return torch.zeros_like(x)

    monkeypatch.setattr(S, "to_d", to_d)
    monkeypatch.setattr(S, "default_noise_sampler", lambda x: lambda a, b: torch.zeros_like(x))
    y = getattr(S, f"sample_{name}")(problems.Gaussian(), x, SIGMAS, disable=True)
    assert torch.equal(y, x)
    assert all(isinstance(sigma, torch.Tensor) for sigma in seen)


@pytest.mark.parametrize("name", [*ANCESTRAL, "dpm_fast", "dpm_adaptive"])
def test_default_noise_sampler(monkeypatch, x, name):
    asked = []

    def default_noise_sampler(x):
        def sampler(sigma, sigma_next):
            asked.append((float(sigma), float(sigma_next)))
            return torch.zeros_like(x)

        return sampler

    monkeypatch.setattr(S, "default_noise_sampler", default_noise_sampler)
    if name.startswith("dpm_f"):
        S.sample_dpm_fast(problems.Gaussian(), x, 0.1, 4.0, 6, disable=True)
    elif name == "dpm_adaptive":
        S.sample_dpm_adaptive(problems.Gaussian(), x, 0.1, 4.0, disable=True)
    else:
        options = {"eta": 1.0} if name == "ddim" else {}
        getattr(S, f"sample_{name}")(problems.Gaussian(), x, SIGMAS, disable=True, **options)
        assert asked == [(4.0, 2.0), (2.0, 1.0)]
    assert asked


def test_default_noise_sampler_of_a_dpm_solver(monkeypatch, x):
    made = []
    original = S.default_noise_sampler
    monkeypatch.setattr(S, "default_noise_sampler", lambda x: made.append(1) or original(x))
    solver = S.DPMSolver(problems.Gaussian())
    solver.dpm_solver_fast(x, solver.t(4.0), solver.t(0.1), 6)
    assert made == [1]


@pytest.mark.parametrize("name", BROWNIAN)
def test_brownian_tree_noise_sampler(monkeypatch, x, name):
    made, asked = [], []

    class Sampler:
        def __init__(self, x, sigma_min, sigma_max, seed=None):
            made.append((float(sigma_min), float(sigma_max)))
            self.x = x

        def __call__(self, sigma, sigma_next):
            asked.append((sigma.item(), sigma_next.item()))
            return torch.zeros_like(self.x)

    monkeypatch.setattr(S, "BrownianTreeNoiseSampler", Sampler)
    getattr(S, f"sample_{name}")(problems.Gaussian(), x, SIGMAS, disable=True)
    assert made == [(1.0, 4.0)]
    # single-step solvers ask for parts of a step
    assert {4.0, 2.0} <= {a for a, _ in asked}
    assert {2.0, 1.0} <= {b for _, b in asked}


def test_a_new_sampler_can_be_set_and_found(monkeypatch):
    monkeypatch.setattr(S, "sample_new", lambda model, x, sigmas: x, raising=False)
    assert "sample_new" in dir(S)
    assert S.sample_new(None, 1, None) == 1
