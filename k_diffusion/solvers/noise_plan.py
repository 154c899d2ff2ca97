"""How a run adds noise: the noise levels of its steps, and how far down a step goes before noise
brings the sample back up to the next level.

Every split keeps the variance exact: sigma_down^2 + sigma_up^2 = sigma_next^2.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, TypeAlias

import torch

from ..common import numbers
from .context import NoiseSampler
from .vp import vp_sigma, vp_time

# (sigma, sigma_next) -> (sigma_down, sigma_up)
Split: TypeAlias = Callable[[float, float], tuple[float, float]]
# (sigma, sigma_hat, sigma_next): noise takes the sample up to sigma_hat, the step down to the next
Hop: TypeAlias = tuple[float, float, float]
Plan: TypeAlias = Callable[[Sequence[float]], list[Hop]]


# ------------------------------------------------------------------------- noise after a step


def get_ancestral_step(sigma_from: Any, sigma_to: Any, eta: float = 1.0) -> tuple[Any, Any]:
    """The noise level to step down to, and the noise to add, in ancestral sampling.

    At eta = 1 the added noise has the variance of the forward process's posterior (DDPM,
    arXiv:2006.11239, equation 7, in variance-exploding form); at eta = 0 there is none, and the
    result is (sigma_to, 0.0). sigma_from, sigma_to: floats or tensors. Returns the same kind.
    """
    if not eta:
        return sigma_to, 0.0
    if not isinstance(eta, torch.Tensor):
        numbers.non_negative(eta=eta)
    if isinstance(sigma_from, torch.Tensor) or isinstance(sigma_to, torch.Tensor):
        sigma_to = torch.as_tensor(sigma_to)
        ratio = torch.where(sigma_to == 0, 0.0, sigma_to / sigma_from)
        sigma_up = torch.minimum(sigma_to, eta * sigma_to * (1 - ratio**2).clamp(min=0).sqrt())
        return (sigma_to**2 - sigma_up**2).clamp(min=0).sqrt(), sigma_up
    if sigma_to == 0:
        return 0.0, 0.0
    sigma_up = min(sigma_to, eta * sigma_to * math.sqrt(max(0.0, 1 - (sigma_to / sigma_from) ** 2)))
    return math.sqrt(sigma_to**2 - sigma_up**2), sigma_up


def get_sde_step(sigma: float, sigma_next: float, eta: float = 1.0) -> tuple[float, float]:
    """The split of the SDE solvers, DPM-Solver++ (arXiv:2211.01095, section 5) with a noise scale.

    With h = log(sigma / sigma_next), the ODE runs for (1 + eta) h and noise fills up the rest:
    sigma_down = sigma exp(-(1 + eta) h). At eta = 1 that is the reverse-time SDE, at 0 the ODE.
    """
    if not eta or sigma_next == 0:
        return sigma_next, 0.0
    eta_h = eta * math.log(sigma / sigma_next)
    return sigma_next * math.exp(-eta_h), sigma_next * math.sqrt(max(0.0, -math.expm1(-2 * eta_h)))


def ode(sigma: float, sigma_next: float) -> tuple[float, float]:
    """No noise: the probability-flow ODE."""
    return sigma_next, 0.0


def _renoise(sigma: float, sigma_next: float, sigma_min: float) -> tuple[float, float]:
    """All the way down to the denoised sample, then noise anew, less what it still has."""
    if sigma == sigma_next:
        return sigma, 0.0
    return 0.0, math.sqrt(max(0.0, sigma_next**2 - sigma_min**2))


def _tcd(sigma: float, sigma_next: float, eta: float) -> tuple[float, float]:
    """Down to the VP time (1 - eta) t of sigma_next, then noise: arXiv:2402.19159."""
    if not eta or sigma == sigma_next:
        return sigma_next, 0.0
    down = min(sigma_next, float(vp_sigma(max(0.0, 1 - eta) * vp_time(sigma_next))))
    return down, math.sqrt(sigma_next**2 - down**2)


def _flow(t: float, t_next: float, eta: float) -> tuple[float, float]:
    """Below t_next by eta (1 - t_next / t) of it; noise fills up what the signal's scale leaves.

    The sample is scaled by (1 - t_next) / (1 - t_down) between the two.
    """
    if not eta or t_next == 0 or t == t_next:
        return t_next, 0.0
    down = max(0.0, t_next * (1 + (t_next / t - 1) * eta))
    return down, math.sqrt(max(0.0, t_next**2 - (down * (1 - t_next) / (1 - down)) ** 2))


def _inside(s_tmin: float, s_tmax: float) -> Callable[[float], bool]:
    # Float32 rounding of a schedule must not decide whether its end is inside the interval.
    return lambda sigma: s_tmin * (1 - 1e-6) <= sigma <= s_tmax * (1 + 1e-6)


# ------------------------------------------------------------------------- noise before a step


def straight(sigmas: Sequence[float]) -> list[Hop]:
    """From each noise level to the next one."""
    return [(sigma, sigma, sigma_next) for sigma, sigma_next in pairwise(sigmas)]


def churned(sigmas: Sequence[float], s_churn: float, s_tmin: float, s_tmax: float) -> list[Hop]:
    """Up by a fixed factor before each step that starts in s_tmin to s_tmax.

    Karras et al. 2022 (arXiv:2206.00364), algorithm 2.
    """
    between = _inside(s_tmin, s_tmax)
    gamma = min(max(s_churn, 0.0) / (len(sigmas) - 1), math.sqrt(2) - 1)
    return [(s, s * (1 + gamma) if between(s) else s, n) for s, n in pairwise(sigmas)]


@dataclass(frozen=True)
class Restart:
    """An interval of noise levels that is run again: Xu et al. 2023 (arXiv:2306.14878), section 3.

    steps: in a pass from sigma_max down to sigma_min. times: passes. Raises ValueError
    unless 0 < sigma_min < sigma_max < inf, steps >= 1 and times >= 0.
    """

    sigma_min: float
    sigma_max: float
    steps: int
    times: int

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max < math.inf or self.steps < 1 or self.times < 0:
            raise ValueError(
                "a restart is (sigma_min, sigma_max, steps, times) with 0 < sigma_min < sigma_max "
                f"< inf, steps >= 1 and times >= 0, got {tuple(vars(self).values())}"
            )

    def hops(self, sigma: float, rho: float = 7.0) -> list[Hop]:
        """From sigma, the schedule's level nearest to sigma_min, up to sigma_max and down again.

        The levels on the way are Karras et al.'s.
        """
        lo, hi = sigma ** (1 / rho), self.sigma_max ** (1 / rho)
        inner = [(hi + (lo - hi) * i / self.steps) ** rho for i in range(1, self.steps)]
        first, *rest = straight([self.sigma_max, *inner, sigma])
        return [(sigma, *first[1:]), *rest] * self.times


def restarted(sigmas: Sequence[float], intervals: Sequence[Restart]) -> list[Hop]:
    """Down the schedule, and again through each interval on coming to its lower end.

    That end is the schedule's level nearest to sigma_min (in ratio). Intervals that aren't inside
    of the schedule are left out.
    """
    hops = straight(sigmas)
    positive = [s for s in sigmas if s > 0]
    inside = _inside(min(positive, default=0.0), max(positive, default=0.0))
    for interval in sorted(intervals, key=lambda r: r.sigma_min):
        if not (inside(interval.sigma_min) and inside(interval.sigma_max)):
            continue
        nearest = min(positive, key=lambda s: abs(math.log(s / interval.sigma_min)))
        at = next((i for i, hop in enumerate(hops) if hop[2] == nearest), None)
        if at is not None and nearest < interval.sigma_max:
            hops[at + 1 : at + 1] = interval.hops(nearest)
    return hops


# ------------------------------------------------------------------------- the noise of a run


@dataclass(frozen=True)
class Noise:
    """How a run adds noise.

    source: the row of NOISE_SOURCES to draw from if sampler is None. s_noise: a factor on all
    noise. plan: the noise levels of each step, with noise before it where the level rises; churns:
    whether noise is drawn before every step, as churn does. split: how far down a step goes before
    noise is added after it. rescale: (sigma_down, sigma_next) -> a factor on the sample between the
    step and that noise. asks: whether the noise sampler is asked after each step, also for none.
    active: whether any will be added, so that sigmas must descend.
    """

    source: str = ""
    sampler: NoiseSampler | None = None
    s_noise: float = 1.0
    plan: Plan = straight
    churns: bool = False
    split: Split = ode
    rescale: Callable[[float, float], float] | None = None
    asks: bool = False
    active: bool = False


NO_NOISE = Noise()


def churn(s_churn: float, s_tmin: float, s_tmax: float, s_noise: float) -> Noise:
    """Noise before each step: Karras et al. 2022, algorithm 2."""
    plan = partial(churned, s_churn=s_churn, s_tmin=s_tmin, s_tmax=s_tmax)
    return Noise("", None, s_noise, plan, churns=True, active=bool(s_churn))


def _after(split: Split, s_noise: float, sampler: NoiseSampler | None, active: bool) -> Noise:
    return Noise("independent", sampler, s_noise, split=split, asks=True, active=active)


def ancestral(eta: float, s_noise: float, sampler: NoiseSampler | None) -> Noise:
    """Noise after each step, as in DDPM."""
    return _after(partial(get_ancestral_step, eta=eta), s_noise, sampler, bool(eta))


def renoise(sigma_min: float, s_noise: float, sampler: NoiseSampler | None) -> Noise:
    """All noise anew after each step, but for the share of sigma_min: consistency models."""
    return _after(partial(_renoise, sigma_min=sigma_min), s_noise, sampler, True)


def tcd(eta: float, s_noise: float, sampler: NoiseSampler | None) -> Noise:
    """Noise from an earlier time up to that of the step's end: arXiv:2402.19159."""
    return _after(partial(_tcd, eta=eta), s_noise, sampler, bool(eta))


