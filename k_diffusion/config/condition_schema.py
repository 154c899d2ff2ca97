"""Typed models of what a model is told besides the noise level and the class: texts and images."""

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, model_validator

from .base import Positive, Probability, Section, fail, is_strict


class Text(Section):
    """What every text encoder has.

    max_length: tokens of a text, to which others are cut off or padded. dropout_rate: how often
    training leaves a caption out, for guidance. precomputed: a file of encoded captions, or a
    folder of latents with them, in place of encoding them as they come. prompts: what demo grids
    show in turn, instead of captions of the data, and sample.py without --prompt. fingerprint: of
    the encoder's weights; train.py fills it in.
    """

    max_length: Positive = 77
    dropout_rate: Probability = 0.1
    precomputed: str | None = None
    prompts: list[str] = Field(default_factory=list)
    fingerprint: str | None = None


class TransformersText(Text):
    """A text encoder of transformers: a folder, or a repository of the hub. tokenizer: of another
    location than the encoder's."""

    type: Literal["transformers"]
    location: str | None = None
    tokenizer: str | None = None

    @model_validator(mode="after")
    def _located(self, info: ValidationInfo) -> "TransformersText":
        if is_strict(info) and self.location is None:
            raise fail("is required: the folder of a text encoder and its tokenizer", "location")
        return self


class OpenCLIPText(Text):
    """The text half of a model of open_clip. location: the file of its weights."""

    type: Literal["open_clip"]
    model: str = "ViT-L-14"
    location: str | None = None

    @model_validator(mode="after")
    def _located(self, info: ValidationInfo) -> "OpenCLIPText":
        if is_strict(info) and self.location is None:
            raise fail("is required: the file of the model's weights", "location")
        if self.max_length != 77:
            raise fail(f"is open_clip's own, 77, and can't be {self.max_length}", "max_length")
        return self


AnyText = Annotated[TransformersText | OpenCLIPText, Field(discriminator="type")]


class ImageCondition(Section):
    """What every image that is concatenated to the input has. dropout_rate: how often training
    leaves it out, for guidance."""

    dropout_rate: Probability = 0.0

    def width(self, of_image: int) -> int:
        """Channels of the condition of an image of so many channels."""
        return of_image


class Downsampled(ImageCondition):
    """The image at 1 / factor of its size, enlarged again: super-resolution."""

    type: Literal["downsampled"]
    factor: Annotated[int, Field(ge=2, lt=2**31)]


class Grayscale(ImageCondition):
    """The image without its colours: colourisation."""

    type: Literal["grayscale"]

    def width(self, of_image: int) -> int:
        return 1


class Paired(ImageCondition):
    """Another image for each: of the same path within the folder `location`, whatever its ending.

    channels: 1 for depth, masks or edges, 3 for colours.
    """

    type: Literal["paired"]
    location: str
    channels: Literal[1, 3] = 3

    def width(self, of_image: int) -> int:
        return self.channels


AnyImageCondition = Annotated[Downsampled | Grayscale | Paired, Field(discriminator="type")]
