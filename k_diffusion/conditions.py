"""What a model is told besides the noise level and the class: texts and images.

A condition is a dict of tensors (n, ...), arguments of the model's forward:

    cross_cond, cross_cond_padding   the tokens of a text, and which of them are padding
    mapping_cond                     a text's pooled vector
    unet_cond                        an image, of the size of the model's

Its absence, which training shows the model now and then and guidance goes away from, is nothing but
padding, and zeros.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate

from .common.images import open_image
from .data.transforms import fitted
from .encoders.text import StoredTexts, TextEncoder, Texts, load_open_clip, load_transformers

Encode: TypeAlias = Callable[[Sequence[str]], Texts]
Condition: TypeAlias = dict[str, Tensor]
# From the numbers of images to their condition.
Given: TypeAlias = Callable[[Sequence[int]], Condition]

# The sections of a config, and what they give a model.
KINDS = {
    "text": ("cross_cond", "cross_cond_padding", "mapping_cond"),
    "image_condition": ("unet_cond",),
}
# Of the luminance of ITU-R BT.601, by which PIL makes grey images, too.
_LUMINANCE = (0.299, 0.587, 0.114)

# ---------------------------------------------------------------- texts


def make_text_encoder(
    config: Mapping[str, Any], device: torch.device | str = "cpu", location: str | None = None
) -> TextEncoder | None:
    """The text encoder of a config, frozen, on the device; None for a model without texts.

    location: of its files, if not as the config says. Raises ValueError or OSError where there is
    none, or one of other widths than the model's.
    """
    section = config.get("text")
    if section is None:
        return None
    location = location or section["location"]
    if location is None:
        raise ValueError(
            "text.location is missing: the folder of the text encoder and its tokenizer; set it, "
            "or pass --text-encoder PATH"
        )
    if section["type"] == "open_clip":
        encoder = load_open_clip(section["model"], location)
    else:
        encoder = load_transformers(location, section["tokenizer"], section["max_length"])
    check_widths(config, encoder, location)
    return encoder.freeze(device)


def make_training_encoder(
    config: Mapping[str, Any], device: torch.device | str = "cpu"
) -> Encode | None:
    """What encodes the captions of training: the file text.precomputed, or the text encoder."""
    section = config.get("text")
    if section is None or section["precomputed"] is None:
        return make_text_encoder(config, device)
    stored = StoredTexts(section["precomputed"])
    check_widths(config, stored, section["precomputed"])
    return stored


def check_widths(config: Mapping[str, Any], encoder: Any, source: object) -> None:
    """Raises ValueError unless an encoder's tokens and pooled vectors are of the model's widths."""
    for key, what, width in (
        ("cross_cond_dim", "the tokens", encoder.width),
        ("mapping_cond_dim", "the pooled vectors", encoder.pooled_width),
    ):
        wanted = config["model"].get(key, 0)
        if wanted not in {0, width}:
            raise ValueError(
                f"model.{key} is {wanted}, but {what} of {source} have {width} features; set it to "
                f"{width}"
            )


def of_texts(config: Mapping[str, Any], encode: Encode, texts: Sequence[str]) -> Condition:
    """The condition of n texts."""
    tokens, padding, pooled = encode(texts)
    model = config["model"]
    condition: Condition = {}
    if model.get("cross_cond_dim", 0):
        condition |= {"cross_cond": tokens, "cross_cond_padding": padding}
    if model.get("mapping_cond_dim", 0):
        condition["mapping_cond"] = pooled
    return condition


# ---------------------------------------------------------------- images


def of_images(section: Mapping[str, Any], images: Tensor) -> Condition:
    """What a config's `image_condition` makes of whole images, or of paired ones.

    images: (n, c, h, w) in [-1, 1].
    """
    if section["type"] == "downsampled":
        small = [side // section["factor"] for side in images.shape[2:]]
        images = enlarged(resized(images, small), images.shape[2:])
    elif section["type"] == "grayscale" and images.shape[1] > 2:
        weights = images.new_tensor(_LUMINANCE)[:, None, None]
        images = (images[:, :3] * weights).sum(1, keepdim=True)
    elif section["type"] == "grayscale":
        images = images[:, :1]
    return {"unet_cond": images}


def resized(images: Tensor, size: Sequence[int]) -> Tensor:
    """Images of another size, by the antialiased bicubic filter. images: (n, c, h, w)."""
    return F.interpolate(images, tuple(size), mode="bicubic", antialias=True)


def enlarged(images: Tensor, size: Sequence[int]) -> Tensor:
    """Small images in the size of the model's, bicubic between pixels. images: (n, c, h, w)."""
    return F.interpolate(images, tuple(size), mode="bicubic")


