"""Schedules over a model's table, and between given noise levels."""

import math
from itertools import combinations, pairwise

import numpy as np
import problems
import pytest
import torch
from scipy import stats

from k_diffusion import external, sampling, schedules
from k_diffusion.schedules import TABLE_SCHEDULES

BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
ALPHAS = (1 - BETAS).cumprod(0)
MODEL = external.DiscreteSchedule(((1 - ALPHAS) / ALPHAS).sqrt().float(), False)
BETWEEN = {"align_your_steps", "gits", "optimal_steps"}  # interpolate what they are given
OF_MODELS = sorted(set(TABLE_SCHEDULES) - BETWEEN)


def times(sigmas: torch.Tensor) -> np.ndarray:
    return MODEL.sigma_to_t(sigmas[:-1]).double().numpy()


@pytest.mark.parametrize("name", OF_MODELS)
@pytest.mark.parametrize("n", [1, 2, 3, 7, 50, 333, 999, 1000])
def test_n_steps_fall_strictly_to_0_inside_of_the_table(name, n):
    sigmas = TABLE_SCHEDULES[name](n, MODEL)
    assert sigmas.shape == (n + 1,)
    assert sigmas.dtype == torch.float32
    assert (sigmas.diff() < 0).all()
    assert sigmas[-1] == 0
    assert MODEL.sigma_min * 0.9999 <= sigmas[-2]
    assert sigmas[0] <= MODEL.sigma_max * 1.0001


@pytest.mark.parametrize("name", OF_MODELS)
def test_the_table_may_be_a_models_or_plain(name):
    want = TABLE_SCHEDULES[name](9, MODEL)
    assert torch.equal(TABLE_SCHEDULES[name](9, MODEL.sigmas), want)
    assert torch.equal(TABLE_SCHEDULES[name](9, MODEL.sigmas.tolist()), want)
    assert TABLE_SCHEDULES[name](9, MODEL, device="meta").is_meta


def test_normal_is_the_models_own():
    for n in (1, 10, 37):
        torch.testing.assert_close(
            sampling.get_sigmas_normal(n, MODEL), MODEL.get_sigmas(n), rtol=1e-4, atol=0
        )


def test_spacings_in_time():
    at = {name: times(TABLE_SCHEDULES[name](10, MODEL)) for name in OF_MODELS}
    np.testing.assert_allclose(at["normal"], np.linspace(999, 0, 10), atol=0.01)
    np.testing.assert_allclose(at["sgm_uniform"], 999 - 99.9 * np.arange(10), atol=0.01)
    np.testing.assert_allclose(at["simple"], 999 - 100 * np.arange(10), atol=0.01)
    np.testing.assert_allclose(at["ddim_uniform"], 901 - 100 * np.arange(10), atol=0.01)
    np.testing.assert_allclose(
        stats.beta.cdf(at["beta"] / 999, 0.6, 0.6), np.linspace(1, 0, 10), atol=1e-3
    )


def test_steps_that_do_not_divide_the_table():
    np.testing.assert_allclose(
        times(sampling.get_sigmas_simple(7, MODEL)), [999, 857, 714, 571, 428, 285, 142], atol=1.01
    )
    np.testing.assert_allclose(
        times(sampling.get_sigmas_ddim_uniform(7, MODEL)), 1 + 142 * np.arange(6, -1, -1), atol=0.01
    )


def test_beta_is_uniform_at_1_and_shifts_with_its_parameters():
    even = sampling.get_sigmas_beta(20, MODEL, alpha=1.0, beta=1.0)
    torch.testing.assert_close(even, sampling.get_sigmas_normal(20, MODEL), rtol=1e-5, atol=0)
    low = sampling.get_sigmas_beta(20, MODEL, alpha=0.3)[5:15]
    assert (low < sampling.get_sigmas_beta(20, MODEL)[5:15]).all()


def test_align_your_steps_interpolates_between_given_levels():
    table = [14.6, 6.5, 3.9, 2.7, 1.9, 1.4, 1.0, 0.65, 0.4, 0.16, 0.03]
    same = sampling.get_sigmas_align_your_steps(11, table)
    torch.testing.assert_close(same, torch.tensor([*table, 0.0]))
    assert torch.equal(sampling.get_sigmas_align_your_steps(11, [*table, 0.0]), same)
    fine = sampling.get_sigmas_align_your_steps(21, torch.tensor(table))
    torch.testing.assert_close(fine[:-1:2], same[:-1])
    middle = [math.sqrt(a * b) for a, b in pairwise(table)]
    torch.testing.assert_close(fine[1:-1:2], torch.tensor(middle))
    assert sampling.get_sigmas_align_your_steps(1, table).tolist() == pytest.approx([14.6, 0])


