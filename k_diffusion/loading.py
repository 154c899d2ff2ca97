"""A denoiser from a checkpoint file, a folder or a repository of the Hugging Face hub."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from PIL import Image
from torch import nn

from . import checkpoints, conditions
from .checkpoints.runs import find_checkpoint, folder_of
from .checkpoints.snapshots import SNAPSHOT, Average, reconstruct
from .common import hub
from .common.files import check_readable, find_in
from .common.untrusted import get_safetensors_metadata
from .config import ConfigError, load_config, make_denoiser_wrapper, make_model
from .encoders.autoencoder import Autoencoder, find_autoencoder, load_diffusers
from .encoders.text import TextEncoder
from .models.autoencoder import compvis_autoencoder, compvis_weights

WEIGHTS = "model.safetensors"  # of a folder that `save_pretrained` wrote
CONFIG = "config.json"
AUTOENCODER = "autoencoder.safetensors"  # of a latent model, ours or latent diffusion's
VAE, TEXT_ENCODER = "vae", "text_encoder"  # folders of diffusers' and transformers' models

Picture: TypeAlias = str | Path | Image.Image


class Loaded(nn.Module):
    """A denoiser, (x, sigma, **cond) -> denoised, with the config that says how to sample it.

    config: the whole config, a dict with its defaults. sigma_min, sigma_max: the range of noise
    levels to sample in. num_classes: 0 for an unconditional model; others take `class_cond`, whose
    id num_classes stands for no class. shape: (c, h, w) of x, an image or the latents of one.
    autoencoder: of a latent model, None of pixels; `decode` makes images of x. image_shape:
    (c, h, w) of these. folders: that the location of a text encoder in the config is relative to,
    in turn; that of the argument text_encoder goes before it.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        config: dict[str, Any],
        text_encoder: str | Path | None = None,
        folders: Sequence[str | Path] = (),
    ):
        super().__init__()
        where = None if text_encoder is None else str(text_encoder)
        self._text = where, [Path(folder).absolute() for folder in folders]
        # no part of the module: its weights aren't ours
        self._encoders: list[TextEncoder | None] = []
        self.denoiser = denoiser
        self.training = denoiser.training
        self.config = config
        self.sigma_min: float = config["model"]["sigma_min"]
        self.sigma_max: float = config["model"]["sigma_max"]
        self.num_classes: int = config["dataset"]["num_classes"] or 0

    @property
    def shape(self) -> tuple[int, ...]:
        """(c, h, w) of an image. Raises ValueError where the config has no size."""
        model = self.config["model"]
        if model["input_size"] is None:
            raise ValueError("the model's config has no model.input_size; add it to the config")
        return model["input_channels"], *model["input_size"]

    @property
    def autoencoder(self) -> Autoencoder | None:
        """What makes images of a latent model's latents; None for a model of pixels."""
        return find_autoencoder(self.denoiser)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(c, h, w) of what `decode` returns."""
        return self.autoencoder.image_shape(self.shape) if self.autoencoder else self.shape

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        """Images in [-1, 1] of what the model samples, x: (n, c, h, w)."""
        return self.autoencoder.decode(x) if self.autoencoder else x

    def text_encoder(self, device: Any = "cpu") -> TextEncoder | None:
        """What encodes the texts of a model of texts, None of others; on the device.

        It is loaded when first asked for. Raises ValueError or OSError where there is none.
        """
        if not self._encoders:
            self._encoders.append(conditions.make_text_encoder(self.config, device, *self._text))
        encoder = self._encoders[0]
        return None if encoder is None else encoder.to(device)

    @property
    def inner_model(self) -> Any:
        """The network within the denoiser, (x, sigma, **cond) -> F."""
        return self.denoiser.inner_model

    def given(
        self, prompts: Sequence[str] = (), images: Sequence[Picture] = (), device: Any = "cpu"
    ) -> conditions.Given | None:
        """The conditions of samples, in turn, for `generation.generate`; None for a model without.

        prompts: texts. images: pictures or their files. Raises ValueError or OSError for what is
        missing, or that the model doesn't take, TypeError for what is neither text nor picture.
        """
        for rule, values, kind in (
            ("prompts must be texts", prompts, str),
            ("images as conditions must be pictures of PIL or their files", images, Picture),
        ):
            if wrong := [type(value).__name__ for value in values if not isinstance(value, kind)]:
                raise TypeError(f"{rule}, got {wrong[0]}; pass a sequence of them")
        encoder = self.text_encoder(device)
        size, coder = self.image_shape[1:], self.autoencoder
        read = partial(conditions.read_image_condition, self.config, autoencoder=coder)
        tensors = torch.cat([read(image, size=size) for image in images]) if images else None
        return conditions.given(self.config, encoder, prompts, tensors, device)

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, **cond: Any) -> torch.Tensor:
        """The estimate of the clean images. x: (n, c, h, w), sigma: (n,)."""
        return self.denoiser(x, sigma, **cond)


def load(
    path_or_repo: str | Path,
    revision: str | None = None,
    device: torch.device | str = "cpu",
    text_encoder: str | Path | None = None,
    autoencoder: str | Path | None = None,
) -> Loaded:
    """A trained model, ready to sample, from a file, a folder or the Hugging Face hub.

    path_or_repo: an inference checkpoint (.safetensors), a training checkpoint (.pth; its averaged
    weights), a folder with one of them, such as `save_pretrained` writes, a training run's name or
    folder, for its latest checkpoint, or a repository OWNER/NAME of the hub, OWNER/NAME/FILE for
    one of its files. What is here goes before the hub.
    revision: the hub's branch, tag or commit; a commit is the same model for ever. text_encoder:
    of a model of texts, and autoencoder: of a latent model, where they are neither beside the
    checkpoint nor at the location that its config names. The text encoder is loaded once it is
    needed.

    Returns the denoiser in float32 and evaluation mode, on the device. Raises ValueError for a
    damaged file, a folder or repository without weights or with several; FileNotFoundError; and
    HubError, an OSError, where the hub has no such repository or can't be reached. No code of a
    file or repository is run.
    """
    path = _find(str(path_or_repo), revision)
    made = load_denoiser(path, None, autoencoder)
    return Loaded(*made, text_encoder, [path.parent, "."]).to(device)


def _find(source: str, revision: str | None) -> Path:
    """The checkpoint file of what `load` takes, downloaded if need be."""
    path = find_checkpoint(Path(source))
    if path.exists():
        if revision is not None:
            raise ValueError(
                f"a revision is of a repository of the hub, but {source} is on this machine; leave "
                "revision out"
            )
        return _weights_in(path, source) if path.is_dir() else path
    named = re.fullmatch(r"(\w[\w.-]*/[\w.-]+)(?:/(.+))?", source)
    if not named or (not named[2] and path.suffix in {".safetensors", ".pth"}):
        raise FileNotFoundError(
            f"there is no file or folder {source}; a repository of the hub would be OWNER/NAME"
        )
    repo, file = named[1], named[2]
    beside = [str(Path(file).with_name(name)) for name in (CONFIG, AUTOENCODER)] if file else []
    folder = hub.download(repo, revision, [file, *beside] if file else ["*.safetensors", CONFIG])
    path = folder / file if file else _weights_in(folder, repo)
    if not path.is_file():
        raise FileNotFoundError(f"the repository {repo} has no file {file}; look at its page")
    if parts := _encoders_beside(path):
        below = path.parent.relative_to(folder)
        # a folder of the cache is named by its commit, which a branch may have left since
        hub.download(repo, folder.name, [(below / part / "*").as_posix() for part in parts])
    return path


def _encoders_beside(path: Path) -> list[str]:
    """The folders beside a checkpoint that its config.json says its encoders are in."""
    raw = _read_json(path.with_name(CONFIG))
    sections = [raw.get(key) for key in ("autoencoder", "text")]
    named = [str(s.get("location")).split("/")[0] for s in sections if isinstance(s, dict)]
    return [part for part in named if part in {VAE, TEXT_ENCODER}]


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file of JSON; an empty one where there is none."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return raw if isinstance(raw, dict) else {}


def _weights_in(folder: Path, source: str) -> Path:
    """The one checkpoint of a folder. Raises ValueError that tells what else there is."""
    if (folder / WEIGHTS).is_file():
        return folder / WEIGHTS
    for ending in "safetensors", "pth":
        # a run's snapshots are not what it has learned, but parts of it
        found = [p for p in sorted(folder.glob(f"*.{ending}")) if not SNAPSHOT.fullmatch(p.name)]
        if len(found) > 1:
            _check_ours(folder / CONFIG)
            names = ", ".join(path.name for path in found[:4]) + (", ..." if found[4:] else "")
            raise ValueError(
                f"{source} has {len(found)} .{ending} files ({names}); name one: {source}/FILE"
            )
        if found:
            return found[0]
    _check_ours(folder / CONFIG)
    raise ValueError(
        f"{source} has no weights: no .safetensors file; name the file if it has another ending, "
        "or use make_diffusers_denoiser for a model of diffusers"
    )


def load_denoiser(
    path: str | Path, config: str | Path | None = None, autoencoder: str | Path | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """The denoiser of an inference checkpoint (.safetensors) or, by its averaged weights, of a
    training checkpoint (.pth); in float32, on the CPU, in evaluation mode.

    path: of the file, or a training run's name or folder, for its latest checkpoint.

    config: a config file; by default the one in the checkpoint, or for an inference checkpoint
    without one the config.json beside it. autoencoder: as of `load`. Returns the denoiser and the
    config; that of a latent model has the autoencoder as its part. Raises ValueError for a damaged
    file or one of another architecture.
    """
    path = find_checkpoint(Path(path))
    if path.suffix == ".safetensors":
        weights = checkpoints.read_weights(path)
        loaded = load_config(config, strict=True) if config else _own_config(path)
    else:
        own, weights = checkpoints.read_averaged(path)
        loaded = load_config(config or own, strict=config is not None)
    return _make(weights, loaded, path, autoencoder), loaded


def _own_config(path: Path) -> dict[str, Any]:
    """The config of an inference checkpoint, in it or beside it. Raises ConfigError."""
    if "config" in get_safetensors_metadata(path):
        return load_config(path)
    beside = path.with_name(CONFIG)
    if not beside.is_file():
        raise ConfigError(f"{path} has no config in its metadata; put a {CONFIG} beside it")
    _check_ours(beside)
    try:
        return load_config(beside, strict=True)
    except ConfigError as error:
        said = str(error).removeprefix(f"{beside}: ")
        raise ConfigError(f"{beside}, the config of {path.name}: {said}") from None


def _check_ours(config: Path) -> None:
    """Raises ConfigError for a config.json of a model of diffusers or transformers."""
    raw = _read_json(config)
    if "model" in raw:
        return
    if "_class_name" in raw:
        raise ConfigError(
            f"{config} is of a model of diffusers, {raw['_class_name']}; load it by diffusers, "
            "and K.external.make_diffusers_denoiser makes a denoiser of it; an autoencoder belongs "
            "into autoencoder.location of a config"
        )
    if kind := raw.get("architectures") or raw.get("model_type"):
        kind = ", ".join(map(str, kind)) if isinstance(kind, list) else kind
        raise ConfigError(
            f"{config} is of a model of transformers, {kind}, which is no denoiser; name a model "
            "of k-diffusion; a text encoder belongs into text.location of a config"
        )


def load_average(
    run: str | Path,
    width: float,
    step: int | None = None,
    autoencoder: str | Path | None = None,
) -> tuple[nn.Module, Average]:
    """The denoiser of a run's weights averaged with any width, from its snapshots.

    run, width, step: as of `snapshots.reconstruct`. autoencoder: as of `load`. Returns it as
    `load_denoiser` does, and what it is made of, whose config is filled in. Raises ValueError.
    """
    average = reconstruct(Path(run), width, step)
    average = replace(average, config=load_config(average.config))
    return _make(average.weights, average.config, Path(run), autoencoder), average


def _make(
    weights: Mapping[str, Any],
    config: dict[str, Any],
    source: Path,
    autoencoder: str | Path | None = None,
) -> nn.Module:
    wrap = make_denoiser_wrapper(config)
    model = make_model(config)
    checkpoints.load_weights(model, weights, source)
    denoiser = wrap(model).eval().requires_grad_(False)
    if autoencoder is not None and not config.get("autoencoder"):
        raise ValueError(
            f"{source} is a model of pixels, which has no use for the autoencoder {autoencoder}"
        )
    if config.get("autoencoder"):
        denoiser.autoencoder = make_autoencoder(config, autoencoder, [folder_of(source), "."])
    return denoiser


# ----------------------------------------------------------------- autoencoders


def make_autoencoder(
    config: Mapping[str, Any],
    path: str | Path | None = None,
    folders: Sequence[str | Path] = (".",),
) -> Autoencoder:
    """The autoencoder of a latent model's config, in the units of the model.

    path: in place of the config's location. folders: that the location is relative to, in turn; of
    one found in none of them the name alone is looked for. Without statistics in the config its own
    convention stands for them. Raises FileNotFoundError, ValueError for another one than the
    config's fingerprint tells of, or one whose latents don't fit the model.
    """
    section, model = config["autoencoder"], config["model"]
    found = find_in(folders, section["location"]) if path is None else Path(path)
    if found is None:
        raise FileNotFoundError(
            f"no autoencoder at {section['location']} (autoencoder.location), nor beside the "
            "checkpoint or config; pass --autoencoder PATH, or autoencoder=PATH to K.load; to "
            "train or encode, pass --set autoencoder.location=PATH"
        )
    options = {"input_range": section["input_range"], "tile": section["tile"]}
    autoencoder = load_autoencoder(found, **options)
    if section["fingerprint"] not in {None, autoencoder.fingerprint}:
        raise ValueError(
            f"{found} is another autoencoder (fingerprint {autoencoder.fingerprint}) than that of "
            f"the model ({section['fingerprint']}); pass the one that its latents were made by"
        )
    autoencoder.image_shape((model["input_channels"], *(model["input_size"] or (1, 1))))
    if section["mean"] is not None:
        autoencoder.normalize(section["mean"], section["std"], model["sigma_data"])
    return autoencoder


def load_autoencoder(path: str | Path, **options: Any) -> Autoencoder:
    """A frozen autoencoder in float32, on the CPU, in the units that it is published with.

    path: a folder of diffusers, or a pipeline's; a checkpoint of train_autoencoder.py (.pth, its
    averaged weights, or .safetensors); one of latent diffusion's code base (.ckpt, .pt or
    .safetensors), also within a whole model. options: of `Autoencoder`. Raises ValueError,
    FileNotFoundError.
    """
    path = Path(path)
    if path.is_dir():
        return load_diffusers(path, **options)
    check_readable(path, "autoencoder")
    config: Any = None
    if path.suffix == ".safetensors":
        weights: Mapping[str, Any] = checkpoints.read_weights(path)
        config = path if "config" in get_safetensors_metadata(path) else None
    else:
        state = checkpoints.read_torch(path)
        state = state if isinstance(state, Mapping) else {}
        weights = state.get("model_ema", state.get("model", state.get("state_dict", state)))
        config = state.get("config")
    given: dict[str, Any] = {"name": str(path)}
    if config is not None:
        config = load_config(config)
        if (kind := config["model"]["type"]) != "kl_autoencoder":
            raise ValueError(
                f"{path} is a model of type {kind} and no autoencoder; train one with "
                "train_autoencoder.py"
            )
        network = make_model(config)
    else:
        if "scale_factor" in weights:
            given["scale"] = float(weights["scale_factor"])
        weights = compvis_weights(weights)
        network = compvis_autoencoder(weights, path)
    checkpoints.load_weights(network, weights, path)
    made = Autoencoder(network, **given | options)
    made.config = config
    return made
