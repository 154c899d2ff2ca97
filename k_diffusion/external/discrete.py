"""Models on a table of noise levels, one a time step: DDPMs that estimate eps, v or x0.

Such models see variance-preserving data x / sqrt(1 + sigma^2) and a time t, the index of a noise
level. Wrapped, they are called as `model(x, sigma)` with x = x0 + sigma noise, (n, ...), and sigma
(n,), and return their estimate of x0.
"""

from typing import Any

import torch
from torch import nn

from ..common.tensors import append_dims, widen
from ..schedules import append_zero
from .v_diffusion import VPrediction

# Where a table ends at zero signal-to-noise ratio sigma would be infinite; here it is 2^12.
MIN_ALPHA_CUMPROD = 2.0**-24


class DiscreteSchedule(nn.Module):
    """A table of noise levels, `sigmas`: (T,), ascending; time t is the (fractional) index.

    Between its entries ln sigma is linear in t; outside the table both directions are clamped.
    quantize: whether `sigma_to_t` gives the nearest whole t unless told otherwise. Raises
    ValueError for sigmas that aren't 1-D, positive, finite and ascending.
    """

    sigmas: torch.Tensor
    log_sigmas: torch.Tensor

    def __init__(self, sigmas: torch.Tensor, quantize: bool):
        super().__init__()
        if sigmas.ndim != 1 or not len(sigmas):
            raise ValueError(f"sigmas must be 1-D and not empty, got {tuple(sigmas.shape)}")
        if not (sigmas.isfinite().all() and (sigmas > 0).all() and (sigmas.diff() >= 0).all()):
            raise ValueError(
                f"sigmas must be positive, finite and ascending, got {sigmas[0].item():g} to "
                f"{sigmas[-1].item():g}; flip a descending table"
            )
        self.register_buffer("sigmas", sigmas)
        self.register_buffer("log_sigmas", sigmas.log())
        self.quantize = quantize

    @property
    def sigma_min(self) -> torch.Tensor:
        return self.sigmas[0]

    @property
    def sigma_max(self) -> torch.Tensor:
        return self.sigmas[-1]

    def get_sigmas(self, n: int | None = None) -> torch.Tensor:
        """n noise levels equally spaced in t, from sigma_max to sigma_min, then 0: (n + 1,).

        None gives the whole table. Raises ValueError for n < 1.
        """
        if n is None:
            return append_zero(self.sigmas.flip(0))
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        t = torch.linspace(len(self.sigmas) - 1, 0, n, device=self.sigmas.device)
        return append_zero(self.t_to_sigma(t))

    def sigma_to_t(self, sigma: torch.Tensor, quantize: bool | None = None) -> torch.Tensor:
        """The time of a noise level, of its shape: int64 if quantized, else floating point.

        sigma: (...), any shape.
        """
        # Each step of a sampler comes by here: few operations. Beyond the ends of the table the
        # first and the last gap count.
        table = self.log_sigmas
        dtype = torch.promote_types(sigma.dtype, table.dtype)
        table, log_sigma = table.to(sigma.device, dtype), sigma.to(dtype).log()
        last = len(table) - 1
        low = torch.searchsorted(table[1:last], log_sigma, right=True)
        start = table.take(low)
        gap = table[min(1, last) :].take(low) - start
        # Equal neighbours have no gap to divide by, and sigma = 0 no finite logarithm.
        fraction = (log_sigma - start) / gap.clamp_min(torch.finfo(dtype).tiny)
        t = low + fraction.clamp(0, 1)
        if last == 0:
            t = t.clamp(max=0)
        return t.round().long() if (self.quantize if quantize is None else quantize) else t

    def t_to_sigma(self, t: torch.Tensor) -> torch.Tensor:
        """The noise level of a time, of its shape. t: (...), any shape."""
        table = self.log_sigmas.to(t.device)
        t = t.to(table.dtype).clamp(0, len(table) - 1)
        low, high = t.floor().long(), t.ceil().long()
        return torch.lerp(table[low], table[high], t.frac()).exp()


