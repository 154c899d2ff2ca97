"""Schedules over a model's table, and between given noise levels."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import stats

from k_diffusion import external, sampling, schedules
from k_diffusion.schedules import TABLE_SCHEDULES

BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
ALPHAS = (1 - BETAS).cumprod(0)
MODEL = external.DiscreteSchedule(((1 - ALPHAS) / ALPHAS).sqrt().float(), False)
OF_MODELS = sorted(set(TABLE_SCHEDULES) - {"align_your_steps"})


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
    good = [1.0, 2.0] if name != "align_your_steps" else [2.0, 1.0]
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
