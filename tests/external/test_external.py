from types import SimpleNamespace

import golden
import pytest
import torch
from torch import nn

from k_diffusion import external, sampling
from k_diffusion.external import (
    CompVisDenoiser,
    CompVisVDenoiser,
    DiscreteEpsDDPMDenoiser,
    DiscreteSampleDDPMDenoiser,
    DiscreteSchedule,
    DiscreteVDDPMDenoiser,
    OpenAIDenoiser,
    VDenoiser,
)

BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
ALPHAS = torch.cumprod(1 - BETAS, 0)
S = 0.6  # the standard deviation of the data


def zero_terminal(alphas):
    """arXiv:2305.08891, algorithm 1."""
    root = alphas.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


def data(seed=0, shape=(3, 2, 4, 4), dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def per_sample(x):
    return x[:, None, None, None]


def gaussian(x, sigma):
    """The optimal denoiser of data N(0, S^2)."""
    return S**2 / (S**2 + per_sample(sigma) ** 2) * x


class Exact(nn.Module):
    """The optimal eps, v or x0 of Gaussian data, from variance-preserving x and t: (n,).

    With abar of t, x has variance abar S^2 + 1 - abar; eps, v and x0 are regressions on it.
    """

    def __init__(self, kind, abar):
        super().__init__()
        self.kind, self.abar = kind, abar
        self.kwargs = []

    def forward(self, x, t, **kwargs):
        self.kwargs.append(kwargs)
        abar = per_sample(self.abar(t))
        alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
        covariances = {"eps": sigma, "v": alpha * sigma * (1 - S**2), "sample": alpha * S**2}
        covariance = covariances[self.kind]
        return covariance / (abar * S**2 + 1 - abar) * x

    def apply_model(self, x, t, cond=None, **kwargs):
        return self(x, t, cond=cond, **kwargs)


def discrete(kind, alphas=ALPHAS):
    model = Exact(kind, lambda t: alphas[t.long()])
    model.alphas_cumprod = alphas
    return model


def table(alphas=ALPHAS):
    return ((1 - alphas) / alphas).sqrt()


WRAPPERS = {
    "eps": lambda **kw: DiscreteEpsDDPMDenoiser(discrete("eps"), ALPHAS, **kw),
    "v": lambda **kw: DiscreteVDDPMDenoiser(discrete("v"), ALPHAS, **kw),
    "sample": lambda **kw: DiscreteSampleDDPMDenoiser(discrete("sample"), ALPHAS, **kw),
    "compvis eps": lambda **kw: CompVisDenoiser(discrete("eps"), **kw),
}
all_wrappers = pytest.mark.parametrize("make", WRAPPERS.values(), ids=WRAPPERS.keys())


# ---------------------------------------------------------------- denoisers


@all_wrappers
def test_exact_models_give_the_gaussian_denoiser_at_the_table_nodes(make):
    sigma = table()[[0, 400, 999]]
    model = make(quantize=True)
    torch.testing.assert_close(model(data(), sigma), gaussian(data(), sigma))


def test_exact_velocity_gives_the_gaussian_denoiser_at_any_time():
    sigma = torch.tensor([0.01, 0.7, 300.0], dtype=torch.float64)
    model = VDenoiser(Exact("v", lambda t: torch.cos(t * torch.pi / 2) ** 2))
    torch.testing.assert_close(model(data(), sigma), gaussian(data(), sigma))


def test_compvis_velocity_and_its_keyword_arguments():
    sigma, inner = table()[[3, 500, 900]], discrete("v")
    model = CompVisVDenoiser(inner, quantize=True)
    y = model(data(), sigma, cond="text", control=1)
    torch.testing.assert_close(y, gaussian(data(), sigma))
    model.loss(data(), data(1), sigma, cond="text", control=2)
    model.get_v(data(), torch.zeros(3), "text", control=3)
    assert inner.kwargs == [{"cond": "text", "control": i} for i in (1, 2, 3)]


def test_one_model_as_eps_and_as_v_is_one_denoiser():
    sigma = torch.tensor([0.05, 1.1, 12.0], dtype=torch.float64)
    nearest = {kind: WRAPPERS[kind](quantize=True)(data(), sigma) for kind in ("eps", "v")}
    torch.testing.assert_close(nearest["eps"], nearest["v"], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("learned", [True, False])
def test_openai_models_lose_their_learned_variances(learned):
    eps, seen = discrete("eps"), []

    def model(x, t, **kwargs):
        seen.append(kwargs)
        y = eps(x, t)
        return torch.cat([y, 7 * y], dim=1) if learned else y

    diffusion = SimpleNamespace(alphas_cumprod=ALPHAS.numpy())
    wrapped = OpenAIDenoiser(model, diffusion, quantize=True, has_learned_sigmas=learned)
    assert wrapped.sigmas.dtype == torch.float32
    sigma = table()[[3, 500, 900]]
    torch.testing.assert_close(wrapped(data(), sigma, y=5), gaussian(data(), sigma))
    wrapped.loss(data(), data(1), sigma, y=6)
    assert seen == [{"y": 5}, {"y": 6}]


@all_wrappers
def test_loss_is_the_squared_error_of_what_the_model_estimates(make):
    """eps is the noise; v = alpha noise - sigma x0 of the variance-preserving data; or x0."""
    model, x, noise, sigma = make(quantize=True), data(), data(1), table()[[0, 400, 999]]
    abar = per_sample(1 / (1 + sigma**2))
    vp = abar.sqrt() * x + (1 - abar).sqrt() * noise
    kind = model.inner_model.kind
    v = abar.sqrt() * noise - (1 - abar).sqrt() * x
    target = {"eps": noise, "v": v, "sample": x}[kind]
    error = model.inner_model(vp, model.sigma_to_t(sigma)) - target
    expected = error.pow(2).flatten(1).mean(1)
    torch.testing.assert_close(model.loss(x, noise, sigma), expected)


def test_sigma_zero_gives_the_input_back():
    """Not from a model that estimates x0 itself: that has the last word."""
    models = [make(quantize=False) for name, make in WRAPPERS.items() if name != "sample"]
    models.append(VDenoiser(Exact("v", lambda t: torch.cos(t * torch.pi / 2) ** 2)))
    for model in models:
        assert torch.equal(model(data(), torch.zeros(3, dtype=torch.float64)), data())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["continuous v", "v", "eps", "sample", "flow"])
def test_half_precision_at_high_noise_levels(name, dtype):
    """The square of sigma doesn't fit into float16 from 256 on. The models see x's dtype."""
    dtypes = set()

    def inner(x, t):
        dtypes.add(x.dtype)
        return 0.5 * x

    alphas = zero_terminal(ALPHAS).float()
    model = {
        "continuous v": lambda: VDenoiser(inner),
        "v": lambda: DiscreteVDDPMDenoiser(inner, alphas, False),
        "eps": lambda: DiscreteEpsDDPMDenoiser(inner, alphas, False),
        "sample": lambda: DiscreteSampleDDPMDenoiser(inner, alphas, False),
        "flow": lambda: external.RectifiedFlowDenoiser(inner),
    }[name]()
    sigma = torch.tensor([0.5, 300.0, 4000.0])
    x = (data(dtype=torch.float32) * per_sample(sigma)).to(dtype)
    y = model(x, sigma.to(dtype))
    assert (y.dtype, dtypes) == (dtype, {dtype})
    want = model(x.float(), sigma.to(dtype).float())
    # what a sampler makes of it is sigma times as exact
    size = torch.maximum(per_sample(sigma), torch.ones(()))
    torch.testing.assert_close(y.float() / size, want / size, rtol=0.02, atol=0.02)
    assert model.loss(x.clamp(-1, 1), x.clamp(-1, 1), sigma.to(dtype)).isfinite().all()
    if name != "eps":  # its estimate is a small difference of large numbers
        torch.testing.assert_close(y.float(), want, rtol=0.02, atol=0.02)


def test_vdenoiser_scalings_and_times():
    model, sigma = VDenoiser(nn.Identity()), torch.tensor([0.0, 0.3, 1.0, 1e6]).double()
    c_skip, c_out, c_in = model.get_scalings(sigma)
    assert (c_out <= 0).all()
    torch.testing.assert_close(c_skip + c_out**2, torch.ones_like(sigma))  # cos^2 + sin^2
    torch.testing.assert_close(c_in**2, c_skip)
    t = model.sigma_to_t(sigma)
    torch.testing.assert_close(t[:3], torch.tensor([0, 0.1855, 0.5]).double(), atol=1e-4, rtol=0)
    torch.testing.assert_close(model.t_to_sigma(t), sigma)


# ---------------------------------------------------------------- discrete schedules


def schedule(quantize=False, alphas=ALPHAS):
    return DiscreteSchedule(table(alphas), quantize)


def test_times_of_the_table_are_its_indices():
    model, t = schedule(), torch.arange(1000.0, dtype=torch.float64)
    torch.testing.assert_close(model.sigma_to_t(table()), t)
    torch.testing.assert_close(model.t_to_sigma(t), table())
    for quantized in (schedule(quantize=True).sigma_to_t(table()), model.sigma_to_t(table(), True)):
        assert torch.equal(quantized, torch.arange(1000))


def test_round_trips_between_nodes_and_log_linear_interpolation():
    model, t = schedule(), torch.rand(50, 2, dtype=torch.float64) * 999
    sigma = model.t_to_sigma(t)
    assert sigma.shape == t.shape
    torch.testing.assert_close(model.sigma_to_t(sigma), t)
    middle = (table()[7] * table()[8]).sqrt()
    torch.testing.assert_close(model.t_to_sigma(torch.tensor(7.5).double()), middle)
    assert model.sigma_to_t(middle).item() == pytest.approx(7.5)


def test_quantized_times_are_nearest_in_log_sigma():
    sigma = torch.rand(200, dtype=torch.float64).exp() * 3
    distance = (sigma.log()[:, None] - table().log()).abs()
    assert torch.equal(schedule(quantize=True).sigma_to_t(sigma), distance.argmin(1))


def test_outside_the_table_times_and_sigmas_are_clamped():
    model = schedule()
    sigma = torch.tensor([0.0, 1e-9, 1e9, float("inf")], dtype=torch.float64)
    assert model.sigma_to_t(sigma).tolist() == [0, 0, 999, 999]
    assert model.sigma_to_t(sigma, quantize=True).tolist() == [0, 0, 999, 999]
    t = torch.tensor([-5.0, -0.1, 999.1, 5000.0])
    torch.testing.assert_close(model.t_to_sigma(t), table()[[0, 0, -1, -1]])
    assert model.t_to_sigma(torch.tensor(12)).item() == pytest.approx(table()[12].item())


def test_get_sigmas():
    model = schedule()
    assert torch.equal(model.get_sigmas(), torch.cat([table().flip(0), torch.zeros(1)]))
    for n in (1, 2, 20):
        sigmas = model.get_sigmas(n)
        assert sigmas.shape == (n + 1,)
        assert sigmas[0].item() == pytest.approx(model.sigma_max.item())
        assert sigmas[-1] == 0
        assert (sigmas.diff() < 0).all()
    assert model.get_sigmas(20)[-2].item() == pytest.approx(model.sigma_min.item())
    with pytest.raises(ValueError, match="n must be at least 1"):
        model.get_sigmas(0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_sigma_of_any_dtype_keeps_its_time(dtype):
    model = DiscreteSchedule(table().float(), False)
    sigma = torch.tensor([0.125, 1.0, 8.0], dtype=dtype)
    expected = schedule().sigma_to_t(sigma.double())
    torch.testing.assert_close(model.sigma_to_t(sigma).double(), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", ["eps", "v", "sample"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_zero_terminal_snr_stays_finite(kind, dtype):
    alphas = zero_terminal(ALPHAS).to(dtype)
    assert alphas[-1] == 0
    cls = {
        "eps": DiscreteEpsDDPMDenoiser,
        "v": DiscreteVDDPMDenoiser,
        "sample": DiscreteSampleDDPMDenoiser,
    }[kind]
    model = cls(discrete(kind, alphas.double()), alphas, quantize=False)
    assert model.sigmas.isfinite().all()
    assert model.log_sigmas.isfinite().all()
    sigma = torch.cat([model.sigmas[[5, 999]].double(), torch.tensor([1e9])]).double()
    t = model.sigma_to_t(sigma)
    assert t[1:].tolist() == pytest.approx([999, 999])
    assert model(data() * per_sample(sigma), sigma).isfinite().all()
    assert model.loss(data(), data(1), sigma).isfinite().all()
    assert model.get_sigmas(10).isfinite().all()


def test_equal_neighbours_in_the_table():
    model = DiscreteSchedule(torch.tensor([1.0, 2.0, 2.0, 4.0]), False)
    t = model.sigma_to_t(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert t.isfinite().all()
    torch.testing.assert_close(model.t_to_sigma(t), torch.tensor([1.0, 2.0, 3.0, 4.0]))


def test_a_table_of_one():
    model = DiscreteSchedule(torch.tensor([3.0]), False)
    assert model.sigma_to_t(torch.tensor([1.0, 3.0, 9.0])).tolist() == [0, 0, 0]
    torch.testing.assert_close(model.get_sigmas(2), torch.tensor([3.0, 3.0, 0.0]))


@pytest.mark.parametrize(
    "sigmas",
    [torch.zeros(0), torch.ones(2, 2), torch.tensor([2.0, 1.0]), torch.tensor([0.0, 1.0])],
)
def test_bad_tables_are_errors(sigmas):
    with pytest.raises(ValueError, match="sigmas must be"):
        DiscreteSchedule(sigmas, False)


# ---------------------------------------------------------------- as applications use them


def test_subclasses_replaced_tables_and_replaced_forward(monkeypatch):
    class Mine(DiscreteEpsDDPMDenoiser):
        def get_eps(self, *args, **kwargs):
            return 2 * super().get_eps(*args, **kwargs)

    sigma = table()[[0, 400, 999]]
    model = Mine(discrete("eps"), ALPHAS, quantize=True)
    torch.testing.assert_close(model(data(), sigma), 2 * gaussian(data(), sigma) - data())

    model.sigmas = torch.tensor([1.0, 10.0])
    model.log_sigmas = model.sigmas.log()
    assert model.get_sigmas().tolist() == [10, 1, 0]
    assert model.sigma_to_t(torch.tensor(10**0.5)).item() == pytest.approx(0)  # quantized
    assert (model.sigma_min, model.sigma_max) == (1, 10)

    for cls in (DiscreteEpsDDPMDenoiser, DiscreteVDDPMDenoiser, VDenoiser):
        monkeypatch.setattr(cls, "forward", lambda self, input, sigma: "replaced")
    for wrapped in (model, WRAPPERS["v"](quantize=False), VDenoiser(nn.Identity())):
        assert wrapped(data(), sigma) == "replaced"


def test_tables_move_and_save_with_the_module():
    model = schedule()
    assert set(model.state_dict()) == {"sigmas", "log_sigmas"}
    assert model.float().sigmas.dtype == torch.float32


def test_samplers_run_on_a_wrapper():
    model = WRAPPERS["v"](quantize=False)
    sigmas = model.get_sigmas(20)
    x = data() * sigmas[0]
    y = sampling.sample_euler(model, x, sigmas, disable=True)
    # The Gaussian's ODE map, to first order in the step.
    expected = x * S / (S**2 + sigmas[0] ** 2).sqrt()
    torch.testing.assert_close(y, expected, rtol=0.15, atol=0.02)


# ---------------------------------------------------------------- golden numbers


class EpsNet(nn.Module):
    alphas_cumprod = ALPHAS.float()

    def forward(self, x, t):
        return torch.tanh(x * 0.7 + 0.001 * t.view(-1, 1, 1, 1))

    def apply_model(self, x, t, cond):
        return self(x, t) + cond


def normal(seed):
    return golden.normal(seed, (3, 2, 4, 4))


@pytest.mark.parametrize("name", ["v", "openai", "compvis"])
def test_published_numbers(name):
    net, kwargs = EpsNet(), {}
    if name == "v":
        model = external.VDenoiser(net)
    elif name == "openai":
        diffusion = SimpleNamespace(alphas_cumprod=net.alphas_cumprod.double().numpy())
        model = OpenAIDenoiser(lambda x, t: net(x, t).repeat(1, 2, 1, 1), diffusion)
    else:
        model, kwargs = CompVisDenoiser(net), {"cond": normal(62)}
    sigma = torch.tensor([0.05, 1.1, 12.0])
    t = model.sigma_to_t(sigma)
    got = {
        "y": model(normal(60), sigma, **kwargs),
        "loss": model.loss(normal(60), normal(61), sigma, **kwargs),
        "t": t,
        "back": model.t_to_sigma(t),
    }
    if name != "v":
        got["tq"] = model.sigma_to_t(sigma, quantize=True).float()
        got["sig8"], got["sigall"] = model.get_sigmas(8), model.get_sigmas()
        got["minmax"] = torch.stack([model.sigma_min, model.sigma_max])
    want, _ = golden.load(f"external_{name}")
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
