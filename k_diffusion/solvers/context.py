"""What a step may ask for."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor


@dataclass(frozen=True)
class Context:
    """The model and the noise, as a step sees them. Noise levels are floats.

    denoise(x, sigma): the model's estimate of the clean sample.
    to_d(x, sigma, denoised): the ODE's slope dx/dsigma (Karras et al. 2022, equation 3).
    noise(sigma, sigma_next): unit Gaussian noise belonging to that interval, times s_noise.
    """

    denoise: Callable[[Tensor, float], Tensor]
    to_d: Callable[[Tensor, float, Tensor], Tensor]
    noise: Callable[[float, float], Tensor]


# (ctx, x, sigma, sigma_next, denoised, state) -> (x at sigma_next, state)
Step: TypeAlias = Callable[[Context, Tensor, float, float, Tensor, Any], tuple[Tensor, Any]]
