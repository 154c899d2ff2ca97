"""What a sampler's door needs: its arguments' types, how its run adds noise, and the loop."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

from torch import Tensor

from ..schedules import Sigmas
from . import levels
from .context import Step

Model: TypeAlias = Callable[..., Tensor]
Args: TypeAlias = Mapping[str, Any] | None
Callback: TypeAlias = Callable[[dict[str, Any]], Any] | None
NoiseSampler: TypeAlias = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Noise:
    """How a run adds noise.

    source: the row of NOISE_SOURCES to draw from if sampler is None. s_noise: a factor on all
    noise. plan: the noise levels of each step, with noise before it where the level rises; churns:
    whether noise is drawn before every step, as churn does. split: how far down a step goes before
    noise is added after it. active: whether any will be added, so that sigmas must descend.
    """

    source: str = ""
    sampler: NoiseSampler | None = None
    s_noise: float = 1.0
    plan: levels.Plan = levels.straight
    churns: bool = False
    split: levels.Levels = levels.ode
    active: bool = False


NO_NOISE = Noise()


def churn(
    s_churn: float, s_tmin: float, s_tmax: float, s_noise: float, sampler: NoiseSampler | None
) -> Noise:
    """Noise before each step: Karras et al. 2022, algorithm 2."""
    plan = partial(levels.churn, s_churn=s_churn, s_tmin=s_tmin, s_tmax=s_tmax)
    return Noise("", sampler, s_noise, plan, churns=True, active=bool(s_churn))


def ancestral(eta: float, s_noise: float, sampler: NoiseSampler | None) -> Noise:
    """Noise after each step, as in DDPM."""
    return Noise("independent", sampler, s_noise, split=levels.ancestral(eta), active=bool(eta))


def sde(
    eta: float,
    s_noise: float,
    sampler: NoiseSampler | None,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
) -> Noise:
    """Noise of a reverse-time SDE, after each step that starts in s_tmin to s_tmax."""
    split = levels.sde(eta, s_tmin, s_tmax)
    return Noise("brownian", sampler, s_noise, split=split, active=bool(eta))


def run(
    step: Step,
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: Args,
    callback: Callback,
    disable: bool | None,
    noise: Noise = NO_NOISE,
) -> Tensor:
    """The loop in `sampling`."""
    from .. import sampling  # at run time: it imports the doors

    return sampling._run(step, model, x, sigmas, extra_args, callback, disable, noise)


def check_order(order: int, most: int, name: str = "order") -> None:
    """Raises ValueError unless 1 <= order <= most."""
    if not 1 <= order <= most:
        raise ValueError(f"{name} must be 1 to {most}, got {order}")
