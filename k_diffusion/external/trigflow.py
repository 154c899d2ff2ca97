"""TrigFlow models (sCM, Lu & Song 2024, arXiv:2410.11081) as denoisers."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..common.tensors import append_dims


class TrigFlowDenoiser(nn.Module):
    """A model of TrigFlow, distilled to a consistency model (sCM) or not, as a denoiser.

    TrigFlow mixes data and noise on a circle, x_t = cos(t) x_0 + sin(t) sigma_data z, so that sigma
    = sigma_data tan(t); the model F(x_t / sigma_data, t) estimates the slope dx_t/dt / sigma_data,
    and cos(t) x_t - sin(t) sigma_data F is the clean sample (equation 5).

    model: (x, t, **kwargs) -> F, all (n, ...) but t: (n,). sigma_data: the data's standard
    deviation. Called as a denoiser: x: (n, ...) = x_0 + sigma z, sigma: (n,). `sample_lcm` then is
    sCM's sampler, on `get_sigmas`. Raises ValueError for sigma_data <= 0.
    """

    def __init__(self, model: Callable[..., Tensor], sigma_data: float = 0.5):
        super().__init__()
        if not sigma_data > 0:
            raise ValueError(f"sigma_data must be positive, got {sigma_data}")
        self.inner_model = model
        self.sigma_data = sigma_data

    def forward(self, x: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        t = torch.atan(sigma / self.sigma_data)
        cos, sin = (append_dims(f(t), x.ndim) for f in (torch.cos, torch.sin))
        x_t = x * cos
        f = self.inner_model(x_t / self.sigma_data, t, **kwargs)
        return cos * x_t - sin * (self.sigma_data * f)

    def get_sigmas(self, times: list[float]) -> Tensor:
        """The schedule of TrigFlow times, descending below pi / 2, such as the paper's [1.5, 1.1].

        Returns (steps + 1,), ending in 0. Raises ValueError for other times.
        """
        falls = all(a > b for a, b in zip(times, [*times[1:], 0.0]))
        if not times or not falls or not times[0] < math.pi / 2:
            raise ValueError(f"times must descend between pi / 2 and 0, got {times}")
        levels = [self.sigma_data * math.tan(t) for t in times if t > 0]
        return torch.tensor([*levels, 0.0], dtype=torch.float32)