def read_image_condition(
    config: Mapping[str, Any],
    image: str | Path | Image.Image,
    size: Sequence[int],
    say: Callable[[str], object] = print,
) -> Tensor:
    """A picture as the condition of images of `size`, (1, c, h, w).

    It may be whole, or for super-resolution as small as the model knows it; one of another size is
    scaled and cropped, which `say` is told. Raises OSError for a file that can't be read,
    ValueError for a model that takes no images.
    """
    section = config.get("image_condition")
    if section is None:
        raise ValueError("this model takes no images as its condition; leave them out")
    if isinstance(image, Image.Image):
        name, picture = "the image", image
    else:
        name, picture = str(image), open_image(image, None)
    paired = section["type"] == "paired"
    channels = section["channels"] if paired else config["model"]["input_channels"]
    factor = section["factor"] if section["type"] == "downsampled" else 1
    small = [side // factor for side in size]
    if factor > 1 and picture.size == (small[1], small[0]):
        return enlarged(fitted(picture, name, (channels, *small), say), size)
    whole = fitted(picture, name, (channels, *size), say)
    return of_images(section, whole)["unet_cond"]


# ---------------------------------------------------------------- training


def conditioned(
    batches: Iterable[dict[str, Any]],
    config: Mapping[str, Any],
    encode: Encode | None,
    device: torch.device | str = "cpu",
) -> Iterator[dict[str, Any]]:
    """Batches of training data with the model's condition, if it has one, made on the device."""
    of_image = config.get("image_condition") is not None
    for batch in batches:
        if of_image:
            images = {k: batch[k] for k in ("image", "paired_image") if k in batch}
            batch |= {k: x.to(device, non_blocking=True) for k, x in images.items()}
        yield batch | of_batch(batch, config, encode)


def of_batch(
    batch: Mapping[str, Any], config: Mapping[str, Any], encode: Encode | None, image: str = "image"
) -> Condition:
    """The condition of a batch of training data. image: the key of its images."""
    condition: Condition = {}
    if encode is not None:
        condition |= of_texts(config, encode, batch["caption"])
    section = config.get("image_condition")
    if section is not None:
        paired = section["type"] == "paired"
        condition |= of_images(section, batch[f"paired_{image}" if paired else image])
    return condition


def dropped(batch: Mapping[str, Any], config: Mapping[str, Any]) -> Condition:
    """The condition in a batch, a share of which is absent: texts and images each by their rate.

    Draws from torch's generator of the CPU, for each kind of condition that there is.
    """
    condition: Condition = {}
    for key, names in KINDS.items():
        section = config.get(key)
        there = {name: batch[name] for name in names if name in batch}
        if section is not None and there:
            left_out = torch.rand(len(batch["image"])) < section["dropout_rate"]
            condition |= {name: without(name, x, left_out) for name, x in there.items()}
    return condition


def without(name: str, x: Tensor, left_out: Tensor) -> Tensor:
    """A condition's tensor with its absence where left_out says so. x: (n, ...). left_out: (n,)."""
    left_out = left_out.to(x.device).view(-1, *[1] * (x.ndim - 1))
    return x.masked_fill(left_out, name == "cross_cond_padding")


def blank(config: Mapping[str, Any], n: int) -> Condition:
    """A condition of zeros, whose texts are all padding, of the shapes that training has."""
    model, made = config["model"], {}
    if (text := config.get("text")) is not None:
        if d := model.get("cross_cond_dim", 0):
            made["cross_cond"] = torch.zeros(n, text["max_length"], d)
            made["cross_cond_padding"] = torch.ones(n, text["max_length"], dtype=torch.bool)
        if d := model.get("mapping_cond_dim", 0):
            made["mapping_cond"] = torch.zeros(n, d)
    if config.get("image_condition") is not None:
        made["unet_cond"] = torch.zeros(n, model["unet_cond_dim"], *model["input_size"])
    return made


# ---------------------------------------------------------------- sampling


class InTurn:
    """Conditions that images have in turn: image i that of number i mod m.

    condition: tensors (m, ...), of which those of texts and of images may have an m of their own.
    """

    def __init__(self, condition: Condition):
        self.condition = condition

    def __call__(self, numbers: Sequence[int]) -> Condition:
        return {
            name: x[[i % len(x) for i in numbers]].contiguous()
            for name, x in self.condition.items()
        }


class OfData:
    """Conditions of the items of training data in turn; with text.prompts, these for captions."""

    def __init__(
        self,
        data: Any,
        config: Mapping[str, Any],
        encode: Encode | None,
        device: torch.device | str = "cpu",
    ):
        self.data, self.config, self.encode, self.device = data, config, encode, device

    def __call__(self, numbers: Sequence[int]) -> Condition:
        items = [self.data[i % len(self.data), 0] for i in numbers]
        batch: dict[str, Any] = default_collate(items)
        if prompts := (self.config.get("text") or {}).get("prompts"):
            batch["caption"] = [prompts[i % len(prompts)] for i in numbers]
        condition = of_batch(batch, self.config, self.encode, "original")
        return {name: x.to(self.device) for name, x in condition.items()}


def of_data(
    data: Any,
    config: Mapping[str, Any],
    encode: Encode | None,
    device: torch.device | str = "cpu",
) -> Given | None:
    """The conditions of samples during training; None for a model without any."""
    there = config.get("text") or config.get("image_condition")
    return OfData(data, config, encode, device) if there else None


def given(
    config: Mapping[str, Any],
    encoder: Encode | None,
    prompts: Sequence[str] = (),
    images: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> Given | None:
    """The conditions of samples: prompts and images in turn; None for a model without any.

    prompts: by default text.prompts of the config. images: (m, c, h, w), as `read_image_condition`
    gives them. Raises ValueError for what is missing, or that the model doesn't take.
    """
    condition: Condition = {}
    text, section = config.get("text"), config.get("image_condition")
    if text is None and prompts:
        raise ValueError("this model takes no texts; leave out the prompts")
    if section is None and images is not None:
        raise ValueError("this model takes no images as its condition; leave them out")
    if text is not None:
        prompts = list(prompts) or text["prompts"]
        if not prompts:
            raise ValueError("this model is told by texts: pass prompts (--prompt TEXT)")
        assert encoder is not None
        condition |= of_texts(config, encoder, prompts)
    if section is not None:
        if images is None:
            raise ValueError(
                f"this model is told by images ({section['type']}): pass some (--condition-image "
                "FILE)"
            )
        condition["unet_cond"] = images
    return InTurn({k: x.to(device) for k, x in condition.items()}) if condition else None


def null(config: Mapping[str, Any], what: str, size: Sequence[int] | None = None) -> Condition:
    """What guidance goes away from: the absence of each condition that training left out, (1, ...).

    Classes are among them. what: asks for guidance. size: (h, w) of the images, if it isn't the
    config's. Raises ValueError for a model that was never trained without its conditions.
    """
    config = {**config, "model": {**config["model"]}}
    if size is not None:
        config["model"]["input_size"] = list(size)
    missing: Condition = {}
    if num_classes := config["dataset"]["num_classes"]:
        missing["class_cond"] = torch.tensor([num_classes])
    there = {key: names for key, names in KINDS.items() if config.get(key) is not None}
    for name, x in blank(config, 1).items():
        key = next(key for key, names in there.items() if name in names)
        if config[key]["dropout_rate"] > 0:
            missing[name] = x
    if missing:
        return missing
    if not there:
        raise ValueError(f"{what} needs a class-conditional model; this one has no classes")
    rates = " and ".join(f"{key}.dropout_rate" for key in there)
    raise ValueError(
        f"{what} needs a model that was trained without its conditions at times, but {rates} was 0"
    )
