"""Guidance against closed forms. The data are Gaussian, N(m, S^2), so that denoisers are linear."""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from problems import Gaussian, mixture, normal, wide
from torch import nn

from k_diffusion import sampling
from k_diffusion.guidance import (
    APG,
    FDG,
    TCFG,
    AutoguidedDenoiser,
    CFGDenoiser,
    CFGPlusPlus,
    CFGZeroStar,
    GradientGuidedDenoiser,
    IntervalDenoiser,
    Rescaled,
    ThresholdedDenoiser,
    linear,
)
from k_diffusion.solvers.context import at_level, start_run

S, GIVEN, NULL = 0.5, 2.0, -1.0


class Conditional(nn.Module):
    """Data from N(mean, S^2), with the mean as the condition; counts its calls."""

    def __init__(self):
        super().__init__()
        self.batches = []

    def forward(self, x, sigma, mean, **other):
        self.batches.append(len(x))
        m, sigma2 = wide(mean, x), wide(sigma, x) ** 2
        return (S**2 * x + sigma2 * m) / (S**2 + sigma2)


class Linear(nn.Module):
    """Not a denoiser, but without a Python side."""

    def forward(self, x, sigma, mean):
        return 0.3 * x + mean[:, None, None]


class Plain(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.calls = 0

    def forward(self, x, sigma, **cond):
        self.calls += 1
        return self.function(x, sigma, **cond)


def cfg(scale, n=4, model=None, **options):
    model = Conditional() if model is None else model
    return CFGDenoiser(model, scale, mean=torch.full((n,), NULL), **options)


def batch(n=4, seed=0, sigma=1.5, dtype=torch.float64):
    x = normal(seed, n, 3, 5, std=2.0, dtype=dtype)
    return x, torch.full((n,), sigma, dtype=dtype), {"mean": torch.full((n,), GIVEN)}


SIGMAS = sampling.get_sigmas_karras(12, 0.05, 20)

# Every guidance in its neutral setting, where it is the model itself; and in a working one.
NEUTRAL = {
    "cfg": lambda model: cfg(1.0, model=model),
    "cfg by a function": lambda model: cfg(torch.ones_like, model=model),
    "rescaled": lambda model: cfg(1.0, model=model, combine=Rescaled(1.0)),
    "apg": lambda model: cfg(1.0, model=model, combine=APG(0.0, 1.0, -0.5)),
    "cfg-zero*": lambda model: cfg(1.0, model=model, combine=CFGZeroStar(sigma_data=S)),
    "tcfg": lambda model: cfg(1.0, model=model, combine=TCFG()),
    "fdg": lambda model: cfg(1.0, model=model, combine=FDG((1.0, torch.ones_like))),
    "autoguidance": lambda model: AutoguidedDenoiser(model, Plain(gaussian_weak), 1.0),
    "interval": lambda model: IntervalDenoiser(cfg(7.0, model=model), 50.0),
    "static threshold": lambda model: ThresholdedDenoiser(model, math.inf),
    "dynamic threshold": lambda model: ThresholdedDenoiser(model, 1e4, 0.9),
    "gradient": lambda model: GradientGuidedDenoiser(model, squared, 0.0),
}
WORKING = {
    "cfg": lambda model: cfg(3.0, model=model),
    "cfg by a function": lambda model: cfg(lambda sigma: 1 + sigma, model=model),
    "cfg++": lambda model: cfg(CFGPlusPlus(0.6, SIGMAS), model=model),
    "rescaled": lambda model: cfg(3.0, model=model, combine=Rescaled(0.7)),
    "apg": lambda model: cfg(3.0, model=model, combine=APG(0.2, 2.5)),
    "apg with momentum": lambda model: cfg(3.0, model=model, combine=APG(0.2, 2.5, -0.5)),
    "cfg-zero*": lambda model: cfg(3.0, model=model, combine=CFGZeroStar()),
    "cfg-zero* with zero-init": lambda model: cfg(3.0, model=model, combine=CFGZeroStar(1.0)),
    "tcfg": lambda model: cfg(3.0, model=model, combine=TCFG()),
    "fdg": lambda model: cfg(3.0, model=model, combine=FDG((2.0, torch.sqrt))),
    "autoguidance": lambda model: AutoguidedDenoiser(model, Plain(gaussian_weak), 2.0),
    "interval": lambda model: IntervalDenoiser(cfg(7.0, model=model), 0.3, 5.0),
    "static threshold": lambda model: ThresholdedDenoiser(model),
    "dynamic threshold": lambda model: ThresholdedDenoiser(model, percentile=0.9),
    "gradient": lambda model: GradientGuidedDenoiser(model, squared, 0.5),
}
neutral = pytest.mark.parametrize("make", NEUTRAL.values(), ids=NEUTRAL.keys())
working = pytest.mark.parametrize("make", WORKING.values(), ids=WORKING.keys())


def gaussian_weak(x, sigma, **cond):
    return Gaussian(0.0, 3.0)(x.double(), sigma).to(x)


def squared(denoised):
    return denoised.pow(2).flatten(1).sum(1)


# ---------------------------------------------------------------------------- what holds for all


@neutral
def test_neutral_guidance_is_the_model(make):
    x, sigma, cond = batch()
    torch.testing.assert_close(
        make(Conditional())(x, sigma, **cond), Conditional()(x, sigma, **cond)
    )


@working
def test_guidance_changes_the_estimate_and_keeps_samples_independent(make):
    x, sigma, cond = batch()
    y = make(Conditional())(x, sigma, **cond)
    assert (y - Conditional()(x, sigma, **cond)).abs().max() > 0.1
    others = torch.cat([x[:1], normal(9, 3, 3, 5, std=9.0, dtype=x.dtype)])
    torch.testing.assert_close(make(Conditional())(others, sigma, **cond)[:1], y[:1])


@working
def test_guidance_in_half_precision_is_that_of_full_precision_rounded(make):
    x, sigma, cond = batch(dtype=torch.bfloat16)
    # the model sees the same numbers, so that all the difference is the guidance's
    exact = Plain(lambda x, sigma, mean: Conditional()(x.double(), sigma.double(), mean).to(x))
    y = make(exact)(x, sigma, **cond)
    rounded = Plain(lambda x, sigma, mean: Conditional()(x, sigma, mean).bfloat16().double())
    want = make(rounded)(x.double(), sigma.double(), **cond)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), want, rtol=2e-2, atol=2e-2)


