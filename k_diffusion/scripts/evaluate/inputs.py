"""What evaluate.py measures, and what it compares with."""

import argparse
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ...checkpoints.snapshots import find_snapshots
from ...common.files import check_readable, sha256
from ...conditions import KINDS
from ...config import code_of, load_config
from ...data.latents import images_section
from ...data.training_data import of_split
from ...encoders.autoencoder import find_autoencoder
from ...evaluation.extraction import Eye
from ...evaluation.images import SampleImages
from ...evaluation.protocols import Protocol
from ...evaluation.reals import RealImages, ToldImages, folder_section
from ...evaluation.registry import Options, check_n
from ...generation import image_shape
from ...loading import load_average, load_denoiser
from .. import sample
from .args import RECOGNITION


class Source(NamedTuple):
    """What is measured: a checkpoint's denoiser with its config, or a set of images.

    width: of the average over a run, which `path` names; None for the file's own weights.
    """

    path: Path
    width: float | None
    digest: str
    denoiser: nn.Module | None
    config: dict[str, Any] | None
    images: SampleImages | None

    @property
    def settings(self) -> dict[str, Any]:
        """What the report says of it, but for its digest.

        With the step, where the checkpoint's name tells it, as train.py's do.
        """
        if self.images is not None:
            return {"samples": str(self.path)}
        found = re.search(r"_(\d{8,})(_ema[\d.]+)?$", self.path.stem)
        step = {"step": int(found[1])} if found else {}
        width = {} if self.width is None else {"ema_width": self.width}
        return {"checkpoint": str(self.path), **step, **width}

    def checkpoint(self) -> tuple[nn.Module, dict[str, Any]]:
        """The denoiser and its config. Raises ValueError for images, which have none."""
        if self.denoiser is None or self.config is None:
            raise ValueError(f"{self.path} holds images; this needs a --checkpoint")
        return self.denoiser, self.config

    @property
    def num_classes(self) -> int:
        """Of the model; 0 for images."""
        return 0 if self.config is None else self.config["dataset"]["num_classes"]

    def shape(self, args: argparse.Namespace) -> tuple[int, ...]:
        """Of an image, (c, h, w). Raises ValueError where neither config nor flag says its size.

        Without the denoiser it is that of latents, where the model is one of latents.
        """
        if self.images is not None:
            return self.images.shape
        assert self.config is not None
        size = args.size or self.config["model"]["input_size"]
        if size is None:
            raise ValueError("the config has no model.input_size; pass --size")
        shape = (self.config["model"]["input_channels"], *size)
        if self.denoiser is None:
            return shape
        whole = image_shape(self.denoiser, shape)
        return (whole[0], *args.size) if args.size else whole

    def classes(self, args: argparse.Namespace, n: int) -> list[int] | None:
        """The class of each of n samples; None without classes."""
        ids = None if self.config is None else sample.parse_classes(args.classes, self.num_classes)
        return None if ids is None else [ids[i % len(ids)] for i in range(n)]


def load_source(
    args: argparse.Namespace, path: Path, width: float | None, device: torch.device
) -> Source:
    """A checkpoint or an average, on the device, or the images of --samples. Raises ValueError."""
    if args.samples:
        images = SampleImages(path)
        return Source(path, None, images.digest(), None, None, images)
    if width is None:
        denoiser, config = load_denoiser(path, autoencoder=args.autoencoder)
        return Source(path, None, sha256(path), sample.ready(denoiser, args, device), config, None)
    denoiser, average = load_average(path, width, autoencoder=args.autoencoder)
    denoiser = sample.ready(denoiser, args, device)
    return Source(path, width, average.digest, denoiser, average.config, None)


def check_alike(args: argparse.Namespace, first: Source) -> None:
    """Raises ValueError where checkpoints have images of other shapes.

    Without --data they must also be trained on one data set. Only their configs are read.
    """
    if first.config is None:
        return
    for path in args.checkpoint[1:]:
        file = find_snapshots(path)[-1].path if args.ema_width else path
        other = Source(path, None, "", None, load_config(file), None)
        known = first._replace(denoiser=None)
        if (shape := other.shape(args)) != known.shape(args):
            raise ValueError(
                f"{path} has images of {shape}, {first.path} of {known.shape(args)}; evaluate them "
                "apart"
            )
        sections = [
            {key: source.config["dataset"].get(key) for key in ("type", "location", "num_classes")}
            for source in (first, other)
            if source.config is not None
        ]
        if args.data is None and sections[0] != sections[1]:
            raise ValueError(
                f"{path} was trained on {sections[1]}, {first.path} on {sections[0]}; pass --data, "
                "which all are compared with"
            )


def check_eyes(eyes: Mapping[str, Eye], metrics: Sequence[str]) -> None:
    """Raises ValueError where an encoder has no classifier, which the inception score needs."""
    for name, eye in eyes.items():
        if "inception_score" in metrics and not hasattr(eye.encoder, "log_probs"):
            raise ValueError(
                f"inception_score needs a classifier, which {eye.encoder.name}, the encoder of the "
                f"protocol {name}, hasn't"
            )


