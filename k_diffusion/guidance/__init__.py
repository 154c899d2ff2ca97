"""Guidance as wrappers from denoiser to denoiser, so that it composes with every sampler.

All are called as the models they wrap, `model(x, sigma, **cond)` with x: (n, ...) and sigma: (n,),
and return the guided estimate of the clean sample, like x. They wrap each other, too:

    model = CFGDenoiser(model, 4, combine=Rescaled(0.7), class_cond=null)
    model = ThresholdedDenoiser(IntervalDenoiser(model, 0.3, 5.0), percentile=0.995)

A scale is a number, or a function of sigma: (n,) that gives one for each sample, (n,).
"""

from .by_loss import GradientGuidedDenoiser
from .by_model import (
    AutoguidedDenoiser,
    CFGDenoiser,
    IntervalDenoiser,
    PerturbedDenoiser,
    ThresholdedDenoiser,
)
from .combine import APG, CFGPlusPlus, Combine, Guidance, Rescaled, Scale, linear
from .inpainting import InpaintingDenoiser
from .rules import FDG, RULES, TCFG, CFGZeroStar

__all__ = [
    "APG",
    "FDG",
    "RULES",
    "TCFG",
    "AutoguidedDenoiser",
    "CFGDenoiser",
    "CFGPlusPlus",
    "CFGZeroStar",
    "Combine",
    "GradientGuidedDenoiser",
    "Guidance",
    "InpaintingDenoiser",
    "IntervalDenoiser",
    "PerturbedDenoiser",
    "Rescaled",
    "Scale",
    "ThresholdedDenoiser",
    "linear",
]
