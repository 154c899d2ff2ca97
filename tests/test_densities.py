import math
from itertools import pairwise
from types import SimpleNamespace

import golden
import numpy as np
import pytest
import torch
from scipy import stats
from torch.overrides import TorchFunctionMode

from k_diffusion import densities as D

N = 20_000


def logistic(sigma, loc, scale):
    return 1 / (1 + math.exp(-(math.log(sigma) - loc) / scale))


def truncated(cdf, low, high):
    return lambda x: (cdf(x) - cdf(low)) / (cdf(high) - cdf(low))


def split_normal_cdf(x, loc, s1, s2):
    z = math.log(x) - loc
    if z < 0:
        return 2 * s1 / (s1 + s2) * stats.norm.cdf(z / s1)
    return (s1 + s2 * (2 * stats.norm.cdf(z / s2) - 1)) / (s1 + s2)


def v_cdf(x, sigma_data):
    return 2 / math.pi * math.atan(x / sigma_data)


# name: (draw, closed-form CDF)
DENSITIES = {
    "lognormal": (
        lambda shape, **kw: D.rand_log_normal(shape, -1.2, 1.2, **kw),
        lambda x: stats.norm.cdf(math.log(x), -1.2, 1.2),
    ),
    "loglogistic": (
        lambda shape, **kw: D.rand_log_logistic(shape, math.log(0.5), 0.5, **kw),
        lambda x: logistic(x, math.log(0.5), 0.5),
    ),
    "loglogistic, truncated": (
        lambda shape, **kw: D.rand_log_logistic(shape, 0.2, 0.7, 0.3, 4.0, **kw),
        truncated(lambda x: logistic(x, 0.2, 0.7), 0.3, 4.0),
    ),
    "loguniform": (
        lambda shape, **kw: D.rand_log_uniform(shape, 0.01, 80.0, **kw),
        lambda x: math.log(x / 0.01) / math.log(8000),
    ),
    "v-diffusion": (
        lambda shape, **kw: D.rand_v_diffusion(shape, 0.5, **kw),
        lambda x: v_cdf(x, 0.5),
    ),
    "v-diffusion, truncated": (
        lambda shape, **kw: D.rand_v_diffusion(shape, 0.5, 0.1, 3.0, **kw),
        truncated(lambda x: v_cdf(x, 0.5), 0.1, 3.0),
    ),
    "split-lognormal": (
        lambda shape, **kw: D.rand_split_log_normal(shape, -1.0, 0.5, 1.5, **kw),
        lambda x: split_normal_cdf(x, -1.0, 0.5, 1.5),
    ),
    # One noise resolution: v-diffusion with sigma_data scaled by image_d / noise_d.
    "cosine-interpolated": (
        lambda shape, **kw: D.rand_cosine_interpolated(shape, 256, 64, 64, 0.5, **kw),
        truncated(lambda x: v_cdf(x, 0.5 * 256 / 64), 1e-3, 1e3),
    ),
}
all_densities = pytest.mark.parametrize(("draw", "cdf"), DENSITIES.values(), ids=DENSITIES.keys())


@pytest.fixture
def draw_constant(monkeypatch):
    """Make torch.rand return a constant."""

    def set_(u):
        monkeypatch.setattr(
            torch, "rand", lambda shape, **kw: torch.full(shape, u, dtype=kw.get("dtype"))
        )

    return set_


@all_densities
@pytest.mark.parametrize("stratified", [False, True])
def test_draws_follow_their_cdf(draw, cdf, stratified):
    torch.manual_seed(0)
    with D.enable_stratified(disable=not stratified):
        sigma = draw([N])
    result = stats.kstest(sigma.double().numpy(), np.vectorize(cdf))
    assert result.pvalue > 0.01


@pytest.mark.parametrize("name", sorted(set(DENSITIES) - {"split-lognormal"}))
def test_stratified_draws_fill_every_stratum(name):
    draw, cdf = DENSITIES[name]
    n, groups = 16, 3
    u = []
    for group in range(groups):
        with D.enable_stratified(group, groups):
            u += [cdf(x) for x in draw([n], dtype=torch.float64).tolist()]
    assert sorted(math.floor(x * n * groups) for x in u) == list(range(n * groups))


def test_cosine_interpolated_is_low_at_the_noisy_end_and_high_at_the_clean_end(
    draw_constant,
):
    def at(u, *noise_d):
        draw_constant(u)
        return D.rand_cosine_interpolated([1], 256, *noise_d, dtype=torch.float64).item()

    assert at(0.0, 32, 256) == pytest.approx(1e3, rel=1e-6)
    assert at(1 - 2**-53, 32, 256) == pytest.approx(1e-3, rel=1e-6)
    for u in (0.1, 0.5, 0.8):  # the logarithms are interpolated linearly in u
        low, high, both = (math.log(at(u, *d)) for d in ((32, 32), (256, 256), (32, 256)))
        assert both == pytest.approx((1 - u) * low + u * high)
        assert low > high


@all_densities
def test_dtype_shape_and_generator(draw, cdf):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        a, b = (draw([3, 5], dtype=dtype, generator=torch.Generator().manual_seed(1)) for _ in "ab")
        assert a.dtype == dtype
        assert a.shape == (3, 5)
        assert torch.equal(a, b)
        assert (a > 0).all()