@working
@pytest.mark.parametrize("name", sampling.SAMPLERS)
def test_guided_models_are_sampled(make, name):
    info = sampling.get_sampler(name)
    if info.takes_sigmas:
        run = partial(info.function, sigmas=SIGMAS)
    else:
        run = partial(info.function, sigma_min=0.05, sigma_max=20.0)
        run = partial(run, n=7) if name == "dpm_fast" else run
    x, _, cond = batch(dtype=torch.float32)
    torch.manual_seed(0)
    y = run(make(Conditional()), x * SIGMAS[0], extra_args=cond, disable=True)
    assert y.isfinite().all()
    assert not y.requires_grad


@working
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(4, 1), (4, 7), (1, 2, 6), (4, 2, 3, 3), (4, 1, 2, 3, 2)])
def test_samples_of_any_rank_and_dtype(make, shape, dtype):
    exact = Plain(lambda x, sigma, mean: Conditional()(x.double(), sigma.double(), mean).to(x))
    x, sigmas = normal(0, *shape, std=300.0).to(dtype), torch.tensor([300.0, 9.0, 1.0, 0.0])
    guided = make(exact)
    uncond = torch.full((1,), NULL)
    if hasattr(guided, "uncond"):  # of any batch size
        guided.uncond = {"mean": uncond}
    elif hasattr(guided, "guided"):
        guided.guided.uncond = {"mean": uncond}
    cond = {"mean": torch.full(shape[:1], GIVEN)}
    y = sampling.sample_dpmpp_2m(guided, x, sigmas.to(dtype), extra_args=cond, disable=True)
    assert y.shape == shape
    assert y.dtype == dtype
    assert y.isfinite().all()


