"""How guidance combines two estimates of the clean sample, and what its wrappers share."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..common import numbers
from ..common.tensors import append_dims
from ..schedules import Sigmas, read_sigmas
from ..solvers.context import estimate, estimate_both, start_run

Scale: TypeAlias = float | Callable[[Tensor], Tensor]
# (given, without, scale, sigma) -> guided: two estimates and how far to go from one to the other.
# A rule with `takes_x` set gets the noised sample as x, too, from which noise and velocity follow.
Combine: TypeAlias = Callable[..., Tensor]
# From a model and what it is called with to its estimate, or to that and the one without guidance.
Ask: TypeAlias = Callable[..., tuple[Tensor, ...]]


def scale_at(scale: Scale, sigma: Tensor, like: Tensor) -> Any:
    """A scale at a noise level, to be multiplied with a tensor (n, ...).

    sigma: (n,). like: (n, ...).
    """
    return append_dims(scale(sigma).to(like.dtype), like.ndim) if callable(scale) else scale


def check_scale(scale: Scale, name: str = "scale") -> Scale:
    """The scale. Raises ValueError for a number that isn't finite."""
    if isinstance(scale, int | float):
        numbers.finite(**{name: scale})
    return scale


def combined(
    combine: Combine, given: Tensor, without: Tensor, scale: Scale, sigma: Tensor, x: Tensor
) -> Tensor:
    """The guided estimate by a rule. given, without, x: (n, ...). sigma: (n,)."""
    more = {"x": x.to(given.dtype)} if getattr(combine, "takes_x", False) else {}
    return combine(given, without, scale_at(scale, sigma, given), sigma, **more)


def dims(x: Tensor) -> tuple[int, ...]:
    """All dimensions but the batch's. x: (n, ...)."""
    return tuple(range(1, x.ndim))


def inner(x: Tensor, y: Tensor) -> Tensor:
    """The inner products of samples, (n, 1, ...). x, y: (n, ...)."""
    return (x * y).sum(dims(x), keepdim=True)


def tiny(x: Tensor) -> float:
    """The least positive normal number of a tensor's type. x: (...)."""
    return torch.finfo(x.dtype).tiny


class Guidance(nn.Module):
    """What the wrappers share: they hand on what a sampler says of its run, and what it asks for.

    parts: the attributes that may be guidance themselves. A wrapper says in `estimates` what it
    makes of those of its model. Where the host knows the noise level, they get it as `host_sigma`,
    one more condition.
    """

    parts: tuple[str, ...] = ("model",)
    takes_level = True  # read by samplers

    def start_run(self) -> None:
        """Samplers call it before their first step: memories of an earlier run are dropped."""
        for name in self.parts:
            start_run(getattr(self, name))

    def estimates(self, ask: Ask, x: Tensor, sigma: Tensor, **cond: Any) -> tuple[Tensor, ...]:
        """The guided estimate, and where `ask` tells it the one without guidance; (n, ...) each.

        ask: gives those of a model, called as ask(model, x, sigma, **cond). x: (n, ...), sigma:
        (n,).
        """
        raise NotImplementedError

    def forward(self, x: Tensor, sigma: Tensor, **cond: Any) -> Tensor:
        """The guided estimate. x: (n, ...), sigma: (n,)."""
        return self.estimates(estimate, x, sigma, **cond)[0]

    def both(self, x: Tensor, sigma: Tensor, **cond: Any) -> tuple[Tensor, Tensor]:
        """The guided estimate and the one without, (n, ...) each: for CFG++'s samplers.

        The latter is the unconditional one of classifier-free guidance, wherever that is within the
        wrappers; what others do to the guided estimate, they do to both. x: (n, ...), sigma: (n,).
        """
        guided, without = self.estimates(estimate_both, x, sigma, **cond)
        return guided, without


def linear(given: Tensor, without: Tensor, scale: Any, sigma: Tensor) -> Tensor:
    """without + scale * (given - without). given, without: (n, ...). sigma: (n,)."""
    return torch.lerp(without, given, scale)


class Rescaled:
    """Linear guidance that keeps the contrast of the estimate `given` (arXiv:2305.08891, eq. 15).

    Each guided sample is scaled to the standard deviation of `given`, and the result mixed with the
    plain one: phi of 0 is plain, 1 all rescaled; the paper takes 0.7. Here both are denoised
    samples. Raises ValueError for phi outside [0, 1].
    """

    def __init__(self, phi: float = 0.7):
        if not 0 <= phi <= 1:
            raise ValueError(f"phi must lie between 0 and 1, got {phi}")
        self.phi = phi

    def __call__(self, given: Tensor, without: Tensor, scale: Any, sigma: Tensor) -> Tensor:
        """The guided estimate. given, without: (n, ...). sigma: (n,)."""
        guided = linear(given, without, scale, sigma)
        std, std_guided = (y.std(dims(y), correction=0, keepdim=True) for y in (given, guided))
        ratio = std / std_guided.clamp(min=tiny(std))
        # A guided estimate without contrast has none to restore.
        ratio = torch.where(std_guided > 0, ratio, 1)
        return torch.lerp(guided, guided * ratio, self.phi)


