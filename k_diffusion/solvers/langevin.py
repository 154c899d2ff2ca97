"""Predictor-corrector sampling (Song et al. 2021, arXiv:2011.13456)."""

from typing import Any

import torch
from torch import Tensor

from .context import Context
from .exponential import toward
from .noise_plan import get_ancestral_step


def langevin(ctx: Context, x: Tensor, sigma: float, noise: Tensor, snr: float) -> Tensor:
    """A step of Langevin dynamics at a noise level: algorithm 4.

    Its size is 2 (snr |noise| / |score|)^2 by each image's own norms, at most sigma^2, beyond which
    it overshoots. x, noise: (n, ...).
    """
    score = (ctx.denoise(x, sigma) - x) * (1 / sigma**2)
    axes = tuple(range(1, x.ndim))
    norms = [torch.linalg.vector_norm(y, dim=axes, keepdim=True) for y in (noise, score)]
    tiny = torch.finfo(score.dtype).tiny
    size = (2 * (snr * norms[0] / norms[1].clamp(min=tiny)) ** 2).clamp(max=sigma**2)
    return x + score * size + noise * (2 * size).sqrt()


def predictor_corrector(
    ctx: Context,
    x: Tensor,
    sigma: float,
    sigma_next: float,
    denoised: Tensor,
    state: Any,
    snr: float,
    corrector_steps: int,
) -> tuple[Tensor, Any]:
    """An ancestral step (appendix F), then Langevin steps at its end. A step to 0 denoises."""
    down, up = get_ancestral_step(sigma, sigma_next)
    x = toward(x, denoised, sigma, down)
    if sigma_next == 0:
        return x, None
    x = x + ctx.noise(sigma, sigma_next) * up
    for _ in range(corrector_steps):
        x = langevin(ctx, x, sigma_next, ctx.noise(sigma, sigma_next), snr)
    return x, None