# ------------------------------------------------------------------- classifier-free, autoguidance


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
def test_cfg_between_gaussians_is_the_gaussian_of_the_extrapolated_mean(scale):
    """With equal variances the guided score is that of N(null + scale (given - null), S^2)."""
    x, _, cond = batch()
    exact = Gaussian(NULL + scale * (GIVEN - NULL), S)
    sigmas = sampling.get_sigmas_karras(400, 0.01, 20).double()[:-1]
    y = sampling.sample_heun(cfg(scale), x * 20, sigmas, extra_args=cond, disable=True)
    torch.testing.assert_close(y, exact.ode_map(x * 20, 20, 0.01), rtol=1e-3, atol=1e-3)


def test_cfg_calls_its_model_once_with_both_halves():
    x, sigma, cond = batch()
    model = Conditional()
    cfg(2.0, model=model)(x, sigma, **cond, other=None)
    assert model.batches == [8]


def test_cfg_with_one_absence_for_the_batch():
    x, sigma, cond = batch()
    torch.testing.assert_close(cfg(2.0, n=1)(x, sigma, **cond), cfg(2.0)(x, sigma, **cond))


@pytest.mark.parametrize("cond", [{}, {"mean": None}])
def test_cfg_without_its_condition_is_an_error(cond):
    x, sigma, _ = batch()
    with pytest.raises(ValueError, match="guidance strengthens mean"):
        cfg(2.0)(x, sigma, **cond)


@pytest.mark.parametrize("absence", [torch.zeros(3), torch.zeros(4, 1), torch.zeros(()), None])
def test_cfg_with_an_absence_of_another_shape_is_an_error(absence):
    x, sigma, cond = batch()
    with pytest.raises(ValueError, match="mean has shape"):
        CFGDenoiser(Conditional(), 2.0, mean=absence)(x, sigma, **cond)


def test_cfg_gives_both_halves_what_belongs_to_samples_twice_and_the_rest_as_it_is():
    x, sigma, cond = batch()
    seen = {}

    def model(x, sigma, mean, **other):
        seen.update(other)
        return Conditional()(x, sigma, mean)

    shared = {"ids": torch.zeros(7, 3), "scale": torch.tensor(2.0), "mode": "text", "none": None}
    own = torch.arange(4.0)
    nested = {"of": {"samples": own, "ids": torch.zeros(7, 3)}, "pair": (own[:, None], own)}
    guided = CFGDenoiser(Plain(model), 2.0, mean=torch.tensor([NULL]))
    torch.testing.assert_close(
        guided(x, sigma, **cond, **shared, **nested), cfg(2.0)(x, sigma, **cond)
    )
    assert all(seen[name] is value for name, value in shared.items())
    assert torch.equal(seen["of"]["samples"], own.repeat(2))
    assert seen["of"]["ids"].shape == (7, 3)
    assert isinstance(seen["pair"], tuple)
    assert [y.shape for y in seen["pair"]] == [(8, 1), (8,)]


def test_cfg_of_conditions_in_a_dict_or_a_list():
    x, sigma, cond = batch()

    def model(x, sigma, text):
        return Conditional()(x, sigma, text["mean"] if isinstance(text, dict) else text[0])

    want = cfg(2.0)(x, sigma, **cond)
    for kind in (lambda m: {"mean": m}, lambda m: [m]):
        guided = CFGDenoiser(Plain(model), 2.0, text=kind(torch.tensor([NULL])))
        torch.testing.assert_close(guided(x, sigma, text=kind(cond["mean"])), want)
        # one condition for all samples, too
        torch.testing.assert_close(guided(x, sigma, text=kind(torch.tensor([GIVEN]))), want)
    for absence, given, match in (
        ({"men": torch.zeros(1)}, {"mean": torch.zeros(4)}, r"text has keys \['mean'\]"),
        (torch.zeros(1), {"mean": torch.zeros(4)}, r"text has keys \['mean'\]"),
        ([], [torch.zeros(4)], "text has 1 parts"),
        ({"mean": torch.zeros(3)}, {"mean": torch.zeros(4)}, r"text\['mean'\] has shape \(4,\)"),
    ):
        with pytest.raises(ValueError, match=match):
            CFGDenoiser(Plain(model), 2.0, text=absence)(x, sigma, text=given)


