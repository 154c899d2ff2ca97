"""Typed models of a config's `model` section, model types and attention; each builds itself."""

from abc import abstractmethod
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, model_validator
from torch import nn
from typing_extensions import Self

from ..augmentation import COND_DIM, KarrasAugmentWrapper
from ..models.attention import (
    Geometry,
    GlobalAttentionSpec,
    NeighborhoodAttentionSpec,
    NoAttentionSpec,
    ShiftedWindowAttentionSpec,
)
from ..models.cross_attention import D_HEAD as CROSS_D_HEAD, check_levels
from ..models.image_transformer_v1 import D_HEAD, ImageTransformerDenoiserModelV1
from ..models.image_transformer_v2 import (
    ImageTransformerDenoiserModelV2,
    LevelSpec,
    MappingSpec,
)
from ..models.image_v1 import ImageDenoiserModelV1
from .autoencoder_schema import KLAutoencoderModel
from .base import (
    ConfigError,
    Count,
    Depth,
    Positive,
    PositiveDepth,
    PositiveFloat,
    Probability,
    Rate,
    Section,
    Size,
    fail,
    is_strict,
    keep_unknown,
)
from .denoiser_schema import DenoiserSection
from .density_schema import Density, ForeignDensity, with_bounds

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

    def build(self) -> GlobalAttentionSpec:
        return GlobalAttentionSpec(self.d_head, self.backend)


class NeighborhoodAttention(Section):
    type: Literal["neighborhood"]
    d_head: Positive = 64
    kernel_size: Positive = 7
    backend: NeighborhoodBackend | None = None

    def build(self) -> NeighborhoodAttentionSpec:
        return NeighborhoodAttentionSpec(self.d_head, self.kernel_size, self.backend)


class ShiftedWindowAttention(Section):
    type: Literal["shifted-window"]
    d_head: Positive = 64
    window_size: Positive
    backend: WindowBackend | None = None

    def build(self) -> ShiftedWindowAttentionSpec:
        return ShiftedWindowAttentionSpec(self.d_head, self.window_size, backend=self.backend)


class NoAttention(Section):
    type: Literal["none"]

    def build(self) -> NoAttentionSpec:
        return NoAttentionSpec()


Attention = Annotated[
    GlobalAttention | NeighborhoodAttention | ShiftedWindowAttention | NoAttention,
    Field(discriminator="type"),
]

# ---------------------------------------------------------------- models


class Model(DenoiserSection):
    """What every model type has. Sizes are in pixels, (height, width).

    unet_cond_dim: channels of an image that is concatenated to the input; 0 for none.
    """

    input_channels: Positive
    input_size: Size | None = None
    sigma_min: PositiveFloat = 0.01
    sigma_max: PositiveFloat = 80.0
    sigma_sample_density: Density
    augment_prob: Probability = 0.0
    augment_wrapper: bool = False
    unet_cond_dim: Count = 0
    skip_stages: Count = 0

    @model_validator(mode="after")
    def _rules(self, info: ValidationInfo) -> Self:
        if self.sigma_min >= self.sigma_max:
            raise fail(f"sigma_min {self.sigma_min} must be below sigma_max {self.sigma_max}")
        if self.skip_stages and not isinstance(self, ImageV1):
            raise fail(f"skip_stages needs an image_v1 model, got {self.skip_stages}")
        if not isinstance(self.sigma_sample_density, ForeignDensity) and self.input_size:
            with_bounds(self.sigma_sample_density, vars(self))
        if self.has_variance and not isinstance(self, ImageV1):
            raise fail("has_variance needs a model with a variance head: image_v1")
        if self.learned_weighting and isinstance(self, ImageV1):
            raise fail("learned_weighting needs a transformer; for image_v1 set has_variance")
        if is_strict(info) and self.input_size is None:
            raise fail("is required", "input_size")
        return self

    @abstractmethod
    def build(self, num_classes: int) -> nn.Module:
        """The inner model, its weights at their initial values. num_classes 0: unconditional."""

    def _same_lengths(self, **lists: list[Any]) -> None:
        lengths = {name: len(value) for name, value in lists.items()}
        if len(set(lengths.values())) > 1:
            text = ", ".join(f"{name} has {n}" for name, n in lengths.items())
            raise fail(f"one entry per level: {text}")


