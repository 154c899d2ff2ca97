"""Guidance by the gradient of a loss."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..common.tensors import append_dims, recordable, widen
from .combine import Ask, Guidance, Scale, check_scale


class GradientGuidedDenoiser(Guidance):
    """Guidance by the gradient of a loss: D - scale * sigma^2 * grad_x loss(D(x, sigma)).

    With loss = -log p(y | x) this is Tweedie's formula for the score of p(x | y) (classifier
    guidance, arXiv:2105.05233, of an estimate of the clean sample, as in arXiv:2209.14687).

    loss: denoised (n, ...) -> (n,), a loss per sample, differentiable. The gradient is taken
    through the model, under no_grad and inference_mode too; the result has none. Raises ValueError
    for a loss of another shape, or one that doesn't depend on x.
    """

    parts = ("model", "loss")

    def __init__(self, model: nn.Module, loss: Callable[[Tensor], Tensor], scale: Scale = 1.0):
        super().__init__()
        self.model = model
        self.loss = loss
        self.scale = check_scale(scale)

    def estimates(self, ask: Ask, x: Tensor, sigma: Tensor, **cond: Any) -> tuple[Tensor, ...]:
        """Those of the model, moved by the gradient of the first. x: (n, ...), sigma: (n,)."""
        with torch.inference_mode(False), torch.enable_grad():
            x = x.detach().clone().requires_grad_()
            sigma = recordable(sigma)
            cond = {name: recordable(value) for name, value in cond.items()}
            denoised = ask(self.model, x, sigma, **cond)
            loss = self.loss(denoised[0])
            if loss.shape != x.shape[:1]:
                raise ValueError(
                    f"the loss must return a value per sample, ({len(x)},), got shape "
                    f"{tuple(loss.shape)}"
                )
            if not loss.requires_grad:
                raise ValueError("the loss has no gradient with respect to the denoised sample")
            # scaled before the gradient is taken, which might underflow in half precision
            scale = self.scale(sigma) if callable(self.scale) else self.scale
            (grad,) = torch.autograd.grad((loss * scale).sum(), x)
        step = append_dims(widen(sigma), x.ndim) ** 2 * widen(grad)
        return tuple((y.detach() - step).to(y.dtype) for y in denoised)
