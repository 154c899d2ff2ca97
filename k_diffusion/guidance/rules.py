"""Rules of newer papers for combining two estimates, and all rules by their names."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.tensors import append_dims
from .combine import APG, Combine, Rescaled, Scale, inner, linear, scale_at, tiny


class CFGZeroStar:
    """CFG-Zero* (arXiv:2503.18886): guidance away from the unconditional velocity times s*.

    s* = <v_c, v_u> / |v_u|^2 per sample brings the unconditional velocity next to the
    conditional one: v = s* v_u + scale (v_c - s* v_u). The velocities are those of the flow
    (1 - t) x0 + t noise, at t = sigma / (1 + sigma) of data in units of sigma_data. Of a denoiser's
    estimate D at the noised sample x that is

        v = (x - (1 + sigma) D) / sigma,    D = (x - sigma v) / (1 + sigma),

    and since this isn't proportional to D, nor to the noise (x - D) / sigma, s* of those would be
    another one.

    zero_above: at noise levels above it the velocity is 0 and the estimate x / (1 + sigma), for
    flows whose first steps err more than that (the paper's zero-init). Pass the schedule's second
    level to leave out its first step; by default none is. sigma_data: the standard deviation of
    the data. Raises ValueError unless both are positive.
    """

    takes_x = True

    def __init__(self, zero_above: float = math.inf, sigma_data: float = 1.0):
        if not (zero_above > 0 and sigma_data > 0):
            raise ValueError(
                f"zero_above and sigma_data must be positive, got {zero_above} and {sigma_data}"
            )
        self.zero_above, self.sigma_data = float(zero_above), sigma_data

    def __call__(
        self, given: Tensor, without: Tensor, scale: Any, sigma: Tensor, *, x: Tensor
    ) -> Tensor:
        """The guided estimate. given, without, x: (n, ...). sigma: (n,)."""
        level = append_dims(sigma.to(x.dtype), x.ndim)
        total = 1 + level / self.sigma_data
        given, without = x - total * given, x - total * without  # velocities times sigma
        best = inner(given, without) / inner(without, without).clamp(min=tiny(x))
        flow = linear(given, best * without, scale, sigma)
        return (x - torch.where(level > self.zero_above, 0, flow)) / total


class TCFG:
    """Tangential damping (arXiv:2503.18137): guidance away from the aligned part of an estimate.

    Of the two noise estimates, as rows of a matrix of two rows, the singular vector of the larger
    singular value is what they share. The unconditional one keeps its part along that alone; guided
    is that and scale times the conditional one's difference to it.

    The noise estimates are (x - D) / sigma; a factor per sample changes nothing, so that x - D
    takes their place, and sigma = 0 is no exception. With the Gram matrix [[a, b], [b, c]] of the
    two, the left singular vector is (cos w, sin w) with 2 w = atan2(2 b, a - c), which makes the
    projection a weighted sum of both.
    """

    takes_x = True

    def __call__(
        self, given: Tensor, without: Tensor, scale: Any, sigma: Tensor, *, x: Tensor
    ) -> Tensor:
        """The guided estimate. given, without, x: (n, ...). sigma: (n,)."""
        noise, noise_u = x - given, x - without
        a, b, c = inner(noise, noise), inner(noise, noise_u), inner(noise_u, noise_u)
        w = torch.atan2(2 * b, a - c) / 2
        damped = w.sin() * (w.cos() * noise + w.sin() * noise_u)
        return linear(given, x - damped, scale, sigma)


_BINOMIAL = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)


def _blur(x: Tensor) -> Tensor:
    """x: (m, 1, length)."""
    return F.conv1d(F.pad(x, (2, 2), mode="replicate"), x.new_tensor(_BINOMIAL)[None, None])


def _resize(x: Tensor, size: int) -> Tensor:
    """x: (m, 1, length)."""
    return F.interpolate(x, size=size, mode="linear")


def _along_axes(
    x: Tensor, function: Callable[[Tensor, int], Tensor], sizes: Sequence[int]
) -> Tensor:
    """function(x, size) along each dimension after the second. x: (n, c, ...)."""
    for dim, size in enumerate(sizes, start=2):
        if max(size, x.shape[dim]) > 1:
            y = x.movedim(dim, -1)
            x = function(y.reshape(-1, 1, y.shape[-1]), size).reshape(*y.shape[:-1], size)
            x = x.movedim(-1, dim)
    return x


def _down(x: Tensor) -> Tensor:
    """Half the resolution. x: (n, c, ...)."""
    sizes = [math.ceil(size / 2) for size in x.shape[2:]]
    return _along_axes(x, lambda y, size: _resize(_blur(y), size), sizes)


def _up(x: Tensor, like: Tensor) -> Tensor:
    """x at the resolution of `like`. x, like: (n, c, ...)."""
    return _along_axes(x, lambda y, size: _blur(_resize(y, size)), like.shape[2:])


class FDG:
    """Frequency-decoupled guidance (arXiv:2506.19713): a scale for each band of frequencies.

    The bands are those of the Laplacian pyramid of the difference of the two estimates, along the
    dimensions after the second: what is between one resolution and half of it. The wrapper's scale
    is that of the finest band. With equal scales it is linear guidance. It is linear in the
    estimates, and so the same for denoised samples, noise and velocities.

    lower: the scale of all below the finest band, or a sequence of scales, one for each band from
    the second on, of which the last one is for all that is left. 1 leaves them as the conditional
    estimate has them. The paper takes low frequencies, which set composition and contrast, at less
    scale than high ones, which set detail. Raises ValueError for an empty sequence.
    """

    def __init__(self, lower: Scale | Sequence[Scale] = 1.0):
        self.lower = tuple(lower) if isinstance(lower, Sequence) else (lower,)
        if not self.lower:
            raise ValueError("lower must hold at least one scale, got none")

    def __call__(self, given: Tensor, without: Tensor, scale: Any, sigma: Tensor) -> Tensor:
        """The guided estimate. given, without: (n, c, ...). sigma: (n,)."""
        levels = [given - without]
        for _ in self.lower:
            levels.append(_down(levels[-1]))
        scales = [scale, *(scale_at(lower, sigma, given) for lower in self.lower)]
        # From the coarsest up, what the scales add to the conditional estimate: exactly 0 at 1.
        change = (scales[-1] - 1) * levels[-1]
        for fine, coarse, factor in zip(levels[-2::-1], levels[:0:-1], scales[-2::-1]):
            change = _up(change, fine) + (factor - 1) * (fine - _up(coarse, fine))
        return given + change


# By the names of command lines, with their defaults, for data of a standard deviation.
RULES: dict[str, Callable[[float], Combine]] = {
    "linear": lambda sigma_data: linear,
    "rescaled": lambda sigma_data: Rescaled(),
    "apg": lambda sigma_data: APG(),
    "cfg-zero-star": lambda sigma_data: CFGZeroStar(sigma_data=sigma_data),
    "tcfg": lambda sigma_data: TCFG(),
    "fdg": lambda sigma_data: FDG(),
}
