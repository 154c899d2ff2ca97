"""Typed sections of autoencoders: one to train as a `model`, one that a latent model names."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationInfo, model_validator
from torch import nn
from typing_extensions import Self

from ..models.autoencoder import KLAutoencoder
from .base import (
    NonNegativeFloat,
    Positive,
    PositiveDepth,
    Probability,
    Section,
    Size,
    fail,
    is_strict,
)


class KLAutoencoderModel(Section):
    """A convolutional autoencoder, trained by train_autoencoder.py.

    channels: features per level, from the pixels down; each level halves the sides. attention: at
    the coarsest level. kl_weight: of the sum of the KL term against that of the absolute error.
    lpips_weight: of LPIPS against the mean absolute error; 0 without the package.
    """

    type: Literal["kl_autoencoder"]
    input_channels: Positive
    input_size: Size | None = None
    latent_channels: Positive
    channels: list[Positive] = Field(min_length=1, max_length=8)
    depth: PositiveDepth = 2
    num_groups: Positive = 32
    attention: bool = False
    kl_weight: NonNegativeFloat = 1e-6
    lpips_weight: NonNegativeFloat = 0.0
    augment_prob: Probability = 0.0

    @model_validator(mode="after")
    def _sizes(self, info: ValidationInfo) -> Self:
        if bad := [c for c in self.channels if c % self.num_groups]:
            raise fail(f"num_groups must divide the channels: {bad[0]} / {self.num_groups}")
        factor = 2 ** (len(self.channels) - 1)
        if self.input_size and any(side % factor for side in self.input_size):
            raise fail(
                f"input_size {self.input_size} must be a multiple of {factor}, 2 for each level "
                "after the first"
            )
        if self.lpips_weight and self.input_size and min(self.input_size) < 16:
            raise fail(
                f"LPIPS halves images four times: their sides are at least 16, got input_size "
                f"{self.input_size}; set it to 0",
                "lpips_weight",
            )
        if is_strict(info) and self.input_size is None:
            raise fail("is required", "input_size")
        return self

    def build(self, num_classes: int) -> nn.Module:
        """The network, its weights at their initial values."""
        return KLAutoencoder(
            self.input_channels,
            self.latent_channels,
            self.channels,
            self.depth,
            num_groups=self.num_groups,
            middle=self.attention,
        )


def _range(value: list[float]) -> list[float]:
    if not value[0] < value[1]:
        raise fail(f"must be [low, high] with low < high, got {value}")
    return value


Range = Annotated[list[float], Field(min_length=2, max_length=2), AfterValidator(_range)]
Statistic = float | list[Any] | None


class AutoencoderSection(Section):
    """The autoencoder of a latent model.

    location: a folder of diffusers, a checkpoint of train_autoencoder.py, or one of latent
    diffusion's code base. input_range: of the pixels that it was trained on. tile: the side in
    pixels above which images are encoded and decoded tile by tile. mean, std: of the raw latents,
    one number for each channel, or for each element; train.py fills them in, and the fingerprint of
    the weights.
    """

    location: str
    input_range: Range = Field(default_factory=lambda: [-1.0, 1.0])
    tile: Positive | None = None
    mean: Statistic = None
    std: Statistic = None
    fingerprint: str | None = None

    @model_validator(mode="after")
    def _both(self) -> Self:
        if (self.mean is None) != (self.std is None):
            raise fail("mean and std are given together, or neither of them")
        return self
