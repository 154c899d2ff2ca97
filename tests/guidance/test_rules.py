"""The combination rules of newer papers, against their formulas."""

import math
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from problems import normal
from torch import nn

from k_diffusion import sampling
from k_diffusion.guidance import (
    FDG,
    RULES,
    TCFG,
    AutoguidedDenoiser,
    CFGDenoiser,
    CFGZeroStar,
    linear,
)

SIGMA = torch.tensor([0.05, 0.9, 40.0], dtype=torch.float64)


def three(*shape, seed=0):
    """Two estimates with something in common, and a noised sample."""
    shape = shape or (2, 6, 5)
    base, a, b, noise = (normal(seed + i, 3, *shape, dtype=torch.float64) for i in range(4))
    level = SIGMA.view(-1, *[1] * len(shape))
    return base + 0.3 * a, base + 0.3 * b, base + level * noise


def rows(x):
    return x.flatten(1).numpy()


# ------------------------------------------------------------------------------------ CFG-Zero*


def test_cfg_zero_star_is_the_papers_formula_on_velocities():
    given, without, x = three()
    got = CFGZeroStar()(given, without, 4.0, SIGMA, x=x)
    for i, s in enumerate(SIGMA.tolist()):
        t = s / (1 + s)  # x_t = (1 - t) x0 + t noise is (1 - t) times the noised sample
        x_t = (1 - t) * rows(x)[i]
        v_c, v_u = ((x_t - rows(d)[i]) / t for d in (given, without))
        star = v_c @ v_u / (v_u @ v_u)
        v = star * v_u + 4.0 * (v_c - star * v_u)
        np.testing.assert_allclose(rows(got)[i], x_t - t * v, rtol=1e-9, atol=1e-9)


def test_cfg_zero_star_leaves_a_difference_at_right_angles_to_the_unconditional_velocity():
    given, without, x = three()
    velocity = lambda d: (x - (1 + SIGMA.view(3, 1, 1, 1)) * d).flatten(1)  # noqa: E731
    # Scale 0 is s* v_u: the closest multiple of the unconditional velocity.
    projected = velocity(CFGZeroStar()(given, without, 0.0, SIGMA, x=x))
    rest = velocity(given) - projected
    dots = (rest * velocity(without)).sum(1) / velocity(without).square().sum(1)
    torch.testing.assert_close(dots, torch.zeros_like(dots), atol=1e-12, rtol=0)


def test_cfg_zero_star_of_data_in_other_units_is_the_same():
    given, without, x = three()
    want = 8 * CFGZeroStar(3.0)(given, without, 4.0, SIGMA, x=x)
    got = CFGZeroStar(24.0, sigma_data=8.0)(8 * given, 8 * without, 4.0, 8 * SIGMA, x=8 * x)
    torch.testing.assert_close(got, want)


class TwoMeans(nn.Module):
    """The exact denoiser of N(mean, 1 / 4)."""

    def forward(self, x, sigma, mean):
        sigma2 = sigma[:, None] ** 2
        return (0.25 * x + sigma2 * mean[:, None]) / (0.25 + sigma2)


def test_zero_init_leaves_the_flows_first_steps_out():
    """Where the velocity is 0, (1 - t) times the noised sample doesn't move."""
    sigmas = torch.tensor([9.0, 3.0, 1.0, 0.5], dtype=torch.float64)
    x, seen = normal(0, 3, 4, dtype=torch.float64) * 9, []
    cond = {"mean": torch.full((3,), 2.0, dtype=torch.float64)}
    rule = CFGZeroStar(zero_above=sigmas[2])
    guided = CFGDenoiser(TwoMeans(), 3.0, combine=rule, mean=-cond["mean"])
    sampling.sample_euler(
        guided,
        x,
        sigmas,
        extra_args=cond,
        disable=True,
        callback=lambda d: seen.append(d["x"] / (1 + d["sigma"])),
    )
    torch.testing.assert_close(seen[1], x / 10)
    torch.testing.assert_close(seen[2], x / 10)
    # From there on it is the rule without.
    s = torch.ones(3, dtype=torch.float64)
    plain = CFGDenoiser(TwoMeans(), 3.0, combine=CFGZeroStar(), mean=-cond["mean"])
    torch.testing.assert_close(guided(x, s, **cond), plain(x, s, **cond))


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("sigma", [0.0, 1.0])
def test_rules_without_a_difference_are_the_estimate(name, sigma):
    given, _, x = three()
    x = x if sigma else given
    sigma = torch.full((3,), sigma, dtype=torch.float64)
    rule = RULES[name](1.0)
    rule = partial(rule, x=x) if getattr(rule, "takes_x", False) else rule
    torch.testing.assert_close(rule(given, given, 5.0, sigma), given)


# ------------------------------------------------------------------------------------------ TCFG


def test_tcfg_is_the_papers_singular_value_decomposition():
    given, without, x = three()
    got = TCFG()(given, without, 4.0, SIGMA, x=x)
    for i, s in enumerate(SIGMA.tolist()):
        noise = np.stack([(rows(x)[i] - rows(d)[i]) / s for d in (given, without)])
        v = np.linalg.svd(noise, full_matrices=False)[2]
        damped = (noise[1] @ v[0]) * v[0]
        guided = damped + 4.0 * (noise[0] - damped)
        np.testing.assert_allclose(rows(got)[i], rows(x)[i] - s * guided, rtol=1e-8, atol=1e-8)


