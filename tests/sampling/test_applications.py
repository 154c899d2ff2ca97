"""What applications do with samplers: edit in place, call by their keywords, ask for help."""

import inspect
import math
import pydoc
from itertools import pairwise

import problems
import pytest
import torch
from torch import nn

from k_diffusion import guidance, sampling as S
from k_diffusion.solvers import exponential_rk, registry

SIGMAS = S.get_sigmas_karras(6, 0.1, 10.0)


# ----------------------------------------------------------------------- the general entry


@pytest.mark.parametrize("name", ["euler", "heun", "dpm_2", "euler_ancestral", "dpmpp_2m_sde"])
def test_sample_gives_each_image_its_own_noise(name):
    x = problems.normal(0, 3, 2) * 10
    options = {"s_churn": 3.0} if name in ("euler", "heun", "dpm_2") else {}
    whole = S.sample(problems.Gaussian(), x, SIGMAS, name, [5, 6, 7], disable=True, **options)
    one = S.sample(problems.Gaussian(), x[1:2], SIGMAS, name, [6], disable=True, **options)
    torch.testing.assert_close(whole[1:2], one)
    other = S.sample(problems.Gaussian(), x, SIGMAS, name, [5, 8, 7], disable=True, **options)
    assert not torch.equal(whole[1], other[1])


@pytest.mark.parametrize("name", [n for n in S.SAMPLERS if S.SAMPLERS[n].takes_sigmas])
def test_sample_is_the_published_function(name):
    x = problems.normal(0, 3, 2) * 10
    torch.manual_seed(0)
    want = S.get_sampler(name).function(problems.Gaussian(), x, SIGMAS, disable=True)
    torch.manual_seed(0)
    assert torch.equal(S.sample(problems.Gaussian(), x, SIGMAS, name, disable=True), want)


def test_sample_runs_dpm_solver_between_the_ends():
    x = problems.normal(0, 3, 2) * 10
    got = S.sample(problems.Gaussian(), x, SIGMAS, "dpm_fast", disable=True)
    ends = SIGMAS[-2], SIGMAS[0]
    want = S.sample_dpm_fast(problems.Gaussian(), x, *ends, 5, disable=True)
    torch.testing.assert_close(got, want)
    got = S.sample(problems.Gaussian(), x, SIGMAS, "dpm_adaptive", rtol=0.01, disable=True)
    want = S.sample_dpm_adaptive(problems.Gaussian(), x, *ends, rtol=0.01, disable=True)
    torch.testing.assert_close(got, want)


def test_sample_refuses_what_it_would_ignore():
    run = lambda *a, **k: S.sample(problems.Gaussian(), torch.ones(1, 2), SIGMAS, *a, **k)  # noqa: E731
    with pytest.raises(ValueError, match="unknown sampler 'eulr'"):
        run("eulr")
    with pytest.raises(ValueError, match="unknown option of euler 'churn'"):
        run("euler", churn=1.0)
    with pytest.raises(ValueError, match="dpmpp_2m adds no noise"):
        run(noise_sampler=lambda a, b: torch.ones(1, 2))
    with pytest.raises(ValueError, match="its seeds make one"):
        run("euler_ancestral", [1], lambda a, b: torch.ones(1, 2))
    with pytest.raises(ValueError, match="max_order is another name of order in deis"):
        run("deis", order=2, max_order=2)


# ---------------------------------------------------------------- signatures, help, keywords


def test_churn_samplers_keep_the_published_signatures():
    shared = ["model", "x", "sigmas", "extra_args", "callback", "disable"]
    for sample in (S.sample_euler, S.sample_heun, S.sample_dpm_2):
        names = list(inspect.signature(sample).parameters)
        assert names == [*shared, "s_churn", "s_tmin", "s_tmax", "s_noise"]


@pytest.mark.parametrize("info", [*S.SAMPLERS.values(), *S.FLOW_SAMPLERS.values()])
def test_help_explains_every_argument(info):
    text = pydoc.render_doc(info.function, renderer=pydoc.plaintext)
    for name in inspect.signature(info.function).parameters:
        assert f"\n        {name}: " in text, name
    assert info.paper.split(" (")[0] in text
    assert "Returns:" in text


