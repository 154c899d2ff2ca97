"""Karras preconditioning (EDM, arXiv:2206.00364), loss weightings and the denoising losses.

A denoiser is called as `model(x, sigma)` with x: (n, ...) noised data and sigma: (n,), and returns
its estimate of the clean data, like x.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from .common import numbers
from .common.tensors import append_dims, widen

Weighting = Callable[[torch.Tensor], torch.Tensor]

# Weights of the squared error of the network's output F; that of the denoiser's output D is
# c_out^2 times as large, with c_out^2 = sigma^2 sigma_data^2 / (sigma^2 + sigma_data^2).
WEIGHTINGS: dict[str, Callable[[torch.Tensor, float], torch.Tensor]] = {
    # EDM, equation 8: every noise level has unit loss for an untrained network.
    "karras": lambda sigma, sigma_data: torch.ones_like(sigma),
    # SNR = 1 / sigma^2 softly limited to 1 / sigma_data^2 (arXiv:2303.09556, made smooth as in
    # arXiv:2401.11605).
    "soft-min-snr": lambda sigma, sigma_data: (
        (sigma * sigma_data / (sigma**2 + sigma_data**2)) ** 2
    ),
    # SNR = 1 / sigma^2, which is the plain squared error of the estimated noise (DDPM).
    "snr": lambda sigma, sigma_data: sigma_data**2 / (sigma**2 + sigma_data**2),
}


def sigmoid_weighting(bias: float, sigma_data: float = 1.0) -> Weighting:
    """The sigmoid weighting (arXiv:2303.00848): the squared error of D weighs 1 / (sigma^2 + e^-b).

    That is soft-min-SNR with a free cap: SNR = 1 / sigma^2 softly limited to e^bias. At
    bias = -2 ln(sigma_data) it is `soft-min-snr`. Returns the function of sigma: (n,) that
    `Denoiser` takes, to weights (n,) of the squared error of F.
    """

    def weighting(sigma: torch.Tensor) -> torch.Tensor:
        square = widen(sigma) ** 2
        c_out = square * sigma_data**2 / (square + sigma_data**2)
        return (c_out / (square + math.exp(-bias))).to(sigma.dtype)

    return weighting


def dct(x: torch.Tensor, dims: Sequence[int] | None = None) -> torch.Tensor:
    """Orthonormal DCT-II of data (n, c, ...) over some of its dimensions.

    x: (n, c, ...). dims: by default all after the second, but of 3-D x the second, as published;
    of signals (n, c, length), dims=(2,) is the transform along the length.
    Raises ValueError for fewer than three dimensions.
    """
    if x.ndim < 3:
        raise ValueError(f"dct needs (n, c, ...) of at least 3 dimensions, got {tuple(x.shape)}")
    if dims is None:
        dims = (1,) if x.ndim == 3 else range(2, x.ndim)
    for dim in dims:
        n = x.shape[dim]
        k = torch.arange(n, dtype=x.dtype, device=x.device)
        basis = torch.cos(math.pi / n * torch.outer(k, k + 0.5)) * math.sqrt(2 / n)
        basis[0] /= math.sqrt(2)
        x = (x.movedim(dim, -1) @ basis.T).movedim(-1, dim)
    return x


def frequency_weights(x: torch.Tensor, scales: int) -> torch.Tensor:
    """Weights of the DCT coefficients of x: (n, c, ...), one octave of frequency counting one more.

    A frequency f in (0, 1/2] has weight min(-log2 f, scales); of several axes the highest frequency
    decides. At scales 1 all weights are 1.
    """
    weights = x.new_full((), float(scales))
    for dim, n in enumerate(x.shape[2:], start=2):
        f = torch.linspace(0.5 / n, 0.5, n, dtype=x.dtype, device=x.device)
        weights = torch.minimum(weights, append_dims(-f.log2(), x.ndim - dim))
    return weights


class Denoiser(nn.Module):
    """Karras et al. preconditioning around a network F (arXiv:2206.00364, equation 7 and table 1).

    D(x, sigma) = c_skip x + c_out F(c_in x, sigma).  The network gets sigma itself, and `**kwargs`;
    inside, models use c_noise = ln(sigma) / 4. At sigma = 0 the result is x.

    sigma_data: the standard deviation of the data. weighting: a key of `WEIGHTINGS`, or a function
    from sigma: (n,) to weights (n,) of the squared error of F; the attribute is such a function.
    scales: above 1, the loss weighs low spatial frequencies more, in the domain of the discrete
    cosine transform. dct_dims: the dimensions that it transforms, see `dct`; for signals
    (n, c, length) pass (2,). learned_weighting: in the loss, the network is called with
    `return_uncertainty=True` and returns (F, u: (n,)), the logarithm of the loss that it expects at
    sigma; the loss L is L / e^u + u, so that all noise levels weigh the same in the gradient (EDM2,
    arXiv:2312.02696, equation 14).
    """

    weighting: Weighting

    def __init__(
        self,
        inner_model: nn.Module,
        sigma_data: float = 1.0,
        weighting: str | Weighting = "karras",
        scales: int = 1,
        dct_dims: Sequence[int] | None = None,
        learned_weighting: bool = False,
    ):
        super().__init__()
        if not sigma_data > 0:
            raise ValueError(f"sigma_data must be positive, got {sigma_data}")
        if scales < 1:
            raise ValueError(f"scales must be at least 1, got {scales}")
        if not callable(weighting) and weighting not in WEIGHTINGS:
            raise ValueError(
                f"unknown loss weighting {weighting!r}; use one of {', '.join(WEIGHTINGS)}, "
                "or a function of sigma"
            )
        self.inner_model = inner_model
        self.sigma_data = sigma_data
        self.weighting = (
            weighting if callable(weighting) else partial(self._named_weight, weighting)
        )
        self.scales = scales
        self.dct_dims = dct_dims
        self.learned_weighting = learned_weighting

    def get_scalings(self, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """c_skip, c_out, c_in of table 1, shaped like sigma."""
        wide = widen(sigma)
        total = wide**2 + self.sigma_data**2
        c_out, c_in = wide * self.sigma_data / total.sqrt(), total.rsqrt()
        c_skip = self.sigma_data**2 / total
        return c_skip.to(sigma.dtype), c_out.to(sigma.dtype), c_in.to(sigma.dtype)

    def loss(
        self, input: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """Weighted denoising loss per sample (equation 8). input, noise: (n, ...), sigma: (n,).

        Returns (n,), the mean over all other dimensions; finite at sigma = 0 also.
        """
        x = input + noise * append_dims(sigma, input.ndim)
        if self.learned_weighting:
            output, u = self._network(x, sigma, return_uncertainty=True, **kwargs)
        else:
            output = self._network(x, sigma, **kwargs)
        error = self._squared_error(output, self._target(input, noise, sigma))
        loss = error * self.weighting(sigma)
        return loss * torch.exp(-u) + u if self.learned_weighting else loss

    def forward(self, input: torch.Tensor, sigma: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """The denoised input. input: (n, ...), sigma: (n,)."""
        c_skip, c_out, _ = self.get_scalings(sigma)
        output = self._network(input, sigma, **kwargs)
        return append_dims(c_skip, input.ndim) * input + append_dims(c_out, input.ndim) * output

    def _network(self, x: torch.Tensor, sigma: torch.Tensor, **kwargs: Any) -> Any:
        c_in = append_dims(self.get_scalings(sigma)[2], x.ndim)
        # The network takes the logarithm of sigma.
        return self.inner_model(c_in * x, sigma.clamp(min=torch.finfo(sigma.dtype).tiny), **kwargs)

    def _target(
        self, input: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor
    ) -> torch.Tensor:
        """(input - c_skip x) / c_out with x = input + sigma noise, free of its 0 / 0."""
        wide = append_dims(widen(sigma), input.ndim)
        root = (wide**2 + self.sigma_data**2).sqrt()
        of_input, of_noise = wide / self.sigma_data / root, self.sigma_data / root
        return of_input.to(sigma.dtype) * input - of_noise.to(sigma.dtype) * noise

    def _named_weight(self, name: str, sigma: torch.Tensor) -> torch.Tensor:
        return WEIGHTINGS[name](widen(sigma), self.sigma_data).to(sigma.dtype)

    def _squared_error(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Mean squared error per sample, (n,), weighted by frequency where scales > 1."""
        error = output - target
        if self.scales == 1:
            return error.pow(2).flatten(1).mean(1)
        spectrum = dct(error, self.dct_dims)
        return (frequency_weights(error, self.scales) * spectrum.pow(2)).flatten(1).mean(1)


