"""The table of samplers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from ..common.text import unknown_name


@dataclass(frozen=True)
class SamplerInfo:
    """A row of SAMPLERS.

    order: of convergence, without noise. evaluations: of the model, per step. paper: its source.
    noise: where its noise comes from, a row of NOISE_SOURCES, or "" if it takes none. stochastic:
    whether it adds noise by default. takes_sigmas: called with a schedule, rather than with
    sigma_min, sigma_max and its own number of evaluations or tolerance.
    """

    name: str
    function: Callable[..., Any]
    order: int
    evaluations: int
    paper: str
    noise: str = ""
    stochastic: bool = False
    takes_sigmas: bool = True


SAMPLERS: dict[str, SamplerInfo] = {}
F = TypeVar("F", bound=Callable[..., Any])


def sampler(**row: Any) -> Callable[[F], F]:
    """Makes a function a sampler: it runs without gradients and is a row of SAMPLERS.

    row: the fields of `SamplerInfo`, by name.
    """

    def register(function: F) -> F:
        function = torch.no_grad()(function)
        name = function.__name__.removeprefix("sample_")
        SAMPLERS[name] = SamplerInfo(name, function, **row)
        return function

    return register


def get_sampler(name: str) -> SamplerInfo:
    """The row of SAMPLERS called `name`, such as "euler". Else a ValueError with the nearest."""
    if name.removeprefix("sample_") not in SAMPLERS:
        raise unknown_name("sampler", name, sorted(SAMPLERS))
    return SAMPLERS[name.removeprefix("sample_")]
