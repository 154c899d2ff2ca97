"""Typed models of a config file: every key, its type and its default, once.

`python -m k_diffusion.config` prints their JSON Schema, which editors use to complete config
files; it is shipped beside this file as schema.json.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, ValidationInfo, model_validator

from .autoencoder_schema import AutoencoderSection, KLAutoencoderModel
from .base import (
    ConfigError,
    Count,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Probability,
    Rate,
    Section,
    fail,
    is_strict,
    keep_unknown,
)
from .condition_schema import AnyImageCondition, AnyText, Downsampled
from .dataset_schema import AnyDataset, ImageFolderDataset, LatentsDataset
from .model_schema import AnyModel, ImageTransformerV2, Model

# ---------------------------------------------------------------- optimisation


class Optimizer(Section):
    """What every optimizer has. max_grad_norm null: no gradient clipping."""

    lr: PositiveFloat = 5e-4
    max_grad_norm: PositiveFloat | None = 1.0


class AdamKeys(Optimizer):
    """What Adam and its relatives have."""

    betas: list[Rate] = Field(default_factory=lambda: [0.9, 0.99], min_length=2, max_length=2)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 1e-4


class Adam(AdamKeys):
    type: Literal["adamw", "adam8bit"]


class Muon(AdamKeys):
    """Muon for hidden matrices, AdamW for the rest. momentum, nesterov: of Muon."""

    type: Literal["muon"]
    momentum: Rate = 0.95
    nesterov: bool = True


class SGD(Optimizer):
    type: Literal["sgd"]
    momentum: Rate = 0.0
    nesterov: bool = False
    weight_decay: NonNegativeFloat = 1e-4


class ForeignOptimizer(Optimizer):
    """An optimizer of another program."""

    type: str


AnyOptimizer = Annotated[
    Adam | SGD | Muon, Field(discriminator="type"), keep_unknown(ForeignOptimizer.model_construct)
]


class ConstantSched(Section):
    """warmup: 0 for none; the rate is multiplied by 1 - warmup ** (step + 1)."""

    type: Literal["constant"]
    warmup: Rate = 0.0


class InverseSched(Section):
    """(1 + step / inv_gamma) ** -power, never below min_lr."""

    type: Literal["inverse"]
    inv_gamma: PositiveFloat = 20000.0
    power: PositiveFloat = 1.0
    warmup: Rate = 0.0
    min_lr: NonNegativeFloat = 0.0


class ExponentialSched(Section):
    """decay ** (step / num_steps), never below min_lr."""

    type: Literal["exponential"]
    num_steps: PositiveFloat
    decay: PositiveFloat = 0.5
    warmup: Rate = 0.0
    min_lr: NonNegativeFloat = 0.0


class CosineSched(Section):
    """Half a cosine from the rate, after a linear warm-up, to min_lr at step num_steps."""

    type: Literal["cosine"]
    num_steps: Positive
    warmup_steps: Count = 0
    min_lr: NonNegativeFloat = 0.0

    @model_validator(mode="after")
    def _ordered(self) -> "CosineSched":
        if self.warmup_steps >= self.num_steps:
            raise fail(f"warmup_steps {self.warmup_steps} must be below num_steps {self.num_steps}")
        return self


class InverseSqrtSched(Section):
    """max(1, step / decay_start) ** -0.5, after a linear warm-up, never below min_lr."""

    type: Literal["inverse-sqrt"]
    decay_start: PositiveFloat
    warmup_steps: Count = 0
    min_lr: NonNegativeFloat = 0.0


class ForeignSched(Section):
    """A schedule of another program."""

    type: str


AnySched = Annotated[
    ConstantSched | InverseSched | ExponentialSched | CosineSched | InverseSqrtSched,
    Field(discriminator="type"),
    keep_unknown(ForeignSched.model_construct),
]


class EMASched(Section):
    """The averaged weights' decay: 1 - (1 + step / inv_gamma) ** -power, within its bounds."""

    type: Literal["inverse"] = "inverse"
    inv_gamma: PositiveFloat = 1.0
    power: PositiveFloat = 0.6667
    min_value: Probability = 0.0
    max_value: Probability = 0.9999

    @model_validator(mode="after")
    def _ordered(self) -> "EMASched":
        if self.min_value > self.max_value:
            raise fail(f"min_value {self.min_value} is above max_value {self.max_value}")
        return self