@all_densities
@pytest.mark.parametrize("u", [0.0, 1 - 2**-24])
def test_the_extreme_draws_are_positive_and_finite(draw_constant, draw, cdf, u):
    draw_constant(u)
    sigma = draw([4])
    assert (sigma > 0).all()
    assert sigma.isfinite().all()


@all_densities
def test_no_float64_on_devices_without_it(monkeypatch, draw, cdf):
    class NoFloat64(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            assert not isinstance(out, torch.Tensor) or out.dtype != torch.float64
            return out

    assert D._wide("mps") == torch.float32
    monkeypatch.setattr(D, "_NO_FLOAT64", ("cpu",))
    with NoFloat64():
        assert draw([4]).isfinite().all()


@pytest.mark.parametrize(
    ("name", "draw"),
    [
        ("lognormal", lambda: D.rand_log_normal([32], -1.2, 1.2)),
        ("loglogistic", lambda: D.rand_log_logistic([32], math.log(0.5), 0.5, 0.01, 80.0)),
        ("loguniform", lambda: D.rand_log_uniform([32], 0.01, 80.0)),
        ("vdiff", lambda: D.rand_v_diffusion([32], 0.5, 1e-3, 1e3)),
        ("split", lambda: D.rand_split_log_normal([32], -1.0, 0.5, 1.5)),
        ("cosint", lambda: D.rand_cosine_interpolated([32], 32, 32, 32, 0.5)),
    ],
)
def test_seeded_draws_are_the_published_ones(name, draw):
    torch.manual_seed(5)
    torch.testing.assert_close(draw(), golden.load(f"density_{name}")[0]["s"], rtol=2e-5, atol=0)


# ---------------------------------------------------------------- stratification


@pytest.mark.parametrize(("n", "groups"), [(1, 1), (8, 1), (5, 3), (7, 4)])
def test_strata_of_all_groups_are_a_permutation(n, groups):
    u = [
        D.stratified_uniform([2, n], group, groups, dtype=torch.float64) for group in range(groups)
    ]
    strata = (torch.cat(u, dim=1) * n * groups).floor()
    assert torch.equal(strata.sort(dim=1).values, torch.arange(n * groups).double().expand(2, -1))


def test_strata_of_all_processes_and_accumulation_steps_are_a_permutation():
    n, processes, steps = 4, 3, 2
    u = []
    for rank in range(processes):
        accelerator = SimpleNamespace(num_processes=processes, process_index=rank)
        for step in range(steps):
            with D.enable_stratified_accelerate(accelerator, step=step, steps=steps):
                u.append(D.stratified_with_settings([n], dtype=torch.float64))
    total = n * processes * steps
    assert (torch.cat(u) * total).floor().sort().values.tolist() == list(range(total))


def test_stratified_draws_stay_below_one(draw_constant):
    draw_constant(1 - 2**-24)
    u = D.stratified_uniform([999], 2, 3)
    assert u.max() < 1
    assert all(a < b for a, b in pairwise(u.tolist()))


def test_stratified_draws_are_uniform_within_strata():
    torch.manual_seed(0)
    u = D.stratified_uniform([N // 4, 4], dtype=torch.float64)
    assert stats.kstest((u * 4).frac().flatten().numpy(), "uniform").pvalue > 0.01


def test_stratification_lowers_the_variance_of_a_mean():
    torch.manual_seed(0)
    independent = torch.rand(500, 16).mean(1).var()
    assert D.stratified_uniform([500, 16]).mean(1).var() < independent / 100


def test_settings_nest_and_are_restored():
    def draw():
        torch.manual_seed(0)
        return D.stratified_with_settings([8])

    plain = draw()
    stratified = (plain + torch.arange(1, 16, 2)) / 16
    with D.enable_stratified(1, 2):
        assert torch.equal(draw(), stratified)
        with D.enable_stratified(disable=True):
            assert torch.equal(draw(), plain)
        assert torch.equal(draw(), stratified)
    assert torch.equal(draw(), plain)
    with pytest.raises(KeyError), D.enable_stratified():
        raise KeyError
    assert torch.equal(draw(), plain)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize("group", [(2, 2), (-1, 2), (0, 0)])
def test_a_group_out_of_range_is_an_error(group):
    with pytest.raises(ValueError, match="0 <= group < groups"), D.enable_stratified(*group):
        pass
    with pytest.raises(ValueError, match="0 <= group < groups"):
        D.stratified_uniform([4], *group)


@pytest.mark.parametrize(
    "draw",
    [
        lambda: D.rand_log_normal([2], scale=0.0),
        lambda: D.rand_log_logistic([2], scale=-1.0),
        lambda: D.rand_log_logistic([2], min_value=2.0, max_value=1.0),
        lambda: D.rand_log_uniform([2], 0.0, 1.0),
        lambda: D.rand_log_uniform([2], 2.0, 1.0),
        lambda: D.rand_v_diffusion([2], 0.0),
        lambda: D.rand_split_log_normal([2], 0.0, -1.0, 1.0),
        lambda: D.rand_cosine_interpolated([2], 32, 0, 32),
        lambda: D.rand_cosine_interpolated([2], 32, 32, 32, min_value=0.0),
    ],
)
def test_parameters_out_of_range_are_errors(draw):
    with pytest.raises(ValueError, match=r"must be positive|min_value < max_value"):
        draw()