def test_autoguidance_extrapolates_from_the_weak_model():
    x, sigma, _ = batch()
    good, weak = Gaussian(1.0, 0.5), Gaussian(0.5, 1.0)
    guided = AutoguidedDenoiser(Plain(good), Plain(weak), 3.0)
    want = 3 * good(x, sigma) - 2 * weak(x, sigma)
    torch.testing.assert_close(guided(x, sigma), want)


def test_a_scale_by_noise_level_is_each_samples_own():
    x, _, cond = batch()
    sigma = torch.tensor([0.1, 1.0, 2.0, 4.0], dtype=torch.float64)
    y = cfg(lambda sigma: 1 + sigma)(x, sigma, **cond)
    for i, s in enumerate(sigma.tolist()):
        alone = cfg(1 + s)(x, sigma, **cond)
        torch.testing.assert_close(y[i], alone[i])


# ------------------------------------------------------------------------- how it combines the two


def pair(seed=0):
    given, without = (normal(seed + i, 4, 3, 5, dtype=torch.float64) for i in (0, 1))
    return given + 0.3, without - 0.2


def test_rescaled_guidance_has_the_contrast_of_the_conditional_estimate():
    given, without = pair()
    y = Rescaled(1.0)(given, without, 7.0, torch.ones(4))
    torch.testing.assert_close(y.std((1, 2)), given.std((1, 2)))
    plain, half = linear(given, without, 7.0, torch.ones(4)), Rescaled(0.5)
    torch.testing.assert_close(half(given, without, 7.0, torch.ones(4)), (y + plain) / 2)
    torch.testing.assert_close(Rescaled(0.0)(given, without, 7.0, torch.ones(4)), plain)


@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 1)])
def test_rescaled_guidance_without_contrast_is_plain(shape):
    for given, without in ((0.0, 0.0), (0.5, 0.25)):
        flat = [torch.full(shape, v) for v in (given, without)]
        y = Rescaled()(*flat, 7.0, torch.ones(2))
        torch.testing.assert_close(y, linear(*flat, 7.0, torch.ones(2)))


def test_apg_without_projection_is_linear_guidance():
    given, without = pair()
    y = APG(eta=1.0)(given, without, 7.0, torch.ones(4))
    torch.testing.assert_close(y, linear(given, without, 7.0, torch.ones(4)))


def test_apg_pushes_at_right_angles_to_the_conditional_estimate():
    given, without = pair()
    push = APG(eta=0.0)(given, without, 7.0, torch.ones(4)) - given
    dot = (push * given).flatten(1).sum(1)
    torch.testing.assert_close(dot, torch.zeros(4, dtype=torch.float64), atol=1e-10, rtol=0)
    # with eta the parallel part is back: Pythagoras
    whole = 6 * (given - without)
    parallel = whole - push
    torch.testing.assert_close(squared(push) + squared(parallel), squared(whole))
    half = APG(eta=0.5)(given, without, 7.0, torch.ones(4)) - given
    torch.testing.assert_close(half, push + parallel / 2)


def test_apg_shortens_the_difference():
    given, without = pair()
    push = APG(eta=1.0, max_norm=0.25)(given, without, 2.0, torch.ones(4)) - given
    torch.testing.assert_close(squared(push).sqrt(), torch.full((4,), 0.25, dtype=torch.float64))
    long = APG(eta=1.0, max_norm=1e3)(given, without, 2.0, torch.ones(4)) - given
    torch.testing.assert_close(long, given - without)


def test_apg_momentum_sums_the_steps_of_one_run():
    apg, diffs, sigmas = APG(eta=1.0, momentum=-0.5), [], [8.0, 11.0, 4.0, 4.0, 1.0]
    given, _ = pair()
    average = torch.zeros_like(given)
    for i, sigma in enumerate(sigmas):  # up by less than a factor 2 is churn
        without = pair(10 + i)[1]
        diffs.append(given - without)
        average = diffs[-1] - 0.5 * average
        y = apg(given, without, 2.0, torch.full((4,), sigma))
        torch.testing.assert_close(y, given + average)
    # a new run, from more noise; then one told of
    without = pair(30)[1]
    for _ in range(2):
        y = apg(given, without, 2.0, torch.full((4,), 8.0))
        torch.testing.assert_close(y, 2 * given - without)
        apg.start_run()