def test_tcfg_drops_a_part_at_right_angles_that_is_smaller():
    """Of noise estimates at right angles the larger one is all that they share."""
    x = torch.zeros(1, 2, dtype=torch.float64)
    large, small = torch.tensor([[3.0, 0.0]]).double(), torch.tensor([[0.0, 1.0]]).double()
    torch.testing.assert_close(TCFG()(large, small, 2.0, SIGMA[:1], x=x), 2 * large)
    torch.testing.assert_close(TCFG()(small, large, 2.0, SIGMA[:1], x=x), 2 * small - large)


# ------------------------------------------------------------------------------------------- FDG


@pytest.mark.parametrize("shape", [(5,), (2, 1), (2, 9), (2, 6, 5), (1, 3, 4, 2)])
@pytest.mark.parametrize("bands", [1, 4])
def test_fdg_with_equal_scales_is_linear_guidance(shape, bands):
    given, without, _ = three(*shape)
    scale = 1 + SIGMA.view(-1, *[1] * len(shape))
    got = FDG([lambda sigma: 1 + sigma] * bands)(given, without, scale, SIGMA)
    torch.testing.assert_close(got, linear(given, without, scale, SIGMA))


@pytest.mark.parametrize(("cycles", "scale"), [(1, 2.0), (15, 10.0)])
def test_fdg_guides_a_wave_by_the_scale_of_its_frequency(cycles, scale):
    """A tenth of the way to the other scale at most; waves of 1 and 15 cycles on 32 pixels."""
    at = (torch.arange(32, dtype=torch.float64) + 0.5) / 32
    wave = torch.cos(2 * math.pi * cycles * at)
    given = wave.expand(1, 1, 32, 32)
    got = FDG(2.0)(given, torch.zeros_like(given), 10.0, SIGMA[:1])
    gain = (got * given).sum() / given.square().sum()
    assert gain.item() == pytest.approx(scale, abs=0.8)


def test_fdg_is_linear_and_has_no_direction():
    given, without, _ = three(2, 8, 7)
    rule = partial(FDG((3.0, 1.5)), scale=6.0, sigma=SIGMA)
    got = rule(given, without)
    torch.testing.assert_close(rule(2 * given + 1, 2 * without + 1), 2 * got + 1)
    torch.testing.assert_close(rule(given.flip(2, 3), without.flip(2, 3)).flip(2, 3), got)
    turned = rule(given.mT, without.mT).mT
    torch.testing.assert_close(turned, got)


# ------------------------------------------------------------------------------------------- all


@pytest.mark.parametrize("name", ["cfg-zero-star", "tcfg", "fdg"])
def test_rules_hold_for_autoguidance_too_and_compile_as_one_graph(name):
    class Shrink(nn.Module):
        def __init__(self, by):
            super().__init__()
            self.by = by

        def forward(self, x, sigma):
            return (x / (1 + sigma[:, None, None])).sub(self.by).tanh()

    guided = AutoguidedDenoiser(Shrink(0.9), Shrink(0.5), 3.0, combine=RULES[name](1.0))
    x = normal(0, 3, 4, 6, dtype=torch.float64)
    want = guided(x, SIGMA)
    assert (want - Shrink(0.9)(x, SIGMA)).abs().max() > 1e-3
    compiled = torch.compile(guided, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, SIGMA), want)


def test_a_rule_of_ones_own_may_take_the_noised_sample():
    class Halfway:
        takes_x = True

        def __call__(self, given, without, scale, sigma, *, x):
            return (given + x) / 2

    guided = AutoguidedDenoiser(TwoMeans(), TwoMeans(), 3.0, combine=Halfway())
    x, sigma = normal(0, 3, 4, dtype=torch.float64), SIGMA
    mean = torch.ones(3, dtype=torch.float64)
    torch.testing.assert_close(guided(x, sigma, mean=mean), (TwoMeans()(x, sigma, mean) + x) / 2)


def test_flow_and_schedule_agree_on_the_first_step():
    """zero_above the second level is the first step alone, in every precision."""
    sigmas = sampling.get_sigmas_karras(10, 0.03, 70.0)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        rule = CFGZeroStar(zero_above=sigmas[1])
        x = torch.ones(1, 3, dtype=torch.float32)
        moved = [
            not torch.equal(
                rule(x / 2, x / 3, 3.0, s.to(dtype).float().expand(1), x=x), x / (1 + s.to(dtype))
            )
            for s in (sigmas[0], *(b for _, b in pairwise(sigmas[:4])))
        ]
        assert moved[0] is False, dtype


@pytest.mark.parametrize(
    "make", [lambda: CFGZeroStar(0.0), lambda: CFGZeroStar(sigma_data=-1.0), lambda: FDG(())]
)
def test_bad_options_are_errors(make):
    with pytest.raises(ValueError, match="must"):
        make()
