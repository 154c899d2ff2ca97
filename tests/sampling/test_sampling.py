"""The front door: published numbers, dtypes, callbacks, schedules in all shapes, no host syncs."""

import inspect
import math
from pathlib import Path

import golden
import numpy as np
import problems
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm.auto import tqdm

from k_diffusion import guidance, sampling as S
from k_diffusion.schedules import positive_range

NAMES = sorted(S.SAMPLERS)
ON_SIGMAS = [name for name in NAMES if S.SAMPLERS[name].takes_sigmas]
STOCHASTIC = [name for name in NAMES if S.SAMPLERS[name].stochastic]
DETERMINISTIC = [name for name in ON_SIGMAS if name not in STOCHASTIC]


def parameters(name):
    return inspect.signature(S.get_sampler(name).function).parameters


def run(name, model, x, sigmas=(4.0, 2.0, 1.0, 0.0), **options):
    """Any sampler on a schedule, or on its ends."""
    info = S.get_sampler(name)
    options = {"disable": True, **options}
    if "noise_sampler" in options and "noise_sampler" not in parameters(name):
        return S.sample(model, x, sigmas, name, **options)
    if info.takes_sigmas:
        return info.function(model, x, sigmas, **options)
    ends = positive_range(torch.as_tensor(sigmas).tolist())
    if name == "dpm_fast":
        options = {"n": 5, **options}
    return info.function(model, x, *ends, **options)


# --------------------------------------------------------------------------- published numbers


def toy(x, sigma, scale=1.0):
    """The denoiser of the golden cases."""
    s = sigma.view(-1, *[1] * (x.ndim - 1))
    y = x + 0.3 * torch.roll(x, 1, -1)
    return scale * torch.tanh(1.5 * y / (1 + s)) * 0.8 + 0.1 * torch.sin(3 * x / (1 + s))


def golden_noise(x):
    """The noise sampler of the golden cases: a function of the interval alone."""
    index = torch.arange(x.numel(), dtype=torch.float64).view(x.shape)

    def noise(sigma, sigma_next):
        a, b = float(sigma), float(sigma_next)
        return (torch.sin(index * 12.9898 + a * 78.233 + b * 37.719) * 1.4).to(x)

    return noise


CHURN = {"s_churn": 5.0, "s_tmin": 0.1, "s_tmax": 8.0, "s_noise": 1.003}


@pytest.mark.parametrize(
    ("case", "options", "tolerance"),
    [
        ("sample_euler__default", {}, 1e-5),
        ("sample_euler__s_churn=5.0_s_tmin=0.1_s_tmax=8.0_s_noise=1.003", CHURN, 1e-5),
        ("sample_heun__default", {}, 1e-5),
        ("sample_dpm_2__default", {}, 1e-5),
        ("sample_euler_ancestral__default", {}, 1e-5),
        ("sample_euler_ancestral__noise=True", {}, 1e-5),
        ("sample_dpm_2_ancestral__noise=True", {}, 1e-5),
        ("sample_lms__default", {}, 1e-5),
        ("sample_dpmpp_2s_ancestral__noise=True", {}, 1e-5),
        # Midpoints were float32, and a Brownian path is rough: 1e-6 in sigma is 1e-3 in noise.
        ("sample_dpmpp_sde__default", {}, 1e-3),
        ("sample_dpmpp_sde__noise=True", {}, 1e-4),
        ("sample_dpmpp_2m__default", {}, 1e-5),
        ("sample_dpmpp_2m_sde__noise=True", {}, 1e-5),
        ("sample_dpmpp_2m_sde__noise=True_solver_type=heun", {"solver_type": "heun"}, 1e-5),
        ("sample_dpmpp_3m_sde__noise=True", {}, 1e-5),
    ],
)
def test_published_numbers(case, options, tolerance):
    want, _ = golden.load(case)
    sigmas = S.get_sigmas_karras(9, 0.05, 12.0)
    x = problems.normal(30, 3, 2, 6, 6) * sigmas[0]
    log = []

    def callback(d):
        squares = (d["denoised"].double().pow(2).mean(), d["x"].double().pow(2).mean())
        log.append([float(v) for v in (d["i"], d["sigma"], d["sigma_hat"], *squares)])

    if "noise=True" in case:
        options = {**options, "noise_sampler": golden_noise(x)}
    torch.manual_seed(123)
    sample = getattr(S, case.split("__")[0])
    y = sample(
        toy, x, sigmas, extra_args={"scale": 0.9}, callback=callback, disable=True, **options
    )
    assert golden.error(y, want["x"]) < tolerance
    assert golden.error(torch.tensor(log), want["callback"]) < tolerance


