"""Typed models of a config's noise-level density; each builds its function."""

import math
from abc import abstractmethod
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, Field
from torch import Tensor

from .. import densities
from .base import (
    ConfigError,
    LogLevel,
    NonNegativeFloat,
    PositiveFloat,
    Section,
    fail,
    keep_unknown,
)

# Of the model, where it doesn't say.
MODEL_DEFAULTS = {"sigma_data": 1.0, "sigma_min": 0.01, "sigma_max": 80.0, "noise_scale": 1.0}


def _of(model: Mapping[str, Any], key: str) -> Any:
    value = model.get(key, MODEL_DEFAULTS.get(key))
    if value is None:
        raise ConfigError(f"model.{key}: is required, as its sigma_sample_density leaves it open")
    return value


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


class SampleDensity(Section):
    """The density of the noise levels of training."""

    @abstractmethod
    def build(self, model: Mapping[str, Any]) -> partial[Tensor]:
        """A function of (shape, device=, dtype=).

        model: the section that fills in what this one leaves open.
        """


def with_bounds(density: SampleDensity, model: Mapping[str, Any]) -> partial[Tensor]:
    """The density's function, what it leaves open filled in from the model's section.

    Raises ConfigError where its lower bound then isn't below its upper one.
    """
    function = density.build(model)
    low, high = (function.keywords.get(key) for key in ("min_value", "max_value"))
    if low is not None and not low < high:
        raise fail(f"min_value {low} must be below max_value {high}", "sigma_sample_density")
    return function


class LogNormal(SampleDensity):
    """log sigma ~ N(mean, std^2)."""

    type: Literal["lognormal"]
    mean: LogLevel = Field(validation_alias=AliasChoices("mean", "loc"))
    std: PositiveFloat = Field(validation_alias=AliasChoices("std", "scale"))

    def build(self, model: Mapping[str, Any]) -> partial[Tensor]:
        return partial(
            densities.rand_log_normal,
            loc=self.mean,
            scale=self.std,
        )


class LogitNormal(SampleDensity):
    """logit t ~ N(mean, std^2) of t = s / (s + sigma), with s the model's noise_scale (JiT).

    Then ln sigma ~ N(ln s - mean, std^2).
    """

    type: Literal["logit-normal"]
    mean: LogLevel = -0.8
    std: PositiveFloat = 0.8

    def build(self, model: Mapping[str, Any]) -> partial[Tensor]:
        return partial(
            densities.rand_log_normal,
            loc=math.log(_of(model, "noise_scale")) - self.mean,
            scale=self.std,
        )


class LogLogistic(SampleDensity):
    """log sigma ~ Logistic(loc, scale), truncated; loc defaults to log(sigma_data)."""

    type: Literal["loglogistic"]
    loc: LogLevel | None = None
    scale: PositiveFloat = 0.5
    min_value: NonNegativeFloat = 0.0
    max_value: PositiveFloat | None = None

    def build(self, model: Mapping[str, Any]) -> partial[Tensor]:
        return partial(
            densities.rand_log_logistic,
            loc=_or(self.loc, math.log(_of(model, "sigma_data"))),
            scale=self.scale,
            min_value=self.min_value,
            max_value=_or(self.max_value, math.inf),
        )


class LogUniform(SampleDensity):
    """log sigma uniform; from sigma_min to sigma_max unless given."""

    type: Literal["loguniform"]
    min_value: PositiveFloat | None = None
    max_value: PositiveFloat | None = None

    def build(self, model: Mapping[str, Any]) -> partial[Tensor]:
        return partial(
            densities.rand_log_uniform,
            min_value=_or(self.min_value, _of(model, "sigma_min")),
            max_value=_or(self.max_value, _of(model, "sigma_max")),
        )


class VDiffusion(SampleDensity):
    """The cosine schedule's density (arXiv 2202.00512), truncated."""

    type: Literal["v-diffusion", "cosine"]
    min_value: NonNegativeFloat = 1e-3
    max_value: PositiveFloat = 1e3

    def build(self, model: Mapping[str, Any]) -> partial[Tensor]:
        return partial(
            densities.rand_v_diffusion,
            sigma_data=_of(model, "sigma_data"),
            min_value=self.min_value,
            max_value=self.max_value,
        )


class SplitLogNormal(SampleDensity):
    """log sigma ~ a normal with another deviation on each side of its mode."""

    type: Literal["split-lognormal"]
    mean: LogLevel = Field(validation_alias=AliasChoices("mean", "loc"))
    std_1: PositiveFloat = Field(validation_alias=AliasChoices("std_1", "scale_1"))
    std_2: PositiveFloat = Field(validation_alias=AliasChoices("std_2", "scale_2"))

    def build(self, model: Mapping[str, Any]) -> partial[Tensor]:
        return partial(
            densities.rand_split_log_normal,
            loc=self.mean,
            scale_1=self.std_1,
            scale_2=self.std_2,
        )


class CosineInterpolated(SampleDensity):
    """The interpolated cosine density of simple diffusion (arXiv 2301.11093) and HDiT.

    image_d, the side of the images, and noise_d_high default to the longer side of input_size.
    """

    type: Literal["cosine-interpolated"]
    image_d: PositiveFloat | None = None
    noise_d_low: PositiveFloat = 32.0
    noise_d_high: PositiveFloat | None = None
    min_value: PositiveFloat | None = None
    max_value: PositiveFloat | None = None

    def build(self, model: Mapping[str, Any]) -> partial[Tensor]:
        return partial(
            densities.rand_cosine_interpolated,
            image_d=self.image_d or max(_of(model, "input_size")),
            noise_d_low=self.noise_d_low,
            noise_d_high=self.noise_d_high or max(_of(model, "input_size")),
            sigma_data=_of(model, "sigma_data"),
            min_value=_or(self.min_value, min(_of(model, "sigma_min"), 1e-3)),
            max_value=_or(self.max_value, max(_of(model, "sigma_max"), 1e3)),
        )


class ForeignDensity(SampleDensity):
    """A density of another program."""

    type: str

    def build(self, model: Mapping[str, Any]) -> partial[Tensor]:
        raise ConfigError(f"model.sigma_sample_density.type: unknown type {self.type!r}")


Density = Annotated[
    LogNormal
    | LogitNormal
    | LogLogistic
    | LogUniform
    | VDiffusion
    | SplitLogNormal
    | CosineInterpolated,
    Field(discriminator="type"),
    keep_unknown(ForeignDensity.model_construct),
]
