"""v-prediction, and models of v-diffusion."""

import math
from typing import Any

import torch
from torch import nn

from ..common.tensors import append_dims, widen

Scalings3 = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class VPrediction(nn.Module):
    """v-prediction (arXiv:2202.00512) for data of unit variance.

    A subclass gives `get_v(x, t, **kwargs)` and `sigma_to_t(sigma)`.
    """

    sigma_data = 1.0
    get_v: Any
    sigma_to_t: Any

    def get_scalings(self, sigma: torch.Tensor) -> Scalings3:
        """c_skip, c_out, c_in, shaped like sigma. c_out is negative: v points away from x0.

        sigma: (n,).
        """
        wide = widen(sigma)
        total = wide**2 + self.sigma_data**2
        c_out = -wide * self.sigma_data / total.sqrt()
        c_skip, c_in = self.sigma_data**2 / total, total.rsqrt()
        return c_skip.to(sigma.dtype), c_out.to(sigma.dtype), c_in.to(sigma.dtype)

    def loss(
        self, input: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """Squared error of v per sample, (n,), the mean over all other dimensions.

        input, noise: (n, ...). sigma: (n,).
        """
        c_in = append_dims(self.get_scalings(sigma)[2], input.ndim)
        s = append_dims(sigma, input.ndim)
        output = self.get_v((input + noise * s) * c_in, self.sigma_to_t(sigma), **kwargs)
        v = (self.sigma_data * noise - s / self.sigma_data * input) * c_in
        return (output - v).pow(2).flatten(1).mean(1)

    def forward(self, input: torch.Tensor, sigma: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """The denoised input. input: (n, ...), sigma: (n,)."""
        c_skip, c_out, c_in = (append_dims(c, input.ndim) for c in self.get_scalings(sigma))
        v = self.get_v(input * c_in, self.sigma_to_t(sigma), **kwargs)
        return c_skip * input + c_out * v


class VDenoiser(VPrediction):
    """A continuous-time v-diffusion model, `inner_model(x, t)` with t from 0 (clean) to 1 (noise).

    Its schedule is the cosine one: t = 2 atan(sigma) / pi.
    """

    def __init__(self, inner_model: nn.Module):
        super().__init__()
        self.inner_model = inner_model

    def get_v(self, x: torch.Tensor, t: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """The model's estimate of v at time t. The model's estimate of v. x: (n, ...). t: (n,)."""
        return self.inner_model(x, t, **kwargs)

    def sigma_to_t(self, sigma: torch.Tensor) -> torch.Tensor:
        """The time in [0, 1] of a noise level. sigma: (...), any shape."""
        return sigma.atan() * 2 / math.pi

    def t_to_sigma(self, t: torch.Tensor) -> torch.Tensor:
        """The noise level of a time in [0, 1]. t: (...), any shape."""
        return (t * math.pi / 2).tan()
