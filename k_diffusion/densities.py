"""Noise-level densities for training, drawn by inversion of their CDF, and stratified sampling.

Each `rand_*` maps a uniform draw u of the wanted shape to sigma. Stratified, the uniforms of all
processes (and of all accumulation steps) of one optimizer step fall one into each of equally sized
strata, which lowers the variance of the loss at no cost (variational diffusion models,
arXiv:2107.00630).
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from .common import numbers

Device = torch.device | str | None

_NO_FLOAT64 = ("mps",)

# (group, groups) of this process and accumulation step, or None where draws are independent.
_strata: ContextVar[tuple[int, int] | None] = ContextVar("strata", default=None)


def _check_group(group: int, groups: int) -> None:
    if groups < 1 or not 0 <= group < groups:
        raise ValueError(
            f"stratified sampling needs 0 <= group < groups, got group {group} of {groups}; "
            "pass this process's rank and the number of processes"
        )


@contextmanager
def enable_stratified(group: int = 0, groups: int = 1, disable: bool = False) -> Iterator[None]:
    """Stratify the uniform draws of every density inside this context.

    `group` of `groups` says which share of the strata this process draws. `disable` makes the
    draws independent instead. Raises ValueError unless 0 <= group < groups.
    """
    _check_group(group, groups)
    token = _strata.set(None if disable else (group, groups))
    try:
        yield
    finally:
        _strata.reset(token)


@contextmanager
def enable_stratified_accelerate(
    accelerator: Any, disable: bool = False, step: int | None = None, steps: int | None = None
) -> Iterator[None]:
    """`enable_stratified` across the processes of an `accelerate.Accelerator`.

    With gradient accumulation the strata are shared out over all processes and micro-batches of
    one optimizer step: micro-batch `step` of `steps`, by default those that the accelerator counts
    (within `accelerator.accumulate`).
    """
    n = accelerator.num_processes
    if steps is None:
        steps = accelerator.gradient_state.num_steps
    if step is None:
        step = accelerator.step % steps
    with enable_stratified(accelerator.process_index + n * step, n * steps, disable):
        yield


def stratified_uniform(
    shape: Sequence[int],
    group: int = 0,
    groups: int = 1,
    dtype: torch.dtype | None = None,
    device: Device = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Uniform draws in [0, 1), one in each stratum of the last dimension.

    With n = shape[-1], [0, 1) is cut into n * groups strata and element i of the last dimension
    falls into stratum `group + groups * i`. Raises ValueError unless 0 <= group < groups.
    """
    _check_group(group, groups)
    n = shape[-1] * groups
    u = torch.rand(shape, dtype=dtype, device=device, generator=generator)
    offsets = torch.arange(group, n, groups, dtype=u.dtype, device=u.device)
    # The sum rounds up to the next stratum once in a while; the last one would then hold a 1.
    end = torch.nextafter(offsets + 1, offsets)
    return torch.minimum(offsets + u, end) / n