def _rows(num_classes: int) -> int:
    """Of a table of class embeddings: one per class and one for "no class"."""
    return num_classes + 1 if num_classes else 0


def _divisible(size: list[int] | None, patch: list[int], levels: int) -> None:
    if size is None:
        return
    multiple = [p * 2 ** (levels - 1) for p in patch]
    if any(s % m for s, m in zip(size, multiple)):
        down = [max(m, s // m * m) for s, m in zip(size, multiple)]
        up = [-(-s // m) * m for s, m in zip(size, multiple)]
        raise fail(
            f"input_size {size} does not divide by {multiple} (patch_size {patch} x 2 for each "
            f"level above the first); sizes that do: {down}, {up}"
        )


def _check_heads(geometry: Geometry, width: int, where: str = "") -> None:
    try:
        geometry.heads(width)
    except ValueError as error:
        raise fail(str(error), where) from None


class ImageV1(Model):
    """Convolutional U-Net."""

    type: Literal["image_v1"]
    patch_size: Positive = 1
    mapping_out: Positive
    depths: list[PositiveDepth] = Field(min_length=1, max_length=16)
    channels: list[Positive]
    self_attn_depths: list[bool]
    cross_attn_depths: list[bool] | None = None
    mapping_cond_dim: Count = 0
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

    def build(self, num_classes: int) -> nn.Module:
        inner = ImageDenoiserModelV1(
            self.input_channels,
            self.mapping_out,
            self.depths,
            self.channels,
            self.self_attn_depths,
            self.cross_attn_depths,
            patch_size=self.patch_size,
            dropout_rate=self.dropout_rate,
            mapping_cond_dim=self.mapping_cond_dim + (COND_DIM if self.augment_wrapper else 0),
            unet_cond_dim=self.unet_cond_dim,
            cross_cond_dim=self.cross_cond_dim,
            skip_stages=self.skip_stages,
            has_variance=self.has_variance,
            num_classes=_rows(num_classes),
        )
        return KarrasAugmentWrapper(inner) if self.augment_wrapper else inner


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
    depth: Depth
    d_ff: Count = 0
    dropout_rate: Rate = 0.0
    attn_backend: GlobalBackend | None = None

    @model_validator(mode="after")
    def _defaults(self) -> "ImageTransformerV1":
        if not self.d_ff:
            self.d_ff = round_to_power_of_two(self.width * 8 / 3, tol=0.05)
        _check_heads(GlobalAttentionSpec(D_HEAD), self.width)
        _divisible(self.input_size, self.patch_size, 1)
        return self

    def build(self, num_classes: int) -> nn.Module:
        return ImageTransformerDenoiserModelV1(
            n_layers=self.depth,
            d_model=self.width,
            d_ff=self.d_ff,
            in_features=self.input_channels,
            out_features=self.input_channels,
            patch_size=self.patch_size,
            num_classes=_rows(num_classes),
            dropout=self.dropout_rate,
            sigma_data=self.sigma_data,
            attn_backend=self.attn_backend,
            learned_weighting=self.learned_weighting,
            unet_cond_dim=self.unet_cond_dim,
        )


class ImageTransformerV2(Model):
    """Hourglass transformer. One entry per level, from the pixels up.

    d_ffs, mapping_d_ff: 3 times the width where not given. self_attns: neighborhood attention with
    kernel_size 7 below and global attention on top. dropout_rate: one for all levels or one each.
    patch_bottleneck: features between a patch and its token; 0 for none. cross_cond_dim: features
    of a token that cross-attention sees; 0 for none. cross_attn_depths: which levels have it; all
    where not given.
    """

    type: Literal["image_transformer_v2"]
    patch_size: Size
    depths: list[Depth] = Field(min_length=1, max_length=16)
    widths: list[Positive]
    d_ffs: list[Positive | None] | None = None
    self_attns: list[Attention] | None = None
    dropout_rate: Rate | list[Rate] = 0.0
    mapping_depth: Depth = 2
    mapping_width: Positive = 256
    mapping_d_ff: Positive | None = None
    mapping_dropout_rate: Rate = 0.0
    mapping_cond_dim: Count = 0
    cross_cond_dim: Count = 0
    cross_attn_depths: list[bool] | None = None
    patch_bottleneck: Count = 0

    @model_validator(mode="after")
    def _defaults(self) -> "ImageTransformerV2":
        n = len(self.depths)
        self.d_ffs = [d or 3 * w for d, w in zip(self.d_ffs or [None] * n, self.widths)]
        self.mapping_d_ff = self.mapping_d_ff or 3 * self.mapping_width
        if not self.self_attns:
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
        self._same_lengths(depths=self.depths, cross_attn_depths=self._crosses)
        try:
            check_levels(self._crosses, self.cross_cond_dim)
        except ValueError as error:
            raise fail(str(error), "cross_attn_depths") from None
        _divisible(self.input_size, self.patch_size, n)
        for level, attn in enumerate(self.self_attns):
            self._check_attention(level, attn)
        return self

    def _check_grid(self, geometry: Geometry, level: int) -> None:
        """Raises ValueError unless a level's tokens at input_size, if there is one, will do."""
        if self.input_size is not None:
            geometry.check(*[s // p // 2**level for s, p in zip(self.input_size, self.patch_size)])

    def _check_attention(self, level: int, attn: Any) -> None:
        geometry, where = attn.build(), f"self_attns[{level}]"
        if isinstance(geometry, NoAttentionSpec):
            if self._crosses[level]:
                _check_heads(GlobalAttentionSpec(CROSS_D_HEAD), self.widths[level], where)
            return
        _check_heads(geometry, self.widths[level], where)
        # A neighborhood larger than the grid is left to `check_grids`: a config that never makes
        # its model may have one.
        if not isinstance(geometry, NeighborhoodAttentionSpec):
            try:
                self._check_grid(geometry, level)
            except ValueError as error:
                raise fail(str(error), where) from None

    def check_grids(self) -> None:
        """Raises ConfigError unless every level can attend at input_size, if there is one."""
        for level, attn in enumerate(self.self_attns or []):
            if not isinstance(geometry := attn.build(), NoAttentionSpec):
                try:
                    self._check_grid(geometry, level)
                except ValueError as error:
                    raise ConfigError(f"model.self_attns[{level}]: {error}") from None

    def build(self, num_classes: int) -> nn.Module:
        levels = []
        rows = zip(self.depths, self.widths, self.d_ffs or [], self.self_attns or [], self._rates)
        self.check_grids()
        for i, (depth, width, d_ff, attn, dropout) in enumerate(rows):
            levels.append(
                LevelSpec(depth, width, d_ff or 0, attn.build(), dropout, self._crosses[i])
            )
        return ImageTransformerDenoiserModelV2(
            levels,
            MappingSpec(
                self.mapping_depth,
                self.mapping_width,
                self.mapping_d_ff or 0,
                self.mapping_dropout_rate,
            ),
            in_channels=self.input_channels,
            out_channels=self.input_channels,
            patch_size=self.patch_size,
            num_classes=_rows(num_classes),
            mapping_cond_dim=self.mapping_cond_dim,
            patch_bottleneck=self.patch_bottleneck,
            learned_weighting=self.learned_weighting,
            cross_cond_dim=self.cross_cond_dim,
            unet_cond_dim=self.unet_cond_dim,
        )

    @property
    def _crosses(self) -> list[bool]:
        given = self.cross_attn_depths
        return [self.cross_cond_dim > 0] * len(self.depths) if given is None else given

    @property
    def _rates(self) -> list[float]:
        rate = self.dropout_rate
        return rate if isinstance(rate, list) else [rate] * len(self.depths)


class ForeignModel(Model):
    """A model of another program, whose section has defaults and isn't checked."""

    type: str

    def build(self, num_classes: int) -> nn.Module:
        raise ConfigError(f"model.type: unknown type {self.type!r}")


AnyModel = Annotated[
    ImageV1 | ImageTransformerV1 | ImageTransformerV2 | KLAutoencoderModel,
    Field(discriminator="type"),
    keep_unknown(ForeignModel.model_construct),
]
