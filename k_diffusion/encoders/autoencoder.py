"""Frozen autoencoders: images to the moments of their latents, and latents to images.

moments = autoencoder.encode(images)                # mean and deviation, as the network gives them
latents = autoencoder.sample(moments, generator)    # drawn, shifted and scaled: what models learn
images = autoencoder.decode(latents)

`loading.load_autoencoder` makes one from a file or folder.
"""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checkpoints import digest
from ..common.files import PathLike
from ..common.text import need
from .tiling import tiled

# A number, one for each channel, or (c, h, w) of them.
Statistic: TypeAlias = "float | Sequence[Any] | Tensor"


class Autoencoder(nn.Module):
    """A frozen autoencoder in the units of a diffusion model: latents are (raw - shift) * scale.

    network: has `moments(images)`, (n, 2 c, h, w) of means and standard deviations, `decode(raw
    latents)`, and the numbers image_channels, latent_channels and factor, by which latents are
    smaller than images. shift, scale: a number, one per channel or (c, h, w) of them. input_range:
    of the pixels that the network was trained on; images are in [-1, 1] here. tile: the side in
    pixels of what is encoded and decoded at once; larger images by overlapping tiles, None whole.
    name: for messages. It stays in evaluation mode, and computes in its own type, whatever autocast
    says.
    """

    shift: Tensor
    scale: Tensor

    def __init__(
        self,
        network: Any,
        *,
        shift: Statistic = 0.0,
        scale: Statistic = 1.0,
        input_range: Sequence[float] = (-1.0, 1.0),
        tile: int | None = None,
        name: str = "the autoencoder",
    ):
        super().__init__()
        self.network, self.name, self.tile = network, name, tile
        self.config: dict[str, Any] | None = None  # that it was trained by, if by ours
        self.image_channels: int = network.image_channels
        self.latent_channels: int = network.latent_channels
        self.factor: int = network.factor
        self.low, self.high = map(float, input_range)
        if tile is not None and (tile % self.factor or tile < 4 * self.factor):
            raise ValueError(
                f"autoencoder.tile must be a multiple of {self.factor}, by which latents are "
                f"smaller, and at least {4 * self.factor}; got {tile}"
            )
        self.register_buffer(
            "shift", statistic("shift", shift, self.latent_channels), persistent=False
        )
        self.register_buffer(
            "scale", statistic("scale", scale, self.latent_channels), persistent=False
        )
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "Autoencoder":
        """Does nothing: it stays in evaluation mode, whatever module it is a part of."""
        return super().train(False)

    @cached_property
    def fingerprint(self) -> str:
        """A digest of the weights as they are when first asked for, by which latents name it."""
        return digest(self.network.state_dict())[:16]

    def normalize(self, mean: Statistic, std: Statistic, sigma_data: float) -> "Autoencoder":
        """From now on latents have mean 0 and standard deviation sigma_data.

        mean, std: of the raw latents: (), (c,) or (c, h, w). Raises ValueError for other shapes, or
        a deviation that isn't positive.
        """
        shift = statistic("mean", mean, self.latent_channels)
        std = statistic("std", std, self.latent_channels)
        self.shift, self.scale = shift.to(self.shift), (sigma_data / std).to(self.scale)
        return self

    def latent_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """(c, h, w) of the latents of images of (c, h, w). Raises ValueError for other sizes."""
        c, h, w = shape
        if c != self.image_channels or h % self.factor or w % self.factor:
            raise ValueError(
                f"{self.name} takes images of {self.image_channels} channels whose sides are "
                f"multiples of {self.factor}, got shape {tuple(shape)}"
            )
        return self.latent_channels, h // self.factor, w // self.factor

    def image_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """(c, h, w) of the images of a model's latents, (c, h, w).

        Raises ValueError where the model has other channels than the latents.
        """
        c, h, w = shape
        if c != self.latent_channels:
            raise ValueError(
                f"the latents of {self.name} have shape {(self.latent_channels, h, w)}, but the "
                f"model's are {tuple(shape)}; set model.input_channels to {self.latent_channels}, "
                "or take the model's own autoencoder"
            )
        return self.image_channels, h * self.factor, w * self.factor

    def encode(self, images: Tensor) -> Tensor:
        """The raw moments of images, in the network's type.

        images: (n, image_channels, h, w) in [-1, 1], of any type. Returns (n, 2 c, h', w'): the
        means of the c channels, then their standard deviations. Raises ValueError for a size that
        isn't a multiple of the factor.
        """
        self._check_shape("images", images, self.image_channels)
        self.latent_shape(images.shape[1:])
        x = images.to(self._like())
        if (self.low, self.high) != (-1, 1):
            x = (x + 1) * ((self.high - self.low) / 2) + self.low
        with torch.autocast(x.device.type, enabled=False):
            if self._whole(x.shape, self.tile):
                return self.network.moments(x)
            assert self.tile is not None
            size: dict[str, Any] = {"tile": self.tile, "multiple": self.factor}
            return tiled(self.network.moments, self.network, x, scale=1 / self.factor, **size)

    def sample(
        self, moments: Tensor, generator: torch.Generator | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """Latents drawn from moments, in the model's units.

        moments: (n, 2 c, h, w), raw. generator: of the noise; it may be the CPU's. noise:
        (n, c, h, w), instead. Returns (n, c, h, w).
        """
        self._check_shape("moments", moments, 2 * self.latent_channels)
        mean = moments.chunk(2, -3)[0]
        if noise is None:
            where = moments.device if generator is None else generator.device
            noise = torch.randn(mean.shape, generator=generator, device=where)
        raw = draw(moments, noise.to(moments))
        self._check_elements(raw)
        return (raw - self.shift.to(raw)) * self.scale.to(raw)

    def decode(self, latents: Tensor) -> Tensor:
        """The images of latents in the model's units, in the type of the latents; with a gradient.

        latents: (n, c, h, w). Returns (n, image_channels, h factor, w factor) in [-1, 1], give or
        take an overshoot.
        """
        self._check_shape("latents", latents, self.latent_channels)
        self._check_elements(latents)
        raw = (latents / self.scale.to(latents) + self.shift.to(latents)).to(self._like())
        tile = self.tile and self.tile // self.factor
        with torch.autocast(raw.device.type, enabled=False):
            if self._whole(raw.shape, tile):
                images = self.network.decode(raw)
            else:
                assert tile is not None
                images = tiled(self.network.decode, self.network, raw, tile=tile, scale=self.factor)
        if (self.low, self.high) != (-1, 1):
            images = (images - self.low) * (2 / (self.high - self.low)) - 1
        return images.to(latents.dtype)

    def _like(self) -> Tensor:
        return next(self.network.parameters())

    @staticmethod
    def _whole(shape: Sequence[int], tile: int | None) -> bool:
        return tile is None or max(shape[2:]) <= tile

    def _check_shape(self, what: str, x: Tensor, channels: int) -> None:
        if x.ndim != 4 or x.shape[1] != channels:
            raise ValueError(
                f"{self.name} takes {what} of shape (n, {channels}, h, w), got {tuple(x.shape)}"
            )

    def _check_elements(self, latents: Tensor) -> None:
        sizes = {x.shape[1:] for x in (self.shift, self.scale) if x.ndim and x.shape[1:] != (1, 1)}
        if any(size != latents.shape[-2:] for size in sizes):
            raise ValueError(
                f"the statistics are of {tuple(sizes.pop())} elements, got latents of "
                f"{tuple(latents.shape[-2:])}; statistics per channel fit any size"
            )


def statistic(name: str, value: Statistic, channels: int) -> Tensor:
    """A statistic of latents of so many channels as a tensor (), (c, 1, 1) or (c, h, w).

    value: (), (c,) or (c, h, w). Raises ValueError for others, what isn't finite, or a `std` of 0.
    """
    try:
        x = torch.as_tensor(value, dtype=torch.float32)
    except (ValueError, TypeError):
        x = torch.empty(0)
    if x.ndim not in {0, 1, 3} or (x.ndim and len(x) != channels) or not x.isfinite().all():
        raise ValueError(
            f"{name} of the latents must be a finite number, {channels} of them, one per channel, "
            f"or ({channels}, h, w) of them; got shape {tuple(x.shape)}"
        )
    if name == "std" and not (x > 0).all():
        raise ValueError(
            "std of the latents must be positive; a channel that never varies needs another "
            "autoencoder"
        )
    return x[:, None, None] if x.ndim == 1 else x


def draw(moments: Tensor, noise: Tensor) -> Tensor:
    """Raw latents from moments.

    moments: (..., 2 c, h, w), means, then standard deviations. noise: (..., c, h, w).
    """
    mean, std = moments.chunk(2, -3)
    return mean + std * noise


def find_autoencoder(model: nn.Module) -> Autoencoder | None:
    """The autoencoder of a latent model, within its guidance; None for a model of pixels."""
    return next((m for m in model.modules() if isinstance(m, Autoencoder)), None)


# ----------------------------------------------------------------- models of diffusers


class _DiffusersNetwork(nn.Module):
    """An autoencoder of diffusers as `Autoencoder` calls it.

    patch: the side of squares of latents whose values become channels, as FLUX.2 has them.
    """

    def __init__(self, network: Any, patch: int = 1):
        super().__init__()
        self.network, self.patch = network, patch
        self.image_channels: int = network.config.in_channels
        probe = torch.zeros(1, self.image_channels, 64, 64)
        with torch.no_grad():
            channels, side = self.moments(probe).shape[1:3]
        self.latent_channels, self.factor = channels // 2, 64 // side

    def moments(self, images: Tensor) -> Tensor:
        out = self.network.encode(images)
        if hasattr(out, "latent_dist"):
            mean, std = out.latent_dist.mean, out.latent_dist.std
        else:  # it has no noise
            mean = out.latent if hasattr(out, "latent") else out.latents
            std = torch.zeros_like(mean)
        return torch.cat([F.pixel_unshuffle(x, self.patch) for x in (mean, std)], 1)

    def decode(self, latents: Tensor) -> Tensor:
        return self.network.decode(F.pixel_shuffle(latents, self.patch)).sample

    def save_pretrained(self, folder: Path) -> None:
        """Writes it into a folder for `load_diffusers`, without the path that it was read from."""
        self.network.register_to_config(_name_or_path="")
        self.network.save_pretrained(folder)


def load_diffusers(path: PathLike, **options: Any) -> Autoencoder:
    """An autoencoder of diffusers from a folder, or the folder `vae` of a pipeline's.

    Its latents are shifted and scaled as its config or its batch-norm statistics say: by
    `shift_factor` and `scaling_factor`, by `latents_mean` and `latents_std`, or by running means
    and variances. options: of `Autoencoder`. Raises ValueError where there is none of images,
    ImportError without diffusers. Weights are read from safetensors alone.
    """
    path = Path(path)
    folder = next((p for p in (path, path / "vae") if (p / "config.json").is_file()), None)
    if folder is None:
        raise ValueError(
            f"the folder {path} has no autoencoder: diffusers' have a config.json in it or in its "
            "folder vae"
        )
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["_class_name"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{folder / 'config.json'} is no config of a diffusers model") from None
    cls: Any = getattr(need("diffusers", f"the autoencoder {path}", "diffusers"), str(kind), None)
    if not (hasattr(cls, "encode") and hasattr(cls, "decode") and hasattr(cls, "from_pretrained")):
        raise ValueError(f"{folder} holds a {kind}, which is no autoencoder of diffusers")
    try:
        network = cls.from_pretrained(folder, use_safetensors=True, local_files_only=True).eval()
        if any(isinstance(m, nn.Conv3d) for m in network.modules()):
            raise ValueError("it is of videos; name an autoencoder of images")
        made = _DiffusersNetwork(network, *_patch(network))
    except (OSError, RuntimeError, ValueError, AttributeError) as error:
        said = " ".join(str(error).split())
        raise ValueError(f"{folder}: {kind} can't be used as an autoencoder: {said}") from error
    shift, scale = _convention(network)
    return Autoencoder(made, **{"shift": shift, "scale": scale, "name": str(path), **options})


def _patch(network: Any) -> list[int]:
    sides = getattr(network.config, "patch_size", None) if hasattr(network, "bn") else None
    return [sides[0]] if sides else []


def _convention(network: Any) -> tuple[Statistic, Statistic]:
    """The shift and scale by which a model of diffusers wants its latents."""
    config = network.config
    if isinstance(bn := getattr(network, "bn", None), nn.BatchNorm2d):
        assert bn.running_mean is not None
        assert bn.running_var is not None
        return bn.running_mean, (bn.running_var + bn.eps).rsqrt()
    if hasattr(network, "_latents_mean"):  # it does so itself
        return 0.0, 1.0
    factor = getattr(config, "scaling_factor", None) or 1.0
    mean, std = (getattr(config, key, None) for key in ("latents_mean", "latents_std"))
    if mean is not None and std is not None:
        return mean, factor / torch.tensor(std)
    return getattr(config, "shift_factor", None) or 0.0, factor