def test_apg_momentum_gives_equal_runs():
    x, _, cond = batch()
    guided = cfg(3.0, combine=APG(0.0, 2.0, -0.5))
    runs = [
        sampling.sample_heun(
            guided, x * 20, SIGMAS, extra_args=cond, s_churn=10.0, s_noise=0.0, disable=True
        )
        for _ in range(2)
    ]
    assert torch.equal(*runs)


class Stop(BaseException):
    pass


@pytest.mark.parametrize("name", ["euler", "dpm_fast", "dpm_adaptive"])
def test_nothing_is_left_of_an_interrupted_run(name):
    x, _, cond = batch(dtype=torch.float32)
    apg = cfg(3.0, combine=APG(0.0, 2.0, -0.5))
    guided = ThresholdedDenoiser(IntervalDenoiser(AutoguidedDenoiser(apg, Conditional(), 1.5)))
    info = sampling.get_sampler(name)

    def run(x, **options):
        ends = (SIGMAS,) if info.takes_sigmas else (0.05, 20.0)
        options |= {"n": 9} if name == "dpm_fast" else {}
        return info.function(guided, x, *ends, extra_args=cond, disable=True, **options)

    def stop(d):
        raise Stop

    torch.manual_seed(0)
    want = run(x * 20)
    with pytest.raises(Stop):
        run(x * 10, callback=stop)
    torch.manual_seed(0)
    assert torch.equal(run(x * 20), want)


@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_cfg_plus_plus_is_cfg_of_a_scale_that_knows_the_step(strength):
    """The paper's step: to the guided estimate, with the unconditional noise."""
    x, _, cond = batch()
    x = y = x * 20
    for a, b in pairwise(SIGMAS.tolist()):
        given, without = (
            Gaussian(mean, S)(x, torch.full((4,), a, dtype=torch.float64)) for mean in (GIVEN, NULL)
        )
        x = torch.lerp(without, given, strength) + b / a * (x - without)
    guided = cfg(CFGPlusPlus(strength, SIGMAS))
    y = sampling.sample_euler(guided, y, SIGMAS, extra_args=cond, disable=True)
    torch.testing.assert_close(y, x, rtol=1e-5, atol=1e-5)


def test_cfg_plus_plus_takes_the_nearest_noise_level_of_the_schedule():
    scale = CFGPlusPlus(0.5, [8.0, 4.0, 4.0, 1.0, 0.0])
    want = [0.5 * 8 / 4, 0.5 * 4 / 3, 0.5]
    at = torch.tensor([8.0, 4.0, 1.0], dtype=torch.float64)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        got = scale((at * 1.01).to(dtype))
        torch.testing.assert_close(got, torch.tensor(want))
    assert scale(torch.tensor([100.0, 1e-3])).tolist() == [1.0, 0.5]


@pytest.mark.parametrize("sigmas", [[1.0, 2.0], [0.0], []])
def test_cfg_plus_plus_needs_a_descending_schedule(sigmas):
    with pytest.raises(ValueError, match="descending schedule"):
        CFGPlusPlus(0.5, sigmas)


# ------------------------------------------------------------------------------- where it's applied


def test_interval_guides_inside_and_calls_one_model():
    x, _, cond = batch()
    model = Conditional()
    guided = IntervalDenoiser(cfg(3.0, model=model), 0.3, 5.0)
    for sigma, inside in [(0.1, False), (0.3, False), (0.4, True), (5.0, True), (6.0, False)]:
        s = torch.full((4,), sigma, dtype=torch.float64)
        want = cfg(3.0 if inside else 1.0)(x, s, **cond)
        model.batches.clear()
        torch.testing.assert_close(guided(x, s, **cond), want)
        assert model.batches == [8 if inside else 4]


