"""The typed part of a config's `model` section that its denoiser reads; it builds itself."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from pydantic import ValidationInfo, model_validator
from torch import nn
from typing_extensions import Self

from ..denoisers import (
    Denoiser,
    DenoiserWithVariance,
    SimpleLossDenoiser,
    XPredictionDenoiser,
    sigmoid_weighting,
)
from .base import LogLevel, Positive, PositiveFloat, Section, fail, is_strict


class DenoiserSection(Section):
    """What the denoiser around a model reads of its section.

    variance_weighting: with has_variance, let the loss honour loss_weighting and loss_scales.
    loss_bias: b of the sigmoid weighting 1 / (sigma^2 + e^-b) of the denoiser's error. prediction
    'x': the network estimates the clean data, and the loss is JiT's. noise_scale: its s;
    loss_max_weight: at most that. learned_weighting: the loss L is L / e^u + u with a learned u of
    sigma.
    """

    sigma_data: PositiveFloat = 1.0
    has_variance: bool = False
    loss_config: Literal["karras", "simple"] = "karras"
    loss_weighting: Literal["karras", "soft-min-snr", "snr", "sigmoid"] = "karras"
    loss_bias: LogLevel = 0.0
    loss_scales: Positive = 1
    variance_weighting: bool = False
    prediction: Literal["karras", "x"] = "karras"
    noise_scale: PositiveFloat = 1.0
    loss_max_weight: PositiveFloat = 400.0
    learned_weighting: bool = False

    @model_validator(mode="after")
    def _one_loss(self) -> Self:
        others = self.has_variance, self.loss_config, self.loss_weighting
        if self.prediction == "x" and others != (False, "karras", "karras"):
            raise fail(
                "prediction 'x' has a loss of its own: leave out has_variance, loss_config and "
                "loss_weighting"
            )
        if self.learned_weighting and (self.has_variance or self.loss_config == "simple"):
            raise fail(
                "learned_weighting needs loss_config 'karras', and no has_variance, which learns a "
                "weighting of its own"
            )
        if self.loss_config == "simple" and self.has_variance:
            raise fail("loss_config 'simple' has no learned variance: set has_variance to false")
        return self

    @model_validator(mode="after")
    def _bias_has_an_effect(self, info: ValidationInfo) -> Self:
        if self.loss_bias and self.loss_weighting != "sigmoid":
            text = "has an effect with loss_weighting 'sigmoid' alone: set that, or leave it out"
            if is_strict(info):
                raise fail(text, "loss_bias")
            warnings.warn(f"loss_bias {text}", stacklevel=2)
        return self

    def build_wrapper(self) -> Callable[[nn.Module], nn.Module]:
        """A function that wraps the inner model into its denoiser."""
        if self.prediction == "x":
            return partial(
                XPredictionDenoiser,
                sigma_data=self.sigma_data,
                noise_scale=self.noise_scale,
                max_weight=self.loss_max_weight,
                scales=self.loss_scales,
                learned_weighting=self.learned_weighting,
            )
        weighting: Any = self.loss_weighting
        if weighting == "sigmoid":
            weighting = sigmoid_weighting(self.loss_bias, self.sigma_data)
        options: dict[str, Any] = {
            "sigma_data": self.sigma_data,
            "weighting": weighting,
            "scales": self.loss_scales,
        }
        if self.loss_config == "simple":
            return partial(SimpleLossDenoiser, **options)
        if self.has_variance:
            return partial(DenoiserWithVariance, **options, weighted=self.variance_weighting)
        return partial(Denoiser, **options, learned_weighting=self.learned_weighting)
