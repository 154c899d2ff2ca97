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
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import default_collate

from ..common.files import find_in
from ..data.latent_sources import open_latents
from ..data.training_data import TrainingData
from ..encoders.autoencoder import Autoencoder
from ..encoders.text import StoredTexts, TextEncoder, Texts, load_open_clip, load_transformers
from .images import (
    as_told as as_told,
    check_images as check_images,
    moments_of as moments_of,
    of_images,
    read_image_condition as read_image_condition,
    resized as resized,
)

Encode: TypeAlias = Callable[[Sequence[str]], Texts]
Condition: TypeAlias = dict[str, Tensor]
# From the numbers of images to their condition.
Given: TypeAlias = Callable[[Sequence[int]], Condition]

# The sections of a config, and what they give a model.
KINDS = {
    "text": ("cross_cond", "cross_cond_padding", "mapping_cond"),
    "image_condition": ("unet_cond",),
}

# ---------------------------------------------------------------- texts


def make_text_encoder(
    config: Mapping[str, Any],
    device: torch.device | str = "cpu",
    location: str | None = None,
    folders: Sequence[str | Path] = (),
) -> TextEncoder | None:
    """The text encoder of a config, frozen, on the device; None for a model without texts.

    location: of its files, if not as the config says. folders: that the config's location is
    relative to, in turn, by itself or its name alone; by default the working directory. Raises
    ValueError or OSError where there is none, or another than the model was trained with.
    """
    section = config.get("text")
    if section is None:
        return None
    location = location or _found(section["location"], folders)
    if location is None:
        raise ValueError(
            "text.location is missing: the folder of the text encoder and its tokenizer; set it, "
            "or pass --text-encoder PATH, or text_encoder=PATH to K.load"
        )
    if section["type"] == "open_clip":
        encoder = load_open_clip(section["model"], location)
    else:
        tokenizer = _found(section["tokenizer"], folders)
        encoder = load_transformers(location, tokenizer, section["max_length"])
    check_widths(config, encoder, location)
    known = section["fingerprint"]
    if known is not None and known != encoder.fingerprint():
        raise ValueError(
            f"{location} is another text encoder (fingerprint {encoder.fingerprint()}) than that "
            f"of the model ({known}); pass the one that it was trained with"
        )
    return encoder.freeze(device)


def _found(location: str | None, folders: Sequence[str | Path]) -> str | None:
    """A location in one of the folders; one that is in none may be a repository of the hub."""
    found = None if location is None else find_in(folders, location)
    return location if found is None else str(found)


def make_training_encoder(
    config: Mapping[str, Any],
    device: torch.device | str = "cpu",
    data: TrainingData | None = None,
) -> Encode | None:
    """What encodes the captions of training, whose fingerprint the config gets.

    It is text.precomputed, what latents on disk have of their captions, or the text encoder. That
    of latents is loaded once: to encode the prompts, and to see that it is the config's; that of
    text.precomputed only where it had another location when it encoded them. Raises
    ValueError where it is another one, or the encoded captions lack a prompt or, as far as that is
    soon known, a caption of the data.
    """
    section = config.get("text")
    if section is None:
        return None
    stored = _stored_texts(config)
    encoder = None
    alone = stored if section["precomputed"] is not None else None
    if alone is None or alone.location != section["location"]:
        encoder = make_text_encoder(config, device)
        assert encoder is not None
        section["fingerprint"] = encoder.fingerprint()
    if stored is None:
        return encoder
    if encoder is not None and stored.fingerprint != section["fingerprint"]:
        raise ValueError(
            f"the captions at {stored.path} are encoded by another text encoder (fingerprint "
            f"{stored.fingerprint}) than {section['location']} ({section['fingerprint']}); name "
            "theirs, or encode them by this one with python -m k_diffusion.scripts.encode_captions"
        )
    check_widths(config, stored, stored.path)
    section["fingerprint"] = stored.fingerprint
    if encoder is not None:
        stored.add(encoder, section["prompts"])
    stored.check(section["prompts"])  # a missing one is known before anything is trained
    stored.check(data.known_captions() if data is not None else ())
    return stored