class Against(NamedTuple):
    """What samples are compared with: real images, or a reference file of statistics.

    name: what the report calls them. folder: where a custom data set's file lies.
    """

    reals: RealImages | None
    file: Path | None
    name: str = ""
    folder: Path = Path()

    def held_out(self, split: str | None, config: Mapping[str, Any]) -> RealImages:
        """The images of a split; by default the held-out ones, where the data set has a part.

        With them comes what a model of the config is told.
        """
        reals = self.images()
        asked = split or ("test" if reals.section.get("split") in {"all", "train"} else None)
        told = {key: config[key] for key in KINDS if config.get(key) is not None}
        return self.of(asked, told)

    def trained_on(self) -> RealImages:
        """The images a model is trained on: where the held-out ones are compared, the others."""
        return self.of("train" if self.images().section.get("split") == "test" else None)

    def of(self, split: str | None, told: Mapping[str, Any] = {}) -> RealImages:
        """The images of a split, None as they are, with what these sections of a config tell."""
        reals = self.images()
        if not told and split in {None, reals.section.get("split")}:
            return reals
        section = of_split(reals.section, split) if split else reals.section
        return RealImages(section, reals.size, reals.channels, self.folder, told)

    def images(self) -> RealImages:
        """The real images. Raises ValueError for a file, which holds none."""
        if self.reals is None:
            raise ValueError(
                "--likelihood, --nearest and recognition need images: pass a folder or a config as "
                f"--data, not {self.file}"
            )
        return self.reals

    @property
    def limit(self) -> int | None:
        """How many images there are; None for a file."""
        return None if self.reals is None else len(self.reals)


def find_data(args: argparse.Namespace, source: Source) -> Against:
    """What --data names, else the data set of the source's config. Raises ValueError, OSError."""
    path: Path | None = args.data
    folder = Path()
    if path is None:
        if source.config is None:
            raise ValueError("--samples needs --data: a folder, a config, or a reference file")
        section = images_section(source.config["dataset"])
        if code := code_of(section):
            raise ValueError(
                f"{source.path} names {code} to make its data set, which is not run unasked; pass "
                "--data CONFIG.json with that data set"
            )
    elif path.suffix in {".npz", ".pkl"}:
        check_readable(path, "reference file")
        return Against(None, path, str(path))
    elif path.suffix == ".json":
        section = images_section(load_config(path, strict=True)["dataset"])
        folder = path.parent
    else:
        section = folder_section(path)
    if args.split is not None:
        if "split" not in section:
            raise ValueError(f"--split: a data set of type {section['type']} has no splits")
        section = of_split(section, args.split)
    channels, h, w = source.shape(args)
    split = section.get("split")
    name = f"{path or section['type']}" + (f" ({split})" if split else "")
    return Against(RealImages(section, (h, w), channels, folder), None, name, folder)


def digest(value: Any) -> str:
    """The SHA-256 of what JSON can hold, in hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


class Told(NamedTuple):
    """What samples are told in turn where no flag says it: captions, and images, of the data."""

    captions: list[str]
    images: ToldImages | None

    def flags(self, setting: argparse.Namespace) -> dict[str, Any]:
        """What the script that samples takes of it, under a setting."""
        return {"prompts": setting.prompts or self.captions, "told_images": self.images}

    def digests(self, setting: argparse.Namespace) -> dict[str, str]:
        """What tells it from others, as the report's settings have it."""
        found = {}
        if self.captions and not setting.prompts:
            found["captions_sha256"] = digest(self.captions)[:16]
        if self.images is not None and not setting.condition_image:
            found["told_images_sha256"] = self.images.digest
        return found


def find_told(args: argparse.Namespace, source: Source, against: Against, n: int) -> Told:
    """What n samples are told where no --prompt or --condition-image is given.

    It is what belongs to n images of the data set, evenly spaced, or to all: nothing of a reference
    file, or for a model that isn't told it. Raises ValueError for an image without a caption, or
    without its partner.
    """
    config, reals = source.config or {}, against.reals
    captions: list[str] = []
    images = None
    if reals is None:
        return Told(captions, images)
    places = reals.spaced(min(n, len(reals)))
    if config.get("text") is not None and not all(s.prompts for s in args.settings):
        captions = reals.captions(places)
    section = config.get("image_condition")
    if section is not None and not all(s.condition_image for s in args.settings):
        paired = {"image_condition": section} if section["type"] == "paired" else {}
        coder = find_autoencoder(source.checkpoint()[0])
        images = ToldImages(against.of(None, paired), places, config, coder)
    return Told(captions, images)


def check(
    args: argparse.Namespace,
    source: Source,
    against: Against,
    n: int,
    n_reals: int | None,
    protocols: dict[str, Protocol],
    metrics: list[str],
    numbers: Options,
) -> None:
    """Raises ValueError, before anything is drawn, for what can't be measured."""
    if source.images is not None and n > len(source.images):
        raise ValueError(f"-n {n}: {source.path} has {len(source.images)} images")
    check_n(metrics, n, n_reals, numbers)
    for name, protocol in protocols.items():
        wrong = [m for m in metrics if (m == "cmmd") != (protocol.formula == "cmmd")]
        if wrong:
            fitting = "cmmd" if protocol.formula == "cmmd" else "all but cmmd"
            raise ValueError(f"the protocol {name} has no {wrong[0]}; its metrics are {fitting}")
    recognition = RECOGNITION in args.metrics
    if against.reals is None and not (args.likelihood or args.nearest or recognition):
        return
    reals = against.images()
    if reals.num_classes and source.num_classes not in {0, reals.num_classes}:
        raise ValueError(
            f"the data set has {reals.num_classes} classes, but the model of {source.path} has "
            f"{source.num_classes}; compare it with its own kind of data"
        )
    if recognition and not (source.num_classes and reals.num_classes):
        raise ValueError("recognition needs a class-conditional model and a labelled data set")
