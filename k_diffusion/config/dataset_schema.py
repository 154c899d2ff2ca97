"""The section `dataset` of a config: its types and their keys."""

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, model_validator

from .base import (
    Colour,
    Count,
    Positive,
    Probability,
    Section,
    Size,
    fail,
    is_strict,
    keep_unknown,
)


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


class Compressed(Dataset):
    """What data sets of compressed images have. jpeg_draft: decode JPEGs of twice the size and more
    at a half, a quarter or an eighth of it, which is faster and changes their pixels a little.
    """

    jpeg_draft: bool = False


class FilesDataset(LocatedDataset, Compressed):
    """What data sets of image files have. buckets: sizes [height, width]; each image is trained on
    at the one of the nearest aspect ratio.
    """

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
    streaming: read them through the package webdataset while they are fetched, from URLs too. Then
    split test is every fifth sample, and num_classes is needed, as are num_examples, of all shards.
    """

    type: Literal["webdataset"]
    caption_key: str = "txt"
    num_classes: Count | None = None  # type: ignore[assignment]
    image_key: str = "image"
    class_key: str = "cls"
    streaming: bool = False
    shuffle_window: Positive = 1000
    num_examples: Positive | None = None


class LatentsDataset(LocatedDataset):
    """Latents in a folder that encode_latents.py wrote, or those of EDM2, REPA or LightningDiT.

    num_classes null: as many as their labels have. flip_prob: how often the latents of the mirrored
    image are taken, where they are stored.
    """

    type: Literal["latents"]
    num_classes: Count | None = None  # type: ignore[assignment]
    flip_prob: Probability = 0.0

    @model_validator(mode="after")
    def _whole(self, info: ValidationInfo) -> "LatentsDataset":
        for key in ("random_crop", "horizontal_flip"):
            if is_strict(info) and getattr(self, key):
                raise fail(
                    "latents are of images that are cropped already; leave it out, and for "
                    "mirrored ones set flip_prob",
                    key,
                )
        return self


class HuggingFaceDataset(Compressed):
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
