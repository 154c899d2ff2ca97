"""Typed models of a config's noise-level density; each builds its function."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Literal, Protocol

from pydantic import AliasChoices, Field
from torch import Tensor

from .. import densities
from .base import NonNegativeFloat, PositiveFloat, Section


class Model(Protocol):
    """What a density takes from the model's section where its own leaves it open."""

    @property
    def input_size(self) -> Sequence[int]: ...
    @property
    def sigma_data(self) -> float: ...
    @property
    def sigma_min(self) -> float: ...
    @property
    def sigma_max(self) -> float: ...


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


class SampleDensity(Section):
    """The density of the noise levels of training."""

    @abstractmethod
    def build(self, model: Model) -> partial[Tensor]:
        """A function of (shape, device=, dtype=). model: fills in what the section leaves open."""


class LogNormal(SampleDensity):
    """log sigma ~ N(mean, std^2)."""

    type: Literal["lognormal"]
    mean: float = Field(validation_alias=AliasChoices("mean", "loc"))
    std: PositiveFloat = Field(validation_alias=AliasChoices("std", "scale"))

    def build(self, model: Model) -> partial[Tensor]:
        return partial(
            densities.rand_log_normal,
            loc=self.mean,
            scale=self.std,
        )


class LogLogistic(SampleDensity):
    """log sigma ~ Logistic(loc, scale), truncated; loc defaults to log(sigma_data)."""

    type: Literal["loglogistic"]
    loc: float | None = None
    scale: PositiveFloat = 0.5
    min_value: NonNegativeFloat = 0.0
    max_value: PositiveFloat | None = None

    def build(self, model: Model) -> partial[Tensor]:
        return partial(
            densities.rand_log_logistic,
            loc=_or(self.loc, math.log(model.sigma_data)),
            scale=self.scale,
            min_value=self.min_value,
            max_value=_or(self.max_value, math.inf),
        )


class LogUniform(SampleDensity):
    """log sigma uniform; from sigma_min to sigma_max unless given."""

    type: Literal["loguniform"]
    min_value: PositiveFloat | None = None
    max_value: PositiveFloat | None = None

    def build(self, model: Model) -> partial[Tensor]:
        return partial(
            densities.rand_log_uniform,
            min_value=_or(self.min_value, model.sigma_min),
            max_value=_or(self.max_value, model.sigma_max),
        )


class VDiffusion(SampleDensity):
    """The cosine schedule's density (arXiv 2202.00512), truncated."""

    type: Literal["v-diffusion", "cosine"]
    min_value: NonNegativeFloat = 1e-3
    max_value: PositiveFloat = 1e3

    def build(self, model: Model) -> partial[Tensor]:
        return partial(
            densities.rand_v_diffusion,
            sigma_data=model.sigma_data,
            min_value=self.min_value,
            max_value=self.max_value,
        )


class SplitLogNormal(SampleDensity):
    """log sigma ~ a normal with another deviation on each side of its mode."""

    type: Literal["split-lognormal"]
    mean: float = Field(validation_alias=AliasChoices("mean", "loc"))
    std_1: PositiveFloat = Field(validation_alias=AliasChoices("std_1", "scale_1"))
    std_2: PositiveFloat = Field(validation_alias=AliasChoices("std_2", "scale_2"))

    def build(self, model: Model) -> partial[Tensor]:
        return partial(
            densities.rand_split_log_normal,
            loc=self.mean,
            scale_1=self.std_1,
            scale_2=self.std_2,
        )


class CosineInterpolated(SampleDensity):
    """The interpolated cosine density of simple diffusion (arXiv 2301.11093) and HDiT.

    noise_d_high defaults to the longer side of input_size.
    """

    type: Literal["cosine-interpolated"]
    noise_d_low: PositiveFloat = 32.0
    noise_d_high: PositiveFloat | None = None
    min_value: PositiveFloat | None = None
    max_value: PositiveFloat | None = None

    def build(self, model: Model) -> partial[Tensor]:
        return partial(
            densities.rand_cosine_interpolated,
            image_d=max(model.input_size),
            noise_d_low=self.noise_d_low,
            noise_d_high=_or(self.noise_d_high, max(model.input_size)),
            sigma_data=model.sigma_data,
            min_value=_or(self.min_value, min(model.sigma_min, 1e-3)),
            max_value=_or(self.max_value, max(model.sigma_max, 1e3)),
        )


Density = Annotated[
    LogNormal | LogLogistic | LogUniform | VDiffusion | SplitLogNormal | CosineInterpolated,
    Field(discriminator="type"),
]
