"""What all encoders are: frozen networks from images to feature vectors."""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Pixels of 0 to 255 go further and have no negative ones. Poor samples overshoot on both sides.
_MAX = 10.0


class Frozen(nn.Module):
    """A network that others trained: it stays in eval mode, and its parameters have no gradient.

    name: what it is called.
    """

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def train(self, mode: bool = True) -> "Frozen":
        """Does nothing: an encoder stays in eval mode, whatever module it is a part of."""
        return super().train(False)

    def fingerprint(self) -> str:
        """A short digest of the weights: features of two fingerprints can't be compared."""
        digest = hashlib.sha256(self.name.encode())
        for name, value in self.state_dict().items():
            total = value.double().sum().item() if value.numel() else 0.0
            digest.update(f"{name} {tuple(value.shape)} {total!r}".encode())
        return digest.hexdigest()[:16]

    def freeze(self, device: torch.device | str = "cpu") -> Any:
        """The encoder itself, on `device`, its parameters without gradients."""
        return self.to(device).eval().requires_grad_(False)


class Encoder(Frozen):
    """A frozen network from images (n, c, h, w) in [-1, 1] to features (n, width).

    It stays in eval mode, and its parameters have no gradient; that of the images is kept. Images
    of another size than `size` (None: any will do) are resized, whole, by torch's antialiased
    bicubic filter; an evaluation protocol may resize them otherwise, and calls `embed`.

    mean, std: of the network's normalization, of pixels in [0, 1].
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        name: str,
        width: int,
        size: int | tuple[int, int] | None = None,
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
    ):
        super().__init__(name)
        self.width = width
        self.size: tuple[int, int] | None = (size, size) if isinstance(size, int) else size
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """The features (n, width) of images (n, c, h, w) in [-1, 1], c of 3 or 1.

        Greyscale images are seen as RGB ones with three equal channels. Raises ValueError for other
        shapes and for values that aren't in [-1, 1], give or take a sample's overshoot.
        """
        check_range(images)
        return self.encode_images(images)

    def encode_images(self, images: Tensor) -> Tensor:
        """The features (n, width) of images (n, c, h, w), c of 3 or 1, their values unchecked.

        Nothing here waits for the GPU, as a check does. Raises ValueError for other shapes.
        """
        return self.embed((self.resized(images) + 1) * 127.5)

    def resized(self, images: Tensor) -> Tensor:
        """Images as RGB in the encoder's size, (n, 3, *size).

        images: (n, c, h, w), c of 3 or 1.
        """
        images = as_rgb(images).to(self.mean)
        if self.size is None or images.shape[2:] == self.size:
            return images
        return F.interpolate(images, self.size, mode="bicubic", antialias=True)

    def embed(self, pixels: Tensor) -> Tensor:
        """The features (n, width) of pixels (n, 3, h, w) in [0, 255], of the encoder's size."""
        return self.network((pixels / 255 - self.mean) / self.std)

    def network(self, x: Tensor) -> Tensor:
        """The features (n, width) of normalized images x (n, 3, h, w)."""
        raise NotImplementedError


def as_rgb(images: Tensor) -> Tensor:
    """Images as RGB, (n, 3, h, w); greyscale is repeated.

    images: (n, c, h, w), c of 3 or 1. Raises ValueError for other shapes.
    """
    if images.ndim != 4 or images.shape[1] not in {1, 3}:
        raise ValueError(
            f"encoders see images (n, c, h, w) of 3 channels, or 1 for greyscale; got shape "
            f"{tuple(images.shape)}"
        )
    return images.expand(-1, 3, -1, -1)


def check_range(images: Tensor) -> None:
    """Raises ValueError where images (n, ...) aren't floats in [-1, 1], or are NaN.

    Samples may overshoot that range: the error is for 0 to 255, and for what isn't finite.
    """
    if not images.dtype.is_floating_point:
        raise ValueError(
            f"encoders see images as floats in [-1, 1], got {images.dtype}; bring 0 to 255 to that "
            "range by / 127.5 - 1"
        )
    if not images.numel():
        return
    low, high = images.detach().aminmax()
    wrong = ~(low.isfinite() & high.isfinite()) | (high > _MAX) & (low >= 0)
    if bool(wrong):
        raise ValueError(
            f"encoders see images in [-1, 1], got values from {low:.4g} to {high:.4g}; leave out "
            "images that aren't finite, and bring 0 to 255 to that range by / 127.5 - 1"
        )
