"""Models trained elsewhere as denoisers: v-diffusion, OpenAI (guided diffusion), CompVis, rectified
flows and diffusers.

Wrapped, they are called as `model(x, sigma)` with x = x0 + sigma noise, (n, ...), and sigma (n,),
and return their estimate of x0.
"""

import math
from typing import Any

import torch
from torch import nn

from .diffusers_wrapper import make_diffusers_denoiser as make_diffusers_denoiser
from .discrete import DiscreteEpsDDPMDenoiser as DiscreteEpsDDPMDenoiser
from .discrete import DiscreteSampleDDPMDenoiser as DiscreteSampleDDPMDenoiser
from .discrete import DiscreteSchedule as DiscreteSchedule
from .discrete import DiscreteVDDPMDenoiser as DiscreteVDDPMDenoiser
from .discrete import VPrediction
from .flow import RectifiedFlowDenoiser as RectifiedFlowDenoiser


class VDenoiser(VPrediction):
    """A continuous-time v-diffusion model, `inner_model(x, t)` with t from 0 (clean) to 1 (noise).

    Its schedule is the cosine one: t = 2 atan(sigma) / pi.
    """

    def __init__(self, inner_model: nn.Module):
        super().__init__()
        self.inner_model = inner_model

    def get_v(self, x: torch.Tensor, t: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """The model's estimate of v at time t."""
        return self.inner_model(x, t, **kwargs)

    def sigma_to_t(self, sigma: torch.Tensor) -> torch.Tensor:
        """The time in [0, 1] of a noise level."""
        return sigma.atan() * 2 / math.pi

    def t_to_sigma(self, t: torch.Tensor) -> torch.Tensor:
        """The noise level of a time in [0, 1]."""
        return (t * math.pi / 2).tan()


class OpenAIDenoiser(DiscreteEpsDDPMDenoiser):
    """A guided-diffusion model, with the table of its `diffusion` object.

    has_learned_sigmas: the model returns twice the channels; the second half, its variances, is
    dropped.
    """

    def __init__(
        self,
        model: Any,
        diffusion: Any,
        quantize: bool = False,
        has_learned_sigmas: bool = True,
        device: torch.device | str = "cpu",
    ):
        alphas_cumprod = torch.as_tensor(
            diffusion.alphas_cumprod, dtype=torch.float32, device=device
        )
        super().__init__(model, alphas_cumprod, quantize)
        self.has_learned_sigmas = has_learned_sigmas

    def get_eps(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        output = self.inner_model(*args, **kwargs)
        return output.chunk(2, dim=1)[0] if self.has_learned_sigmas else output


class CompVisDenoiser(DiscreteEpsDDPMDenoiser):
    """A latent-diffusion (Stable Diffusion) model that estimates the noise.

    `device` has no effect: the table lies where the model has it.
    """

    def __init__(self, model: Any, quantize: bool = False, device: torch.device | str = "cpu"):
        super().__init__(model, model.alphas_cumprod, quantize)

    def get_eps(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.inner_model.apply_model(*args, **kwargs)


class CompVisVDenoiser(DiscreteVDDPMDenoiser):
    """A latent-diffusion (Stable Diffusion 2) model that estimates v.

    `device` has no effect: the table lies where the model has it.
    """

    def __init__(self, model: Any, quantize: bool = False, device: torch.device | str = "cpu"):
        super().__init__(model, model.alphas_cumprod, quantize)

    def get_v(self, x: torch.Tensor, t: torch.Tensor, cond: Any, **kwargs: Any) -> torch.Tensor:
        return self.inner_model.apply_model(x, t, cond, **kwargs)
