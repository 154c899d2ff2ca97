"""Guidance as wrappers from denoiser to denoiser, so that it composes with every sampler."""

from typing import Any

import torch
from torch import nn


class CFGDenoiser(nn.Module):
    """Classifier-free guidance (arXiv 2207.12598): D_uncond + scale * (D_cond - D_uncond).

    model: (x, sigma, **cond) -> denoised, called once with both halves as one batch of 2 n. scale:
    1 is the model itself. uncond: for each condition that guidance strengthens, the (n, ...) tensor
    that stands for its absence, e.g. `class_cond=torch.full((n,), num_classes)`. Other conditions
    are given to both halves.
    """

    def __init__(self, model: nn.Module, scale: float, **uncond: torch.Tensor):
        super().__init__()
        self.model = model
        self.scale = scale
        self.uncond = uncond

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, **cond: Any) -> torch.Tensor:
        missing = [name for name in self.uncond if name not in cond]
        if missing:
            raise ValueError(f"guidance strengthens {missing}, but the sampler's extra_args lack it")
        both = {
            name: torch.cat([self.uncond.get(name, value), value])
            if isinstance(value, torch.Tensor)
            else value
            for name, value in cond.items()
        }
        without, given = self.model(torch.cat([x, x]), torch.cat([sigma, sigma]), **both).chunk(2)
        return torch.lerp(without, given, self.scale)
