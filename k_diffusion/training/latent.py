"""What a run on latents needs besides its config: autoencoder, statistics, batches of latents."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .. import conditions
from ..data.latent_sources import LatentSource, open_latents
from ..data.latents import LatentStatistics, encoded
from ..data.training_data import make_training_data
from ..encoders.autoencoder import Autoencoder
from ..loading import make_autoencoder

_MEASURED = 4096  # images, where they are encoded on the fly
_BATCH = 64


def prepare(config: dict[str, Any], folder: Path, device: Any) -> Autoencoder | None:
    """The autoencoder of a latent model's config, on the device; None for a model of pixels.

    The config gets what a checkpoint has to tell: the fingerprint of the autoencoder, and the
    statistics of its latents, those of the data set or, where images are encoded on the fly,
    measured. folder: where a custom data set's file lies. Raises ValueError where the latents'
    shape isn't the model's, they are another autoencoder's, or nobody knows their statistics.
    """
    section = config.get("autoencoder")
    if section is None:
        return None
    autoencoder = make_autoencoder(config, folders=[".", folder]).to(device)
    section["fingerprint"] = autoencoder.fingerprint
    conditions.check_images(config, autoencoder)
    if config["dataset"]["type"] == "latents":
        source = open_latents(config["dataset"]["location"])
        check(source, autoencoder, config)
        if config.get("text") is not None:
            source.check_captions()
        found = source.statistics()
        if section["mean"] is None and found is None:
            raise ValueError(
                f"the latents at {source.path} have no statistics; measure them: python "
                f"encode_latents.py --statistics {source.path}"
            )
        if section["mean"] is None and found is not None:
            plain = (x.tolist() if isinstance(x, torch.Tensor) else x for x in found)
            section["mean"], section["std"] = plain
    elif section["mean"] is None:
        found_here = measure(config, folder, autoencoder)
        section["mean"], section["std"] = found_here["mean"], found_here["std"]
    model = config["model"]
    return autoencoder.normalize(section["mean"], section["std"], model["sigma_data"])


def check(source: LatentSource, autoencoder: Autoencoder, config: dict[str, Any]) -> None:
    """Raises ValueError where latents don't fit the model, or are another autoencoder's."""
    model = config["model"]
    shape = model["input_channels"], *model["input_size"]
    if source.shape != shape:
        raise ValueError(
            f"the latents at {source.path} have shape {source.shape}, but the model's are {shape}; "
            "set model.input_channels and model.input_size to it"
        )
    noted = source.info.get("autoencoder")
    if noted is None:
        return
    told = [
        {key: section[key] for key in ("type", "factor", "channels") if key in section}
        for section in (source.info.get("image_condition"), config.get("image_condition"))
        if section is not None
    ]
    if len(told) == 2 and told[0] != told[1]:
        raise ValueError(
            f"the latents at {source.path} have images of image_condition {told[0]}, but the "
            f"config's is {told[1]}; set it to theirs, or encode anew"
        )
    if noted["fingerprint"] != autoencoder.fingerprint:
        raise ValueError(
            f"the latents at {source.path} are of another autoencoder (fingerprint "
            f"{noted['fingerprint']}, {noted['location']}) than {autoencoder.name} "
            f"({autoencoder.fingerprint}); name theirs, or encode anew"
        )
    given = [autoencoder.low, autoencoder.high]
    if noted["input_range"] != given:
        raise ValueError(
            f"the latents at {source.path} are of pixels in {noted['input_range']}, but "
            f"autoencoder.input_range is {given}; set it to theirs"
        )


def data_shape(config: dict[str, Any], autoencoder: Autoencoder | None) -> tuple[int, ...]:
    """(c, h, w) of the items of a config's data set: images, or latents that are stored."""
    model = config["model"]
    shape = model["input_channels"], *model["input_size"]
    if autoencoder is None or config["dataset"]["type"] == "latents":
        return shape
    return autoencoder.image_shape(shape)


def measure(config: dict[str, Any], folder: Path, autoencoder: Autoencoder) -> dict[str, Any]:
    """The statistics of the latents of at most 4,096 images of the data set, evenly spaced."""
    plain = {**config, "model": {**config["model"], "augment_prob": 0.0}}
    data = make_training_data(plain, folder, shape=data_shape(config, autoencoder))
    n = min(_MEASURED, len(data))
    places = [i * len(data) // n for i in range(n)]
    statistics = LatentStatistics()
    with torch.no_grad():
        for start in range(0, n, _BATCH):
            images = [data[i, 0]["image"] for i in places[start : start + _BATCH]]
            statistics.update(autoencoder.encode(torch.stack(images).to(autoencoder.shift.device)))
    return statistics.result()


def batches_of_latents(
    batches: Iterator[dict[str, Any]], autoencoder: Autoencoder | None, config: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """The batches that a model learns from: images are encoded where it is one of latents."""
    if autoencoder is None or config["dataset"]["type"] == "latents":
        return batches
    return encoded(batches, autoencoder)