@pytest.mark.parametrize("name", sorted(S.SAMPLERS))
def test_options_may_be_positional(name):
    info = S.get_sampler(name)
    if info.body is None:
        return
    x = problems.normal(0, 2, 3) * 10
    own = [p.default for p in list(inspect.signature(info.function).parameters.values())[6:]]
    own = own[: len(own) - len(info.aliases)]
    torch.manual_seed(0)
    want = info.function(problems.Gaussian(), x, SIGMAS, disable=True)
    torch.manual_seed(0)
    assert torch.equal(info.function(problems.Gaussian(), x, SIGMAS, None, None, True, *own), want)


def test_noise_scaler_and_tau_func_are_functions_of_the_noise_level():
    x = problems.normal(0, 2, 3) * 10
    noise = lambda a, b: torch.full_like(x, 0.3)  # noqa: E731
    run = lambda name, **k: S.sample(  # noqa: E731
        problems.Gaussian(), x, SIGMAS, name, None, noise, disable=True, **k
    )
    got = run("er_sde", noise_scaler=lambda s: s * ((s**0.3).exp() + 10))
    torch.testing.assert_close(got, run("er_sde"))
    for name in ("sa_solver", "sa_solver_pece"):
        torch.testing.assert_close(run(name, tau_func=lambda s: 0.5), run(name, eta=0.25))


# ------------------------------------------------------------------------- callbacks that edit


@pytest.mark.parametrize("name", ["euler", "heun", "dpm_2", "lms"])
def test_an_edit_of_denoised_changes_nothing(name):
    x = problems.normal(0, 2, 3) * 10
    sample = S.get_sampler(name).function
    want = sample(problems.Gaussian(), x, SIGMAS, disable=True)
    got = sample(
        problems.Gaussian(), x, SIGMAS, callback=lambda d: d["denoised"].zero_(), disable=True
    )
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["euler", "lms"])
def test_an_edit_of_x_moves_the_start_of_the_step_alone(name):
    x = problems.normal(0, 2, 3) * 10
    sample = S.get_sampler(name).function
    want = sample(problems.Gaussian(), x, [4.0, 2.0], disable=True) + 1
    got = sample(
        problems.Gaussian(), x.clone(), [4.0, 2.0], callback=lambda d: d["x"].add_(1), disable=True
    )
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", ["dpmpp_2s_ancestral", "dpmpp_sde"])
def test_the_last_step_widens_half_precision(name):
    sample = S.get_sampler(name).function
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.ones(1, 3, 4, 4, dtype=dtype)
        assert sample(lambda x, s: x * 0.5, x, SIGMAS, disable=True).dtype == torch.float32


@pytest.mark.parametrize("name", ["dpm_fast", "dpm_adaptive"])
def test_dpm_solver_runs_backwards(name):
    problem = problems.Gaussian(0.2, 0.5)
    x = problems.normal(0, 4, 2, dtype=torch.float64)
    options = {"n": 60} if name == "dpm_fast" else {"rtol": 1e-4, "atol": 1e-4}
    sample = S.get_sampler(name).function
    up = sample(problem, x, 5.0, 0.1, disable=True, **options)
    torch.testing.assert_close(up, problem.ode_map(x, 0.1, 5.0), rtol=1e-2, atol=1e-2)


# --------------------------------------------------------------------------------------- CFG++


class Classes(nn.Module):
    def forward(self, x, sigma, mean):
        return problems.Gaussian(0.0, 0.6)(x - mean[:, None], sigma) + mean[:, None]


CFG_PP = [n for n in S.SAMPLERS if n.endswith("_cfg_pp")]
MEAN = {"mean": torch.tensor([1.0, 2.0])}


def cfg(scale):
    return guidance.CFGDenoiser(Classes(), scale, mean=torch.zeros(1))


def test_euler_cfg_pp_is_the_papers_step():
    x = problems.normal(0, 2, 3) * 10
    got = S.sample_euler_cfg_pp(cfg(0.6), x, SIGMAS, MEAN, disable=True)
    for sigma, sigma_next in pairwise(SIGMAS):
        given, without = (Classes()(x, sigma.expand(2), m) for m in (MEAN["mean"], torch.zeros(2)))
        x = without + 0.6 * (given - without) + sigma_next * (x - without) / sigma
    torch.testing.assert_close(got, x)


