"""Typed models of a config file: every key, its type and its default, once.

`python -m k_diffusion.config` prints their JSON Schema, which editors use to complete config
files; it is shipped beside this file as schema.json.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, ValidationInfo, model_validator

from .autoencoder_schema import AutoencoderSection, KLAutoencoderModel
from .base import (
    Colour,
    Count,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Probability,
    Rate,
    Section,
    Size,
    fail,
    is_strict,
    keep_unknown,
)
from .condition_schema import AnyImageCondition, AnyText, Downsampled
from .model_schema import AnyModel, Model

# ---------------------------------------------------------------- data sets


class Dataset(Section):
    """What every data set has. num_classes 0: unconditional.

    cond_dropout_rate: how often training replaces a class by "no class". image_key, class_key:
    where an item of the data set holds its image and class. caption_key: where it holds its
    caption; of images in files, the ending of the text file beside each. background: the colour
    that shows through transparent images. random_crop: crop anywhere, not around the centre.
    horizontal_flip: mirror every other image.
    """

    num_classes: Count = 0
    cond_dropout_rate: Probability = 0.1
    image_key: int | str = 0
    class_key: int | str = 1
    caption_key: int | str = 2
    background: Colour = "white"
    random_crop: bool = False
    horizontal_flip: bool = False


class NoDataset(Dataset):
    """A model to build, not to train."""

    type: Literal["none"]


class Digits(Dataset):
    """scikit-learn's handwritten digits: 1,797 greyscale images of 8 x 8, 10 classes.

    split test: every fifth digit of each class. train: the others.
    """

    type: Literal["digits"]
    location: str | None = None
    split: Literal["all", "train", "test"] = "all"


class LocatedDataset(Dataset):
    """What data sets have that are read from `location`."""

    location: str | None = None

    @model_validator(mode="after")
    def _located(self, info: ValidationInfo) -> "LocatedDataset":
        if is_strict(info) and self.location is None:
            raise fail("is required", "location")
        return self


class FilesDataset(LocatedDataset):
    """What data sets of image files have. jpeg_draft: decode JPEGs of twice the size and more at a
    half, a quarter or an eighth of it, which is faster and changes their pixels a little. buckets:
    sizes [height, width]; each image is trained on at the one of the nearest aspect ratio.
    """

    jpeg_draft: bool = False
    buckets: Annotated[list[Size], Field(min_length=1)] | None = None
    split: Literal["all", "train", "test"] = "all"


class BenchmarkDataset(LocatedDataset):
    """Downloaded to `location` where it is missing. mnist and fashion-mnist may be IDX files there.

    split test: the images that its authors hold out.
    """

    type: Literal["cifar10", "mnist", "fashion-mnist"]
    split: Literal["train", "test"] = "train"


class ImageFolderDataset(FilesDataset):
    """All images below a folder. split test: every fifth of them, by path. train: the others."""

    type: Literal["imagefolder"]
    caption_key: int | str = "txt"


class ImageFolderClassDataset(FilesDataset):
    """One subfolder for each class. num_classes null: as many as have images.

    split test: every fifth image of each class, by path. train: the others.
    """

    type: Literal["imagefolder-class"]
    caption_key: int | str = "txt"
    num_classes: Count | None = None  # type: ignore[assignment]


class ZipDataset(FilesDataset):
    """A zip file of images as EDM's dataset_tool.py packs them, with classes in its dataset.json.

    num_classes null: as many as that has. split test: every fifth image of each class.
    """

    type: Literal["zip"]
    num_classes: Count | None = None  # type: ignore[assignment]
    image_key: str = "image"
    class_key: str = "class"


class WebDataset(FilesDataset):
    """Tar shards of WebDataset: a file, a folder, or a pattern such as train-{0000..0099}.tar.

    num_classes null: as many as class ids have. image_key: the ending of a sample's image, `image`
    for any image. class_key: that of its class id. split test: every fifth image of each class.
    """

    type: Literal["webdataset"]
    caption_key: str = "txt"
    num_classes: Count | None = None  # type: ignore[assignment]
    image_key: str = "image"
    class_key: str = "cls"


class LatentsDataset(LocatedDataset):
    """Latents in a folder that encode_latents.py wrote, or those of EDM2, REPA or LightningDiT.

    num_classes null: as many as their labels have. flip_prob: how often the latents of the mirrored
    image are taken, where they are stored.
    """

    type: Literal["latents"]
    num_classes: Count | None = None  # type: ignore[assignment]
    flip_prob: Probability = 0.0


class HuggingFaceDataset(Dataset):
    """A data set of the Hugging Face hub, or a local folder of that library's.

    streaming: read it while it is fetched, and keep nothing; shuffle_window rows that follow each
    other are then shuffled together. num_examples: its rows, where a streamed one doesn't say.
    """

    type: Literal["huggingface"]
    location: str
    split: str = "train"
    image_key: int | str = "image"
    class_key: int | str = "label"
    caption_key: int | str = "text"
    streaming: bool = False
    shuffle_window: Positive = 1000
    num_examples: Positive | None = None


class CustomDataset(Dataset):
    """A Python file beside the config, and the function in it that makes the data set."""

    type: Literal["custom"]
    location: str
    get_dataset: str = "get_dataset"
    config: dict[str, Any] = Field(default_factory=dict)


class ForeignDataset(Dataset):
    """A data set of another program."""

    type: str


AnyDataset = Annotated[
    NoDataset
    | Digits
    | BenchmarkDataset
    | ImageFolderDataset
    | ImageFolderClassDataset
    | ZipDataset
    | WebDataset
    | LatentsDataset
    | HuggingFaceDataset
    | CustomDataset,
    Field(discriminator="type"),
    keep_unknown(ForeignDataset.model_construct),
]

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
        for i, size in enumerate(getattr(self.dataset, "buckets", None) or ()):
            model = self.model.model_dump(warnings="none", exclude_unset=True)
            model["input_size"] = size
            try:
                type(self.model).model_validate(model, context=info.context)
            except ValidationError as error:
                said = f"the model can't take this size: {error.errors()[0]['msg']}"
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