def test_interval_of_different_noise_levels():
    x, _, cond = batch()
    sigma = torch.tensor([0.1, 1.0, 5.0, 9.0], dtype=torch.float64)
    y = IntervalDenoiser(cfg(3.0), 0.3, 5.0)(x, sigma, **cond)
    want = torch.stack([cfg(s)(x, sigma, **cond)[i] for i, s in enumerate([1.0, 3.0, 3.0, 1.0])])
    torch.testing.assert_close(y, want)


def test_interval_reads_no_device_value():
    """Values on the meta device can't be read."""
    x, sigma, cond = batch()
    cond = {"mean": cond["mean"].to("meta")}
    guided = CFGDenoiser(Conditional(), 3.0, mean=torch.zeros(4, device="meta"))
    y = IntervalDenoiser(guided, 0.3, 5.0)(x.to("meta"), sigma.to("meta"), **cond)
    assert y.shape == x.shape


def test_intervals_within_guidance_are_decided_for_a_level_that_the_host_knows():
    """Called with another sigma than the host's, they keep to the host's."""
    x, sigma, cond = batch(sigma=1.0)
    model = Conditional()
    interval = IntervalDenoiser(cfg(3.0, model=model), 0.3, 5.0)
    around = [
        interval,
        ThresholdedDenoiser(interval, 1e9),
        AutoguidedDenoiser(Plain(gaussian_weak), interval, 0.0),
        GradientGuidedDenoiser(interval, squared, 0.0),
        IntervalDenoiser(ThresholdedDenoiser(interval, 1e9)),
        cfg(1.0, model=IntervalDenoiser(AutoguidedDenoiser(model, model, 1.0), 0.3, 5.0)),
    ]
    for guided in around[:-1]:
        for level, inside in [(0.1, 0), (0.3, 0), (0.4, 1), (5.0, 1), (6.0, 0)]:
            model.batches.clear()
            y = at_level(guided, level)(x, sigma, **cond)
            torch.testing.assert_close(y, cfg(3.0 if inside else 1.0)(x, sigma, **cond))
            assert model.batches == [8 if inside else 4]
    for level, calls in [(0.1, 1), (1.0, 2)]:
        model.batches.clear()
        at_level(around[-1], level)(x, sigma, **cond)
        assert model.batches == [8] * calls


def test_a_compiled_model_stays_compiled():
    compiled = torch.compile(IntervalDenoiser(cfg(3.0)), backend="eager")
    assert at_level(compiled, 1.0) is compiled


def test_other_models_are_called_as_they_are():
    model = Plain(Gaussian())
    assert at_level(model, 1.0) is model
    start_run(model)


def test_interval_compiles_as_one_graph():
    x, sigma, cond = batch()
    guided = IntervalDenoiser(CFGDenoiser(Linear(), 3.0, mean=torch.full((4,), NULL)), 0.3, 5.0)
    compiled = torch.compile(guided, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, sigma, **cond), guided(x, sigma, **cond))


def test_interval_of_autoguidance():
    x, sigma, _ = batch()
    good, weak = Plain(Gaussian(1.0, 0.5)), Plain(Gaussian(0.5, 1.0))
    guided = IntervalDenoiser(AutoguidedDenoiser(good, weak, 3.0), 0.3, 1.0)
    torch.testing.assert_close(guided(x, sigma), good(x, sigma))
    assert weak.calls == 0


def test_static_threshold_clamps():
    x, sigma, cond = batch()
    y = ThresholdedDenoiser(Conditional(), 0.8)(x, sigma, **cond)
    torch.testing.assert_close(y, Conditional()(x, sigma, **cond).clamp(-0.8, 0.8))


@pytest.mark.parametrize("percentile", [0.5, 0.9, 1.0])
def test_dynamic_threshold_scales_each_sample_by_its_quantile(percentile):
    sizes = torch.tensor([0.1, 1.0, 30.0], dtype=torch.float64)[:, None, None]
    d = normal(0, 3, 4, 5, dtype=torch.float64) * sizes
    y = ThresholdedDenoiser(Plain(lambda x, sigma: x), percentile=percentile)(d, torch.ones(3))
    assert torch.equal(y[0], d[0])  # within the limit already
    for got, want in zip(y[1:], d[1:]):
        s = want.abs().flatten().sort().values[math.ceil(percentile * 20) - 1].clamp(min=1)
        torch.testing.assert_close(got, (want / s).clamp(-1, 1))


