"""The table of samplers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from ..cli import aligned
from ..schedules import unknown_name


@dataclass(frozen=True)
class SamplerInfo:
    """A row of SAMPLERS.

    order: of convergence, without noise. evaluations: of the model, a step. reference: the paper.
    noise: where its noise comes from, a row of NOISE_SOURCES, or "" if it takes none. stochastic:
    whether it adds noise by default. takes_sigmas: called with a schedule, rather than with
    sigma_min, sigma_max and its own number of evaluations or tolerance.
    """

    name: str
    function: Callable[..., Any]
    order: int
    evaluations: int
    reference: str
    noise: str = ""
    stochastic: bool = False
    takes_sigmas: bool = True


SAMPLERS: dict[str, SamplerInfo] = {}
F = TypeVar("F", bound=Callable[..., Any])


def sampler(order: int, evaluations: int, reference: str, **info: Any) -> Callable[[F], F]:
    """Makes a function a sampler: it runs without gradients and is a row of SAMPLERS."""

    def register(function: F) -> F:
        function = torch.no_grad()(function)
        name = function.__name__.removeprefix("sample_")
        SAMPLERS[name] = SamplerInfo(name, function, order, evaluations, reference, **info)
        return function

    return register


def get_sampler(name: str) -> SamplerInfo:
    """The row of SAMPLERS called `name`, such as "euler". Else a ValueError with the nearest."""
    if name.removeprefix("sample_") not in SAMPLERS:
        raise unknown_name("sampler", name, SAMPLERS)
    return SAMPLERS[name.removeprefix("sample_")]


def sampler_table() -> str:
    """SAMPLERS as text, a row a line: first those that need no noise."""
    rows = [("sampler", "order", "evaluations", "stochastic", "reference")]
    for info in sorted(SAMPLERS.values(), key=lambda info: (info.stochastic, info.name)):
        stochastic = "yes" if info.stochastic else "no"
        rows.append((info.name, str(info.order), str(info.evaluations), stochastic, info.reference))
    return "\n".join(aligned(rows))