def _sigmas(alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """sqrt((1 - abar) / abar), kept finite at zero signal-to-noise ratio."""
    alphas_cumprod = widen(alphas_cumprod).clamp(min=MIN_ALPHA_CUMPROD)
    return ((1 - alphas_cumprod) / alphas_cumprod).sqrt()


class DiscreteEpsDDPMDenoiser(DiscreteSchedule):
    """A DDPM that estimates the noise, `model(x, t)`, on the table of its `alphas_cumprod`: (T,).

    A subclass may replace `get_eps`.
    """

    sigma_data = 1.0

    def __init__(self, model: Any, alphas_cumprod: torch.Tensor, quantize: bool):
        super().__init__(_sigmas(alphas_cumprod), quantize)
        self.inner_model = model

    def get_scalings(self, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """c_out and c_in, shaped like sigma. sigma: (n,)."""
        return -sigma, (widen(sigma) ** 2 + self.sigma_data**2).rsqrt().to(sigma.dtype)

    def get_eps(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The model's estimate of the noise, from (x, t, **kwargs)."""
        return self.inner_model(*args, **kwargs)

    def loss(
        self, input: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """Squared error of the noise per sample, (n,), the mean over all other dimensions.

        input, noise: (n, ...). sigma: (n,).
        """
        c_in = append_dims(self.get_scalings(sigma)[1], input.ndim)
        noised = input + noise * append_dims(sigma, input.ndim)
        eps = self.get_eps(noised * c_in, self.sigma_to_t(sigma), **kwargs)
        return (eps - noise).pow(2).flatten(1).mean(1)

    def forward(self, input: torch.Tensor, sigma: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """The denoised input. input: (n, ...), sigma: (n,)."""
        c_out, c_in = (append_dims(c, input.ndim) for c in self.get_scalings(sigma))
        return input + c_out * self.get_eps(input * c_in, self.sigma_to_t(sigma), **kwargs)


class DiscreteVDDPMDenoiser(VPrediction, DiscreteSchedule):
    """A DDPM that estimates v, `model(x, t)`, on the table of its `alphas_cumprod`: (T,).

    A subclass may replace `get_v`.
    """

    def __init__(self, model: Any, alphas_cumprod: torch.Tensor, quantize: bool):
        super().__init__(_sigmas(alphas_cumprod), quantize)
        self.inner_model = model

    def get_v(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The model's estimate of v, from (x, t, **kwargs)."""
        return self.inner_model(*args, **kwargs)


class DiscreteSampleDDPMDenoiser(DiscreteSchedule):
    """A DDPM that estimates the clean data, `model(x, t)`, on the table of its `alphas_cumprod`.

    A subclass may replace `get_sample`.
    """

    def __init__(self, model: Any, alphas_cumprod: torch.Tensor, quantize: bool):
        """alphas_cumprod: (steps,), ᾱ of each time step."""
        super().__init__(_sigmas(alphas_cumprod), quantize)
        self.inner_model = model

    def get_sample(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The model's estimate of the clean data, from (x, t, **kwargs)."""
        return self.inner_model(*args, **kwargs)

    def loss(
        self, input: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """Squared error of the clean data per sample, (n,), the mean over all other dimensions.

        input, noise: (n, ...). sigma: (n,).
        """
        denoised = self(input + noise * append_dims(sigma, input.ndim), sigma, **kwargs)
        return (denoised - input).pow(2).flatten(1).mean(1)

    def forward(self, input: torch.Tensor, sigma: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """The denoised input. input: (n, ...), sigma: (n,)."""
        c_in = append_dims((widen(sigma) ** 2 + 1).rsqrt().to(sigma.dtype), input.ndim)
        return self.get_sample(input * c_in, self.sigma_to_t(sigma), **kwargs)
