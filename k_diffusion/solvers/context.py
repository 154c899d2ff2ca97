"""What a step may ask for."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
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


def evaluate(
    model: Callable[..., Tensor],
    x: Tensor,
    sigma: float,
    dtype: torch.dtype,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """model(x, sigma), with sigma as the tensor (n,) it expects; fills it without a transfer.

    Raises ValueError unless the model returns x's shape.
    """
    sigma_in = torch.full((x.shape[0],), sigma, dtype=dtype, device=x.device)
    denoised = model(x, sigma_in, *args, **kwargs)
    if not isinstance(denoised, Tensor) or denoised.shape != x.shape:
        got = tuple(denoised.shape) if isinstance(denoised, Tensor) else type(denoised).__name__
        raise ValueError(
            f"the model must return a tensor shaped as its input, {tuple(x.shape)}, got {got}"
        )
    return denoised


# (ctx, x, sigma, sigma_next, denoised, state) -> (x at sigma_next, state)
Step: TypeAlias = Callable[[Context, Tensor, float, float, Tensor, Any], tuple[Tensor, Any]]