@pytest.mark.parametrize("case", ["dpm_fast_12", "dpm_adaptive_3"])
def test_published_dpm_solver_numbers(case):
    want, info = golden.load(case)
    x = problems.normal(31, 3, 2, 6, 6) * 12.0
    log = []

    def callback(d):
        log.append([float(d["sigma"]), float(d["sigma_hat"]), float(d["denoised"].pow(2).mean())])

    if case == "dpm_fast_12":
        y = S.sample_dpm_fast(toy, x, 0.05, 12.0, 12, callback=callback, disable=True)
    else:
        y, counts = S.sample_dpm_adaptive(
            toy, x, 0.05, 12.0, callback=callback, disable=True, return_info=True
        )
        assert counts == info
    assert golden.error(y, want["x"]) < 1e-5
    assert golden.error(torch.tensor(log), want["callback"]) < 1e-4


@pytest.mark.parametrize("name", ["euler", "heun", "dpm_2"])
def test_churn_samplers_draw_every_step_even_without_churn(name):
    x = problems.normal(0, 2, 3)
    torch.manual_seed(0)
    run(name, problems.Gaussian(), x)
    got = torch.get_rng_state()
    torch.manual_seed(0)
    for _ in range(3):
        torch.randn_like(x)
    assert torch.equal(got, torch.get_rng_state())


@pytest.mark.parametrize("name", ["euler_ancestral", "dpm_fast", "dpm_adaptive"])
def test_noise_samplers_are_asked_even_at_eta_0(name):
    asked = []

    def noise(sigma, sigma_next):
        asked.append((float(sigma), float(sigma_next)))
        return torch.full((2, 3), math.nan)

    x = run(name, problems.Gaussian(), problems.normal(0, 2, 3), eta=0.0, noise_sampler=noise)
    assert len(asked) >= 2
    assert all(a > b for a, b in asked)
    assert x.isfinite().all()


def test_sde_samplers_draw_their_seed_but_no_tree_at_eta_0(monkeypatch):
    drawn = []
    monkeypatch.setattr(S.BatchedBrownianTree, "_normal", lambda *a, **k: drawn.append(1))
    for name in ("dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde"):
        torch.manual_seed(0)
        run(name, problems.Gaussian(), problems.normal(0, 2, 3), eta=0.0)
        got = torch.get_rng_state()
        torch.manual_seed(0)
        torch.randint(0, 2**63 - 1, [])
        assert torch.equal(got, torch.get_rng_state())
    assert not drawn


# --------------------------------------------------------------------------------- the contract


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(3, 2), (2, 4, 8), (2, 3, 4, 4), (2, 1, 2, 3, 3)])
def test_samples_of_any_rank(name, shape):
    seen = []

    def model(x, sigma, **extra):
        assert sigma.shape == (len(x),)
        seen.append(extra)
        return problems.Gaussian()(x, sigma)

    x = problems.normal(0, *shape) * 4
    torch.manual_seed(0)
    y = run(name, model, x, extra_args={"cond": 7})
    assert y.shape == x.shape
    assert y.isfinite().all()
    assert all(extra == {"cond": 7} for extra in seen)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", ON_SIGMAS)