# ------------------------------------------------------------------------------ guidance by a loss


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradient_guidance_by_an_observation_is_the_gaussian_posterior(mode):
    """y = x0 + N(0, tau^2): given x, x0 is N(D, V), so y is N(D, V + tau^2)."""
    m, s, tau, seen = 0.7, 0.9, 0.4, -1.1
    prior, precision = Gaussian(m, s), 1 / s**2 + 1 / tau**2
    posterior = Gaussian((m / s**2 + seen / tau**2) / precision, precision**-0.5)

    def weight(sigma):
        return 1 / (s**2 * sigma**2 / (s**2 + sigma**2) + tau**2)

    def loss(denoised):
        return (denoised - seen).pow(2).flatten(1).sum(1) / 2

    guided = GradientGuidedDenoiser(Plain(prior), loss, weight)
    with mode():
        x = normal(0, 4, 3, 5, std=2.0, dtype=torch.float64)
        sigma = torch.tensor([0.01, 0.5, 3.0, 50.0], dtype=torch.float64)
        torch.testing.assert_close(guided(x, sigma), posterior(x, sigma))
        y = sampling.sample_dpmpp_2m(guided, x * 20, SIGMAS[:-1], disable=True)
    want = posterior.ode_map(x * 20, 20, 0.05)
    torch.testing.assert_close(y.clone(), want, rtol=0.1, atol=0.1)


def test_gradient_guidance_takes_conditions_made_under_inference_mode():
    with torch.inference_mode():
        x, gain = normal(0, 2, 3), normal(1, 2, 3)
        guided = GradientGuidedDenoiser(Plain(lambda x, sigma, gain: x * gain), squared, 0.5)
        y = guided(x, torch.full((2,), 2.0), gain=gain)
        torch.testing.assert_close(y, gain * x - 0.5 * 4 * 2 * gain**2 * x)


def test_gradient_goes_through_a_nonlinear_model():
    """Central differences of the loss along each coordinate."""
    model, at = mixture(), torch.tensor([0.4, 2.0], dtype=torch.float64)
    x = normal(0, 2, 2, dtype=torch.float64)

    def loss(denoised):
        return denoised.pow(2).sum(1) + denoised[:, 0]

    guided, h = GradientGuidedDenoiser(Plain(model), loss, 0.3), 1e-5
    grads = []
    for step in torch.eye(2, dtype=torch.float64) * h:
        grads.append((loss(model(x + step, at)) - loss(model(x - step, at))) / (2 * h))
    want = model(x, at) - 0.3 * at[:, None] ** 2 * torch.stack(grads, 1)
    torch.testing.assert_close(guided(x, at), want)


def test_gradient_guidance_leaves_the_model_alone():
    inner = nn.Linear(3, 3)
    guided = GradientGuidedDenoiser(Plain(lambda x, sigma: inner(x)), squared)
    x = torch.randn(2, 3, requires_grad=True)
    y = guided(x, torch.ones(2))
    assert not y.requires_grad
    assert inner.weight.grad is None
    assert x.grad is None


@pytest.mark.parametrize(
    ("loss", "match"),
    [
        (lambda denoised: denoised.sum(), "a value per sample"),
        (lambda denoised: denoised.detach().sum((1, 2)), "no gradient"),
    ],
)
def test_bad_losses_are_errors(loss, match):
    x, sigma, cond = batch()
    with pytest.raises(ValueError, match=match):
        GradientGuidedDenoiser(Conditional(), loss)(x, sigma, **cond)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Rescaled(1.5),
        lambda: APG(max_norm=0.0),
        lambda: APG(momentum=1.0),
        lambda: IntervalDenoiser(cfg(1.0), 2.0, 1.0),
        lambda: ThresholdedDenoiser(Conditional(), -1.0),
        lambda: ThresholdedDenoiser(Conditional(), percentile=99.5),
    ],
)
def test_bad_options_are_errors(make):
    with pytest.raises(ValueError, match=r"must|needs"):
        make()
