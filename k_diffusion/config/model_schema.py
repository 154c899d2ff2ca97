"""Typed models of a config's `model` section: model types, attention, noise-level densities."""

from typing import Annotated, Any, Literal

from pydantic import AliasChoices, Field, model_validator

from .base import (
    Count,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Probability,
    Rate,
    Section,
    Size,
    fail,
)

# ---------------------------------------------------------------- noise-level densities


class LogNormal(Section):
    """log sigma ~ N(mean, std^2)."""

    type: Literal["lognormal"]
    mean: float = Field(validation_alias=AliasChoices("mean", "loc"))
    std: PositiveFloat = Field(validation_alias=AliasChoices("std", "scale"))


class LogLogistic(Section):
    """log sigma ~ Logistic(loc, scale), truncated; loc defaults to log(sigma_data)."""

    type: Literal["loglogistic"]
    loc: float | None = None
    scale: PositiveFloat = 0.5
    min_value: NonNegativeFloat = 0.0
    max_value: PositiveFloat | None = None


class LogUniform(Section):
    """log sigma uniform; from sigma_min to sigma_max unless given."""

    type: Literal["loguniform"]
    min_value: PositiveFloat | None = None
    max_value: PositiveFloat | None = None


class VDiffusion(Section):
    """The cosine schedule's density (arXiv 2202.00512), truncated."""

    type: Literal["v-diffusion", "cosine"]
    min_value: NonNegativeFloat = 1e-3
    max_value: PositiveFloat = 1e3


class SplitLogNormal(Section):
    """log sigma ~ a normal with another deviation on each side of its mode."""

    type: Literal["split-lognormal"]
    mean: float = Field(validation_alias=AliasChoices("mean", "loc"))
    std_1: PositiveFloat = Field(validation_alias=AliasChoices("std_1", "scale_1"))
    std_2: PositiveFloat = Field(validation_alias=AliasChoices("std_2", "scale_2"))


class CosineInterpolated(Section):
    """The interpolated cosine density of simple diffusion (arXiv 2301.11093) and HDiT.

    noise_d_high defaults to the longer side of input_size.
    """

    type: Literal["cosine-interpolated"]
    noise_d_low: PositiveFloat = 32.0
    noise_d_high: PositiveFloat | None = None
    min_value: PositiveFloat | None = None
    max_value: PositiveFloat | None = None


Density = Annotated[
    LogNormal | LogLogistic | LogUniform | VDiffusion | SplitLogNormal | CosineInterpolated,
    Field(discriminator="type"),
]

# ---------------------------------------------------------------- attention geometries


GlobalBackend = Literal["flash4", "flash3", "flash2", "sdpa", "reference"]
NeighborhoodBackend = Literal[
    "natten", "natten-0.17", "flex", "natten-unfused", "tiled", "reference"
]
WindowBackend = Literal["sdpa", "reference"]


class GlobalAttention(Section):
    type: Literal["global"]
    d_head: Positive = 64
    backend: GlobalBackend | None = None


class NeighborhoodAttention(Section):
    type: Literal["neighborhood"]
    d_head: Positive = 64
    kernel_size: Positive = 7
    backend: NeighborhoodBackend | None = None


class ShiftedWindowAttention(Section):
    type: Literal["shifted-window"]
    d_head: Positive = 64
    window_size: Positive
    backend: WindowBackend | None = None


class NoAttention(Section):
    type: Literal["none"]


Attention = Annotated[
    GlobalAttention | NeighborhoodAttention | ShiftedWindowAttention | NoAttention,
    Field(discriminator="type"),
]

# ---------------------------------------------------------------- models


class Model(Section):
    """What every model type has. Sizes are in pixels, (height, width)."""

    input_channels: Positive
    input_size: Size
    sigma_data: PositiveFloat = 1.0
    sigma_min: PositiveFloat = 0.01
    sigma_max: PositiveFloat = 80.0
    sigma_sample_density: Density
    has_variance: bool = False
    loss_config: Literal["karras", "simple"] = "karras"
    loss_weighting: Literal["karras", "soft-min-snr", "snr"] = "karras"
    loss_scales: Positive = 1
    augment_prob: Probability = 0.0
    augment_wrapper: bool = False
    skip_stages: Count = 0

    @model_validator(mode="after")
    def _rules(self) -> "Model":
        if self.sigma_min >= self.sigma_max:
            raise fail(f"sigma_min {self.sigma_min} must be below sigma_max {self.sigma_max}")
        if self.loss_config == "simple" and self.has_variance:
            raise fail("loss_config 'simple' has no learned variance: set has_variance to false")
        if self.has_variance and not isinstance(self, ImageV1):
            raise fail("has_variance needs a model with a variance head: image_v1")
        return self

    def _same_lengths(self, **lists: list[Any]) -> None:
        lengths = {name: len(value) for name, value in lists.items()}
        if len(set(lengths.values())) > 1:
            text = ", ".join(f"{name} has {n}" for name, n in lengths.items())
            raise fail(f"one entry a level: {text}")