def test_schedules_of_any_dtype_and_as_floats(name, dtype):
    host = [4.0, 2.0, 1.0, 0.0]
    x = problems.normal(0, 2, 3, dtype=torch.float64)
    noise = lambda sigma, sigma_next: torch.ones_like(x)  # noqa: E731
    options = {"noise_sampler": noise} if S.SAMPLERS[name].noise else {}
    want = run(name, problems.Gaussian(), x, host, **options)
    got = run(name, problems.Gaussian(), x, torch.tensor(host, dtype=dtype), **options)
    # Only noise levels that a step computes for itself are rounded to the schedule's dtype.
    torch.testing.assert_close(got, want, rtol=0.02 if dtype.itemsize == 2 else 1e-6, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_promoted_by_slopes_alone(dtype):
    x = problems.normal(0, 2, 1, 4, 4).to(dtype)
    dtypes = []

    def model(x, sigma):
        dtypes.append(sigma.dtype)
        return x * 0.5

    sigmas = torch.tensor([4.0, 2.0, 1.0, 0.5])
    promoted = {"euler", "euler_ancestral", "heun", "dpm_2", "dpm_2_ancestral", "lms"}
    promoted |= {"ddim", "ddpm", "deis", "gradient_estimation", "heunpp2", "ipndm", "ipndm_v"}
    promoted |= {"restart", "pndm", "tcd", "euler_cfg_pp", "euler_ancestral_cfg_pp"}
    promoted |= {"gradient_estimation_cfg_pp"}
    for name in ON_SIGMAS:
        y = run(name, model, x, sigmas)
        assert y.dtype == (torch.float32 if name in promoted else dtype), name
    assert set(dtypes) == {dtype}


@pytest.mark.parametrize("name", ON_SIGMAS)
def test_callbacks_see_each_step(name):
    x = problems.normal(0, 2, 3)
    sigmas = torch.tensor([4.0, 2.0, 1.0, 0.0])
    seen = []
    y = run(name, problems.Gaussian(), x, sigmas, callback=seen.append)
    assert [d["i"] for d in seen] == [0, 1, 2]
    assert set(seen[0]) == {"x", "i", "sigma", "sigma_hat", "denoised"}
    for d, sigma in zip(seen, sigmas):
        assert d["sigma"].shape == ()
        assert d["sigma"] == sigma
        assert d["sigma_hat"] == sigma
        want = problems.Gaussian()(d["x"], d["sigma_hat"].expand(2))
        torch.testing.assert_close(d["denoised"], want)
    assert torch.equal(seen[0]["x"], x)
    # The last step goes to 0, where the sample is the denoised one.
    torch.testing.assert_close(y, seen[-1]["denoised"], rtol=1e-5, atol=0.5 if name == "lms" else 0)


@pytest.mark.parametrize("name", ["dpm_fast", "dpm_adaptive"])
def test_dpm_solver_callbacks(name):
    seen = []
    run(name, problems.Gaussian(), problems.normal(0, 2, 3), callback=seen.append)
    keys = {"x", "i", "sigma", "sigma_hat", "denoised", "t", "t_up"}
    if name == "dpm_adaptive":
        keys |= {"error", "h", "steps", "nfe", "n_accept", "n_reject"}
    assert set(seen[0]) == keys
    for i, d in enumerate(seen):
        assert d["i"] == i
        assert d["sigma"].shape == ()
        torch.testing.assert_close(d["sigma"], d["t"].neg().exp())


class Stop(BaseException):
    pass


@pytest.mark.parametrize("name", NAMES)
def test_a_callback_can_stop_the_sampling(name):
    calls = []

    def callback(d):
        calls.append(d["i"])
        if len(calls) == 2:
            raise Stop

    x = problems.normal(0, 2, 3)
    seeds = [1, 2] if S.SAMPLERS[name].noise else None
    fresh = lambda: S.make_noise_sampler(name, x, [4.0, 2.0, 1.0, 0.0], seeds)  # noqa: E731
    options = {"noise_sampler": fresh()} if seeds else {}
    want = run(name, problems.Gaussian(), x, **options)
    with pytest.raises(Stop):  # with a progress bar
        run(name, problems.Gaussian(), x, callback=callback, disable=False)
    assert len(calls) == 2
    assert torch.is_grad_enabled()
    assert not tqdm._instances
    options = {"noise_sampler": fresh()} if seeds else {}
    assert torch.equal(run(name, problems.Gaussian(), x, **options), want)


@pytest.mark.parametrize("name", NAMES)
def test_samplers_run_without_gradients(name):
    x = problems.normal(0, 2, 3).requires_grad_()
    assert not run(name, problems.Gaussian(), x).requires_grad


def test_to_d_takes_a_sigma_an_image_one_for_all_or_a_float():
    x, denoised = problems.normal(0, 2, 3, 4), problems.normal(1, 2, 3, 4)
    want = (x - denoised) / 2
    for sigma in (torch.tensor([2.0, 2.0]), torch.tensor(2.0), 2.0):
        torch.testing.assert_close(S.to_d(x, sigma, denoised), want)


# ----------------------------------------------------------------------------------- schedules


@pytest.mark.parametrize("name", ON_SIGMAS)
def test_one_step_to_0_gives_the_denoised_sample(name):
    x = problems.normal(0, 2, 3) * 4
    y = run(name, problems.Gaussian(), x, torch.tensor([4.0, 0.0]))
    torch.testing.assert_close(y, problems.Gaussian()(x, torch.tensor([4.0])))


@pytest.mark.parametrize("name", ON_SIGMAS)
def test_steps_of_no_length_change_nothing(name):
    x = problems.normal(0, 2, 3, dtype=torch.float64) * 4
    noise = lambda sigma, sigma_next: torch.full_like(x, math.cos(sigma) + sigma_next)  # noqa: E731
    options = {"noise_sampler": noise} if S.SAMPLERS[name].noise else {}
    mixture = problems.Mixture(
        torch.tensor([0.5, 0.5]), torch.tensor([[0.0, 1, 2], [1, -1, 0]]), torch.tensor([0.5, 0.2])
    )
    want = run(name, mixture, x, [4.0, 3.0, 1.0, 0.5, 0.0], **options)
    sigmas = [4.0, 4.0, 3.0, 3.0, 3.0, 1.0, 0.5, 0.5, 0.0, 0.0]
    got = run(name, mixture, x, sigmas, **options)
    torch.testing.assert_close(got, want)
    # and with its own noise
    assert run(name, mixture, x, sigmas).isfinite().all()


@pytest.mark.parametrize("name", ON_SIGMAS)
@pytest.mark.parametrize("sigmas", [[], [3.0]])
def test_a_schedule_without_steps_returns_the_sample(name, sigmas):
    x = problems.normal(0, 2, 3)
    assert run(name, problems.Gaussian(), x, torch.tensor(sigmas)) is x


@pytest.mark.parametrize("name", ON_SIGMAS)
@pytest.mark.parametrize(
    ("sigmas", "message"),
    [
        (torch.ones(2, 3), r"sigmas must be 1-D, got shape \(2, 3\)"),
        (torch.tensor(3.0), r"sigmas must be 1-D, got shape \(\)"),
        (torch.tensor([3.0, math.nan, 0.0]), "finite and >= 0, got nan"),
        (torch.tensor([math.inf, 1.0, 0.0]), "finite and >= 0, got inf"),
        (torch.tensor([3.0, 1.0, -1.0]), "finite and >= 0, got -1"),
        (torch.tensor([3.0, 1.0, 2.0, 0.0]), r"turn at sigmas\[1\] = 1"),
        (torch.tensor([1.0, 2.0, 0.5]), r"turn at sigmas\[1\] = 2"),
    ],
)
def test_no_schedule_is_an_error(name, sigmas, message):
    with pytest.raises(ValueError, match=message):
        run(name, problems.Gaussian(), torch.ones(2, 3), sigmas)


@pytest.mark.parametrize("sigmas", [[[3.0, 1.0]], np.ones((2, 1)), 3.0, None])
def test_sequences_that_are_no_schedule(sigmas):
    with pytest.raises(ValueError, match=r"sigmas must be 1-D.*sequence of numbers, got"):
        S.sample_euler(problems.Gaussian(), torch.ones(2, 3), sigmas)


@pytest.mark.parametrize("name", ON_SIGMAS)
def test_noise_levels_of_all_sizes(name):
    for sigmas in ([1e12, 1e10, 3.0, 1e-10, 0.0], [80.0, 1e-8, 0.0], [1e-3, 9e-4, 0.0]):
        x = problems.normal(0, 2, 3) * sigmas[0]
        torch.manual_seed(0)
        assert run(name, problems.Gaussian(), x, sigmas).isfinite().all()


@pytest.mark.parametrize("name", STOCHASTIC)
def test_ascending_sigmas_are_an_error_where_noise_is_added(name):
    with pytest.raises(ValueError, match="sigmas ascend"):
        run(name, problems.Gaussian(), torch.ones(2, 3), torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize("name", ["euler", "heun", "dpm_2"])
def test_ascending_sigmas_are_an_error_with_churn(name):
    with pytest.raises(ValueError, match="sigmas ascend"):
        run(name, problems.Gaussian(), torch.ones(2, 3), torch.tensor([1.0, 2.0]), s_churn=1.0)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_ascending_sigmas_cannot_start_at_0(name):
    with pytest.raises(ValueError, match="can't start at 0"):
        run(name, problems.Gaussian(), torch.ones(2, 3), torch.tensor([0.0, 2.0]))


@pytest.mark.parametrize("name", NAMES)
def test_a_model_of_another_shape_is_an_error(name):
    with pytest.raises(ValueError, match=r"shaped as its input, \(2, 3\), got \(2, 2\)"):
        run(name, lambda x, sigma: x[:, :2], torch.ones(2, 3))
    with pytest.raises(ValueError, match="got tuple"):
        run(name, lambda x, sigma: (x, x), torch.ones(2, 3))


@pytest.mark.parametrize("sample", [S.sample_dpm_fast, S.sample_dpm_adaptive])
@pytest.mark.parametrize("ends", [(1.0, 1.0), (math.inf, 1.0), (0.0, 1.0), (math.nan, 1.0)])
def test_dpm_solver_ends(sample, ends):
    options = {"n": 3} if sample is S.sample_dpm_fast else {}
    with pytest.raises(ValueError, match="positive, finite and different"):
        sample(problems.Gaussian(), torch.ones(2, 3), *ends, **options)


def test_other_bad_options():
    model, x = problems.Gaussian(), torch.ones(2, 3)
    with pytest.raises(ValueError, match="at least one evaluation, got n = 0"):
        S.sample_dpm_fast(model, x, 0.1, 1.0, 0)
    with pytest.raises(ValueError, match="order must be at least 1"):
        S.sample_lms(model, x, [1.0, 0.0], order=0)
    with pytest.raises(ValueError, match="there are midpoint, heun"):
        S.sample_dpmpp_2m_sde(model, x, [1.0, 0.0], solver_type="mid")


# ------------------------------------------------------------------------------------ the table


def test_the_table_holds_every_sampler():
    functions = {n.removeprefix("sample_") for n in dir(S) if n.startswith("sample_")}
    assert functions == set(S.SAMPLERS) | set(S.FLOW_SAMPLERS)
    for name, info in S.SAMPLERS.items():
        assert info.function is getattr(S, f"sample_{name}")
        assert info.noise in ("", *S.NOISE_SOURCES)
        assert info.paper
        # Churn's is left out of the signature, by which clients decide; `sample` takes it.
        known = {"noise_sampler", "s_churn"} & set(parameters(name))
        assert len(known) == bool(info.noise), name
        assert ("sigmas" in parameters(name)) == info.takes_sigmas


@pytest.mark.parametrize("name", ON_SIGMAS)
def test_evaluations_per_step_are_as_the_table_says(name):
    calls = []

    def model(x, sigma):
        calls.append(1)
        return problems.Gaussian()(x, sigma)

    run(name, model, torch.ones(2, 3), [8.0, 4.0, 2.0, 1.0])
    # PNDM starts with three steps of Runge and Kutta.
    assert len(calls) == 3 * (4 if name == "pndm" else S.get_sampler(name).evaluations)


def test_an_unknown_sampler_names_the_nearest():
    assert S.get_sampler("sample_euler") is S.get_sampler("euler")
    with pytest.raises(ValueError, match="did you mean 'dpmpp_2m'"):
        S.get_sampler("dpmp_2m")


def test_eta_0_is_the_ode_sampler():
    x = problems.normal(0, 2, 3) * 4
    sigmas = S.get_sigmas_karras(6, 0.1, 4.0)
    for stochastic, ode in (
        ("euler_ancestral", "euler"),
        ("dpm_2_ancestral", "dpm_2"),
        ("dpmpp_2m_sde", "dpmpp_2m"),
        ("res_multistep_ancestral", "res_multistep"),
        ("ddim", "euler"),
    ):
        got = run(stochastic, problems.Gaussian(), x, sigmas, eta=0.0)
        assert torch.equal(got, run(ode, problems.Gaussian(), x, sigmas))


# ------------------------------------------------------------------------------- no host syncs


class NoReads(TorchDispatchMode):
    """Raises where a tensor's value is read on the host, as `item`, `bool` and `float` do."""

    READS = ("_local_scalar_dense", "equal", "nonzero", "is_nonzero", "allclose")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in self.READS:
            raise AssertionError(f"{func} reads a value from the device")
        return func(*args, **(kwargs or {}))


def test_no_reads_catches_reads():
    for read in (lambda t: t.item(), bool, lambda t: t > 0 and True, float):
        with NoReads(), pytest.raises(AssertionError, match="reads a value"):
            read(torch.ones(()))


@pytest.mark.parametrize("name", [n for n in NAMES if n != "dpm_adaptive"])
def test_loops_read_no_value(name):
    x = problems.normal(0, 2, 3)
    sigmas = torch.tensor([4.0, 2.0, 2.0, 1.0, 0.0])
    options = {"noise_sampler": S.make_noise_sampler(name, x, sigmas, [1, 2])}
    options = options if S.SAMPLERS[name].noise else {}
    if name == "restart":
        options["restarts"] = [(1.0, 3.0, 2, 2)]
    seen = []
    with NoReads():
        run(name, problems.Gaussian(), x, sigmas, callback=seen.append, **options)
        if name in DETERMINISTIC:
            run(name, problems.Gaussian(), x, sigmas)
    assert len(seen) >= 2


class Guided(nn.Module):
    """Two Gaussians, by a condition."""

    def forward(self, x, sigma, mean):
        return problems.Gaussian()(x, sigma) + 0.1 * mean[:, None]


def guided():
    """Guidance around guidance, in intervals at two depths."""
    strong = guidance.AutoguidedDenoiser(Guided(), Guided(), 2.0, combine=guidance.Rescaled())
    inner = guidance.IntervalDenoiser(strong, 0.5, 3.0)
    combine = guidance.APG(0.5, 2.5, -0.5)
    cfg = guidance.CFGDenoiser(inner, 3.0, combine=combine, mean=torch.zeros(1))
    dynamic = guidance.ThresholdedDenoiser(guidance.IntervalDenoiser(cfg, 0.1, 3.0), 1.0, 0.9)
    return guidance.GradientGuidedDenoiser(dynamic, lambda d: d.pow(2).sum(1), 0.1)


@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m", "dpmpp_2m_sde", "dpm_fast"])
def test_guidance_reads_no_value(name):
    x, extra = problems.normal(0, 2, 3), {"mean": torch.tensor([1.0, 2.0])}
    model, sigmas = guided(), [4.0, 2.0, 1.0, 0.0]
    options = {"extra_args": extra}
    if S.SAMPLERS[name].noise:
        options["noise_sampler"] = S.make_noise_sampler(name, x, sigmas, [1, 2])
    with NoReads():
        got = run(name, model, x, sigmas, **options)
    assert got.isfinite().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", [n for n in NAMES if n != "dpm_adaptive"])
def test_loops_never_wait_for_a_cuda_device(name):
    x = problems.normal(0, 2, 3).cuda()
    sigmas = torch.tensor([4.0, 2.0, 2.0, 1.0, 0.0])
    options = {"noise_sampler": lambda a, b: torch.randn_like(x)} if S.SAMPLERS[name].noise else {}
    if name == "restart":
        options["restarts"] = [(1.0, 3.0, 2, 2)]
    run(name, problems.Gaussian(), x, sigmas, **options)  # whatever is set up once
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(name, problems.Gaussian(), x, sigmas, **options)
        run(name, problems.Gaussian(), x, sigmas)  # with its own noise
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", [n for n in NAMES if n != "dpm_adaptive"])
def test_loops_run_on_tensors_without_values(name):
    x = torch.empty(2, 3, 4, 4, device="meta")
    options = {}
    if S.SAMPLERS[name].noise:
        options = {"noise_sampler": lambda sigma, sigma_next: torch.randn_like(x)}
    y = run(name, problems.Gaussian(), x, torch.tensor([4.0, 2.0, 1.0, 0.0]), **options)
    assert y.is_meta
    assert y.shape == x.shape


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m", "dpmpp_2m_sde"])
def test_whole_loops_compile_as_one_graph(name, backend):
    torch._dynamo.reset()
    x = problems.normal(0, 2, 3)
    noise = problems.normal(1, 2, 3)
    options = {"noise_sampler": lambda a, b: noise} if S.SAMPLERS[name].noise else {}
    sigmas = S.get_sigmas_karras(4, 0.1, 4.0).tolist()

    def sample(x):
        return run(name, problems.Gaussian(), x, sigmas, **options)

    compiled = torch.compile(sample, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(x), sample(x))


def test_a_loop_with_guidance_compiles_as_one_graph():
    x, extra = problems.normal(0, 2, 3), {"mean": torch.tensor([1.0, 2.0])}
    cfg = guidance.CFGDenoiser(Guided(), 3.0, mean=torch.zeros(1))
    model = guidance.ThresholdedDenoiser(guidance.IntervalDenoiser(cfg, 0.5, 3.0))

    def sample(x):
        return run("dpmpp_2m", model, x, [4.0, 2.0, 1.0, 0.0], extra_args=extra)

    compiled = torch.compile(sample, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), sample(x))


def test_the_guide_measures_every_sampler_and_schedule():
    guide = (Path(__file__).parents[2] / "docs" / "samplers.md").read_text()
    # the adaptive one can't be given a budget
    assert not [n for n in NAMES if f"| `{n}` |" not in guide and n != "dpm_adaptive"]
    assert not [n for n in S.SCHEDULES if f"| `{n}` |" not in guide and n != "polyexponential"]
    assert not [n for n in S.TABLE_SCHEDULES if f"get_sigmas_{n}" not in guide]
