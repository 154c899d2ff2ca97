"""Noise level schedules: `continuous` from two ends, `table` from a model's table of levels.

A schedule is a function here and a row of SCHEDULES; `grid` has what they share.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..common.text import unknown_name
from .continuous import (
    get_sigmas_cosine,
    get_sigmas_exponential,
    get_sigmas_karras,
    get_sigmas_kl_optimal,
    get_sigmas_laplace,
    get_sigmas_linear,
    get_sigmas_linear_quadratic,
    get_sigmas_polyexponential,
    get_sigmas_vp,
    vp_between,
)
from .grid import (
    Number,
    Sigmas,
    append_zero,
    check_ends,
    check_range,
    check_schedule,
    discard_penultimate,
    positive_range,
    read_sigmas,
)
from .search import search_levels
from .table import (
    TABLE_SCHEDULES,
    get_sigmas_align_your_steps,
    get_sigmas_beta,
    get_sigmas_ddim_uniform,
    get_sigmas_gits,
    get_sigmas_normal,
    get_sigmas_optimal_steps,
    get_sigmas_sgm_uniform,
    get_sigmas_simple,
)

__all__ = [
    "SCHEDULES",
    "TABLE_SCHEDULES",
    "Number",
    "Sigmas",
    "append_zero",
    "check_ends",
    "check_range",
    "discard_penultimate",
    "get_sigmas_align_your_steps",
    "get_sigmas_beta",
    "get_sigmas_cosine",
    "get_sigmas_ddim_uniform",
    "get_sigmas_exponential",
    "get_sigmas_gits",
    "get_sigmas_karras",
    "get_sigmas_kl_optimal",
    "get_sigmas_laplace",
    "get_sigmas_linear",
    "get_sigmas_linear_quadratic",
    "get_sigmas_normal",
    "get_sigmas_optimal_steps",
    "get_sigmas_polyexponential",
    "get_sigmas_sgm_uniform",
    "get_sigmas_simple",
    "get_sigmas_vp",
    "make_sigmas",
    "positive_range",
    "read_sigmas",
    "search_levels",
]

SCHEDULES: dict[str, Callable[..., Tensor]] = {
    "karras": get_sigmas_karras,
    "exponential": get_sigmas_exponential,
    "polyexponential": get_sigmas_polyexponential,
    "vp": vp_between,
    "linear": get_sigmas_linear,
    "cosine": get_sigmas_cosine,
    "kl_optimal": get_sigmas_kl_optimal,
    "laplace": get_sigmas_laplace,
    "linear_quadratic": get_sigmas_linear_quadratic,
}


def make_sigmas(
    name: str,
    n: int,
    sigma_min: Number,
    sigma_max: Number,
    device: torch.device | str = "cpu",
    *,
    penultimate: bool = True,
    **options: Any,
) -> Tensor:
    """The schedule called `name` in SCHEDULES. Returns (n + 1,), ending in 0.

    penultimate: False for n steps of a schedule of n + 1 whose last level before 0 is discarded.
    options go to the schedule's function (`rho`, `eps_s`). Raises ValueError for an unknown name,
    with the nearest ones, for one that needs a table rather than two ends, and where n, sigma_min
    and sigma_max make no schedule.
    """
    if name in TABLE_SCHEDULES:
        call = TABLE_SCHEDULES[name].__name__
        raise ValueError(
            f"schedule {name!r} needs a table of noise levels, not two ends; call "
            f"k_diffusion.sampling.{call}(n, table)"
        )
    if name not in SCHEDULES:
        raise unknown_name("schedule", name, SCHEDULES)
    if not penultimate:
        check_schedule(n, sigma_min, sigma_max)
        return discard_penultimate(
            SCHEDULES[name](n + 1, sigma_min, sigma_max, device=device, **options)
        )
    return SCHEDULES[name](n, sigma_min, sigma_max, device=device, **options)