def _stored_texts(config: Mapping[str, Any]) -> StoredTexts | None:
    """The captions that were encoded beforehand, if there are any."""
    if (path := config["text"]["precomputed"]) is not None:
        return StoredTexts(path)
    section = config["dataset"]
    if section["type"] != "latents" or "text" not in open_latents(section["location"]).info:
        return None
    return StoredTexts(section["location"])


def check_widths(config: Mapping[str, Any], encoder: Any, source: object) -> None:
    """Raises ValueError unless texts have the widths of the model and the length of the config.

    encoder: of the texts, from `source`.
    """
    if (length := config["text"]["max_length"]) != encoder.max_length:
        raise ValueError(
            f"text.max_length is {length}, but the texts of {source} have {encoder.max_length} "
            f"tokens; set it to {encoder.max_length}"
        )
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


# ---------------------------------------------------------------- training


def conditioned(
    batches: Iterable[dict[str, Any]],
    config: Mapping[str, Any],
    encode: Encode | None,
    device: torch.device | str = "cpu",
    autoencoder: Autoencoder | None = None,
) -> Iterator[dict[str, Any]]:
    """Batches of training data with the model's condition, if it has one, made on the device.

    autoencoder: of a latent model, whose images these are, not yet their latents.
    """
    of_image = config.get("image_condition") is not None
    for batch in batches:
        if of_image:
            images = {k: batch[k] for k in ("image", "paired_image") if k in batch}
            batch |= {k: x.to(device, non_blocking=True) for k, x in images.items()}
        yield batch | of_batch(batch, config, encode, autoencoder)


def of_batch(
    batch: Mapping[str, Any],
    config: Mapping[str, Any],
    encode: Encode | None,
    autoencoder: Autoencoder | None = None,
    image: str = "image",
) -> Condition:
    """The condition of a batch of training data. image: the key of its images."""
    condition: Condition = {}
    if encode is not None:
        condition |= of_texts(config, encode, batch["caption"])
    section = config.get("image_condition")
    if section is not None and config["dataset"]["type"] == "latents":  # stored ones
        condition["unet_cond"] = batch[f"paired_{image}"]
    elif section is not None:
        paired = section["type"] == "paired"
        images = batch[f"paired_{image}" if paired else image]
        condition |= of_images(section, images, autoencoder)
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


class Images(Protocol):
    """A tensor of images (m, c, h, w), or what makes them as they are asked for, as of many."""

    def __len__(self) -> int: ...
    def __getitem__(self, numbers: list[int], /) -> Tensor: ...