class DenoiserWithVariance(Denoiser):
    """A denoiser whose network also estimates the log variance of its error, one value per sample.

    In the loss, the network is called with `return_variance=True` and returns (F, logvar: (n,)).
    weighted: whether the loss honours `weighting` and `scales`; by default it uses neither, as
    published. The other arguments: as of `Denoiser`.
    """

    def __init__(
        self,
        inner_model: nn.Module,
        sigma_data: float = 1.0,
        weighting: str | Weighting = "karras",
        scales: int = 1,
        dct_dims: Sequence[int] | None = None,
        weighted: bool = False,
    ):
        super().__init__(inner_model, sigma_data, weighting, scales, dct_dims)
        self.weighted = weighted

    def loss(
        self, input: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """Gaussian negative log-likelihood per sample, (n,): (error / e^logvar + logvar) / 2.

        input, noise: (n, ...). sigma: (n,).
        """
        x = input + noise * append_dims(sigma, input.ndim)
        output, logvar = self._network(x, sigma, return_variance=True, **kwargs)
        target = self._target(input, noise, sigma)
        if self.weighted:
            error, weight = self._squared_error(output, target), self.weighting(sigma)
        else:
            error, weight = (output - target).pow(2).flatten(1).mean(1), torch.ones_like(sigma)
        return weight * (error * torch.exp(-logvar) + logvar) / 2


class SimpleLossDenoiser(Denoiser):
    """A denoiser trained on the squared error of the noise it estimates, (x - D) / sigma.

    This simple loss of DDPM (arXiv:2006.11239, equation 14) is the `snr` weighting; `weighting` and
    `learned_weighting` are accepted and not used.
    """

    def loss(
        self, input: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """||(x - D) / sigma - noise||^2 per sample, (n,), the mean over all other dimensions.

        input, noise: (n, ...). sigma: (n,).
        """
        output = self._network(input + noise * append_dims(sigma, input.ndim), sigma, **kwargs)
        error = self._squared_error(output, self._target(input, noise, sigma))
        return error * self._named_weight("snr", sigma)


class XPredictionDenoiser(Denoiser):
    """A denoiser whose network estimates the clean data itself (JiT, arXiv:2511.13720).

    D(x, sigma) = F(c_in x, sigma), with c_in = s / (s + sigma): JiT's z = t x + (1 - t) s noise at
    t = s / (s + sigma). The loss is that of v = (x - z) / (1 - t): the squared error of D weighs
    ((s + sigma) / sigma)^2, at most `max_weight`; 400 is JiT's 1 - t >= 0.05. At sigma = 0 the
    result is the network's, not x.

    sigma_data: the standard deviation of the data, which plays no part. noise_scale: s, 1 at 256
    pixels and 2 at 512. scales, dct_dims, learned_weighting: as of `Denoiser`.
    """

    def __init__(
        self,
        inner_model: nn.Module,
        sigma_data: float = 1.0,
        noise_scale: float = 1.0,
        max_weight: float = 400.0,
        scales: int = 1,
        dct_dims: Sequence[int] | None = None,
        learned_weighting: bool = False,
    ):
        numbers.positive(noise_scale=noise_scale, max_weight=max_weight)
        rest = scales, dct_dims, learned_weighting
        super().__init__(inner_model, sigma_data, self._v_weight, *rest)
        self.noise_scale = noise_scale
        self.max_weight = max_weight

    def get_scalings(self, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """c_skip = 0, c_out = 1 and c_in, shaped like sigma."""
        c_in = self.noise_scale / (self.noise_scale + widen(sigma))
        return torch.zeros_like(sigma), torch.ones_like(sigma), c_in.to(sigma.dtype)

    def _target(
        self, input: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor
    ) -> torch.Tensor:
        return input

    def _v_weight(self, sigma: torch.Tensor) -> torch.Tensor:
        ratio = (self.noise_scale + widen(sigma)) / sigma
        return ratio.square().clamp(max=self.max_weight).to(sigma.dtype)