def flow(eta: float, s_noise: float, sampler: NoiseSampler | None) -> Noise:
    """Noise after each step of a rectified flow; its levels are times from 1 to 0."""

    def plan(times: Sequence[float]) -> list[Hop]:
        if max(times) > 1:
            raise ValueError(
                f"the times of a rectified flow lie between 0 and 1, got {max(times):g}; for "
                "noise levels take the sampler without _RF"
            )
        return straight(times)

    def rescale(down: float, t_next: float) -> float:
        return 1.0 if down == t_next else (1 - t_next) / (1 - down)

    split = partial(_flow, eta=eta)
    return replace(_after(split, s_noise, sampler, bool(eta)), plan=plan, rescale=rescale)


def between(eta: float, s_tmin: float, s_tmax: float) -> Callable[[float], float]:
    """eta by the noise level: within an interval, and 0 elsewhere."""
    inside = _inside(s_tmin, s_tmax)
    return lambda sigma: eta if inside(sigma) else 0.0


def sde(
    eta: float | Callable[[float], float],
    s_noise: float,
    sampler: NoiseSampler | None,
    active: bool | None = None,
) -> Noise:
    """Noise of a reverse-time SDE, after each step. eta: a number, or by the noise level."""

    def split(sigma: float, sigma_next: float) -> tuple[float, float]:
        return get_sde_step(sigma, sigma_next, eta(sigma) if callable(eta) else eta)

    active = bool(eta) if active is None else active
    return Noise("brownian", sampler, s_noise, split=split, active=active)


def inside(eta: float, s_noise: float, sampler: NoiseSampler | None) -> Noise:
    """Noise of a reverse-time SDE that the steps themselves ask for."""
    return Noise("brownian", sampler, s_noise, active=bool(eta))


def restart(intervals: Sequence[Restart], s_noise: float, sampler: NoiseSampler | None) -> Noise:
    """Noise that takes the sample up again, through each interval: arXiv:2306.14878."""
    plan = partial(restarted, intervals=intervals)
    return Noise("", sampler, s_noise, plan, active=bool(intervals))