class InTurn:
    """Conditions that images have in turn: image i text i mod m of m, and so of images.

    texts: encoded as they are needed, for there may be many.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        encode: Encode | None,
        texts: Sequence[str],
        images: Images | None,
        device: torch.device | str = "cpu",
    ):
        self.config, self.encode, self.device = config, encode, device
        self.texts, self.images = texts, images

    def __call__(self, numbers: Sequence[int]) -> Condition:
        condition: Condition = {}
        if self.encode is not None:
            texts = [self.texts[i % len(self.texts)] for i in numbers]
            places = {text: k for k, text in enumerate(dict.fromkeys(texts))}
            made = of_texts(self.config, self.encode, [*places])
            condition |= {name: x[[places[text] for text in texts]] for name, x in made.items()}
        if self.images is not None:
            condition["unet_cond"] = self.images[[i % len(self.images) for i in numbers]]
        return {name: x.to(self.device) for name, x in condition.items()}


class OfData:
    """Conditions of the items of training data in turn; with text.prompts, these for captions.

    Images are of the model's size, as samples are, also where data has several.
    """

    def __init__(
        self,
        data: Any,
        config: Mapping[str, Any],
        encode: Encode | None,
        device: torch.device | str = "cpu",
        autoencoder: Autoencoder | None = None,
    ):
        self.data = data.of_size(tuple(config["model"]["input_size"]))
        self.config, self.encode, self.device = config, encode, device
        self.autoencoder = autoencoder

    def __call__(self, numbers: Sequence[int]) -> Condition:
        items = [self.data[i % len(self.data), 0] for i in numbers]
        used = [k for k in ("caption", "original", "paired_original") if k in items[0]]
        batch: dict[str, Any] = default_collate([{k: item[k] for k in used} for item in items])
        if prompts := (self.config.get("text") or {}).get("prompts"):
            batch["caption"] = [prompts[i % len(prompts)] for i in numbers]
        condition = of_batch(batch, self.config, self.encode, self.autoencoder, "original")
        return {name: x.to(self.device) for name, x in condition.items()}


def of_data(
    data: Any,
    config: Mapping[str, Any],
    encode: Encode | None,
    device: torch.device | str = "cpu",
    autoencoder: Autoencoder | None = None,
) -> Given | None:
    """The conditions of samples during training; None for a model without any."""
    there = config.get("text") or config.get("image_condition")
    return OfData(data, config, encode, device, autoencoder) if there else None


def given(
    config: Mapping[str, Any],
    encoder: Encode | None,
    prompts: Sequence[str] = (),
    images: Images | None = None,
    device: torch.device | str = "cpu",
) -> Given | None:
    """The conditions of samples: prompts and images in turn; None for a model without any.

    prompts: by default text.prompts of the config. images: (m, c, h, w), as `read_image_condition`
    gives them. Raises ValueError for what is missing, or that the model doesn't take.
    """
    text, section = config.get("text"), config.get("image_condition")
    if text is None and prompts:
        raise ValueError("this model takes no texts; leave out the prompts")
    if section is None and images is not None:
        raise ValueError("this model takes no images as its condition; leave them out")
    if text is not None:
        prompts = list(prompts) or text["prompts"]
        if not prompts:
            raise ValueError(
                "this model is told by texts: pass --prompt TEXT, or prompts=[TEXT] to K.sample"
            )
        assert encoder is not None
    if section is not None and images is None:
        raise ValueError(
            f"this model is told by images ({section['type']}): pass --condition-image FILE, or "
            "condition_images=[FILE] to K.sample"
        )
    there = text is not None or section is not None
    return InTurn(config, encoder, prompts, images, device) if there else None


def null(config: Mapping[str, Any], what: str, size: Sequence[int] | None = None) -> Condition:
    """What guidance goes away from: the absence of each condition that training left out, (1, ...).

    Classes are among them. what: asks for guidance. size: (h, w) of what is sampled, images or
    latents, if it isn't the config's. Raises ValueError for a model that was never trained without
    its conditions.
    """
    config = {**config, "model": {**config["model"]}}
    if size is not None:
        config["model"]["input_size"] = list(size)
    missing: Condition = {}
    rates, section = [], config["dataset"]
    if num_classes := section["num_classes"]:
        rates.append("dataset.cond_dropout_rate")
        if section.get("cond_dropout_rate") != 0:  # unknown of others' models
            missing["class_cond"] = torch.tensor([num_classes])
    there = {key: names for key, names in KINDS.items() if config.get(key) is not None}
    for name, x in blank(config, 1).items():
        key = next(key for key, names in there.items() if name in names)
        if config[key]["dropout_rate"] > 0:
            missing[name] = x
    if missing:
        return missing
    rates += [f"{key}.dropout_rate" for key in there]
    if not rates:
        raise ValueError(f"{what} needs a class-conditional model; this one has no classes")
    raise ValueError(
        f"{what} needs a model that was trained without its conditions at times, but "
        f"{' and '.join(rates)} was 0"
    )
