"""Noise level schedules over a table: that of a model's training, or one to interpolate.

A model's table is a `DiscreteSchedule` (`external`), whatever has its `sigmas`, or these: (T,),
ascending and positive. Time t is the index, from 0 to T - 1, and between indices log sigma is
linear in it. Like those of `continuous` they have n + 1 strictly decreasing values, the last one 0,
in float32. All of them raise ValueError for n < 1 and for what is no such table.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from scipy import special
from torch import Tensor

from .grid import finish

Table: TypeAlias = Any  # of a model: an object with `sigmas`, a tensor, or a sequence of floats
Device: TypeAlias = torch.device | str


def _logs(n: int, table: Table) -> np.ndarray:
    """The logarithms of a model's table, checked."""
    if n < 1:
        raise ValueError(f"a schedule needs at least one step, got n = {n}")
    sigmas = torch.as_tensor(getattr(table, "sigmas", table)).double().cpu().numpy()
    if sigmas.ndim != 1 or not len(sigmas):
        raise ValueError(
            f"a model's table of noise levels must be 1-D and not empty, got {sigmas.shape}"
        )
    if not (sigmas[0] > 0 and sigmas[-1] < math.inf and (np.diff(sigmas) >= 0).all()):
        raise ValueError(
            "a model's table of noise levels must be positive, finite and ascending, got "
            f"{sigmas[0]:g} to {sigmas[-1]:g}; flip a descending one"
        )
    return np.log(sigmas)


def _at(logs: np.ndarray, t: np.ndarray, device: Device) -> Tensor:
    """The schedule of the noise levels at times t."""
    return finish(np.exp(np.interp(t, np.arange(len(logs)), logs)), device)


def _whole_steps(n: int, logs: np.ndarray) -> int:
    """T, if it has n different indices."""
    if n > len(logs):
        raise ValueError(f"the table has {len(logs)} noise levels, too few for n = {n} steps")
    return len(logs)


def get_sigmas_normal(n: int, table: Table, device: Device = "cpu") -> Tensor:
    """Equally spaced in t, from T - 1 to 0: `DiscreteSchedule.get_sigmas`. Returns (n + 1,)."""
    logs = _logs(n, table)
    return _at(logs, np.linspace(len(logs) - 1, 0, n), device)


def get_sigmas_sgm_uniform(n: int, table: Table, device: Device = "cpu") -> Tensor:
    """Equally spaced in t from T - 1 to 0, but 0 itself is sigma = 0. Returns (n + 1,).

    "Trailing" in Lin et al. 2023 (arXiv:2305.08891), table 2.
    """
    logs = _logs(n, table)
    return _at(logs, np.linspace(len(logs) - 1, 0, n + 1)[:-1], device)


def get_sigmas_simple(n: int, table: Table, device: Device = "cpu") -> Tensor:
    """Every (T / n)-th level of the table from its last one down. Returns (n + 1,)."""
    logs = _logs(n, table)
    size = _whole_steps(n, logs)
    return _at(logs, size - 1 - np.arange(n) * size // n, device)


def get_sigmas_ddim_uniform(n: int, table: Table, device: Device = "cpu") -> Tensor:
    """Every floor(T / n)-th level from t = 1 up, in reverse. Returns (n + 1,).

    "Leading" in Lin et al. 2023 (arXiv:2305.08891), table 2: DDIM's, which leaves out the top of
    the table, where training starts. At n = T it starts from t = 0.
    """
    logs = _logs(n, table)
    size = _whole_steps(n, logs)
    stride = size // n
    first = min(1, size - 1 - (n - 1) * stride)
    return _at(logs, first + stride * np.arange(n)[::-1], device)


def get_sigmas_beta(
    n: int, table: Table, alpha: float = 0.6, beta: float = 0.6, device: Device = "cpu"
) -> Tensor:
    """Quantiles of a Beta distribution of t: Lee et al. 2024 (arXiv:2407.12173).

    Below 1, alpha makes for more steps at low noise levels, beta for more at high ones. Returns
    (n + 1,).
    """
    logs = _logs(n, table)
    if not (alpha > 0 and beta > 0):
        raise ValueError(f"alpha and beta must be positive, got {alpha} and {beta}")
    t = special.betaincinv(alpha, beta, np.linspace(1, 0, n)) * (len(logs) - 1)
    return _at(logs, t, device)


def _between_levels(n: int, table: Tensor | Sequence[float], device: Device) -> Tensor:
    """n levels of a descending table, log-linearly between its own, and a 0."""
    levels = torch.as_tensor(table).double().cpu()
    levels = levels[:-1] if levels.ndim == 1 and len(levels) and levels[-1] == 0 else levels
    if levels.ndim != 1 or len(levels) < 2 or not (levels.diff() < 0).all():
        raise ValueError(
            "the table must be two or more descending noise levels, got "
            f"{levels.tolist() if levels.ndim == 1 else tuple(levels.shape)}"
        )
    logs = _logs(n, levels.flip(0))
    return _at(logs, np.linspace(len(logs) - 1, 0, n), device)


def get_sigmas_align_your_steps(
    n: int, table: Tensor | Sequence[float], device: Device = "cpu"
) -> Tensor:
    """n noise levels of a given schedule, log-linearly between its own: arXiv:2404.14507.

    table: (k,), the optimised noise levels, descending and positive but for a final 0, which is
    left out; at least two. Returns (n + 1,), ending in 0.
    """
    return _between_levels(n, table, device)


def get_sigmas_gits(
    n: int,
    table: Tensor | Sequence[float] | Mapping[int, Sequence[float]],
    device: Device = "cpu",
) -> Tensor:
    """Noise levels from the trajectory's geometry: GITS (arXiv:2405.11326).

    table: the levels that the search gave, (steps + 1,), descending, the last one 0 or not, or a
    dict of them by the number of steps. One that has n steps is taken as it is, else the longest is
    interpolated log-linearly. `search_levels` makes such a table. Returns (n + 1,), ending in 0.
    """
    if isinstance(table, Mapping):
        if not table:
            raise ValueError("a dict of GITS tables must have at least one; pass one by its steps")
        table = table[n] if n in table else table[max(table)]
    return _between_levels(n, table, device)


def get_sigmas_optimal_steps(
    n: int, table: Tensor | Sequence[float], device: Device = "cpu"
) -> Tensor:
    """The levels of an optimised schedule: OptimalSteps (arXiv:2503.21774).

    table: (k,), noise levels, or the times of a flow model, descending and positive but for a final
    0; `search_levels` makes one. Others than their number are interpolated log-linearly. Returns
    (n + 1,), in the table's units, ending in 0.
    """
    return _between_levels(n, table, device)


TABLE_SCHEDULES: dict[str, Callable[..., Tensor]] = {
    "normal": get_sigmas_normal,
    "sgm_uniform": get_sigmas_sgm_uniform,
    "simple": get_sigmas_simple,
    "ddim_uniform": get_sigmas_ddim_uniform,
    "beta": get_sigmas_beta,
    "align_your_steps": get_sigmas_align_your_steps,
    "gits": get_sigmas_gits,
    "optimal_steps": get_sigmas_optimal_steps,
}
