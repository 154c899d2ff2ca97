"""Rectified flows as denoisers."""

from typing import Any

import torch
from torch import nn

from ..common.tensors import append_dims, widen
from ..schedules import append_zero


class RectifiedFlowDenoiser(nn.Module):
    """A rectified flow (arXiv:2209.03003; SD3, arXiv:2403.03206; Flux) as a denoiser.

    The flow knows x_t = (1 - t) x0 + t eps, and `inner_model(x_t, t * time_scale, **kwargs)`
    estimates its velocity v = eps - x0. Divided by 1 - t, x_t is x0 + sigma eps with
    sigma = t / (1 - t); so this is a denoiser for every sampler, and as D = x_t - t v, an Euler
    step in sigma is an Euler step of the flow in t.

    shift: moves the schedule towards noise for large images, t -> s t / (1 + (s - 1) t) (SD3,
    equation 23), which makes each sigma s times as large. It touches `get_sigmas` and sigma_min
    alone: the model's time belongs to sigma as it is. time_scale: 1000 for models that count time
    in thousandths. sigma_max: pure noise, t = 1, is sigma = infinity; t ends at this noise level
    instead, by default 4096, t = 0.99976, where noise still fits into float16. sigma_min: at
    t = 1 / 1000 before the shift. Schedules between sigma_min and sigma_max spend many steps on
    pure noise: use `get_sigmas`, or start lower.

    Raises ValueError for a shift, time_scale or sigma_max that isn't positive.
    """

    def __init__(
        self,
        inner_model: Any,
        shift: float = 1.0,
        time_scale: float = 1.0,
        sigma_max: float = 4096.0,
    ):
        super().__init__()
        options = {"shift": shift, "time_scale": time_scale, "sigma_max": sigma_max}
        for name, value in options.items():
            if not 0 < value < float("inf"):
                raise ValueError(f"{name} must be positive and finite, got {value}")
        self.inner_model = inner_model
        self.shift = shift
        self.time_scale = time_scale
        self.sigma_max = sigma_max

    @property
    def sigma_min(self) -> float:
        return self.shift / 999

    def get_sigmas(self, n: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """n steps equal in t before the shift, from sigma_max to 0: (n + 1,).

        Raises ValueError for n < 1.
        """
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        start = self.sigma_max / self.shift
        t = torch.linspace(start / (1 + start), 0, n + 1, dtype=torch.float64)[:-1]
        return append_zero(self.shift * t / (1 - t)).float().to(device)

    def sigma_to_t(self, sigma: torch.Tensor) -> torch.Tensor:
        """The time in [0, 1) of a noise level. sigma: (...), any shape."""
        return sigma / (1 + sigma)

    def t_to_sigma(self, t: torch.Tensor) -> torch.Tensor:
        """The noise level of a time in [0, 1], at most sigma_max."""
        return (t / (1 - t)).clamp(max=self.sigma_max)

    def get_v(self, x: torch.Tensor, t: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """The model's estimate of the velocity at time t: (n,) in [0, 1]. x: (n, ...)."""
        return self.inner_model(x, t * self.time_scale, **kwargs)

    def loss(
        self, input: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """Squared error of the velocity per sample, (n,), the mean over all other dimensions.

        input, noise: (n, ...). sigma: (n,).
        """
        noised = input + noise * append_dims(sigma, input.ndim)
        _, _, v = self._flow(noised, sigma, kwargs)
        return (v - (noise - input)).pow(2).flatten(1).mean(1)

    def forward(self, input: torch.Tensor, sigma: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """The denoised input. input: (n, ...), sigma: (n,)."""
        x_t, t, v = self._flow(input, sigma, kwargs)
        return (x_t - append_dims(t, input.ndim) * v).to(input.dtype)

    def _flow(
        self, x: torch.Tensor, sigma: torch.Tensor, kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x_t, t: (n,), and v there. Times stay precise where x is in half precision."""
        sigma = widen(sigma)
        t = self.sigma_to_t(sigma)
        x_t = x / append_dims(1 + sigma, x.ndim)
        return x_t, t, self.get_v(x_t.to(x.dtype), t, **kwargs)
