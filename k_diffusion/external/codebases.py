"""Models of OpenAI's guided diffusion and of CompVis' latent diffusion."""

from typing import Any

import torch

from .discrete import DiscreteEpsDDPMDenoiser, DiscreteVDDPMDenoiser


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
        """The model's estimate of v. x: (n, c, h, w). t: (n,)."""
        return self.inner_model.apply_model(x, t, cond, **kwargs)