def stratified_with_settings(
    shape: Sequence[int],
    dtype: torch.dtype | None = None,
    device: Device = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Uniform draws in [0, 1), stratified as the enclosing `enable_stratified` says."""
    strata = _strata.get()
    if strata is None:
        return torch.rand(shape, dtype=dtype, device=device, generator=generator)
    return stratified_uniform(shape, *strata, dtype=dtype, device=device, generator=generator)


def _wide(device: Device) -> torch.dtype:
    """The widest floating point type that the device has."""
    kind = "cpu" if device is None else torch.device(device).type
    return torch.float32 if kind in _NO_FLOAT64 else torch.float64


def _uniform(
    shape: Sequence[int],
    dtype: torch.dtype,
    device: Device,
    generator: torch.Generator | None,
) -> torch.Tensor:
    """Uniform draws strictly inside (0, 1), drawn in `dtype` (at least float32), then widened."""
    draw = torch.promote_types(dtype, torch.float32)
    u = stratified_with_settings(shape, dtype=draw, device=device, generator=generator)
    # A drawn 0, once in 2**24, stands for [0, eps / 2); most densities would give sigma = 0.
    eps = torch.finfo(draw).eps
    return u.clamp(eps / 4, 1 - eps / 2).to(_wide(device))


def _positive(name: str, **values: float) -> None:
    for key, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name}: {key} must be positive and finite, got {value}")


def _ordered(name: str, min_value: float, max_value: float) -> None:
    if not 0 <= min_value < max_value:
        raise ValueError(
            f"{name} needs 0 <= min_value < max_value, got {min_value} and {max_value}"
        )


def rand_log_normal(
    shape: Sequence[int],
    loc: float = 0.0,
    scale: float = 1.0,
    device: Device = "cpu",
    dtype: torch.dtype = torch.float32,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """sigma with ln sigma ~ N(loc, scale^2) (EDM, arXiv:2206.00364, table 1: P_mean, P_std)."""
    _positive("rand_log_normal", scale=scale)
    numbers.finite(loc=loc)
    u = _uniform(shape, dtype, device, generator)
    z = math.sqrt(2) * torch.erfinv(2 * u - 1)
    return (loc + scale * z).exp().to(dtype)


def rand_log_logistic(
    shape: Sequence[int],
    loc: float = 0.0,
    scale: float = 1.0,
    min_value: float = 0.0,
    max_value: float = math.inf,
    device: Device = "cpu",
    dtype: torch.dtype = torch.float32,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """sigma with ln sigma ~ Logistic(loc, scale), truncated to [min_value, max_value].

    At scale 0.5 the CDF is sigma^2 / (sigma^2 + e^(2 loc)).
    """
    _positive("rand_log_logistic", scale=scale)
    numbers.finite(loc=loc)
    _ordered("rand_log_logistic", min_value, max_value)

    def cdf(sigma: float) -> float:
        return 1 / (1 + (math.exp(loc) / sigma) ** (1 / scale)) if sigma > 0 else 0.0

    # Drawn wide, unlike the others: seeds depend on it.
    u = _uniform(shape, _wide(device), device, generator)
    u = cdf(min_value) + (cdf(max_value) - cdf(min_value)) * u
    return (loc + scale * torch.logit(u)).exp().to(dtype)


def rand_log_uniform(
    shape: Sequence[int],
    min_value: float,
    max_value: float,
    device: Device = "cpu",
    dtype: torch.dtype = torch.float32,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """sigma with ln sigma uniform between ln min_value and ln max_value."""
    _positive("rand_log_uniform", min_value=min_value)
    _ordered("rand_log_uniform", min_value, max_value)
    numbers.finite(max_value=max_value)
    low, high = math.log(min_value), math.log(max_value)
    return (low + (high - low) * _uniform(shape, dtype, device, generator)).exp().to(dtype)


def rand_v_diffusion(
    shape: Sequence[int],
    sigma_data: float = 1.0,
    min_value: float = 0.0,
    max_value: float = math.inf,
    device: Device = "cpu",
    dtype: torch.dtype = torch.float32,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """sigma = sigma_data tan(pi t / 2) with t uniform, truncated to [min_value, max_value].

    The density of the cosine schedule with uniform time (arXiv:2202.00512).
    """
    _positive("rand_v_diffusion", sigma_data=sigma_data)
    _ordered("rand_v_diffusion", min_value, max_value)
    low, high = math.atan(min_value / sigma_data), math.atan(max_value / sigma_data)
    angle = low + (high - low) * _uniform(shape, dtype, device, generator)
    return (sigma_data * torch.tan(angle)).to(dtype)


def rand_split_log_normal(
    shape: Sequence[int],
    loc: float,
    scale_1: float,
    scale_2: float,
    device: Device = "cpu",
    dtype: torch.dtype = torch.float32,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """sigma with ln sigma split normal: mode loc, scale_1 below it and scale_2 above it.

    The two halves meet at the mode, so the lower one has weight scale_1 / (scale_1 + scale_2).
    It isn't stratified, as it maps two draws to a noise level.
    """
    _positive("rand_split_log_normal", scale_1=scale_1, scale_2=scale_2)
    numbers.finite(loc=loc)
    draw = torch.promote_types(dtype, torch.float32)
    distance = torch.randn(shape, dtype=draw, device=device, generator=generator).abs()
    u = torch.rand(shape, dtype=draw, device=device, generator=generator)
    below = u < scale_1 / (scale_1 + scale_2)
    return (loc + distance * torch.where(below, -scale_1, scale_2)).exp().to(dtype)


def rand_cosine_interpolated(
    shape: Sequence[int],
    image_d: float,
    noise_d_low: float,
    noise_d_high: float,
    sigma_data: float = 1.0,
    min_value: float = 1e-3,
    max_value: float = 1e3,
    device: Device = "cpu",
    dtype: torch.dtype = torch.float32,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """sigma of the interpolated shifted cosine schedule at uniform time (arXiv:2301.11093).

    The cosine schedule, shifted as if the image (of side `image_d`) had side `noise_d_low` at the
    noisy end and `noise_d_high` at the clean end, the log signal-to-noise ratios interpolated
    linearly in time. Reaches from max_value (u = 0) to min_value (u = 1).
    """
    name = "rand_cosine_interpolated"
    _positive(name, image_d=image_d, noise_d_low=noise_d_low, noise_d_high=noise_d_high)
    _positive(name, sigma_data=sigma_data, min_value=min_value)
    _ordered(name, min_value, max_value)
    u = _uniform(shape, dtype, device, generator)

    def log_sigma(noise_d: float) -> torch.Tensor:
        # The shift scales sigma; the time range is adjusted so that the ends stay where they are.
        unit = sigma_data * image_d / noise_d
        high, low = math.atan(max_value / unit), math.atan(min_value / unit)
        return torch.tan(high + (low - high) * u).log() + math.log(unit)

    return torch.lerp(log_sigma(noise_d_low), log_sigma(noise_d_high), u).exp().to(dtype)
