"""A schedule as a grid of noise levels: its checks, its end, and how samplers read it."""

import math
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

Number = float | Tensor
Sigmas: TypeAlias = Tensor | Sequence[float]


def append_zero(x: Tensor) -> Tensor:
    """Appends a 0, the noise level of a finished sample. x: (n,). Returns (n + 1,)."""
    return torch.cat([x, x.new_zeros([1])])


def check_range(sigma_min: Number, sigma_max: Number) -> tuple[float, float]:
    """Both ends as floats. Raises ValueError unless 0 < sigma_min < sigma_max < inf."""
    lo, hi = float(sigma_min), float(sigma_max)
    if not 0 < lo < hi < math.inf:
        raise ValueError(
            f"noise levels must satisfy 0 < sigma_min < sigma_max < inf, got sigma_min = {lo} and "
            f"sigma_max = {hi}"
        )
    return lo, hi


def check_ends(sigma_min: Number, sigma_max: Number) -> tuple[float, float]:
    """Both ends of a run as floats. Raises ValueError unless positive, finite and different."""
    lo, hi = float(sigma_min), float(sigma_max)
    if not (0 < lo < math.inf and 0 < hi < math.inf and lo != hi):
        raise ValueError(
            "sigma_min and sigma_max must be positive, finite and different, got sigma_min = "
            f"{lo} and sigma_max = {hi}"
        )
    return lo, hi


def check_schedule(n: int, sigma_min: Number, sigma_max: Number) -> tuple[float, float]:
    if n < 1:
        raise ValueError(f"a schedule needs at least one step, got n = {n}")
    return check_range(sigma_min, sigma_max)


def finish(sigmas: Sequence[float] | np.ndarray, device: torch.device | str) -> Tensor:
    """Noise levels as a schedule: (n + 1,) float32, ending in 0.

    Raises ValueError where they don't fall strictly.
    """
    out = append_zero(torch.as_tensor(np.asarray(sigmas, dtype=np.float64)).float())
    if not (out.diff() < 0).all():
        raise ValueError(
            f"{len(out) - 1} steps from {out[0]:g} to {out[-2]:g} don't fall strictly in float32; "
            "use fewer steps, or options less extreme"
        )
    return out.to(device)


def discard_penultimate(sigmas: Tensor) -> Tensor:
    """A schedule without its last noise level before the end, (steps,) of (steps + 1,).

    sigmas: (steps + 1,). The last step then is a longer one, which some samplers finish better.
    Raises ValueError for fewer than two steps.
    """
    if sigmas.ndim != 1 or len(sigmas) < 3:
        raise ValueError(
            f"a schedule of two steps or more has a level to discard, got {tuple(sigmas.shape)}"
        )
    return torch.cat([sigmas[:-2], sigmas[-1:]])


def read_sigmas(
    sigmas: Sigmas, device: torch.device, adds_noise: bool
) -> tuple[Tensor, list[float]]:
    """A sampler's schedule as a tensor on a device and as floats, read once.

    adds_noise: whether it must descend. Raises ValueError where it is no schedule.
    """
    if not isinstance(sigmas, Tensor):
        try:
            # older versions of numpy make a number of an array of one, too
            if getattr(sigmas, "ndim", 1) != 1:
                raise TypeError
            host = [float(s) for s in sigmas]
        except TypeError as e:
            raise ValueError(
                f"sigmas must be 1-D, a tensor or a sequence of numbers, got {sigmas!r}"
            ) from e
        sigmas = torch.tensor(host, dtype=torch.float32)
    elif sigmas.ndim != 1:
        raise ValueError(
            f"sigmas must be 1-D, got shape {tuple(sigmas.shape)}; pass one schedule for the whole "
            "batch"
        )
    else:
        sigmas = sigmas if sigmas.is_floating_point() else sigmas.float()
        host = sigmas.tolist()
    if bad := [s for s in host if not 0 <= s < math.inf]:
        raise ValueError(f"sigmas must be finite and >= 0, got {bad[0]}")
    ups = [i for i in range(len(host) - 1) if host[i + 1] > host[i]]
    downs = [i for i in range(len(host) - 1) if host[i + 1] < host[i]]
    if ups and downs:
        i = max(ups[0], downs[0])
        raise ValueError(
            f"sigmas must go one way, but turn at sigmas[{i}] = {host[i]:g}; sort them or sample "
            "in two calls"
        )
    if ups and adds_noise:
        raise ValueError(
            "sigmas ascend, and this sampler adds noise, which can't be run backwards; set eta or "
            "s_churn to 0 or use an ODE sampler"
        )
    if ups and host[0] == 0:
        raise ValueError(
            "ascending sigmas can't start at 0, where the ODE has no slope; start at the model's "
            "sigma_min"
        )
    return sigmas.to(device, non_blocking=True), host


def positive_range(host: Sequence[float]) -> tuple[float, float]:
    """The least and the greatest positive noise level: where a schedule's noise lives."""
    positive = [s for s in host if s > 0] or [0.0]
    return min(positive), max(positive)