class APG:
    """Adaptive projected guidance (arXiv:2410.02416): strong guidance without oversaturation.

    The difference of the two estimates is averaged with those of earlier steps, shortened to
    max_norm, and its part parallel to `given`, which saturates, is multiplied by eta; eta 1 is
    linear guidance. The paper takes a max_norm of 2.5 to 15, and a momentum of -0.5 to -0.75, which
    pushes away from the steps before.

    With momentum it has a memory, so one object guides one run at a time. The samplers of this
    package clear it as they start; else `start_run()` does, or a call at more than twice the noise
    level of the one before it. Raises ValueError for a max_norm that isn't positive or a momentum
    outside (-1, 1).
    """

    def __init__(self, eta: float = 0.0, max_norm: float = math.inf, momentum: float = 0.0):
        if not max_norm > 0:
            raise ValueError(f"max_norm must be positive, got {max_norm}")
        if not -1 < momentum < 1:
            raise ValueError(f"momentum must lie between -1 and 1, got {momentum}")
        numbers.finite(eta=eta)
        self.eta, self.max_norm, self.momentum = eta, max_norm, momentum
        self.start_run()

    def start_run(self) -> None:
        """Forget the steps before."""
        self._last: tuple[Tensor, Tensor] | None = None

    def __call__(self, given: Tensor, without: Tensor, scale: Any, sigma: Tensor) -> Tensor:
        """The guided estimate. given, without: (n, ...). sigma: (n,)."""
        diff = given - without
        if self.momentum:
            diff = self._averaged(diff, sigma)
        diff = diff * (self.max_norm / self._norm(diff)).clamp(max=1)
        unit = given / self._norm(given)
        parallel = inner(diff, unit) * unit
        return given + (scale - 1) * (diff + (self.eta - 1) * parallel)

    @staticmethod
    def _norm(x: Tensor) -> Tensor:
        return torch.linalg.vector_norm(x, dim=dims(x), keepdim=True).clamp(min=tiny(x))

    def _averaged(self, diff: Tensor, sigma: Tensor) -> Tensor:
        if self._last is not None and self._last[0].shape == diff.shape:
            average, last_sigma = self._last
            goes_on = append_dims(sigma <= 2 * last_sigma, diff.ndim)
            diff = diff + self.momentum * torch.where(goes_on, average, 0)
        self._last = diff.detach(), sigma
        return diff


class CFGPlusPlus:
    """The scale of CFG++ (arXiv:2406.08070): `CFGDenoiser(model, CFGPlusPlus(0.6, sigmas), ...)`.

    CFG++ goes to the guided estimate, strength between 0 and 1 of the way from the unconditional to
    the conditional one, but adds the unconditional noise again. In an Euler (DDIM) step from sigma
    to sigma' that is

        x' = D_u + strength (D_c - D_u) + sigma' (x - D_u) / sigma,

    and so is a plain step with classifier-free guidance of scale strength / (1 - sigma' / sigma):
    all that it asks of the sampler is the schedule. The identity is exact for samplers with Euler's
    step (euler, ddim); for others this is the same scale, stronger where steps are shorter.

    sigmas: the run's schedule. The scale at a noise level is that of the nearest one in it. Raises
    ValueError for an ascending schedule.
    """

    def __init__(self, strength: float, sigmas: Sigmas):
        numbers.finite(strength=strength)
        _, host = read_sigmas(sigmas, torch.device("cpu"), False)
        levels = sorted({0.0, *host})
        if len(levels) < 2 or host[0] < host[-1]:
            raise ValueError("CFG++ needs a descending schedule of at least one noise level")
        scales = [strength * b / (b - a) for a, b in pairwise(levels)]
        bounds = [math.sqrt(a * b) for a, b in pairwise(levels[1:])]
        self._scales, self._bounds = torch.tensor(scales), torch.tensor(bounds)

    def __call__(self, sigma: Tensor) -> Tensor:
        """The guidance scale. sigma: (n,)."""
        if self._scales.device != sigma.device:
            self._scales = self._scales.to(sigma.device, non_blocking=True)
            self._bounds = self._bounds.to(sigma.device, non_blocking=True)
        return self._scales[torch.searchsorted(self._bounds, sigma.to(self._bounds.dtype))]