def _divisible(size: list[int], patch: list[int], levels: int) -> None:
    multiple = [p * 2 ** (levels - 1) for p in patch]
    if any(s % m for s, m in zip(size, multiple)):
        down = [max(m, s // m * m) for s, m in zip(size, multiple)]
        up = [-(-s // m) * m for s, m in zip(size, multiple)]
        raise fail(
            f"input_size {size} does not divide by {multiple} (patch_size {patch} x 2 for each "
            f"level above the first); sizes that do: {down}, {up}"
        )


class ImageV1(Model):
    """Convolutional U-Net."""

    type: Literal["image_v1"]
    patch_size: Positive = 1
    mapping_out: Positive
    depths: list[Positive]
    channels: list[Positive]
    self_attn_depths: list[bool]
    cross_attn_depths: list[bool] | None = None
    mapping_cond_dim: Count = 0
    unet_cond_dim: Count = 0
    cross_cond_dim: Count = 0
    dropout_rate: Rate = 0.0
    augment_wrapper: bool = True

    @model_validator(mode="after")
    def _levels(self) -> "ImageV1":
        levels = {"depths": self.depths, "channels": self.channels}
        self._same_lengths(**levels, self_attn_depths=self.self_attn_depths)
        if self.cross_attn_depths is not None:
            self._same_lengths(**levels, cross_attn_depths=self.cross_attn_depths)
        _divisible(self.input_size, [self.patch_size] * 2, len(self.depths))
        return self


def round_to_power_of_two(x: float, tol: float) -> int:
    """x rounded to a multiple of the largest power of two that stays within a share `tol` of x."""
    best, power = round(x), 1
    while power <= x:
        candidate = round(x / power) * power
        if abs(candidate - x) <= tol * x:
            best = candidate
        power *= 2
    return best


class ImageTransformerV1(Model):
    """Transformer with global attention. d_ff 0: 8/3 of the width, rounded."""

    type: Literal["image_transformer_v1"]
    patch_size: Size
    width: Positive
    depth: Positive
    d_ff: Count = 0
    dropout_rate: Rate = 0.0
    attn_backend: GlobalBackend | None = None

    @model_validator(mode="after")
    def _defaults(self) -> "ImageTransformerV1":
        if not self.d_ff:
            self.d_ff = round_to_power_of_two(self.width * 8 / 3, tol=0.05)
        if self.width % 64:
            raise fail(f"width must be a multiple of 64 (the size of a head), got {self.width}")
        _divisible(self.input_size, self.patch_size, 1)
        return self


class ImageTransformerV2(Model):
    """Hourglass transformer. One entry a level, from the pixels up.

    d_ffs, mapping_d_ff: 3 times the width where not given. self_attns: neighborhood attention with
    kernel_size 7 below and global attention on top. dropout_rate: one for all levels or one each.
    """

    type: Literal["image_transformer_v2"]
    patch_size: Size
    depths: list[Positive]
    widths: list[Positive]
    d_ffs: list[Positive | None] | None = None
    self_attns: list[Attention] | None = None
    dropout_rate: Rate | list[Rate] = 0.0
    mapping_depth: Positive = 2
    mapping_width: Positive = 256
    mapping_d_ff: Positive | None = None
    mapping_dropout_rate: Rate = 0.0
    mapping_cond_dim: Count = 0

    @model_validator(mode="after")
    def _defaults(self) -> "ImageTransformerV2":
        n = len(self.depths)
        self.d_ffs = [d or 3 * w for d, w in zip(self.d_ffs or [None] * n, self.widths)]
        self.mapping_d_ff = self.mapping_d_ff or 3 * self.mapping_width
        if self.self_attns is None:
            below = [NeighborhoodAttention(type="neighborhood") for _ in range(n - 1)]
            self.self_attns = [*below, GlobalAttention(type="global")]
        if not isinstance(self.dropout_rate, list):
            self.dropout_rate = [self.dropout_rate] * n
        self._same_lengths(
            depths=self.depths,
            widths=self.widths,
            d_ffs=self.d_ffs,
            self_attns=self.self_attns,
            dropout_rate=self.dropout_rate,
        )
        _divisible(self.input_size, self.patch_size, n)
        for level, attn in enumerate(self.self_attns):
            self._check_attention(level, attn)
        return self

    def tokens(self, level: int) -> list[int]:
        """The (height, width) of a level's grid of tokens at input_size."""
        return [s // p // 2**level for s, p in zip(self.input_size, self.patch_size)]

    def _check_attention(self, level: int, attn: Any) -> None:
        if isinstance(attn, NoAttention):
            return
        where, width, tokens = f"self_attns[{level}]", self.widths[level], self.tokens(level)
        if width % attn.d_head:
            valid = [d for d in range(8, width + 1, 8) if width % d == 0]
            raise fail(
                f"width {width} is not a multiple of d_head {attn.d_head}; "
                f"values of d_head that divide it: {valid or 'none'}",
                where,
            )
        if attn.d_head % 8:
            raise fail(f"d_head must be a multiple of 8, got {attn.d_head}", where)
        if isinstance(attn, ShiftedWindowAttention) and any(t % attn.window_size for t in tokens):
            valid = [d for d in range(2, min(tokens) + 1) if not any(t % d for t in tokens)]
            raise fail(
                f"window_size {attn.window_size} does not divide the {tokens[0]} x {tokens[1]} "
                f"tokens of level {level}; sizes that do: {valid or 'none but 1'}",
                where,
            )


AnyModel = Annotated[ImageV1 | ImageTransformerV1 | ImageTransformerV2, Field(discriminator="type")]