class Config(Section):
    """A whole config file."""

    schema_: str | None = Field(None, alias="$schema", exclude=True)
    model: AnyModel
    dataset: AnyDataset = ImageFolderDataset(type="imagefolder")
    text: AnyText | None = None
    image_condition: AnyImageCondition | None = None
    optimizer: AnyOptimizer = Adam(type="adamw")
    lr_sched: AnySched = ConstantSched(type="constant")
    ema_sched: EMASched = EMASched()
    autoencoder: AutoencoderSection | None = None

    @model_validator(mode="after")
    def _latent(self) -> "Config":
        latents = isinstance(self.dataset, LatentsDataset)
        if latents and self.autoencoder is None:
            raise fail(
                "a data set of latents needs one, which turns samples into images", "autoencoder"
            )
        if self.autoencoder is not None and isinstance(self.model, KLAutoencoderModel):
            raise fail("model.type is an autoencoder itself; leave this section out", "autoencoder")
        if self.autoencoder is not None and getattr(self.dataset, "buckets", None):
            raise fail("a latent model's images have one size; leave them out", "dataset.buckets")
        if latents and self.model.augment_prob:
            raise fail("latents can't be augmented: set it to 0", "model.augment_prob")
        return self

    @model_validator(mode="after")
    def _rates(self) -> "Config":
        least = getattr(self.lr_sched, "min_lr", 0.0)
        if isinstance(self.optimizer, Optimizer) and least > self.optimizer.lr:
            raise fail(
                f"{least} is above optimizer.lr, {self.optimizer.lr}, so that the rate would rise",
                "lr_sched.min_lr",
            )
        return self

    @model_validator(mode="after")
    def _conditions(self) -> "Config":
        """Fills in the image's channels. Widths of texts are their encoder's, not known here."""
        model = self.model
        if not isinstance(model, Model):
            return self
        keys = "cross_cond_dim", "mapping_cond_dim"
        if self.text is not None and not any(getattr(model, key, 0) for key in keys):
            raise fail(f"needs a model.{' or model.'.join(keys)} to be told by", "text")
        if self.image_condition is None:
            return self
        latent = self.autoencoder is not None  # then the image comes as latents, too
        wanted = model.input_channels
        if not latent:
            wanted = self.image_condition.width(model.input_channels)
        if model.unet_cond_dim not in {0, wanted}:
            raise fail(
                f"is {model.unet_cond_dim}, but image_condition has {wanted} channels; leave it "
                "out",
                "model.unet_cond_dim",
            )
        model.unet_cond_dim = wanted
        if isinstance(self.image_condition, Downsampled) and not latent:
            factor = self.image_condition.factor
            if any(side % factor for side in model.input_size or ()):
                raise fail(
                    f"{factor} must divide model.input_size {model.input_size}",
                    "image_condition.factor",
                )
        return self

    @model_validator(mode="after")
    def _bucket_sizes(self, info: ValidationInfo) -> "Config":
        factor, strict = getattr(self.image_condition, "factor", 1), is_strict(info)
        for i, size in enumerate(getattr(self.dataset, "buckets", None) or ()):
            model = self.model.model_dump(warnings="none", exclude_unset=True)
            model["input_size"] = size
            try:
                made = type(self.model).model_validate(model, context=info.context)
                if strict and isinstance(made, ImageTransformerV2):
                    made.check_grids()
                if strict and any(side % factor for side in size):
                    raise ConfigError(f"image_condition.factor {factor} must divide {size}")
            except (ValidationError, ConfigError) as error:
                rule = error if isinstance(error, ConfigError) else error.errors()[0]["msg"]
                said = f"the model can't take this size: {rule}"
                raise fail(said, f"dataset.buckets[{i}]") from None
        return self


# The U-Net's training defaults differ from the transformers'; each holds for sections of its type.
TRAINING_DEFAULTS: dict[str, dict[str, dict[str, Any]]] = {
    "image_v1": {
        "optimizer": {
            "type": "adamw",
            "lr": 1e-4,
            "betas": [0.95, 0.999],
            "eps": 1e-6,
            "weight_decay": 1e-3,
        },
    }
}

# Of the sections that don't say.
DEFAULT_TYPES = {"dataset": "imagefolder", "optimizer": "adamw", "lr_sched": "constant"}


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a config file."""
    return Config.model_json_schema(by_alias=True)