@pytest.mark.parametrize("name", sorted(TABLE_SCHEDULES))
def test_no_table_is_an_error(name):
    make = TABLE_SCHEDULES[name]
    good = [1.0, 2.0] if name not in BETWEEN else [2.0, 1.0]
    with pytest.raises(ValueError, match="at least one step, got n = 0"):
        make(0, good)
    for bad in ([], [[1.0, 2.0]], good[::-1], [1.0, math.nan, 3.0], [3.0, math.nan, 1.0]):
        with pytest.raises(ValueError, match="table"):
            make(2, bad)


def test_other_bad_options():
    for name in ("simple", "ddim_uniform"):
        with pytest.raises(ValueError, match="has 3 noise levels, too few for n = 4"):
            TABLE_SCHEDULES[name](4, [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="alpha and beta must be positive"):
        sampling.get_sigmas_beta(3, MODEL, alpha=0.0)
    with pytest.raises(ValueError, match="don't fall strictly"):
        sampling.get_sigmas_normal(4, [1.0, 1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match=r"needs a table .*\.get_sigmas_sgm_uniform\(n, table\)"):
        schedules.make_sigmas("sgm_uniform", 5, 0.1, 10.0)


def test_searched_levels_are_the_cheapest_path():
    rng = np.random.default_rng(0)
    costs = rng.random((7, 7))
    paths = [[0, *inner, 6] for inner in combinations(range(1, 6), 2)]
    want = min(paths, key=lambda p: sum(costs[a, b] for a, b in pairwise(p)))
    assert sampling.search_levels(costs, 3) == want
    assert sampling.search_levels(costs, 6) == list(range(7))
    for bad in (np.ones((2, 3)), np.ones(4)):
        with pytest.raises(ValueError, match="costs must be"):
            sampling.search_levels(bad, 1)
    with pytest.raises(ValueError, match="1 <= n <= 6"):
        sampling.search_levels(costs, 7)


def test_euler_on_searched_levels_beats_even_ones():
    """The cost is GITS's: the error of one Euler step against the exact trajectory."""
    problem, x = problems.Gaussian(0.3, 0.5), problems.normal(0, 64, 2, dtype=torch.float64) * 10
    fine = torch.linspace(10.0, 0.05, 40, dtype=torch.float64)
    path = [problem.ode_map(x, 10.0, float(s)) for s in fine]
    costs = np.zeros((40, 40))
    for i, j in combinations(range(40), 2):
        step = sampling.sample_euler(problem, path[i], fine[[i, j]], disable=True)
        costs[i, j] = problems.rms(step - path[j])
    found = fine[sampling.search_levels(costs, 6)]
    even = [*fine[:: 39 // 6][:6].tolist(), float(fine[-1])]
    errors = [
        problems.rms(sampling.sample_euler(problem, x, sigmas, disable=True) - path[-1])
        for sigmas in (found, torch.tensor(even, dtype=torch.float64))
    ]
    assert errors[0] < 0.5 * errors[1]
    got = sampling.get_sigmas_gits(7, found)
    torch.testing.assert_close(got[:-1].double(), found, rtol=1e-6, atol=1e-6)


def test_tables_by_their_steps():
    tables = {2: [14.0, 3.0, 0.0], 4: [14.0, 6.0, 2.0, 0.5, 0.0]}
    assert sampling.get_sigmas_gits(2, tables).tolist() == pytest.approx([14.0, 3.0, 0.0])
    assert sampling.get_sigmas_gits(4, tables).tolist() == pytest.approx(tables[4])
    assert sampling.get_sigmas_gits(7, tables)[[0, -2]].tolist() == pytest.approx([14.0, 0.5])
    assert sampling.get_sigmas_optimal_steps(3, [0.99, 0.5, 0.01])[1].item() == pytest.approx(0.5)
    with pytest.raises(ValueError, match="at least one"):
        sampling.get_sigmas_gits(3, {})