@pytest.mark.parametrize("name", CFG_PP)
def test_cfg_pp_without_guidance_is_the_plain_sampler(name):
    x = problems.normal(0, 2, 3) * 10
    plain = S.get_sampler(name.removesuffix("_cfg_pp")).function
    for model, extra in ((problems.Gaussian(), {}), (cfg(0.0), MEAN)):
        samples = []
        for sample in (S.get_sampler(name).function, plain):
            torch.manual_seed(0)
            samples.append(sample(model, x, SIGMAS, extra, disable=True))
        torch.testing.assert_close(samples[0], samples[1])


@pytest.mark.parametrize("name", CFG_PP)
def test_cfg_pp_reaches_the_guided_estimate_at_0(name):
    seen = []
    x = problems.normal(0, 2, 3) * 10
    y = S.get_sampler(name).function(cfg(0.6), x, SIGMAS, MEAN, seen.append, True)
    torch.testing.assert_close(y, seen[-1]["denoised"], rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------ rectified flows


RF = sorted(S.FLOW_SAMPLERS)


@pytest.mark.parametrize("name", RF)
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_a_flow_keeps_its_law_for_a_constant_denoiser(name, eta):
    """x_t = (1 - t) c + t z: the mean falls and the variance is t^2, at every step."""
    times = torch.linspace(1.0, 0.0, 7, dtype=torch.float64)
    rows = iter(torch.eye(9, dtype=torch.float64)[1:, :, None])
    x = torch.zeros(9, 1, dtype=torch.float64)
    x[0] = 1.0
    seen = []
    S.FLOW_SAMPLERS[name].function(
        problems.Constant(),
        x,
        times,
        callback=lambda d: seen.append(d["x"].pow(2).sum().item()),
        disable=True,
        eta=eta,
        noise_sampler=lambda a, b: next(rows),
    )
    assert seen == pytest.approx([t * t for t in times[:-1].tolist()], rel=1e-9)


@pytest.mark.parametrize("name", RF)
def test_a_flow_samples_as_its_denoiser_without_noise(name):
    """x_t / (1 - t) is x at the noise level t / (1 - t), where the sampler without _RF is."""
    mixture, levels = problems.mixture(), torch.linspace(8, 0.2, 12, dtype=torch.float64)
    times = levels / (1 + levels)
    x = problems.normal(0, 16, 2, dtype=torch.float64) * 8
    got = S.FLOW_SAMPLERS[name].function(
        lambda x, t: mixture(x / (1 - t[:, None]), t / (1 - t)),
        x * (1 - times[0]),
        times,
        disable=True,
        eta=0.0,
    )
    want = S.get_sampler(name.removesuffix("_RF")).function(
        mixture, x, levels, disable=True, eta=0.0
    )
    tolerance = 1e-9 if name.startswith(("euler", "dpmpp")) else 0.1
    torch.testing.assert_close(got / (1 - times[-1]), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", RF)
def test_a_flow_from_1_to_0_with_its_own_noise(name):
    times = [1.0, 1.0, 0.7, 0.3, 0.3, 0.0]
    x = problems.normal(0, 2, 3)
    sample = S.FLOW_SAMPLERS[name].function
    assert sample(problems.Gaussian(), x, times, disable=True).isfinite().all()
    with pytest.raises(ValueError, match="times of a rectified flow lie between 0 and 1, got 4"):
        sample(problems.Gaussian(), x, [4.0, 0.0], disable=True)


# --------------------------------------------------------------------------- laws and orders


def test_pndm_is_of_fourth_order_on_even_steps():
    problem, x = problems.Gaussian(0.1, 0.7), problems.normal(0, 8, 2, dtype=torch.float64) * 3

    def error(n):
        sigmas = torch.linspace(3.0, 0.5, n + 1, dtype=torch.float64)
        y = S.sample_pndm(problem, x, sigmas, disable=True)
        return problems.rms(y - problem.ode_map(x, 3.0, 0.5))

    assert math.log2(error(40) / error(80)) == pytest.approx(4, abs=0.2)


def test_consistency_sampling_leaves_room_for_the_last_noise():
    x = torch.zeros(1, 1, dtype=torch.float64)
    sigmas = torch.tensor([4.0, 2.0, 0.5], dtype=torch.float64)
    noise = lambda a, b: torch.ones_like(x)  # noqa: E731
    y = S.sample_consistency(
        problems.Constant(), x, sigmas, noise_sampler=noise, sigma_min=0.3, disable=True
    )
    assert y.item() == pytest.approx(0.4)
    runs = [
        sample(problems.Gaussian(), x + 1, sigmas, noise_sampler=noise, disable=True, **options)
        for sample, options in ((S.sample_consistency, {"sigma_min": 0.0}), (S.sample_lcm, {}))
    ]
    assert torch.equal(*runs)


def test_tcd_goes_from_ddim_to_consistency_sampling():
    x = problems.normal(0, 2, 3) * 10
    noise = lambda a, b: torch.full_like(x, 0.7)  # noqa: E731
    got = S.sample_tcd(problems.Gaussian(), x, SIGMAS, eta=1.0, noise_sampler=noise, disable=True)
    want = S.sample_lcm(problems.Gaussian(), x, SIGMAS, noise_sampler=noise, disable=True)
    torch.testing.assert_close(got, want)


def test_langevin_steps_widen_by_a_known_factor():
    """Of a constant denoiser the variance grows by 1 + 4 snr^4 per corrector step."""
    x = problems.normal(0, 4, 200_000, dtype=torch.float64) * 3
    noise = iter(problems.normal(1, 2, 4, 200_000, dtype=torch.float64))
    y = S.sample_predictor_corrector(
        problems.Constant(),
        x,
        torch.tensor([3.0, 1.5], dtype=torch.float64),
        noise_sampler=lambda a, b: next(noise),
        snr=0.4,
        disable=True,
    )
    assert y.var().item() == pytest.approx(1.5**2 * (1 + 4 * 0.4**4), rel=0.01)
    with pytest.raises(ValueError, match="snr must be positive"):
        S.sample_predictor_corrector(problems.Constant(), x, SIGMAS, snr=0.0)


def test_tableaus_are_measured_before_they_count():
    weights = {(2, 1): [(2.0, 2, 1.0)]}
    good = exponential_rk.Tableau(2, (0.0, 0.5), weights)
    exponential_rk.add_tableau("mine", good)
    try:
        run = lambda name: S.sample_exponential_rk(  # noqa: E731
            problems.Gaussian(), torch.ones(1, 2), SIGMAS, tableau=name, disable=True
        )
        assert torch.equal(run("mine"), run("res_2s"))
    finally:
        del exponential_rk.TABLEAUS["mine"]
    with pytest.raises(ValueError, match=r"order 1\.9, not the stated 3"):
        exponential_rk.add_tableau("bad", exponential_rk.Tableau(3, (0.0, 0.5), weights))
    with pytest.raises(ValueError, match="0 < j < i <= 2"):
        exponential_rk.Tableau(2, (0.0, 0.5), {(1, 1): []})
    with pytest.raises(ValueError, match="fractions c"):
        exponential_rk.Tableau(2, (0.5, 1.5))


@pytest.mark.parametrize("z", [-30.0, -1.0, -0.999, -1e-6, 0.5])
def test_phi_functions_meet_their_recursion(z):
    assert exponential_rk.phi(1, z) == pytest.approx(math.expm1(z) / z)
    for k in (1, 2, 3):
        want = z * exponential_rk.phi(k + 1, z) + 1 / math.factorial(k)
        assert exponential_rk.phi(k, z) == pytest.approx(want, rel=1e-9)


def test_dpmpp_2ms_lower_order_final():
    problem, x, _ = problems.reference()
    sigmas = torch.tensor([8.0, 4.0, 2.0], dtype=torch.float64)
    seen = []
    y = S.sample_dpmpp_2m(
        problem, x, sigmas, callback=seen.append, lower_order_final=True, disable=True
    )
    want = S.sample_euler(problem, seen[1]["x"], sigmas[1:], disable=True)
    torch.testing.assert_close(y, want)
    assert not torch.equal(y, S.sample_dpmpp_2m(problem, x, sigmas, disable=True))


def test_the_table_knows_both_kinds():
    assert not set(registry.SAMPLERS) & set(registry.FLOW_SAMPLERS)
    assert all(info.flow for info in registry.FLOW_SAMPLERS.values())
